"""FID and KID of images, and the extractors that they are taken with."""

from __future__ import annotations

import os
import pickle
import random
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torch_fidelity")

import torch_fidelity
from torch.utils.data import Dataset

import fedgen_assets
from fedgen_app.data.images import load_images
from fedgen_app.errors import FedgenError, MetricError, SettingsError
from fedgen_app.tasks import _features, _quality
from fedgen_app.tasks._features import SMALL, Extractor, extract, open_extractor, reference
from fedgen_app.tasks._quality import Real, diversity, per_class, real_side, subset_size

CPU = torch.device("cpu")
INCEPTION = os.environ.get("FEDGEN_INCEPTION", "")


def known(features: np.ndarray) -> Real:
    return Real(features, features.mean(0, dtype=np.float64), np.cov(features, rowvar=False, dtype=np.float64), {})


def compare(generated: np.ndarray, real: np.ndarray, seed: int) -> dict[str, float]:
    return _quality.compare(generated, known(real), seed)


@pytest.fixture(scope="module")
def small() -> Extractor:
    return open_extractor("bundled", CPU)


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, tuple[str, ...]]:
    """Test images (2000, 32, 32, 1), 200 of each class."""
    found = load_images("bundled", "test", resolution=32)
    assert found is not None and found.labels is not None
    return found.pixels, found.labels


@pytest.fixture(scope="module")
def features(small: Extractor, pictures: tuple[np.ndarray, tuple[str, ...]]) -> np.ndarray:
    return extract(small, pictures[0])


