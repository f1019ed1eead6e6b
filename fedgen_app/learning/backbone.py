"""The frozen backbone: found, loaded once per process, fingerprinted, and fitted with LoRA layers.

All clients that a process serves share it; only adapters move in and out (``adapters.read`` and ``adapters.write``).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers.pytorch_utils import Conv1D

import fedgen_assets
from fedgen_app.data.cache import source_identity
from fedgen_app.errors import BackboneError, SettingsError
from fedgen_app.learning import adapters
from fedgen_app.learning.adapters import Adapter, Layout, layout_of, parameters
from fedgen_app.learning.quantised import count, expected_bytes, held_bytes
from fedgen_app.learning.task import Held, Task
from fedgen_app.learning.whole import WholeModel
from fedgen_app.settings import LoraSettings, Settings, looks_like_path

# Keys of configurations that change nothing of what is computed.
NOTES = frozenset(
    (
        *("_name_or_path", "name_or_path", "_commit_hash", "_diffusers_version", "transformers_version"),
        *("torch_dtype", "dtype", "use_cache", "chat_template"),
        # What transformers notes of the machine on which a tokenizer was saved.
        *("backend", "is_local", "local_files_only", "tokenizer_file", "special_tokens_map_file", "cache_dir"),
    )
)
# Layers whose adapter has an A and a B that aggregation understands.
ADAPTED = (torch.nn.Linear, torch.nn.Conv2d, Conv1D)


@dataclass(frozen=True)
class Backbone:
    """A frozen model with LoRA layers in it, and where it came from.

    Attributes:
        reference: What the export's ``base_model_name_or_path`` says: a folder or a hub id.
        fingerprint: SHA-256 over the source weights, however they are held in memory, and the configuration.
        parameters: Of the frozen model, tied weights once.
        bits: Of each weight of the linear layers as it is held; 0: as ``dtype`` says.
        held_bytes: What the frozen weights take in memory.
        layout: Of what learns: the adapter, or all weights.
    """

    model: PeftModel | WholeModel
    processor: Any
    name: str
    reference: str
    revision: str
    fingerprint: str
    parameters: int
    device: torch.device
    dtype: torch.dtype
    bits: int
    held_bytes: int
    layout: Layout
    license: str

    def fresh(self, seed: int) -> Adapter:
        """What a run starts from: a new adapter that changes nothing yet, or the pre-trained weights."""
        if isinstance(self.model, WholeModel):
            return {key: tensor.float().cpu() for key, tensor in sorted(self.model.pretrained.items())}
        return adapters.fresh(self.layout, seed)

    @property
    def full_bytes(self) -> int:
        """Bytes of the float32 state dict: what a method without adapters would send."""
        return 4 * self.parameters


def load_task(name: str) -> Task:
    """The task of a settings value: ``tasks/<name>.py`` ends in ``TASK``.

    Raises:
        SettingsError: a package that the task needs is not installed.
    """
    try:
        return cast(Task, importlib.import_module(f"fedgen_app.tasks.{name.replace('-', '_')}").TASK)
    except ModuleNotFoundError as error:
        if error.name not in ("diffusers", "PIL"):
            raise
        raise SettingsError(f"task = {name!r} needs {error.name}: pip install 'fedgen-edge[images]'") from None


def pick_device(name: str) -> torch.device:
    """``auto``: CUDA where it is there.

    Raises:
        BackboneError: CUDA is asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise BackboneError("device = 'cuda', but torch finds no CUDA device; use device = 'auto' or 'cpu'")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself; emulation is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 where the machine computes it natively, else float32."""
    if name == "auto":
        return torch.bfloat16 if computes_bfloat16(device) else torch.float32
    return cast(torch.dtype, getattr(torch, name))


def find(source: str, revision: str, task: Task, weights: bool = True) -> Path:
    """The folder of a backbone: bundled, local, or fetched from the hub into its cache (no pickles, no code).

    Args:
        weights: Whether those are fetched too; else the configurations alone.

    Raises:
        BackboneError: the folder is not there, or the hub is out of reach.
    """
    if source == "bundled" and not task.bundled_backbone:
        raise BackboneError("backbone = 'bundled': this task has none; set backbone to a folder")
    if source == "bundled":
        return fedgen_assets.path(task.bundled_backbone)
    if looks_like_path(source):
        folder = Path(source).expanduser().resolve()
        try:
            there = folder.is_dir()
        except PermissionError:
            raise BackboneError(f"backbone = {source!r}: this user may not enter a folder on the way to it") from None
        if not there:
            raise BackboneError(f"backbone = {source!r}: no such folder")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [name for name in task.hub_files if weights or name.endswith(".json")]
    try:
        return Path(snapshot_download(source, revision=revision or None, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise BackboneError(
            f"backbone = {source!r} (revision {revision or 'default'}): the model hub does not give it "
            f"({type(error).__name__}). Where there is a net: hf download {source} --local-dir FOLDER, then set "
            "backbone = FOLDER"
        ) from None


def facts_of(file: Path) -> object:
    """What a configuration says of the function that is computed; of a file that is no JSON its digest.

    Without notes of who wrote it, where it lies and how weights are held, so that copies of one model are alike.

    Raises:
        BackboneError: it is damaged.
    """
    content = file.read_bytes()
    if file.suffix != ".json":
        return hashlib.sha256(content).hexdigest()
    try:
        found = json.loads(content)
    except ValueError as error:
        raise BackboneError(f"{file}: damaged: {error}") from None
    # Elsewhere, in a vocabulary, the same words are tokens.
    return _without_notes(found) if file.name.endswith("config.json") else found


def _without_notes(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    kept = {key: value for key, value in config.items() if key not in NOTES}
    return {key: _without_notes(value) if key.endswith("_config") else value for key, value in kept.items()}


def fingerprint(folder: Path, files: Sequence[Path], config: Mapping[str, object] | None = None) -> str:
    """``sha256:...`` over names, types, shapes and bytes of the files' weights, however they are cut into files.

    Args:
        config: What else decides what is computed, by name: JSON values, such as ``facts_of`` gives.

    Raises:
        BackboneError: the folder has no safetensors weights, or a damaged file.
    """
    places: dict[str, Path] = {}
    try:
        for file in files:
            with safe_open(file, framework="pt") as weights:
                places |= {f"{file.parent.relative_to(folder)}/{key}": file for key in weights.keys()}  # noqa: SIM118
        if not places:
            raise BackboneError(f"{folder}: no *.safetensors weights (pickled ones are never loaded)")
        whole = hashlib.sha256()
        for name in sorted(places):
            with safe_open(places[name], framework="pt") as weights:
                tensor = weights.get_tensor(name.rpartition("/")[2])
            whole.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            whole.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        whole.update(json.dumps(config or {}, sort_keys=True, separators=(",", ":")).encode())
    except SafetensorError as error:
        raise BackboneError(f"{folder}: damaged weights: {error}") from None
    return f"sha256:{whole.hexdigest()}"


def licence_of(folder: Path) -> str:
    """The ``license`` line of the model card, where there is one."""
    card = folder / "README.md"
    found = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8"), re.M) if card.is_file() else None
    return found[1] if found else "see the backbone's own card"


def lora_config(model: torch.nn.Module, task: Task, lora: LoraSettings) -> LoraConfig:
    """PEFT's configuration for these settings.

    Raises:
        BackboneError: no layer of the model has one of the targets' names.
    """
    targets = lora.targets or task.lora_targets(model, lora)
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            leaves = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "weight")})
            raise BackboneError(f"lora.targets: no layer named {target!r}; there are {', '.join(leaves)}")
        for name, layer in model.named_modules():
            if (name == target or name.endswith(f".{target}")) and not isinstance(layer, ADAPTED):
                raise BackboneError(f"lora.targets: {name} is a {type(layer).__name__}, which takes no adapter here")
    return LoraConfig(
        r=lora.rank,
        lora_alpha=cast(int, lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        use_rslora=lora.rslora,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
        bias="none",
    )


def open_backbone(settings: Settings, source: str = "", weights: Literal["adapter", "model"] = "adapter") -> Backbone:
    """The backbone of these settings, from the process's memory where it is there already.

    Args:
        source: A device's own place of the same weights, instead of ``settings.backbone``.
        weights: What learns: an adapter beside the frozen weights, or all weights, which are then float32.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    place = source or settings.backbone
    return _open(
        weights,
        settings.task,
        place,
        # A folder's content may be replaced while we have the old one open.
        source_identity(place, "", "") if looks_like_path(place) else "",
        settings.backbone_revision,
        settings.dtype,
        settings.device,
        settings.backbone_bits,
        settings.lora.model_copy(update={"init": "", "ranks": ()}),
        settings.gradient_checkpointing,
    )


