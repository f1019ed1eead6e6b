"""Whole runs of the real apps with tiny image generators: what they leave, what repeats, what goes on after a stop."""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, RecordingGrid, command, events, federate, results, without_times
from PIL import Image
from pipelines import CLASSES, MAKERS, class_folders, draw, image_config, image_settings, tiny_images, write_images
from safetensors.torch import load_file

from fedgen_app.errors import CheckpointError
from fedgen_app.learning import adapters
from fedgen_app.learning.backbone import open_backbone
from fedgen_app.runs import report
from fedgen_app.settings import Value
from fedgen_app.tasks import _features, _likeness
from fedgen_app.tasks._grid import BETWEEN, GAP, LEAST_SIDE, LINE

STATES = ("frozen", "global", "personal")
FLOORS = {"fid_floor", "kid_floor"}
SERVER = {"fid", "kid", "kid_std", "samples", "features", "diversity", "kid_by_class", "denoising_loss"} | FLOORS
PEFT = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
DIFFUSERS = {"pytorch_lora_weights.safetensors"}
# Learning rates of a tiny model with few steps.
FAST: dict[str, Value] = {"learning_rate": 2e-2, "personal__learning_rate": 1e-2}
# What is not looked at costs nothing.
BARE: dict[str, Value] = {"samples__count": 0, "evaluate_every": 0, "personal__epochs": 0}
# Clients draw images of their own; the server does not.
KID: dict[str, Value] = {
    "metrics__personal_samples": 8,
    "holdout_fraction": 0.5,
    "metrics__samples": 0,
    "num_server_rounds": 1,
    "samples__count": 0,
    "samples__steps": 1,
}


def page(file: Path) -> Image.Image:
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG")
    opened = Image.open(io.BytesIO(content))
    opened.load()
    return opened


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return dict(sorted(load_file(folder / "adapter_model.safetensors").items()))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The finished run of a kind, made once."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def made(kind: str) -> Path:
        federate(image_config(folder / kind, kind, samples__every=1, **FAST))
        return folder / kind

    return made


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_of_pipeline_is_federated(kind: str, run: Any) -> None:
    folder = run(kind)
    found = results(folder)
    assert found["status"] == "completed" and found["task"] == "diffusion"
    backbone = open_backbone(image_settings(kind))
    trained = adapter(folder / "global")
    assert adapters.layout_of(trained) == backbone.layout
    assert found["adapter"]["sha256"] == adapters.digest(trained)
    assert found["backbone"]["fingerprint"] == backbone.fingerprint
    assert all(trained[key].abs().max() > 0 for key in trained), "a layer has not learned"

    assert [r["round"] for r in found["rounds"]] == [1, 2]
    assert all(r["clients"] == [0, 1, 2] and not r["rejected"] for r in found["rounds"])
    for metrics in (found["frozen"], *(r["metrics"] for r in found["rounds"])):
        assert set(metrics) == SERVER
        assert metrics["samples"] == 12 and metrics["features"] == "fedgen-small-32"
        numbers = [metrics[name] for name in sorted(SERVER - {"samples", "features", "kid_by_class"})]
        assert np.isfinite(numbers).all()
        assert {metrics[name] for name in FLOORS} == {found["frozen"][name] for name in FLOORS}
        assert metrics["fid"] > metrics["fid_floor"], "a random generator is no better than real images"
    assert found["rounds"][-1]["metrics"]["denoising_loss"] < found["frozen"]["denoising_loss"]
    assert found["final"]["metrics"] == found["rounds"][-1]["metrics"] and found["final"]["source"] == "server"
    assert found["final"]["full_model_bytes"] == 4 * backbone.parameters

    assert [entry["client"] for entry in found["personal"]] == [0, 1, 2]
    for state in STATES:
        assert all(set(entry[state]) == {"denoising_loss"} for entry in found["personal"])
    means = [found["final"]["personal"][state]["denoising_loss"] for state in STATES]
    assert means == sorted(means, reverse=True), "training did not help"


