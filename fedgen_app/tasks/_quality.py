"""How far generated images lie from real ones: FID and KID through torch-fidelity, and what an average hides.

FID: Heusel et al., arXiv 1706.08500; KID: Binkowski et al., arXiv 1801.01401. Numbers of different extractors, or FIDs
of different numbers of images, do not compare: FID is biased upwards at small n, KID is not.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch_fidelity import metric_fid, metric_kid, registry
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

import fedgen_assets
from fedgen_app.data.cache import cached
from fedgen_app.errors import MetricError, SettingsError

SMALL = "fedgen-small-32"
INCEPTION = "inception-v3-2015-12-05"
# The same weights travel in several files, with and without the last layer, which the features do not need: the
# digest of the others (``_fingerprint``), and that of the published file.
INCEPTION_FINGERPRINT = "c9ce7f36d5ee9536ecde7e5b5b679a59d152a85abff7981e0d6c0e5d706e3557"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PREPROCESSING = 1  # counted up when the way from pixels to features changes, so that cached features are not used

SIDE = 32
WIDTH = 96  # of the small extractor's features
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow turns RGB to grey

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000  # the field's usual size, where there are images enough
MIN_PER_CLASS = 20

# What torch.load says of damaged files, found by damaging some: its unpickler trusts their structure.
DAMAGED = (
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

FloatArray = NDArray[np.float32]


def small_network() -> nn.Sequential:
    """Untrained layers of the small extractor: (n, 1, 32, 32) from -1 to 1 in, (n, 96) non-negative features out."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 24, 1),
        *block(24, 48, 2),
        *block(48, 64, 1),
        *block(64, 96, 2),
        *block(96, 128, 2),
        nn.AvgPool2d(2),  # 2x2 places are left: where in the image a thing is still counts
        nn.Flatten(),
        nn.Linear(4 * 128, WIDTH),
        nn.ReLU(),
    )


def prepare(images: Tensor) -> Tensor:
    """What ``small_network`` takes, from uint8 (n, 3, h, w): grey, 32x32, from -1 to 1."""
    weights = torch.tensor(LUMA, device=images.device).view(1, 3, 1, 1)
    grey = (images.float() * weights).sum(1, keepdim=True)
    if grey.shape[2:] != (SIDE, SIDE):
        grey = nn.functional.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
    return grey / 127.5 - 1


class SmallFeatures(FeatureExtractorBase):  # type: ignore[misc]  # torch-fidelity has no types
    """The bundled extractor for torch-fidelity, registered there as "fedgen-small-32"; its card says what it saw."""

    def __init__(
        self, name: str, features_list: Sequence[str], feature_extractor_weights_path: str | None = None, **_: object
    ) -> None:
        super().__init__(name, list(features_list))
        self.layers = small_network()
        file = Path(feature_extractor_weights_path or small_weights())
        try:
            self.layers.load_state_dict(load(file.read_bytes()))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise MetricError(f"the weights of the feature extractor, {file}, cannot be loaded: {error}") from error
        self.requires_grad_(False)
        self.eval()

    def forward(self, input: Tensor) -> tuple[Tensor]:
        """Features (n, 96) of uint8 images (n, 3, h, w), in a tuple of one."""
        if input.dtype != torch.uint8 or input.ndim != 4 or input.shape[1] != 3:
            raise ValueError(f"images should be uint8 (n, 3, h, w), not {input.dtype} {tuple(input.shape)}")
        return (self.layers(prepare(input)),)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Names of the layers whose features there are."""
        return (str(WIDTH),)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The layer for a metric; KeyError for the Inception score, which needs classes of ImageNet."""
        return {"fid": str(WIDTH), "kid": str(WIDTH), "prc": str(WIDTH)}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        """Whether torch.compile takes it."""
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        """An input to compile with."""
        return torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)


if SMALL not in registry.FEATURE_EXTRACTORS_REGISTRY:
    registry.register_feature_extractor(SMALL, SmallFeatures)


@dataclass(frozen=True)
class Extractor:
    """What turns images into features.

    name: what a metric's ``features`` says.
    digest: sha256 of the weights.
    module: torch-fidelity's module: uint8 (n, 3, h, w) to a tuple of one (n, d).
    """

    name: str
    digest: str
    module: nn.Module