class Rows(Dataset):
    """Images (n, h, w, channels) as torch-fidelity wants them: uint8 (3, h, w)."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = np.repeat(images, 3 // images.shape[3], axis=3).transpose(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.images[index].copy())


def directly(left: np.ndarray, right: np.ndarray, seed: int, **options: object) -> dict[str, float]:
    found = torch_fidelity.calculate_metrics(
        input1=Rows(left),
        input2=Rows(right),
        cuda=False,
        fid=True,
        kid=True,
        kid_subset_size=subset_size(len(left), len(right)),
        rng_seed=seed,
        save_cpu_ram=True,
        verbose=False,
        **options,
    )
    return {
        "fid": found["frechet_inception_distance"],
        "kid": found["kernel_inception_distance_mean"],
        "kid_std": found["kernel_inception_distance_std"],
    }


def test_the_numbers_are_torch_fidelitys_own(small: Extractor) -> None:
    noise = np.random.default_rng(0)
    left = noise.integers(0, 200, (120, 40, 36, 3), dtype=np.uint8)  # colour, and a size that has to be changed
    right = noise.integers(50, 256, (150, 32, 32, 1), dtype=np.uint8)
    ours = compare(extract(small, left), extract(small, right), seed=7)
    theirs = directly(left, right, 7, feature_extractor=SMALL)
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-9)
    assert compare(extract(small, left), extract(small, right), seed=8)["kid"] != ours["kid"]
    assert ours["kid_std"] > 0


def test_the_same_features_are_no_distance_apart(features: np.ndarray) -> None:
    few = features[:400]
    found = compare(few, few, seed=0)
    apart = compare(few, features[400:800] + 0.5, seed=0)
    assert found["fid"] == pytest.approx(0, abs=1e-3 * apart["fid"])
    assert abs(found["kid"]) < 0.2 * apart["kid"]
    # Every image meets itself in one pair of 400, which an estimate for independent sets takes off twice.
    kernel = (few @ few.T / few.shape[1] + 1) ** 3
    same, other = np.trace(kernel) / 400, (kernel.sum() - np.trace(kernel)) / (400 * 399)
    assert found["kid"] == pytest.approx(-2 * (same - other) / 400, rel=0.3)


def test_changed_images_lie_further_off_than_others_of_the_same_kind(
    small: Extractor, pictures: tuple[np.ndarray, tuple[str, ...]], features: np.ndarray
) -> None:
    real, other, held = features[::4], features[1::4], pictures[0][1::4]
    floor = compare(other, real, seed=0)
    noisy = np.clip(held + np.random.default_rng(0).normal(0, 25, held.shape), 0, 255).astype(np.uint8)
    blurred = ((held[:, :-2] + held[:, 1:-1].astype(int) + held[:, 2:]) // 3).astype(np.uint8)
    shifted = np.roll(held, 5, axis=2)
    for changed in (noisy, blurred, shifted, held[:, ::-1]):
        found = compare(extract(small, changed), real, seed=0)
        assert found["fid"] > 1.5 * floor["fid"] and found["kid"] > floor["kid"] + floor["kid_std"]


def test_more_noise_is_worse(small: Extractor, pictures: tuple[np.ndarray, tuple[str, ...]]) -> None:
    images = pictures[0][::5]
    real, found = extract(small, images[::2]), []
    for deviation in (0, 10, 30, 80):
        noise = np.random.default_rng(0).normal(0, deviation, images[1::2].shape)
        noisy = np.clip(images[1::2] + noise, 0, 255).astype(np.uint8)
        found.append(compare(extract(small, noisy), real, seed=0))
    for measure in ("fid", "kid"):
        assert sorted(value[measure] for value in found) == [value[measure] for value in found]


def test_features_do_not_depend_on_batches_or_on_the_random_state(
    small: Extractor, pictures: tuple[np.ndarray, tuple[str, ...]], features: np.ndarray
) -> None:
    done: list[int] = []
    few = extract(small, pictures[0][:10], batch_size=4, progress=done.append)
    np.testing.assert_allclose(few, features[:10], rtol=1e-4, atol=1e-4)
    assert done == [4, 8, 10]
    before = torch.random.get_rng_state()
    _features.open_extractor.__wrapped__("bundled", CPU)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_grey_and_repeated_grey_are_the_same(small: Extractor, pictures: tuple[np.ndarray, tuple[str, ...]]) -> None:
    grey = pictures[0][:5]
    np.testing.assert_array_equal(extract(small, grey), extract(small, np.repeat(grey, 3, axis=3)))


def test_real_features_are_computed_once(
    small: Extractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: tuple[np.ndarray, tuple[str, ...]]
) -> None:
    monkeypatch.setenv("FEDGEN_CACHE", str(tmp_path))
    counted: list[int] = []
    images = pictures[0][:6]
    first = reference(small, images, progress=counted.append)
    np.testing.assert_array_equal(first, extract(small, images))
    np.testing.assert_array_equal(reference(small, images, progress=counted.append), first)
    assert counted == [6]
    changed = images.copy()
    changed[0, 16, 16] ^= 1
    reference(small, changed, progress=counted.append)
    reference(small, images.reshape(6, 64, 16, 1), progress=counted.append)
    reference(Extractor(small.name, "other weights", small.module), images, progress=counted.append)
    assert counted == [6, 6, 6, 6]


def test_what_real_images_alone_decide_is_computed_once(
    small: Extractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: tuple[np.ndarray, tuple[str, ...]]
) -> None:
    monkeypatch.setenv("FEDGEN_CACHE", str(tmp_path))
    images, others, more = pictures[0][:40], pictures[0][40:80], pictures[0][80:120]
    first = real_side(small, images, others, seed=3)
    here, there = extract(small, images), extract(small, others)
    assert first.floor == pytest.approx(compare(there, here, 3), rel=1e-5)
    expected = compare(extract(small, more), here, 3)
    assert _quality.compare(extract(small, more), first, 3) == pytest.approx(expected, rel=1e-5)
    counted: list[int] = []
    plain = _quality._statistics

    def watched(features: np.ndarray) -> Any:
        counted.append(len(features))
        return plain(features)

    monkeypatch.setattr(_quality, "_statistics", watched)
    again = real_side(small, images, others, seed=3)  # as another process of this machine
    assert counted == [] and again.floor == first.floor
    for part in ("features", "mean", "covariance"):
        np.testing.assert_array_equal(getattr(again, part), getattr(first, part))
    # Whatever a figure hangs on makes another entry of it.
    assert real_side(small, images, others, seed=4).floor["kid"] != first.floor["kid"]
    assert real_side(small, images, more, seed=3).floor["fid"] != first.floor["fid"]
    assert counted == [40, 40], "the floor's side alone, not that of the images"
    assert real_side(small, others, images, seed=3).mean[0] != first.mean[0]
    assert real_side(small, images, others[:20], seed=3).floor == {}


def test_the_class_that_failed_stands_out(small: Extractor, pictures: tuple[np.ndarray, tuple[str, ...]]) -> None:
    images, labels = pictures
    chosen = np.isin(labels, ["bag", "dress", "sneaker"])
    images, named = images[chosen], np.array(labels)[chosen]
    generated, theirs = images[1::2].copy(), named[1::2]
    failed = theirs == "dress"
    generated[failed] = np.random.default_rng(0).integers(0, 256, generated[failed].shape, dtype=np.uint8)
    theirs[np.flatnonzero(theirs == "bag")[15:]] = "coat"  # too few bags on one side, no coats on the other
    real = extract(small, images[::2])
    found = per_class(extract(small, generated), list(theirs), real, list(named[::2]), seed=0)
    assert list(found) == ["dress", "sneaker"]
    assert found["dress"] > 10 * abs(found["sneaker"])


def test_equal_images_have_no_diversity(features: np.ndarray) -> None:
    assert diversity(np.repeat(features[:1], 50, axis=0), features) == 0
    assert diversity(features[::2], features[1::2]) == pytest.approx(1, abs=0.15)
    assert diversity(features.mean(0) + (features - features.mean(0)) / 2, features) == pytest.approx(0.25, rel=1e-3)


def test_a_source_that_is_no_extractor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="metrics.features") as refused:
        open_extractor(str(tmp_path / "none.pth"), CPU)
    assert refused.value.exit_status == 2
    with pytest.raises(SettingsError):
        open_extractor(str(tmp_path), CPU)


class Hostile:
    """Unpickled without a guard, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*TypedStorage")