@pytest.mark.parametrize("kind", MAKERS)
def test_the_run_folder_is_complete(kind: str, run: Any) -> None:
    folder = run(kind)
    exported = PEFT | (DIFFUSERS if kind in ("text", "latent") else set())
    assert {f.name for f in (folder / "global").iterdir()} == exported
    shared = adapter(folder / "global")
    for client in range(3):
        own = folder / "clients" / str(client)
        assert {f.name for f in own.iterdir()} == exported | {"state", ".lock"}
        personal = adapter(own)
        assert adapters.layout_of(personal) == adapters.layout_of(shared)
        assert adapters.digest(personal) != adapters.digest(shared)
        assert "## Use" in (own / "README.md").read_text()
    assert page(folder / "partition.png").width > 100
    told = (folder / "global" / "README.md").read_text()
    assert "| frozen |" in told and "fedgen-small-32" in told
    assert not [f for f in folder.rglob(".*") if f.name != ".lock"], "temporary files are left"


@pytest.mark.parametrize("kind", MAKERS)
def test_samples_stand_side_by_side_after_every_round_and_at_the_end(kind: str, run: Any) -> None:
    samples = run(kind) / "samples"
    files = ["grid.png", "round-0001/grid.png", "round-0002/grid.png"]
    assert sorted(str(f.relative_to(samples)) for f in samples.rglob("*") if f.is_file()) == files
    # Without prompts the two images of a block stand in one row, with them in two.
    rows, columns = (1, 2) if kind == "unconditional" else (2, 1)
    pages = [page(samples / name) for name in files]
    assert {p.height for p in pages} == {LINE + rows * (LEAST_SIDE + GAP)}
    blocks = 4 * (columns * (LEAST_SIDE + GAP) + BETWEEN)  # frozen, global, two clients
    assert all(8 <= p.width - blocks < 400 for p in pages) and len({p.width for p in pages}) == 1
    assert len({p.tobytes() for p in pages}) == 3, "the adapters of two moments draw alike"
    left = pages[0].width - blocks
    first, second = (np.asarray(pages[n].crop((left, LINE, left + LEAST_SIDE, LINE + LEAST_SIDE))) for n in (0, 1))
    assert np.array_equal(first, second), "the frozen backbone draws the same every time"


@pytest.mark.slow
def test_both_encoders_learn_together(tmp_path: Path) -> None:
    found = federate(image_config(tmp_path / "run", "latent", lora__text_encoder=True, **FAST))
    assert found["status"] == "completed" and not found["personal_rejected"]
    assert found["rounds"][-1]["metrics"]["denoising_loss"] < found["frozen"]["denoising_loss"]
    trained = adapter(tmp_path / "run" / "global")
    parts = {key.removeprefix("base_model.model.").split(".")[0] for key in trained}
    assert parts == {"unet", "text_encoder"}
    assert all(tensor.abs().max() > 0 for tensor in trained.values())
    sent = {r["uplink_bytes"] / 3 for r in found["rounds"]}
    assert min(sent) >= sum(4 * tensor.numel() for tensor in trained.values())
    exported = load_file(tmp_path / "run" / "global" / "pytorch_lora_weights.safetensors")
    assert {key.split(".")[0] for key in exported} == parts and len(exported) == len(trained)
    assert page(tmp_path / "run" / "samples" / "grid.png").height > LINE


@pytest.mark.slow
def test_convolutions_learn_too(tmp_path: Path) -> None:
    found = federate(image_config(tmp_path / "run", "text", lora__convolutions=True, **FAST, **BARE))
    assert found["status"] == "completed" and all(not r["rejected"] for r in found["rounds"])
    trained = adapter(tmp_path / "run" / "global")
    assert {tensor.ndim for tensor in trained.values()} == {2, 4}
    assert all(tensor.abs().max() > 0 for tensor in trained.values())


