"""The settings: every default is valid, and every mistake is named with its key and its value."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedgen_app import settings as module
from fedgen_app.errors import SettingsError
from fedgen_app.settings import KEYS, Settings, Value, absolute, check, defaults, flatten_toml, read_toml

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = defaults(ROOT)
PRESETS = sorted((ROOT / "fedgen_app" / "presets").glob("*.toml"))

# Values out of range, beside a value of another type, which is wrong everywhere.
OUT_OF_RANGE: dict[str, list[Value]] = {
    "task": ["lenguage", "../language", ""],
    "method": ["fedgen_edge", "fedgen-edges"],
    "seed": [-1, 2**31],
    "resume-round": [-1],
    "dtype": ["float64", "Auto"],
    "device": ["gpu"],
    "threads": [-1, 1.5],
    "backbone-bits": [-4, 3, 16],
    "backbone": [""],
    "text-column": [""],
    "holdout-fraction": [0, 1, -0.1],
    "test-sequences": [-1],
    "num-server-rounds": [0],
    "fraction-train": [0, 1.01],
    "selection": ["largest"],
    "expected-clients": [-1],
    "evaluate-every": [-1],
    "keep-checkpoints": [0],
    "local-epochs": [0],
    "max-steps": [-1],
    "batch-size": [0],
    "accumulate": [0],
    "learning-rate": [0, -1e-3, math.nan, math.inf],
    "weight-decay": [-0.1, math.nan],
    "clip-norm": [-1],
    "warmup-rounds": [-1],
    "sequence-length": [7],
    "resolution": [7, -1],
    "lora.rank": [0, 1025, 8.5],
    "lora.ranks": ["4,16", "4,x"],
    "lora.alpha": [0, math.inf],
    "lora.dropout": [1, -0.1],
    "partition.by": ["labels"],
    "partition.alpha": [0],
    "partition.min-examples": [0],
    "partition.max-examples": [-1],
    "personal.epochs": [-1],
    "personal.max-steps": [-1],
    "personal.learning-rate": [0],
    "personal.proximal": [-1],
    "round.quorum": [0, 1.5],
    "round.grace": [-1],
    "round.deadline": [0],
    "round.roll-call": [0],
    "admission.max-update-norm": [-1, math.nan],
    "admission.norm-action": ["ignore"],
    "admission.max-weight": [-1],
    "wire.codec": ["int8"],
    "samples.count": [-1],
    "samples.length": [0],
    "samples.per-prompt": [0],
    "samples.every": [-1],
    "samples.sampler": ["euler"],
    "samples.steps": [0, 1001],
    "samples.guidance": [-1, math.nan],
    "samples.batch": [0],
    "diffusion.caption": ["a photo", "{} and {}", "{name}"],
    "diffusion.caption-dropout": [1, -0.1],
    "diffusion.min-snr": [-1, math.inf],
    "gan.r1": [-0.1, math.inf],
    "metrics.samples": [-1],
    "metrics.personal-samples": [-1],
    "metrics.features": [""],
    "aggregation.robust": ["median"],
    "aggregation.attackers": [0, 0.5],
    "aggregation.norm-bound": [0],
    "aggregation.residual-rank": [0],
    "clusters.by": ["prompt"],
    "clusters.choose": ["elbow"],
    "clusters.count": [0],
    "clusters.threshold": [0, 2.1],
    "clusters.warmup": [0],
    "clusters.loss-examples": [-1],
    "clusters.every": [-1],
    "clusters.interact-every": [-1],
    "clusters.strength": [-0.1, 1.1],
    "clusters.temperature": [0],
    "clusters.encoder": [""],
    "clusters.noise": [-1, math.inf],
    "clusters.delta": [0, 1],
    "fedprox.mu": [0],
    "fedper.personal-blocks": [0],
    "ditto.mu": [-1],
    "apfl.mix": [-0.1, 1.1],
    "apfl.mix-learning-rate": [-1],
    "hetlora.gamma": [0, 1.1],
    "hetlora.penalty": [-1],
    "fedrot.strength": [-0.1, 1.1],
    "fedavgm.learning-rate": [0],
    "fedavgm.momentum": [1],
    "fedopt.learning-rate": [0],
    "fedopt.beta1": [1],
    "fedopt.beta2": [-0.1, 1],
    "fedopt.tau": [0],
    "metrics.classes": ["bag,coat,bag"],
}
ANY_TEXT = {
    "clusters.key",
    "output-dir",
    "resume-from",
    "backbone-revision",
    "dataset",
    "label-column",
    "lora.targets",
    "lora.init",
    "samples.prompts",
}
SWITCHES = {"aggregation.layer-wise", "gradient-checkpointing", "lora.rslora", "lora.convolutions", "lora.text-encoder"}


def message(**changes: Value) -> str:
    return message_of({key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()})


def message_of(changes: dict[str, Value]) -> str:
    with pytest.raises(SettingsError) as caught:
        Settings.from_run_config(DEFAULTS | changes)
    return str(caught.value)


def test_the_defaults_are_valid_and_are_all_there() -> None:
    settings = Settings.from_run_config(DEFAULTS)
    assert set(DEFAULTS) == KEYS
    assert (settings.lora.rank, settings.round.quorum, settings.task) == (8, 1.0, "language")
    check(settings.flat())


def test_every_setting_has_a_wrong_value_below() -> None:
    assert set(OUT_OF_RANGE) | ANY_TEXT | SWITCHES == KEYS


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key, values in OUT_OF_RANGE.items() for value in values]
    + [(key, "banana" if isinstance(value, bool | int | float) else 5) for key, value in DEFAULTS.items()],
)
def test_every_wrong_value_is_named_with_its_key_alone(key: str, value: Value) -> None:
    lines = message_of({key: value}).splitlines()
    # A task or a method that is no text has two lines, its type's and the list of those there are.
    assert lines and all(line.startswith(f"{key} = {value!r}: ") and len(line) > len(key) + 15 for line in lines)
    assert len(lines) == 1 or key in {"task", "method"}


def test_what_is_allowed_is_said() -> None:
    assert "language" in message(task="music") and "fedgen-edge" in message(method="none")
    assert "'fp32' or 'fp16'" in message(wire__codec="int8")
    assert "greater than 0" in message(learning_rate=0)


def test_all_mistakes_are_named_at_once() -> None:
    changes: dict[str, Value] = {"lora.rank": 0, "wire.codec": "zip", "seed": -1, "task": "x", "lora.rnk": 3}
    lines = message_of(changes).splitlines()
    assert len(lines) == 5
    for key, value in changes.items():
        assert sum(line.startswith(f"{key} = {value!r}") for line in lines) == 1


def test_an_unknown_key_is_refused_with_the_nearest_one() -> None:
    assert message_of({"lora.rnk": 3}) == "lora.rnk = 3: no such setting; did you mean lora.rank?"
    assert message_of({"zzzzzzzz": 3}) == "zzzzzzzz = 3: no such setting"
    assert "no such setting" in message_of({"lora": 3})


def test_a_missing_key_is_named() -> None:
    without = {key: value for key, value in DEFAULTS.items() if key not in {"seed", "lora.rank"}}
    with pytest.raises(SettingsError) as caught:
        Settings.from_run_config(without)
    assert sorted(str(caught.value).splitlines()) == ["lora.rank is missing", "seed is missing"]


def test_flat_gives_back_the_run_config() -> None:
    changes: dict[str, Value] = {
        "lora.targets": "q_proj,v_proj",
        "samples.prompts": "One, two|Three",
        "lora.alpha": 12.5,
    }
    settings = Settings.from_run_config(DEFAULTS | changes)
    assert settings.lora.targets == ("q_proj", "v_proj") and settings.samples.prompts == ("One, two", "Three")
    assert settings.flat() == DEFAULTS | changes
    assert Settings.from_run_config(settings.flat()) == settings


def test_lists_are_read_without_blanks_and_empty_parts() -> None:
    assert Settings.from_run_config(DEFAULTS | {"lora.targets": " q , ,v "}).lora.targets == ("q", "v")


def test_scaling_is_alpha_over_rank_and_with_rslora_over_its_root() -> None:
    base: dict[str, Value] = {"lora.rank": 9, "lora.alpha": 18.0}
    assert Settings.from_run_config(DEFAULTS | base).lora.scaling == 2
    assert Settings.from_run_config(DEFAULTS | base | {"lora.rslora": True}).lora.scaling == 6


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_every_preset_is_valid_over_the_defaults(file: Path) -> None:
    preset = flatten_toml(read_toml(file))
    assert preset and set(preset) <= KEYS
    settings = Settings.from_run_config(DEFAULTS | preset)
    assert settings.flat() == DEFAULTS | preset
    assert file.read_text(encoding="utf-8").startswith("# ")  # `fedgen presets` shows this line


def test_there_are_presets() -> None:
    assert {"quickstart", "ptb"} <= {file.stem for file in PRESETS}


def test_absolute_turns_paths_and_leaves_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "bundled").mkdir()  # a folder of this name does not hide what is bundled
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    changes: dict[str, Value] = {
        "output-dir": "runs/one",
        "resume-from": "old",
        "dataset": "data",
        "backbone": "owner/name",
        "lora.init": "~/adapter",
    }
    given = DEFAULTS | changes
    got = absolute(given)
    assert got == given | {
        "output-dir": str(tmp_path / "runs/one"),
        "resume-from": str(tmp_path / "old"),
        "dataset": str(tmp_path / "data"),
        "lora.init": str(tmp_path / "home" / "adapter"),
    }
    assert given == DEFAULTS | changes  # its argument stays
    assert absolute(got) == got
    assert absolute(DEFAULTS) == DEFAULTS


def test_check_names_every_path_that_is_not_there(tmp_path: Path) -> None:
    changes: dict[str, Value] = {
        "backbone": "./nowhere",
        "dataset": "not a hub id",
        "lora.init": str(tmp_path),
        "resume-from": str(tmp_path / "gone"),
    }
    with pytest.raises(SettingsError) as caught:
        check(DEFAULTS | changes)
    lines = str(caught.value).splitlines()
    assert [line.split(" = ")[0] for line in lines] == ["backbone", "dataset", "lora.init", "resume-from"]
    for value, line in zip(changes.values(), lines, strict=True):
        assert repr(value) in line


@pytest.mark.parametrize("value", ["owner/name", "gpt2", "owner/name:sub", "owner/name@main"])
def test_check_takes_hub_ids(value: str) -> None:
    check(DEFAULTS | {"dataset": value, "backbone": value})


def test_check_takes_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    changes: dict[str, Value] = dict.fromkeys(("backbone", "dataset", "lora.init", "resume-from"), str(tmp_path))
    check(DEFAULTS | changes)


def test_toml_values_that_a_run_config_cannot_hold_are_refused() -> None:
    assert flatten_toml({"a": {"b": {"c": 1}}, "d": True}) == {"a.b.c": 1, "d": True}
    tables: list[dict[str, Any]] = [{"a": {"b": [1]}}, {"a": {"b": None}}]
    for table in tables:
        with pytest.raises(SettingsError, match=r"^a\.b = "):
            flatten_toml(table)


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    for data in (None, b"= 1", b"\xff\xfe"):
        if data is not None:
            file.write_bytes(data)
        with pytest.raises(SettingsError, match="x.toml"):
            read_toml(file)
    with pytest.raises(SettingsError, match="pyproject.toml"):
        defaults(tmp_path)


def test_importing_the_settings_imports_neither_torch_nor_flower() -> None:
    code = (
        "import sys, fedgen_app.settings\n"
        "print(sorted({'torch', 'flwr', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
    assert Path(module.__file__).parent == ROOT / "fedgen_app"


def test_true_is_no_number() -> None:
    with pytest.raises(SettingsError, match=r"lora.rank = True: should be a number"):
        Settings.from_run_config(DEFAULTS | {"lora.rank": True})


def test_wrong_values_and_wrong_paths_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"(?s)lora.rank = 0.*dataset = .*no such file"):
        check(DEFAULTS | {"lora.rank": 0, "dataset": str(tmp_path / "nothing")})
