"""Small convolutional networks for small images: a GAN's two halves, and a variational autoencoder's.

They have no batch normalisation, whose statistics a frozen backbone must not change, no spectral normalisation, which
an adapter's layer would lose, and no transposed convolution, for which PEFT has no adapter. Each is saved as
``config.json`` and ``model.safetensors`` (``save_pretrained``, ``from_pretrained``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional

LEAST = 4  # side of the smallest feature maps
SLOPE = 0.2  # of the leaky ReLU, as in DCGAN (arXiv 1511.06434)
FEATURES = 64  # of an image, before the last layer
PARTS = ("embed", "stem", "conv", "film", "features", "output")  # the layers' names: all of them take an adapter


class Rising(nn.Module):
    """Twice the size: nearest neighbour, a convolution, and a normalisation whose scale and shift the style gives.

    The scale and shift are FiLM's (arXiv 1709.07871).
    """

    def __init__(self, inputs: int, outputs: int, style: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.GroupNorm(math.gcd(4, outputs), outputs, affine=False)
        self.film = nn.Linear(style, 2 * outputs)

    def forward(self, maps: Tensor, style: Tensor) -> Tensor:
        """(n, inputs, s, s) and (n, style) to (n, outputs, 2s, 2s)."""
        found = self.norm(self.conv(functional.interpolate(maps, scale_factor=2.0, mode="nearest")))
        scale, shift = self.film(style)[..., None, None].chunk(2, dim=1)
        return functional.leaky_relu(found * (1 + scale) + shift, SLOPE)


class Falling(nn.Module):
    """Half the size: a convolution with stride two."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        """(n, inputs, s, s) to (n, outputs, s/2, s/2)."""
        return functional.leaky_relu(self.conv(maps), SLOPE)


class Told(nn.Module):
    """Something that is told a class, as a vector of its own; of no classes, nothing."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        # Not nn.Embedding: aggregation knows the adapters of linear layers and convolutions.
        self.embed = nn.Linear(classes, width, bias=False) if classes else None

    def told(self, numbers: Tensor | None) -> Tensor | None:
        """Vectors (n, width) of class numbers (n,); None where there are no classes.

        Raises:
            ValueError: there are classes, and no numbers.
        """
        if self.embed is None:
            return None
        if numbers is None:
            raise ValueError("this network has classes and must be told one for each image")
        return torch.as_tensor(self.embed(functional.one_hot(numbers, self.classes).to(self.embed.weight.dtype)))


class Synthesis(Told):
    """From a latent vector and a class to maps; every width but the first stands for a doubling of the side from 4."""

    def __init__(self, latent: int, classes: int, widths: Sequence[int], outputs: int) -> None:
        super().__init__(classes, latent)
        style = 2 * latent if classes else latent
        self.stem = nn.Linear(style, widths[0] * LEAST**2)
        self.blocks = nn.ModuleList(Rising(inputs, width, style) for inputs, width in pairwise(widths))
        self.output = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, latents: Tensor, numbers: Tensor | None = None) -> Tensor:
        """(n, latent) and class numbers (n,) to (n, outputs, side, side)."""
        latents = latents.to(self.stem.weight.dtype)
        told = self.told(numbers)
        style = latents if told is None else torch.cat([latents, told], dim=1)
        maps = functional.leaky_relu(self.stem(style).unflatten(1, (-1, LEAST, LEAST)), SLOPE)
        for block in self.blocks:
            maps = block(maps, style)
        return torch.as_tensor(self.output(maps))


class Analysis(Told):
    """From an image and a class to numbers; every width stands for a halving of the side, down to 4."""

    def __init__(self, channels: int, classes: int, widths: Sequence[int], outputs: int) -> None:
        super().__init__(classes, FEATURES)
        self.blocks = nn.ModuleList(Falling(inputs, width) for inputs, width in pairwise([channels, *widths]))
        self.features = nn.Linear(widths[-1] * LEAST**2, FEATURES)
        self.output = nn.Linear(FEATURES, outputs)

    def trunk(self, images: Tensor) -> Tensor:
        """Features (n, FEATURES) of images (n, channels, side, side) in -1..1, of whatever class."""
        maps = images.to(self.features.weight.dtype)
        for block in self.blocks:
            maps = block(maps)
        return functional.leaky_relu(self.features(maps.flatten(1)), SLOPE)


class Generator(Synthesis):
    """The half of a GAN that draws: (n, latent) and class numbers (n,) to images (n, channels, side, side) in -1..1."""

    def forward(self, latents: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Images in float32."""
        return torch.tanh(super().forward(latents, numbers).float())


class Discriminator(Analysis):
    """The half of a GAN that judges, with a projection of the class (arXiv 1802.05637)."""

    def forward(self, images: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Logits (n,) in float32, above zero for what it takes for real, of images (n, channels, side, side)."""
        found = self.trunk(images)
        told = self.told(numbers)
        plain = self.output(found).squeeze(1).float()
        return torch.as_tensor(plain if told is None else plain + (told * found).sum(1).float())


class Encoder(Analysis):
    """The half of an autoencoder that reads: images to the mean and log-variance of their latents."""

    def forward(self, images: Tensor, numbers: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Two tensors (n, latent) in float32."""
        told, found = self.told(numbers), self.trunk(images)
        mean, log_variance = self.output(found if told is None else found + told).float().chunk(2, dim=1)
        return mean, log_variance


class Decoder(Synthesis):
    """The half of an autoencoder that draws: latents to the mean and log-scale of every pixel, -1..1."""

    def forward(self, latents: Tensor, numbers: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Two tensors (n, channels, side, side) in float32."""
        mean, log_scale = super().forward(latents, numbers).float().chunk(2, dim=1)
        return torch.tanh(mean), log_scale


class Pictured(nn.Module):
    """What a GAN and an autoencoder have in common: the images they are about.

    Attributes:
        channels: Of the images: 1 or 3.
        latent: Width of the latent vectors.
        classes: Names of the classes; without names there are none, and nothing is told.
        side: Height and width of the images in pixels.
    """

    def __init__(self, channels: int, latent: int, classes: Sequence[str], rising: Sequence[int]) -> None:
        super().__init__()
        self.channels = channels
        self.latent = latent
        self.classes = tuple(classes)
        self.side = LEAST * 2 ** (len(rising) - 1)

    def check(self, falling: Sequence[int]) -> None:
        """Refuse halves for images of different sizes.

        Raises:
            ValueError: says which.
        """
        if LEAST * 2 ** len(falling) != self.side:
            raise ValueError(f"{len(falling)} halvings from {self.side} pixels do not end at {LEAST}")


class GAN(Pictured, PyTorchModelHubMixin):
    """Generator and discriminator for square images; ``generator`` has one width more than ``discriminator``."""

    def __init__(
        self, channels: int, latent: int, classes: list[str], generator: list[int], discriminator: list[int]
    ) -> None:
        super().__init__(channels, latent, classes, generator)
        self.check(discriminator)
        self.generator = Generator(latent, len(classes), generator, channels)
        self.discriminator = Discriminator(channels, len(classes), discriminator, 1)


class VAE(Pictured, PyTorchModelHubMixin):
    """Encoder and decoder for square images; ``decoder`` has one width more than ``encoder``."""

    def __init__(self, channels: int, latent: int, classes: list[str], encoder: list[int], decoder: list[int]) -> None:
        super().__init__(channels, latent, classes, decoder)
        self.check(encoder)
        self.encoder = Encoder(channels, len(classes), encoder, 2 * latent)
        self.decoder = Decoder(latent, len(classes), decoder, 2 * channels)
