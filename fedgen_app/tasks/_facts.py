"""What reading and dealing out images needs to know of a backbone that draws them, whatever it is."""

from __future__ import annotations

from typing import Literal, Protocol


class Facts(Protocol):
    """What belongs to an image backbone: a diffusers pipeline, or one of the small networks."""

    @property
    def condition(self) -> Literal["none", "class", "text"]:
        """What it is told of an image."""

    @property
    def image_channels(self) -> int:
        """Of the images: 1 or 3."""

    @property
    def resolution(self) -> int:
        """Side of the images that it was made for, in pixels."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, where it has them."""

    @property
    def class_count(self) -> int:
        """Number of classes; 0 without."""

    @property
    def has_vae(self) -> bool:
        """Whether an autoencoder makes latents of the images first; only a diffusers pipeline has one."""

    def __hash__(self) -> int: ...

    def side_for(self, resolution: int) -> int:
        """Side of its input for images of ``resolution`` pixels (0: as it was made for).

        Raises:
            SettingsError: it cannot take such images.
        """

    def class_of(self, label: str) -> int:
        """The number of a class from its name or its number.

        Raises:
            SettingsError: there is no such class.
        """