@functools.lru_cache(maxsize=1)
def _open(
    weights: Literal["adapter", "model"],
    task_name: str,
    source: str,
    files: str,
    revision: str,
    dtype: str,
    device: str,
    bits: int,
    lora: LoraSettings,
    checkpointing: bool,
) -> Backbone:
    task = load_task(task_name)
    folder = find(source, revision, task)
    place = pick_device(device)
    held = pick_dtype(dtype, place) if weights == "adapter" else torch.float32
    marks = fingerprint(folder, task.weight_files(folder), task.config(folder))
    loaded = task.load_backbone(folder, Held(held, place, bits), lora)
    loaded.model.requires_grad_(False)
    parameters_there, taken = count(loaded.model), held_bytes(loaded.model)
    if checkpointing:
        task.save_memory(loaded.model)
    on_hub = source != "bundled" and not looks_like_path(source)
    reference = source if on_hub else str(folder)
    model = WholeModel(loaded.model) if weights == "model" else _with_adapter(loaded.model, task, lora)
    if isinstance(model, PeftModel):
        peft_config = model.peft_config["default"]
        peft_config.base_model_name_or_path, peft_config.revision = reference, revision or None
    return Backbone(
        model=model,
        processor=loaded.processor,
        name=f"bundled {task.bundled_backbone}" if source == "bundled" else source if on_hub else folder.name,
        reference=reference,
        revision=revision,
        fingerprint=marks,
        parameters=parameters_there,
        device=place,
        dtype=held,
        bits=bits,
        held_bytes=taken,
        layout=layout_of(parameters(model)),
        license=licence_of(folder),
    )


