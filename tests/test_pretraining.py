"""Backbones of the small networks, trained from nothing: what is seen, what a stop changes, what the scripts write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from networks import network_settings
from pipelines import CLASSES, tiny_images
from torch import Tensor

from fedgen_app.errors import DataError
from fedgen_app.learning.backbone import open_backbone
from fedgen_app.tasks._pretraining import Pretraining, Recipe, pretrain_gan, pretrain_vae, read_rows

RECIPE = Recipe(steps=8, batch_size=8)
SHAPES: dict[str, Any] = {
    "gan": {"generator": (8, 8, 8), "discriminator": (8, 8), "latent": 4},
    "vae": {"encoder": (8, 8), "decoder": (8, 8, 8), "latent": 4},
}


def rows(wanted: tuple[str, ...] = CLASSES[:2]) -> dict[str, Tensor]:
    return read_rows(str(tiny_images()), 16, wanted)


def trained(kind: str, recipe: Recipe = RECIPE, **options: Any) -> tuple[dict[str, Tensor], Pretraining]:
    pretrain: Any = pretrain_gan if kind == "gan" else pretrain_vae
    model, training = pretrain(rows(), CLASSES, recipe, **SHAPES[kind], **options)
    return model.state_dict(), training


def test_only_the_images_of_the_wanted_classes_are_read() -> None:
    found = rows(("cross", "disc"))
    assert found["pixels"].shape == (40, 1, 16, 16) and found["pixels"].dtype == torch.uint8
    assert found["class"].bincount().tolist() == [20, 20]
    everything = rows(())
    assert set(everything) == {"pixels"} and len(everything["pixels"]) == 60
    crosses = {tuple(image.flatten().tolist()) for image in rows(("cross",))["pixels"]}
    assert {tuple(image.flatten().tolist()) for image in found["pixels"][found["class"] == 0]} == crosses
    with pytest.raises(DataError, match="no image of bag; there are cross, disc, square"):
        rows(("disc", "bag"))


@pytest.mark.parametrize("kind", ["gan", "vae"])
def test_an_interrupted_training_ends_as_one_that_was_left_alone(kind: str, tmp_path: Path) -> None:
    # Of a constant rate: progress, and with it the rate, is another in a training of half the steps.
    recipe = replace(RECIPE, final_rate=1.0)
    whole, _ = trained(kind, recipe)
    _, first = trained(kind, replace(recipe, steps=5), checkpoint=tmp_path)
    assert first.step == 5 and not list(tmp_path.glob("*.new"))
    # The average was put in place at the end; the checkpoint holds the weights that learn.
    parts, second = trained(kind, recipe, checkpoint=tmp_path)
    assert second.step == 8
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_training_changes_both_halves_and_lowers_the_bound() -> None:
    start, _ = trained("gan", replace(RECIPE, steps=1, learning_rate=1e-12))
    after, _ = trained("gan")
    changed = {name.split(".")[0] for name in after if not torch.allclose(after[name], start[name], atol=1e-6)}
    assert changed == {"generator", "discriminator"}
    losses = []
    for steps in (1, 60):
        _, training = trained("vae", replace(RECIPE, steps=steps))
        losses.append(training.learn(rows())["bits per dimension"])
    assert losses[1] < losses[0] - 0.5


def test_what_draws_is_a_moving_average() -> None:
    fast, slow = (trained("gan", replace(RECIPE, average=average))[0] for average in (0.0, 0.998))
    generators = [name for name in fast if name.startswith("generator.")]
    assert not any(torch.equal(fast[name], slow[name]) for name in generators)
    assert all(torch.equal(fast[name], slow[name]) for name in fast if name not in generators)


def test_a_recipe_has_one_end() -> None:
    for recipe in (Recipe(), Recipe(minutes=1.0, steps=5)):
        with pytest.raises(ValueError, match="either minutes or steps"):
            recipe.progress(0, 0.0)
    assert Recipe(minutes=2.0).progress(1000, 30.0) == 0.25


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "widths"),
    [("gan", ["--generator=8,8,8", "--discriminator=8,8"]), ("vae", ["--decoder=8,8,8", "--encoder=8,8"])],
)
def test_the_scripts_write_backbones_that_the_tasks_open(kind: str, widths: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "made"
    script = [sys.executable, str(ROOT / "scripts" / f"pretrain_{kind}.py"), f"--images={tiny_images()}"]
    options = ["--classes=disc,square", "--spare=cross", "--steps=3", "--batch-size=8", f"--output={folder}", *widths]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*script, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    noted = json.loads((folder / "training.json").read_text())
    assert (noted["classes"], noted["spare"], noted["images"], noted["steps"]) == (["disc", "square"], ["cross"], 40, 3)
    assert (folder / "samples.png").read_bytes().startswith(b"\x89PNG")
    backbone = open_backbone(network_settings(kind, backbone=str(folder)))
    assert backbone.processor.classes == CLASSES and backbone.parameters == sum(noted["parameters"].values())
