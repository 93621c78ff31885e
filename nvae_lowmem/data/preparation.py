"""One image: from any size to a square uint8 array of the size and colours that the model wants."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import Crop, DataConfig
from nvae_lowmem.errors import ConfigError

CELEBA_SIZE = (178, 218)
CELEBA_BOX = (15, 40, 163, 188)
"""(left, top, right, bottom) of the published crop of CelebA's aligned images; a centred one is five pixels higher."""


@dataclass(frozen=True)
class Preparation:
    """What is done to every image: crop a square, resize, set the colours."""

    channels: int
    size: int
    crop: Crop
    crop_pixels: int

    @classmethod
    def of(cls, config: DataConfig, model: ModelConfig) -> Preparation:
        """The preparation that a profile asks for. Raises ConfigError for what images cannot give."""
        if model.image_channels not in (1, 3):
            raise ConfigError(
                f"model.image_channels = {model.image_channels}: images have 1 channel (grey) or 3 (RGB): set 1 or 3"
            )
        if config.crop != "centre" and config.crop_pixels:
            does = "cuts nothing" if config.crop == "none" else "is a fixed square"
            raise ConfigError(
                f"data.crop_pixels = {config.crop_pixels} cuts a square, but data.crop = {config.crop!r} {does}: "
                "set data.crop = 'centre' or data.crop_pixels = 0"
            )
        return cls(model.image_channels, model.image_size, config.crop, config.crop_pixels)

    def __call__(self, image: Image.Image, name: str) -> np.ndarray:
        """(C, S, S) uint8 of an image in mode L or RGB.

        Raises ConfigError naming the image when it is too small for crop_pixels, or not square though crop is none.
        """
        image = image.crop(self._square(*image.size, name))
        image = image.convert("L" if self.channels == 1 else "RGB")
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.LANCZOS)
        values = np.asarray(image)  # (S, S) or (S, S, 3)
        return values[None] if self.channels == 1 else values.transpose(2, 0, 1)

    def _square(self, width: int, height: int, name: str) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the square to cut."""
        if self.crop == "celeba":
            if (width, height) != CELEBA_SIZE:
                raise ConfigError(
                    f"image {name} is {width} x {height} pixels (width x height), but data.crop = 'celeba' cuts the "
                    "published square out of CelebA's aligned images, which are 178 x 218: set data.crop = 'centre'"
                )
            return CELEBA_BOX
        if self.crop == "none" and width != height:
            raise ConfigError(
                f"image {name} is {width} x {height} pixels (width x height), but data.crop = 'none' needs square "
                "images: set data.crop = 'centre', or make the images square"
            )
        smaller = min(width, height)
        if self.crop_pixels > smaller:
            raise ConfigError(
                f"image {name} is {width} x {height} pixels (width x height), too small to cut a square of "
                f"data.crop_pixels = {self.crop_pixels}: set at most {smaller}, or 0 for each image's largest square"
            )
        side = self.crop_pixels or smaller
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side