def test_damaged_and_hostile_weights_are_refused(tmp_path: Path) -> None:
    whole, mark = tmp_path / "whole.pth", tmp_path / "mark"
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 3, 3)}, whole)
    files = {
        "other layers": whole.read_bytes(),
        "truncated": whole.read_bytes()[:-200],
        "empty": b"",
        "text": b"<!doctype html>\n" * 50,
        "hostile": pickle.dumps({"weights": Hostile(mark)}),
        "plain": pickle.dumps([1, 2]),
    }
    torch.save({"weights": Hostile(mark)}, tmp_path / "hostile archive")
    torch.save([torch.zeros(2)], tmp_path / "list")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in (*files, "hostile archive", "list"):
        with pytest.raises(MetricError, match=name):
            open_extractor(str(tmp_path / name), CPU)
    assert not mark.exists()
    pickle.loads(files["hostile"])
    assert mark.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*TypedStorage")
def test_no_damage_to_weights_ends_in_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_layers(*_: object, **__: object) -> None:  # building Inception-v3 takes a second each time
        raise RuntimeError("missing keys")

    monkeypatch.setattr(_features, "FeatureExtractorInceptionV3", other_layers)
    draw, file = random.Random(0), tmp_path / "damaged.pth"
    for archive in (True, False):
        torch.save(torch.nn.BatchNorm2d(2).state_dict(), file, _use_new_zipfile_serialization=archive)
        whole = file.read_bytes()
        for _ in range(250):
            damaged = bytearray(whole)
            damaged[draw.randrange(min(len(whole), 700))] = draw.randrange(256)
            file.write_bytes(damaged)
            with pytest.raises(MetricError):
                open_extractor(str(file), CPU)


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FedgenError, match=r"https://\S+6726825d\.pth.*metrics\.features=PATH"):
        open_extractor("inception", CPU)
    kept = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    kept.write_bytes(b"what was kept is used")
    with pytest.raises(MetricError, match="is no file of weights"):
        open_extractor("inception", CPU)


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 8, 8, 1), np.float32), np.zeros((2, 8, 8, 4), np.uint8), np.zeros((0, 8, 8, 1), np.uint8)],
    ids=["floats", "four channels", "none"],
)
def test_what_is_not_images_is_refused(small: Extractor, images: np.ndarray) -> None:
    with pytest.raises(MetricError, match="uint8"):
        extract(small, images)


def test_too_few_images_are_refused(features: np.ndarray) -> None:
    with pytest.raises(MetricError, match="3 and 2000"):
        compare(features[:3], features, seed=0)
    with pytest.raises(MetricError, match="widths"):
        compare(features[:, :5], features, seed=0)
    with pytest.raises(MetricError):
        diversity(features[:1], features)
    with pytest.raises(MetricError, match="all equal"):
        diversity(features, np.zeros((3, 96), np.float32))


def test_the_card_names_the_weights_that_are_there(small: Extractor) -> None:
    assert small.name == SMALL
    assert small.digest in (fedgen_assets.path("features") / "training.json").read_text()


@pytest.mark.skipif(not INCEPTION, reason="FEDGEN_INCEPTION names no file of Inception-v3's weights")
def test_inception_gives_torch_fidelitys_numbers(pictures: tuple[np.ndarray, tuple[str, ...]]) -> None:
    extractor = open_extractor(INCEPTION, CPU)
    assert extractor.name == "inception-v3-2015-12-05"
    left, right = extract(extractor, pictures[0][:6]), extract(extractor, pictures[0][6:12])
    assert left.shape == (6, 2048)
    options = {"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": INCEPTION}
    theirs = directly(pictures[0][:6], pictures[0][6:12], 3, **options)
    ours = compare(left, right, 3)
    assert ours == pytest.approx(theirs, rel=1e-3)
