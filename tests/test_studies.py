"""What prepares the backbones of the studies: off by what was asked for, and what a task opens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny_data, tiny_model, tiny_settings
from safetensors.torch import load_file

from fedgen_app.errors import DataError
from fedgen_app.learning.backbone import open_backbone
from fedgen_app.learning.task import Share
from fedgen_app.studies import steps
from fedgen_app.tasks.language import TASK, evaluate


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_noise_is_in_proportion_to_each_matrix(tmp_path: Path) -> None:
    steps.perturb(tmp_path / "off", strength=0.2, backbone=str(tiny_model()))
    before, after = weights(tiny_model()), weights(tmp_path / "off")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        change = (after[name] - tensor).float()
        if tensor.ndim > 1:
            assert float(change.std() / tensor.std()) == pytest.approx(0.2, rel=0.15), name
        else:
            assert not change.any(), name
    steps.perturb(tmp_path / "again", strength=0.2, backbone=str(tiny_model()))
    again = weights(tmp_path / "again")
    assert all(torch.equal(after[name], again[name]) for name in after)
    open_backbone(tiny_settings(backbone=str(tmp_path / "off")))


def test_drift_goes_on_training_with_all_weights(tmp_path: Path) -> None:
    asked = {"backbone": str(tiny_model()), "dataset": str(tiny_data()), "label_column": "label"}
    steps.drift(tmp_path / "sea", steps=25, label="sea", sequence_length=32, learning_rate=3e-3, **asked)
    perplexity = {}
    for name, backbone in (("before", tiny_model()), ("after", tmp_path / "sea")):
        settings = tiny_settings(backbone=str(backbone))
        opened = open_backbone(settings)
        data = TASK.load_data(settings, opened, Share(0, 1))
        with opened.model.disable_adapter():
            perplexity[name] = evaluate(settings, opened, data.train, 0)["word_perplexity"]
    assert perplexity["after"] < perplexity["before"] / 2
    before, after = weights(tiny_model()), weights(tmp_path / "sea")
    assert all(not torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(DataError, match="label = 'cooking': no text has it; there are farm, law, sea"):
        steps.drift(tmp_path / "no", steps=1, label="cooking", **asked)


def test_a_vae_from_nothing_has_a_place_for_new_classes(tmp_path: Path) -> None:
    small = {"encoder": [4, 4, 4], "decoder": [4, 4, 4, 4], "latent": 4, "batch_size": 4}
    steps.vae(tmp_path / "vae", classes=["dress", "coat"], spare=["bag"], steps=2, **small)
    opened = open_backbone(
        tiny_settings(task="vae", backbone=str(tmp_path / "vae"), label_column="", dataset="bundled")
    )
    assert opened.processor.classes == ("dress", "coat", "bag")
    with pytest.raises(DataError, match="no image of hat"):
        steps.vae(tmp_path / "no", classes=["hat"], spare=[], steps=1, **small)