def outlined(
    settings: Settings, folder: Path, task: Task, dtype: torch.dtype, weights: Literal["adapter", "model"] = "adapter"
) -> Backbone:
    """The backbone of a folder without its weights, on torch's meta device: shapes alone, and what they would take.

    Raises:
        BackboneError: the folder holds none.
        SettingsError: the task cannot say.
    """
    if task.outline is None:
        raise SettingsError(f"task = {settings.task!r}: what it costs is not counted beforehand")
    held = Held(dtype, torch.device("cpu"), settings.backbone_bits)
    with torch.device("meta"):
        loaded = task.outline(folder, held, settings.lora)
        loaded.model.requires_grad_(False)
        parameters_there, taken = count(loaded.model), expected_bytes(loaded.model, held)
        if settings.gradient_checkpointing:
            task.save_memory(loaded.model)
        lora = settings.lora
        model = WholeModel(loaded.model) if weights == "model" else _with_adapter(loaded.model, task, lora)
    return Backbone(
        model=model,
        processor=loaded.processor,
        name=folder.name,
        reference=str(folder),
        revision="",
        fingerprint="",
        parameters=parameters_there,
        device=held.device,
        dtype=dtype,
        bits=held.bits,
        held_bytes=taken,
        layout=layout_of(parameters(model)),
        license="",
    )


def _with_adapter(model: torch.nn.Module, task: Task, lora: LoraSettings) -> PeftModel:
    with warnings.catch_warnings():
        # PEFT reads an attribute that transformers has renamed; a user can do nothing about it.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
        return cast(PeftModel, get_peft_model(cast(Any, model), lora_config(model, task, lora)))