def small_weights() -> Path:
    """File of the bundled extractor's weights."""
    return fedgen_assets.path("features") / "model.safetensors"


@lru_cache(maxsize=4)
def open_extractor(source: str, device: torch.device) -> Extractor:
    """The feature extractor that the setting metrics.features names; opened once per process and device.

    source: "bundled": the small one of fedgen_assets/features; "inception": Inception-v3 of 2015-12-05, downloaded (95
    MB) where torch's cache does not hold it; or a file of its weights in torch-fidelity's .pth format. A file of other
    weights for the same layers is taken, and named for its digest. Files are read without running what is in them.

    Raises SettingsError where there is no such file, MetricError where it cannot be downloaded or is not such a file.
    """
    # Layers draw weights when they are made; a measurement must not change what training draws next.
    with torch.random.fork_rng(devices=[]):
        if source == "bundled":
            digest = hashlib.sha256(small_weights().read_bytes()).hexdigest()
            module: nn.Module = SmallFeatures(SMALL, [str(WIDTH)])
            return Extractor(SMALL, digest, module.to(device))
        file = _published_inception() if source == "inception" else Path(source).expanduser()
        if not file.is_file():
            raise SettingsError(f'metrics.features={source!r}: neither "bundled", "inception" nor a file')
        name, digest, module = _inception(file)
        return Extractor(name, digest, module.to(device))


def _published_inception() -> Path:
    """Where torch-fidelity itself would look, so that the download is shared with it."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name: str = URL_INCEPTION_V3.rsplit("/", 1)[-1]
    file = folder / name
    if file.is_file():
        return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file), hash_prefix=INCEPTION_SHA256, progress=False)
    # RuntimeError: the file that came has another digest.
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        raise MetricError(
            f"the weights of Inception-v3 cannot be downloaded ({error}); download {URL_INCEPTION_V3}, put it to {file}"
            ' or anywhere else with metrics.features=PATH, or use metrics.features="bundled"'
        ) from error
    return file


def _inception(file: Path) -> tuple[str, str, nn.Module]:
    """Name, digest and module of Inception-v3 with the weights of a file."""
    raw = file.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    try:
        state = torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")
    except DAMAGED as error:
        said = str(error).partition("\n")[0]
        raise MetricError(f"{file} is no file of weights or is damaged: {said}") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise MetricError(f"{file} holds no weights by name")
    # torch-fidelity would unpickle the file without a guard; it gets a copy that was written here.
    copy = io.BytesIO()
    torch.save(state, copy)
    copy.seek(0)
    try:
        module = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=copy)
    except RuntimeError as error:
        said = " ".join(str(error).split())[:200]
        raise MetricError(f"{file} does not hold Inception-v3 as torch-fidelity has it: {said}") from error
    known = digest == INCEPTION_SHA256 or _fingerprint(state) == INCEPTION_FINGERPRINT
    return INCEPTION if known else f"inception-v3-{digest[:8]}", digest, module


def _fingerprint(state: Mapping[str, Tensor]) -> str:
    """sha256 of the weights that the 2048 features depend on, whatever file they came in."""
    sha = hashlib.sha256()
    for name in sorted(state):
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            sha.update(name.encode())
            sha.update(state[name].detach().float().contiguous().numpy().tobytes())
    return sha.hexdigest()


def extract(
    extractor: Extractor,
    images: NDArray[np.uint8],
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> FloatArray:
    """Features (n, d) of images (n, h, w, channels), uint8 from 0 to 255; channels 1 (repeated) or 3 (RGB).

    progress: called with the number of images done after every batch. Raises MetricError for other shapes or types,
    and where there is no image.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or len(images) == 0:
        raise MetricError(f"images should be uint8 (n, h, w, 1 or 3), not {images.dtype} {images.shape}")
    device = next(extractor.module.parameters()).device
    parts = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            # A copy: torch warns of read-only arrays, and takes none with negative strides.
            batch = torch.from_numpy(np.array(images[start : start + batch_size])).permute(0, 3, 1, 2)
            (features,) = extractor.module(batch.expand(-1, 3, -1, -1).to(device))
            parts.append(features.float().cpu().numpy())
            if progress:
                progress(start + len(batch))
    return np.concatenate(parts)


