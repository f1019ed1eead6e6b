"""Feature extractors: what FID and KID look at images with, and the features of real images, computed once."""

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

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch_fidelity import registry
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
    key = key_of(extractor, images)
    return cached("features", key, lambda: {"features": extract(extractor, images, batch_size, progress)})["features"]


def key_of(extractor: Extractor, images: NDArray[np.uint8]) -> dict[str, object]:
    """All that the features of these images hang on, for a cache."""
    pixels = np.ascontiguousarray(images)
    return {
        "pixels": hashlib.sha256(pixels.data).hexdigest(),
        "shape": list(pixels.shape),
        "dtype": str(pixels.dtype),
        "extractor": extractor.name,
        "weights": extractor.digest,
        "preprocessing": PREPROCESSING,
        "device": next(extractor.module.parameters()).device.type,  # GPUs round differently
    }
