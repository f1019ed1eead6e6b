"""The scripts that make data and backbones, on a few fabricated images and texts."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, TOPICS, sentences
from pipelines import CLASSES, write_images

from fedgen_app.data.images import load_images

SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

import _training  # noqa: E402
import make_cifar  # noqa: E402


def script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def batches(folder: Path) -> dict[str, tuple[np.ndarray, list[int]]]:
    """A folder as CIFAR-10 is published, with ten images in each file; the images and labels of the splits."""
    folder.mkdir()
    draw, whole = np.random.default_rng(0), {}
    for split, names in make_cifar.BATCHES.items():
        images = draw.integers(0, 256, (10 * len(names), 32, 32, 3), dtype=np.uint8)
        labels = draw.integers(0, 10, len(images)).tolist()
        for number, name in enumerate(names):
            part = slice(10 * number, 10 * number + 10)
            # A row is all reds, then all greens, then all blues, each line by line.
            rows = np.array([[*i[..., 0].ravel(), *i[..., 1].ravel(), *i[..., 2].ravel()] for i in images[part]])
            batch = {b"batch_label": b"toy", b"data": rows.astype(np.uint8), b"labels": labels[part]}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
        whole[split] = (images, labels)
    return whole


def test_cifar_comes_out_as_it_was_published(tmp_path: Path) -> None:
    whole = batches(tmp_path / "cifar-10-batches-py")
    done = script("make_cifar", "--source", tmp_path / "cifar-10-batches-py", "--output", tmp_path / "cifar10")
    assert done.returncode == 0 and done.stdout.split("\n")[:2] == ["train: 50 images", "test: 10 images"], done.stderr
    for split, (images, labels) in whole.items():
        found = load_images(str(tmp_path / "cifar10"), split, resolution=32)
        assert found is not None and np.array_equal(found.pixels, images)
        assert found.labels == tuple(make_cifar.NAMES[label] for label in labels)
    # And once more, from arrays without names.
    (tmp_path / "bare").mkdir()
    for split, (images, labels) in whole.items():
        np.savez(tmp_path / "bare" / f"{split}.npz", images=images, labels=labels)
    assert script("make_cifar", "--source", tmp_path / "bare", "--output", tmp_path / "named").returncode == 0
    for split in whole:
        one, other = (np.load(tmp_path / name / f"{split}.npz") for name in ("cifar10", "named"))
        assert set(one) == {"images", "labels", "names"} and all(np.array_equal(one[key], other[key]) for key in one)


class Hostile:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def test_a_batch_that_is_none_is_refused(tmp_path: Path) -> None:
    batches(tmp_path / "batches")
    (tmp_path / "batches" / "data_batch_3").write_bytes(pickle.dumps({b"data": Hostile(tmp_path / "mark")}))
    done = script("make_cifar", "--source", tmp_path / "batches", "--output", tmp_path / "out")
    assert done.returncode == 1 and "which is no part of CIFAR-10" in done.stderr
    assert not (tmp_path / "mark").exists() and not (tmp_path / "out").exists()
    (tmp_path / "batches" / "test_batch").unlink()
    batch = {b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}
    (tmp_path / "batches" / "data_batch_3").write_bytes(pickle.dumps(batch, protocol=2))
    done = script("make_cifar", "--source", tmp_path / "batches", "--output", tmp_path / "out")
    assert done.returncode == 1 and "holds neither test.npz nor test_batch" in done.stderr


def test_the_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    recipe = _training.Recipe(None, 100, 8, learning_rate=0.5, warmup_steps=10, weight_decay=0.0, floor=0.05)
    assert [recipe.progress(step, 1e9) for step in (0, 50, 200)] == [0, 0.5, 1]
    assert recipe.rate(0, 0.0) == pytest.approx(0.05) and recipe.rate(9, 0.0) == pytest.approx(0.5)
    assert recipe.rate(50, 0.5) == pytest.approx(0.5 * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi / 2))))
    assert recipe.rate(100, 1.0) == pytest.approx(0.025)
    assert _training.Recipe(2.0, None, 8, 0.5, 10, 0.0).progress(10**6, 60) == 0.5


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    assert _training.load_state(None) is None and _training.load_state(tmp_path) is None
    _training.save_state(tmp_path / "new", {"model": {"a": torch.ones(2)}, "step": 7, "seconds": 1.5})
    found = _training.load_state(tmp_path / "new")
    assert found is not None and found["step"] == 7 and torch.equal(found["model"]["a"], torch.ones(2))
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["state.pt"]


@pytest.mark.slow
def test_an_image_generator_is_trained_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    import pretrain_diffusion as pretrain
    from diffusers import StableDiffusionPipeline

    write_images(tmp_path / "images.npz", 8, 1)
    options = ["--images", tmp_path / "images.npz", "--classes", ",".join(CLASSES), "--channels", "8,8,16,16"]
    options += ["--resolution", "16", "--threads", "1", "--batch-size", "4", "--device", "cpu"]
    done = script("pretrain_diffusion", *options, "--output", tmp_path / "made", "--steps", "3")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "made" / "training.json").read_text())["steps"] == 3
    opened = StableDiffusionPipeline.from_pretrained(tmp_path / "made", vae=None)
    assert tuple(opened.unet.config.block_out_channels) == (8, 8, 16, 16)
    # A checkpoint as the trainings have always written it.
    shape = pretrain.Shape(channels=(8, 8, 16, 16), resolution=16)
    model = pretrain.build(shape, 1, opened.tokenizer, seed=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    state = {"model": model.state_dict(), "averaged": model.state_dict(), "optimizer": optimizer.state_dict()}
    (tmp_path / "kept").mkdir()
    torch.save(state | {"step": 4, "seconds": 2.0}, tmp_path / "kept" / "state.pt")
    more = ["--checkpoint", tmp_path / "kept", "--output", tmp_path / "more", "--steps", "4"]
    done = script("pretrain_diffusion", *options, *more)
    assert done.returncode == 0 and "resumed at step 4" in done.stdout, done.stderr
    unet = StableDiffusionPipeline.from_pretrained(tmp_path / "more", vae=None).unet.state_dict()
    kept = model.unet.state_dict()
    assert all(torch.allclose(unet[name], kept[name], rtol=1e-3, atol=1e-6) for name in kept), "not what was kept"


@pytest.mark.slow
def test_a_feature_extractor_is_trained(tmp_path: Path) -> None:
    from fedgen_app.tasks._features import SMALL, SmallFeatures

    for split in ("train", "test"):
        write_images(tmp_path / f"{split}.npz", 6, 1)
    options = ["--images", tmp_path, "--output", tmp_path / "made", "--steps", "2", "--threads", "1"]
    done = script("train_features", *options)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "made" / "training.json").read_text())
    assert report["classes"] == sorted(CLASSES) and report["recipe"]["steps"] == 2
    made = SmallFeatures(SMALL, ["96"], str(tmp_path / "made" / "model.safetensors"))
    assert made(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))[0].shape == (1, 96)


@pytest.mark.slow
def test_a_language_model_is_trained(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = [text for topic in TOPICS for text in sentences(topic, 60, 1)]
    (tmp_path / "text.txt").write_text("\f".join(texts))
    options = ["--text", tmp_path / "text.txt", "--output", tmp_path / "made", "--steps", "2", "--threads", "1"]
    done = script("pretrain_language", *options, "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "made" / "training.json").read_text())
    assert report["bits_per_byte"]["after"] < report["bits_per_byte"]["before"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert tokenizer.decode(tokenizer("the captain")["input_ids"]) == "the captain"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "made").config.vocab_size == 4096
