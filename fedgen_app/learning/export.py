"""Adapters that other software opens: PEFT's two files and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from fedgen_app.errors import AdapterError
from fedgen_app.files import write_atomic
from fedgen_app.learning.adapters import Adapter, load_adapter, rank_of, save_adapter
from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.task import Metrics, Task
from fedgen_app.learning.whole import WholeModel
from fedgen_app.runs.report import number
from fedgen_app.settings import Settings

ADAPTER_FILE, WHOLE_FILE = "adapter_model.safetensors", "model.safetensors"


def save_peft(folder: Path, backbone: Backbone, adapter: Mapping[str, Tensor], card: str) -> None:
    """Write ``adapter_config.json``, ``README.md`` and ``adapter_model.safetensors``, the adapter last.

    ``PeftModel.from_pretrained(base, folder)`` opens the folder; its base model is the one that was trained on. Where
    all weights learned there is no adapter: ``model.safetensors`` then holds them under the model's own names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(backbone.model, WholeModel):
        write_atomic(folder / "README.md", card.encode())
        save_adapter(adapter, folder / WHOLE_FILE)
        return
    config: Any = backbone.model.peft_config["default"]
    facts = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    facts |= {"inference_mode": True, "r": rank_of(adapter)}
    write_atomic(folder / "adapter_config.json", (json.dumps(facts, indent=2, sort_keys=True) + "\n").encode())
    write_atomic(folder / "README.md", card.encode())
    save_adapter(adapter, folder / ADAPTER_FILE)


def exported_file(folder: Path) -> Path:
    """Where the adapter of an export lies, or, where all weights learned, the model."""
    whole = folder / WHOLE_FILE
    return whole if whole.is_file() else folder / ADAPTER_FILE


def load_peft(folder: Path, backbone: Backbone) -> Adapter:
    """The adapter of a PEFT folder that was made with the same LoRA settings.

    Raises:
        AdapterError: it is damaged, does not fit the backbone, or scales its product otherwise.
    """
    adapter = load_adapter(folder / "adapter_model.safetensors", backbone.layout)
    try:
        found = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder}: no readable adapter_config.json: {error}") from None
    # Not the model's r: that is of the adapter which it holds at the moment.
    wanted = backbone.model.peft_config["default"].to_dict() | {"r": rank_of(adapter)}
    for key in ("r", "lora_alpha", "use_rslora"):
        if found.get(key) != wanted[key]:
            raise AdapterError(f"{folder}: made with {key} = {found.get(key)!r}, the settings say {wanted[key]!r}")
    return adapter


def export_personal(
    folder: Path,
    backbone: Backbone,
    adapter: Mapping[str, Tensor],
    data_name: str,
    settings: Settings,
    measured: Mapping[str, Metrics],
    examples: int,
    usage: Sequence[str],
) -> None:
    """A client's personal adapter, on its own disk."""
    note = (
        "This adapter was fine-tuned on one client's own data after the last federated round. It can repeat that data: "
        "treat it as you treat the data."
    )
    facts = {
        **shape_row(settings, adapter),
        "data": data_name,
        "local training examples": str(examples),
        "personal fine-tuning": span(settings.personal.epochs, settings.personal.max_steps),
        "measured on": "the client's own hold-out",
        "privacy": "this adapter was not sent, those of the rounds were; no differential privacy",
    }
    save_peft(folder, backbone, adapter, card(backbone, settings, "personal adapter", note, facts, measured, usage))


def usage_of(task: Task, settings: Settings, backbone: Backbone) -> Sequence[str]:
    """Lines of Python that load an export: the task's own, or, where all weights learned, those for any model."""
    if not isinstance(backbone.model, WholeModel):
        return task.usage(settings, backbone)
    return [
        "from safetensors.torch import load_file",
        "",
        f'weights = load_file(FOLDER + "/{WHOLE_FILE}")  # the folder of this file',
        "model.load_state_dict(weights, strict=False)  # model: the base model, or of a pipeline its denoiser",
    ]


def span(epochs: int, max_steps: int) -> str:
    """How long something trained, in words."""
    return f"{epochs} epoch{'' if epochs == 1 else 's'}" + (f", {max_steps} steps at most" if max_steps else "")


def shape_row(settings: Settings, adapter: Mapping[str, Tensor]) -> dict[str, str]:
    """The card's line about the adapter's shape; none where all weights learned."""
    if not any(".lora_" in key for key in adapter):
        return {"what learned": "all weights"}
    lora = settings.lora
    return {"rank, alpha": f"{rank_of(adapter)}, {lora.alpha:g}" + (", rsLoRA" if lora.rslora else "")}


def card(
    backbone: Backbone,
    settings: Settings,
    title: str,
    note: str,
    facts: Mapping[str, str],
    measured: Mapping[str, Mapping[str, Any]],
    usage: Sequence[str],
) -> str:
    """A Hugging Face model card: how the adapter was made, what it measured, how to load it."""
    header = [
        "---",
        "library_name: peft",
        f"base_model: {backbone.reference}",
        *([f"license: {backbone.license}"] if " " not in backbone.license else []),
        "tags: [lora, federated-learning, fedgen-edge]",
        "---",
    ]
    rows = {
        "base model": f"{backbone.name} ({backbone.fingerprint})",
        "licence of the base model": backbone.license,
        "task": settings.task,
        "method": settings.method,
        "seed": str(settings.seed),
        "privacy": "no differential privacy; adapters were sent as they were trained",
        **facts,
        "made with": f"FedGen-Edge {version('fedgen-edge')}, PEFT {version('peft')}, torch {version('torch')}",
    }
    return "\n".join(
        [
            *header,
            f"\n# FedGen-Edge: {title}\n",
            f"{note}\n",
            *_table(("what", "value"), list(rows.items())),
            *_metrics(measured),
            "\n## Use\n",
            "```python",
            *usage,
            "```",
            "",
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    return [*lines, ""]


def _metrics(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    names = sorted({n for found in measured.values() for n, v in found.items() if isinstance(v, int | float | str)})
    if not names:
        return []
    rows = [
        [state, *(v if isinstance(v := found.get(name, ""), str) else number(v) for name in names)]
        for state, found in measured.items()
    ]
    return ["\n## Measured\n", *_table(("adapter", *names), rows)]