def reference(
    extractor: Extractor,
    images: NDArray[np.uint8],
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> FloatArray:
    """As ``extract``, but computed once per machine for the same pixels and weights: for real images."""
    pixels = np.ascontiguousarray(images)
    key = {
        "pixels": hashlib.sha256(pixels.data).hexdigest(),
        "shape": list(pixels.shape),
        "dtype": str(pixels.dtype),
        "extractor": extractor.name,
        "weights": extractor.digest,
        "preprocessing": PREPROCESSING,
        "device": next(extractor.module.parameters()).device.type,  # GPUs round differently
    }
    features = cached("features", key, lambda: {"features": extract(extractor, pixels, batch_size, progress)})
    return features["features"]


def compare(generated: FloatArray, real: FloatArray, seed: int) -> dict[str, float]:
    """FID and KID of features (n, d) against features (m, d).

    Returns "fid"; "kid", the mean over 100 pairs of random subsets; and "kid_std", their standard deviation. A subset
    has half as many images as the smaller set, at most 1000: were it the whole set, every subset would be the same and
    the spread nothing. KID is unbiased, so its mean does not depend on that size; its spread does, and as the subsets
    overlap it is no confidence interval. FID is computed in float64.

    seed: of the subsets. Raises MetricError where a side has fewer than four images, or the widths differ.
    """
    return {"fid": _fid(generated, real), **_kid(generated, real, seed)}


def subset_size(generated: int, real: int) -> int:
    """Images in each of KID's subsets, for so many images on either side."""
    return min(KID_SUBSET_SIZE, generated // 2, real // 2)


def _fid(generated: FloatArray, real: FloatArray) -> float:
    _check(generated, real)
    statistics = [
        metric_fid.fid_features_to_statistics(torch.from_numpy(np.array(features, np.float64)))
        for features in (generated, real)
    ]
    found: dict[str, float] = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    return found[metric_fid.KEY_METRIC_FID]


def _kid(generated: FloatArray, real: FloatArray, seed: int) -> dict[str, float]:
    _check(generated, real)
    found: dict[str, float] = metric_kid.kid_features_to_metric(
        torch.from_numpy(np.array(generated, np.float32)),
        torch.from_numpy(np.array(real, np.float32)),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=subset_size(len(generated), len(real)),
        rng_seed=seed % 2**32,
        verbose=False,
    )
    return {"kid": found[metric_kid.KEY_METRIC_KID_MEAN], "kid_std": found[metric_kid.KEY_METRIC_KID_STD]}


def _check(generated: NDArray[Any], real: NDArray[Any]) -> None:
    if min(len(generated), len(real)) < 4:
        raise MetricError(f"FID and KID need four images on each side; there are {len(generated)} and {len(real)}")
    if generated.shape[1] != real.shape[1]:
        raise MetricError(f"features of different extractors: widths {generated.shape[1]} and {real.shape[1]}")


def per_class(
    generated: FloatArray,
    generated_labels: Sequence[str],
    real: FloatArray,
    real_labels: Sequence[str],
    seed: int,
) -> dict[str, float]:
    """KID of each class that has 20 images or more on both sides, in the order of the names.

    Features (n, d) and (m, d), with one label for each; an average over all classes hides one that failed.
    """
    theirs, ours = np.asarray(generated_labels, dtype=str), np.asarray(real_labels, dtype=str)
    found = {}
    for name in sorted(set(generated_labels) & set(real_labels)):
        left, right = generated[theirs == name], real[ours == name]
        if min(len(left), len(right)) >= MIN_PER_CLASS:
            found[name] = _kid(left, right, seed)["kid"]
    return found


def diversity(generated: FloatArray, real: FloatArray) -> float:
    """How varied the generated images are: the variance of their features, summed, over that of the real ones.

    Features (n, d) and (m, d). 0: all equal; 1: as varied as the real ones. Far below 1 says mode collapse, or images
    of nothing that the extractor knows: it finds pure noise all alike. A few images over and over can be as varied as
    the real ones. Raises MetricError where a side has fewer than two images or the real ones are all equal.
    """
    if min(len(generated), len(real)) < 2:
        raise MetricError(f"variety needs two images on each side; there are {len(generated)} and {len(real)}")
    ours = float(np.var(real, axis=0, ddof=1, dtype=np.float64).sum())
    if ours == 0:
        raise MetricError("the real images are all equal: nothing to measure variety by")
    return float(np.var(generated, axis=0, ddof=1, dtype=np.float64).sum()) / ours