def test_a_run_can_start_from_anothers_adapter(tmp_path: Path, run: Any) -> None:
    before = adapter(run("text") / "global")
    still: dict[str, Value] = {"learning_rate": 1e-9, "num_server_rounds": 1, **BARE}
    federate(image_config(tmp_path / "next", "text", lora__init=str(run("text") / "global"), **still))
    after = adapter(tmp_path / "next" / "global")
    assert all(torch.allclose(after[key], before[key], atol=1e-6) for key in before)
    backbone = open_backbone(image_settings("text"))
    fresh = adapters.fresh(backbone.layout, 0)
    assert not all(torch.allclose(fresh[key], before[key], atol=1e-2) for key in before)


@pytest.fixture
def copy(tmp_path: Path, run: Any) -> Path:
    """A copy of a finished run, to go back in."""
    folder = tmp_path / "copy"
    shutil.copytree(run("latent"), folder)
    return folder


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_that_was_left_alone(copy: Path, run: Any) -> None:
    for file in ("samples/grid.png", "global/adapter_model.safetensors", "clients/0/adapter_model.safetensors"):
        (copy / file).unlink()
    kept = json.loads((copy / "settings.json").read_text())
    federate(kept | {"output-dir": str(copy), "resume-from": str(copy), "resume-round": 1})
    whole = run("latent")
    assert [e["done"] for e in events(copy) if e["event"] == "start"] == [0, 1]
    ours, theirs = (without_times(results(f)) | {"run": ""} for f in (copy, whole))
    assert ours == theirs
    for name in ("global", "clients/0", "clients/1", "clients/2"):
        files = [f / name / "adapter_model.safetensors" for f in (copy, whole)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert (copy / "samples" / "grid.png").read_bytes() == (whole / "samples" / "grid.png").read_bytes()


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_feature_extractor(
    copy: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = json.loads((copy / "settings.json").read_text())
    config = kept | {"output-dir": str(copy), "resume-from": str(copy), "resume-round": 1, "metrics.features": "auto"}

    def out_of_reach(*_: object, **__: object) -> None:
        raise OSError("no net")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(copy))
    monkeypatch.setattr(torch.hub, "download_url_to_file", out_of_reach)
    _likeness._inception_or_bundled.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(_features, "SMALL", "another-extractor")
        _features.open_extractor.cache_clear()
        with pytest.raises(CheckpointError, match="with fedgen-small-32, and .* 'auto' gives another-extractor"):
            federate(config)
    assert results(copy)["status"] == "failed" and len(results(copy)["rounds"]) <= 1
    # The same extractor under another setting is the same.
    _features.open_extractor.cache_clear()
    _likeness._inception_or_bundled.cache_clear()
    found = federate(config)
    assert found["status"] == "completed" and found["rounds"][1]["metrics"]["features"] == "fedgen-small-32"
    assert found["final"]["metrics"] == results(run("latent"))["final"]["metrics"]


@pytest.mark.slow
def test_two_runs_of_one_seed_measure_the_same(tmp_path: Path, run: Any) -> None:
    again = federate(image_config(tmp_path / "again", "text", samples__every=0, **FAST))
    first = results(run("text"))
    assert again["adapter"]["sha256"] == first["adapter"]["sha256"]
    assert without_times(again) | {"run": ""} == without_times(first) | {"run": ""}
    assert not list((tmp_path / "again" / "samples").glob("round-*"))
    other = federate(image_config(tmp_path / "other", "text", seed=1, num_server_rounds=1, **BARE))
    assert other["adapter"]["sha256"] != first["adapter"]["sha256"]


@pytest.mark.slow
def test_clients_measure_kid_of_their_own_images_where_asked(tmp_path: Path) -> None:
    found = federate(image_config(tmp_path / "run", "text", partition__alpha=100.0, **KID))
    assert [entry["client"] for entry in found["personal"]] == [0, 1, 2] and not found["personal_rejected"]
    for state in STATES:
        assert all(
            set(entry[state]) == {"denoising_loss", "kid", "kid_std", "diversity"} for entry in found["personal"]
        )
    distances = {entry["frozen"]["kid"] for entry in found["personal"]}
    assert len(distances) == 3, "every client has images of its own"


def test_images_that_cannot_be_read_are_counted_in_the_results(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "shapes", 6, broken=3)
    changes: dict[str, Value] = {"dataset": str(source), "num_server_rounds": 1, "metrics__samples": 0}
    found = federate(image_config(tmp_path / "run", "text", personal__epochs=0, samples__count=0, **changes))
    assert found["data"] == {"skipped": 3, "skipped_by_client": {}, "skipped_test": 3}, "all clients share one data set"
    changes["dataset"] = str(tiny_images())
    whole = federate(image_config(tmp_path / "whole", "text", personal__epochs=0, samples__count=0, **changes))
    assert whole["data"] == {"skipped": 0, "skipped_by_client": {}, "skipped_test": 0}


@pytest.mark.slow
def test_devices_tell_how_many_images_they_cannot_read_and_how_each_class_is_drawn(tmp_path: Path) -> None:
    changes: dict[str, Value] = KID | {"dataset": "", "max_steps": 2, "personal__max_steps": 2}
    changes |= {"metrics__personal_samples": 1000, "metrics__classes": "cross,square", "expected_clients": 2}
    config = image_config(tmp_path / "run", "text", **changes)
    grid = RecordingGrid(config, 2)
    for node, (name, broken) in enumerate((("attic", 2), ("cellar", 0)), start=1):
        folder = class_folders(tmp_path / name, 44, broken)
        grid.contexts[node].node_config = {
            "client-id": name,
            "data": str(folder),
            "state-dir": str(tmp_path / "state" / name),
        }
    found = federate(config, 2, grid)
    assert found["data"] == {"skipped": 2, "skipped_by_client": {"attic": 2}, "skipped_test": 0}
    assert [entry["client"] for entry in found["personal"]] == ["attic", "cellar"]
    for entry in found["personal"]:
        # A disc has no number that the server knows: neither its name nor its figure leaves the device.
        assert all(set(entry[state]["kid_by_class"]) == {"cross", "square"} for state in STATES)
    names = {name for reply in grid.replies for name in reply.content.metric_records.get("metrics", {})}
    assert "global.kid_by_class_1" in names and not any("disc" in n or "square" in n for n in names)
    (card,) = (tmp_path / "state" / "attic").rglob("README.md")
    assert re.search(r"pipeline\('a photo of a (disc|square|cross)', height=128", card.read_text())


def few(folder: Path) -> Path:
    """Three classes: two owned by many, one of two images only."""
    folder.mkdir()
    generator = np.random.default_rng(5)
    labels = np.array([0] * 20 + [1] * 20 + [2] * 2)
    images = np.stack([draw(int(label), generator) for label in labels])
    for name in ("train", "test"):
        np.savez(folder / f"{name}.npz", images=images, labels=labels, names=np.array(CLASSES))
    return folder


@pytest.mark.slow
def test_a_client_with_hardly_an_image_keeps_its_personal_adapter(tmp_path: Path) -> None:
    config = image_config(tmp_path / "run", "text", dataset=str(few(tmp_path / "few")), partition__alpha=0.01, **KID)
    found = federate(config)
    there = sorted(f.parent.name for f in (tmp_path / "run" / "clients").glob("*/adapter_model.safetensors"))
    assert there == ["0", "1", "2"]
    assert [entry["client"] for entry in found["personal"]] == [0, 1, 2] and not found["personal_rejected"]
    small = [entry for entry in found["personal"] if set(entry["personal"]) == {"denoising_loss"}]
    assert small, "every client has images enough"
    assert found["final"]["personal_clients"] == {"denoising_loss": 3} | dict.fromkeys(
        ("kid", "kid_std", "diversity"), 3 - len(small)
    )
    for state in STATES:
        assert found["final"]["personal"][state].keys() == {"denoising_loss", "kid", "kid_std", "diversity"}
        for metric in ("denoising_loss", "kid"):
            pairs = [(e["examples"], e[state][metric]) for e in found["personal"] if metric in e[state]]
            mean = sum(n * value for n, value in pairs) / sum(n for n, _ in pairs)
            assert found["final"]["personal"][state][metric] == pytest.approx(mean)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "dit"])
