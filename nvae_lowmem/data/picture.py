"""One picture: from the bytes of a file to a square uint8 array of the size and colours that the model wants."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import DataConfig
from nvae_lowmem.errors import ConfigError

# What may be decoded. Pillow reads more, but EPS runs Ghostscript, WMF the system's renderer, and some formats are
# only recognised, never decoded.
_WANTED = "PNG JPEG JPEG2000 WEBP AVIF GIF BMP DIB TIFF PPM TGA QOI PCX SGI ICO"
_EXIF_ORIENTATION = 0x0112
MAX_FILE_BYTES = 256 << 20


class UnreadableImage(Exception):
    """One image cannot be decoded; the text says which and why. The set may go on without it."""


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Names of the formats that this installation of pillow decodes and we accept."""
    Image.init()
    return tuple(name for name in _WANTED.split() if name in Image.OPEN)


@functools.cache
def image_extensions() -> frozenset[str]:
    """Lower-case file name endings of those formats, with the dot."""
    accepted = image_formats()
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in accepted)


def decode(data: bytes, name: str) -> Image.Image:
    """The picture in a file's bytes, fully loaded and upright, as mode L (grey) or RGB.

    Transparency is laid on white, 16-bit values keep their upper 8 bits, of an animation the first frame is taken.
    Raises UnreadableImage for what cannot be decoded, ConfigError for a picture of so many pixels that decoding it
    would be a risk (pillow's limit).
    """
    try:
        with Image.open(io.BytesIO(data), formats=image_formats()) as picture:
            _refuse_bomb(picture.size, name)
            picture.load()
            orientation = picture.getexif().get(_EXIF_ORIENTATION, 1)
            upright = ImageOps.exif_transpose(picture) if orientation != 1 else picture
            return _grey_or_rgb(upright)
    except ConfigError:
        raise
    except Image.DecompressionBombError as error:
        raise ConfigError(_bomb_message(name, str(error))) from None
    except Exception as error:  # a damaged file makes a decoder raise nearly anything, from OSError to IndexError
        reason = " ".join(str(error).split()) or type(error).__name__
        # pillow's text names the memory buffer that we read from, which says nothing to a user
        reason = "is not an image that can be read" if "cannot identify" in reason else reason
        raise UnreadableImage(f"{name}: {reason}") from error


def _refuse_bomb(size: tuple[int, int], name: str) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit and size[0] * size[1] > limit:
        raise ConfigError(_bomb_message(name, f"{size[0]} x {size[1]} pixels, more than {limit:,}"))


def _bomb_message(name: str, what: str) -> str:
    return f"image {name}: {what}; decoding it could fill the memory (decompression bomb): make it smaller or remove it"


def _grey_or_rgb(picture: Image.Image) -> Image.Image:
    mode = picture.mode
    if mode == "F":
        raise ValueError("holds floating-point values, which have no agreed range: save it with 8 or 16 bits")
    if mode == "I" or mode.startswith("I;16"):
        return _from_16_bits(picture)
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        rgb = Image.alpha_composite(white, rgba).convert("RGB")
        return rgb.convert("L") if mode in ("LA", "La", "L", "1") else rgb
    if mode in ("1", "L"):
        return picture.convert("L")
    rgb = picture.convert("RGB")
    return rgb.convert("L") if mode == "P" and looks_grey(rgb) else rgb


def _from_16_bits(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture)
    if values.size and (values.min() < 0 or values.max() > 0xFFFF):
        raise ValueError("holds 32-bit integers: save it with 8 or 16 bits")
    return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))


def looks_grey(picture: Image.Image) -> bool:
    """Whether a picture has no colour: mode L, or RGB with three equal channels."""
    if picture.mode == "L":
        return True
    red, green, blue = (channel.tobytes() for channel in picture.split())
    return red == green == blue


@dataclass(frozen=True)
class Preparation:
    """What is done to every picture: crop a square, resize, set the colours."""

    channels: int
    size: int
    crop: Literal["centre", "none"]
    crop_pixels: int

    @classmethod
    def of(cls, config: DataConfig, model: ModelConfig) -> Preparation:
        """The preparation that a profile asks for. Raises ConfigError for what pictures cannot give."""
        if model.image_channels not in (1, 3):
            raise ConfigError(
                f"model.image_channels = {model.image_channels}: pictures have 1 channel (grey) or 3 (RGB): set 1 or 3"
            )
        if config.crop == "none" and config.crop_pixels:
            raise ConfigError(
                f"data.crop_pixels = {config.crop_pixels} cuts a square, but data.crop = 'none' cuts nothing: "
                "set data.crop = 'centre' or data.crop_pixels = 0"
            )
        return cls(model.image_channels, model.image_size, config.crop, config.crop_pixels)

    def __call__(self, picture: Image.Image, name: str) -> np.ndarray:
        """(C, S, S) uint8 of a picture in mode L or RGB.

        Raises ConfigError naming the picture when it is too small for crop_pixels, or not square though crop is none.
        """
        picture = picture.crop(self._square(*picture.size, name))
        picture = picture.convert("L" if self.channels == 1 else "RGB")
        if picture.size != (self.size, self.size):
            picture = picture.resize((self.size, self.size), Image.Resampling.LANCZOS)
        values = np.asarray(picture)  # (S, S) or (S, S, 3)
        return values[None] if self.channels == 1 else values.transpose(2, 0, 1)

    def _square(self, width: int, height: int, name: str) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the square to cut."""
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
