"""Whole runs of the real apps with tiny GANs and autoencoders: what they leave, what repeats, what goes on."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import command, events, federate, results, without_times
from networks import KINDS, network_config, network_settings
from PIL import Image
from safetensors.torch import load_file

from fedgen_app.learning import adapters
from fedgen_app.learning.backbone import open_backbone
from fedgen_app.settings import Value

STATES = ("frozen", "global", "personal")
SERVER = {"fid", "kid", "kid_std", "samples", "features", "diversity", "fid_floor", "kid_floor"}
OWN = {"gan": {"sliced_wasserstein"}, "vae": {"bits_per_dim", "kl"}}
HEADLINE = {"gan": "sliced_wasserstein", "vae": "bits_per_dim"}
FAST: dict[str, Value] = {"learning_rate": 1e-2, "personal__learning_rate": 3e-3, "local_epochs": 3}
BARE: dict[str, Value] = {"samples__count": 0, "evaluate_every": 0, "personal__epochs": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The finished run of a kind, made once."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def made(kind: str) -> Path:
        federate(network_config(folder / kind, kind, samples__every=1, **FAST))
        return folder / kind

    return made


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return dict(sorted(load_file(folder / "adapter_model.safetensors").items()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_federated(kind: str, run: Any) -> None:
    folder, task = run(kind), kind.partition("-")[0]
    found = results(folder)
    assert found["status"] == "completed" and found["task"] == task
    backbone = open_backbone(network_settings(kind))
    trained = adapter(folder / "global")
    assert adapters.layout_of(trained) == backbone.layout
    assert all(tensor.abs().max() > 0 for tensor in trained.values()), "a layer has not learned"
    assert found["backbone"]["fingerprint"] == backbone.fingerprint
    assert all(r["clients"] == [0, 1, 2] and not r["rejected"] for r in found["rounds"])
    told = {"kid_by_class"} if kind.endswith("classes") else set()
    for metrics in (found["frozen"], *(r["metrics"] for r in found["rounds"])):
        assert set(metrics) == SERVER | OWN[task] | told
        assert metrics["features"] == "fedgen-small-32" and metrics["samples"] == 12
        assert np.isfinite([metrics[name] for name in metrics if name not in ("features", "kid_by_class")]).all()
    means = [found["final"]["personal"][state][HEADLINE[task]] for state in STATES]
    assert means[1] < means[0] and means[2] < means[0], "training did not help"
    for state in STATES:
        assert all(set(entry[state]) == OWN[task] for entry in found["personal"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_folder_is_complete(kind: str, run: Any) -> None:
    folder = run(kind)
    assert {f.name for f in (folder / "global").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
    }
    pages = [folder / "samples" / name / "grid.png" for name in (".", "round-0001", "round-0002")]
    assert len({Image.open(page).convert("RGB").tobytes() for page in pages}) == 3
    for client in range(3):
        assert adapters.digest(adapter(folder / "clients" / str(client))) != adapters.digest(adapter(folder / "global"))
    assert "PeftModel.from_pretrained" in (folder / "global" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gan-classes", "vae"])
def test_a_resumed_run_ends_as_one_that_was_left_alone(kind: str, tmp_path: Path, run: Any) -> None:
    copy, whole = tmp_path / "copy", run(kind)
    shutil.copytree(whole, copy)
    for file in ("samples/grid.png", "global/adapter_model.safetensors", "clients/0/adapter_model.safetensors"):
        (copy / file).unlink()
    kept = json.loads((copy / "settings.json").read_text())
    federate(kept | {"output-dir": str(copy), "resume-from": str(copy), "resume-round": 1})
    assert [e["done"] for e in events(copy) if e["event"] == "start"] == [0, 1]
    ours, theirs = (without_times(results(f)) | {"run": ""} for f in (copy, whole))
    assert ours == theirs
    for name in ("global", "clients/0", "clients/1", "clients/2"):
        files = [f / name / "adapter_model.safetensors" for f in (copy, whole)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert (copy / "samples" / "grid.png").read_bytes() == (whole / "samples" / "grid.png").read_bytes()


@pytest.mark.slow
def test_generate_draws_the_class_that_is_asked_for(tmp_path: Path, run: Any) -> None:
    folder = run("gan-classes")
    made = [tmp_path / name for name in ("disc.png", "again.png", "cross.png")]
    for file, prompt in zip(made, ("disc", "disc", "cross"), strict=True):
        ended = command("generate", folder, "--prompt", prompt, "--count", "2", "--output", file)
        assert ended.status == 0, ended.err
    assert made[0].read_bytes() == made[1].read_bytes() != made[2].read_bytes()
    refused = command("generate", folder, "--prompt", "sandal", "--output", tmp_path / "none.png")
    assert refused.status == 2 and "'sandal' is no class" in refused.err


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedprox", "ffa-lora", "scaffold", "fedavg-full"])
def test_methods_work_with_two_halves(method: str, tmp_path: Path) -> None:
    found = federate(network_config(tmp_path / "run", "gan-classes", method=method, **FAST, **BARE))
    assert found["status"] == "completed" and all(len(r["clients"]) == 3 for r in found["rounds"])