def test_each_client_says_how_each_class_is_drawn(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "many"
    source.mkdir()
    write_images(source / "train.npz", 130, 1)
    many = KID | {"dataset": str(source), "metrics__personal_samples": 1000, "personal__max_steps": 2}
    found = federate(image_config(tmp_path / "run", kind, partition__by="iid", max_steps=2, **many), clients=2)
    for entry in found["personal"]:
        for state in STATES:
            assert set(entry[state]["kid_by_class"]) == set(CLASSES)
            # The figure for all classes together cannot be had from it, and is there too.
            assert np.isfinite([entry[state]["kid"], *entry[state]["kid_by_class"].values()]).all()
    whole = {state: found["final"]["personal"][state]["kid_by_class"] for state in STATES}
    assert all(set(whole[state]) == set(CLASSES) for state in STATES)
    assert len({value for state in STATES for value in whole[state].values()}) == 9
    assert found["final"]["personal_clients"]["kid_by_class"] == 2


def test_where_nothing_is_to_be_measured_nothing_is(tmp_path: Path) -> None:
    found = federate(image_config(tmp_path / "run", "text", num_server_rounds=1, **BARE))
    assert found["status"] == "completed"
    assert found["frozen"] is None and found["personal"] == [] and found["final"]["metrics"] is None
    assert [r["metrics"] for r in found["rounds"]] == [None]
    assert not (tmp_path / "run" / "samples").exists()


def test_without_images_to_compare_with_the_loss_alone_is_measured(tmp_path: Path) -> None:
    changes: dict[str, Value] = {"metrics__samples": 0, "num_server_rounds": 1, "samples__count": 0}
    found = federate(image_config(tmp_path / "run", "dit", personal__epochs=0, **changes))
    assert set(found["frozen"]) == set(found["rounds"][0]["metrics"]) == {"denoising_loss"}


def test_a_collapsed_generator_is_warned_of(run: Any) -> None:
    """Random latents that a random autoencoder decodes: every image is about the mean."""
    (frozen,) = (event for event in events(run("latent")) if event["event"] == "frozen")
    assert frozen["metrics"]["diversity"] < 0.25
    assert "(WARNING: the images are nearly alike)" in (report.line(frozen) or "")


def test_generate_draws_with_each_adapter(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    drawn = {}
    for name, options in (("global", []), ("frozen", ["--frozen"]), ("client", ["--client", "1"])):
        ended = command("generate", run("text"), *options, "--output", tmp_path / f"{name}.png")
        assert ended.status == 0, ended.err
        assert str(tmp_path / f"{name}.png") in ended.out
        drawn[name] = page(tmp_path / f"{name}.png")
    assert {p.height for p in drawn.values()} == {3 * (LEAST_SIDE + GAP)}, "a row for each of the data's captions"
    assert len({p.tobytes() for p in drawn.values()}) == 3
    ended = command("generate", run("text"))
    assert ended.status == 0 and ended.out.strip() == "generated.png"
    assert page(Path("generated.png")).tobytes() == drawn["global"].tobytes()
    before = Path("generated.png").read_bytes()
    for number in (2, 3):  # nobody asked for the first one to be replaced
        ended = command("generate", run("text"), "--frozen")
        assert ended.status == 0 and ended.out.strip() == f"generated-{number}.png"
        assert page(Path(f"generated-{number}.png")).tobytes() == drawn["frozen"].tobytes()
    assert Path("generated.png").read_bytes() == before


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "unconditional",
            ["--prompt", "a disc"],
            "--prompt a disc: means nothing to the backbone of this",
        ),
        ("text", ["--length", "5"], "--length 5: means nothing to the backbone of this diffusion run; use --prompt,"),
    ],
)
def test_generate_refuses_what_it_would_ignore(
    kind: str, options: list[str], message: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = command("generate", run(kind), *options)
    assert ended.status == 2 and message in " ".join(ended.err.split())
    assert not list(tmp_path.iterdir()) and ended.out == ""


def test_generate_takes_prompt_count_seed_and_steps(run: Any, tmp_path: Path) -> None:
    def draws(*options: str) -> Image.Image:
        ended = command("generate", run("text"), *options, "--output", tmp_path / "drawn.png")
        assert ended.status == 0, ended.err
        return page(tmp_path / "drawn.png")

    asked = ("--prompt", "a photo of a disc", "--count", "3")
    first = draws(*asked)
    assert first.height == LEAST_SIDE + GAP
    wide = draws("--prompt", "a photo of a disc").width
    assert first.width == wide + 2 * (LEAST_SIDE + GAP)
    assert draws(*asked).tobytes() == first.tobytes()
    for other in (("--seed", "5"), ("--steps", "7"), ("--frozen",)):
        assert draws(*asked, *other).tobytes() != first.tobytes(), other


def test_generate_knows_classes_by_name_and_number(run: Any, tmp_path: Path) -> None:
    pages = []
    for prompt in ("square", "1", "cross"):
        ended = command("generate", run("dit"), "--prompt", prompt, "--output", tmp_path / "drawn.png")
        assert ended.status == 0, ended.err
        whole = page(tmp_path / "drawn.png")
        pages.append(np.asarray(whole)[:, whole.width - BETWEEN - GAP - LEAST_SIDE : whole.width - BETWEEN - GAP])
    assert np.array_equal(pages[0], pages[1]) and not np.array_equal(pages[0], pages[2])
    ended = command("generate", run("dit"), "--prompt", "triangle", "--output", tmp_path / "none.png")
    assert ended.status == 2 and "label 'triangle' is no class of this backbone" in " ".join(ended.err.split())
    assert not (tmp_path / "none.png").exists()


@pytest.mark.slow
def test_the_quickstart_for_images_from_the_command_to_the_picture(tmp_path: Path) -> None:
    output, shorter = (
        tmp_path / "run",
        {
            "num-server-rounds": 2,
            "evaluate-every": 2,
            "warmup-rounds": 0,
            "max-steps": 12,
            "personal.max-steps": 4,
            "test-sequences": 128,
            "metrics.samples": 40,
            "samples.steps": 3,
            "samples.per-prompt": 1,
        },
    )
    changed = [f"--set={key}={value}" for key, value in shorter.items()]
    started = ["run", str(ROOT), "--preset", "quickstart-images", "--engine", "in-process", "--clients", "2"]
    ended = command(*started, "--set=expected-clients=2", "--output", output, *changed)
    assert ended.status == 0, ended.err
    found = results(output)
    assert found["backbone"]["name"] == "bundled diffusion"
    assert found["frozen"]["features"] == "fedgen-small-32" and found["frozen"]["samples"] == 40
    assert 0 < found["frozen"]["fid_floor"] < found["frozen"]["fid"]
    # Four of the ten classes are new to the backbone: even so short a training pays, on the server and on clients.
    assert found["final"]["metrics"]["denoising_loss"] < found["frozen"]["denoising_loss"]
    own = found["final"]["personal"]
    assert own["personal"]["denoising_loss"] < own["frozen"]["denoising_loss"]
    picture = tmp_path / "sneaker.png"
    drawn = command("generate", output, "--prompt", "a photo of a sneaker", "--steps", "2", "--output", picture)
    assert drawn.status == 0, drawn.err
    assert picture.read_bytes().startswith(b"\x89PNG")
