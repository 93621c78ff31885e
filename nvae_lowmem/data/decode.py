"""From the bytes of one image file to an upright 8-bit image, grey or RGB, whatever the file's format and mode.

A mode without an agreed range (integers of 32 bits, floating point) is refused unless `data.white` says which value is
white: a guess would make images black, and nobody would see it before the samples are.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from nvae_lowmem.errors import ConfigError

# What may be decoded. Pillow reads more, but EPS runs Ghostscript, WMF the system's renderer, and some formats are
# only recognised, never decoded.
_WANTED = "PNG JPEG JPEG2000 WEBP AVIF GIF BMP DIB TIFF PPM TGA QOI PCX SGI ICO"
MAX_FILE_BYTES = 256 << 20
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
_DARKEST_OF_16_BITS = 4095
"""A 16-bit image without any value above this would come out black: it holds 8 to 12 bits."""

_ROWS = 256
_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# PNG chunks that are not critical, but say how the image looks.
_PNG_KEPT = (b"tRNS", b"eXIf")


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


def decode(data: bytes, name: str, white: float = 0.0) -> Image.Image:
    """The image in a file's bytes, fully loaded and upright, as mode L (grey) or RGB.

    Transparency is laid on white; of an animation the first frame is taken. Values of more than 8 bits become
    floor(256 v / (white + 1)), floating-point ones round(255 v / white).

    white: the value that is white where an image has more than 8 bits per channel; 0: what its format says.
    Raises UnreadableImage for what cannot be decoded, or has no known range; ConfigError for an image of so many
    pixels that decoding it would be a risk (pillow's limit), or whose values `white` does not fit.
    """
    try:
        try:
            return _opened(data, name, white)
        except (ConfigError, Image.DecompressionBombError):
            raise
        except Exception:
            # Pillow refuses a whole PNG for damaged or large text and colour profiles, which are not in its pixels.
            bare = _without_extras(data)
            if bare is None:
                raise
            return _opened(bare, name, white)
    except ConfigError:
        raise
    except Image.DecompressionBombError as error:
        raise ConfigError(_bomb_message(name, str(error))) from None
    except Exception as error:  # a damaged file makes a decoder raise nearly anything, from OSError to IndexError
        reason = " ".join(str(error).split()) or type(error).__name__
        # pillow's text names the memory buffer that we read from, which says nothing to a user
        reason = "is not an image that can be read" if "cannot identify" in reason else reason
        raise UnreadableImage(f"{name}: {reason}") from error


def _opened(data: bytes, name: str, white: float) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=image_formats()) as image:
        _refuse_bomb(image.size, name)
        cut_to_8_bits = any(";16" in str(arguments) for *_, arguments in image.tile)
        image.load()
        if cut_to_8_bits and not _has_values(image.mode):
            _refuse_black(image)
        plain = as_grey_or_rgb(image, name, white)
        turn = _TURNS.get(_orientation(image))
        return plain if turn is None else plain.transpose(turn)


def _refuse_bomb(size: tuple[int, int], name: str) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit and size[0] * size[1] > limit:
        raise ConfigError(_bomb_message(name, f"{size[0]} x {size[1]} pixels, more than {limit:,}"))


def _bomb_message(name: str, what: str) -> str:
    return f"image {name}: {what}; decoding it could fill the memory (decompression bomb): make it smaller or remove it"


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 (upright) where it is missing or damaged."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged metadata is no reason to do without the image
        return 1


# --- modes ------------------------------------------------------------------------------------------------------------


def as_grey_or_rgb(image: Image.Image, name: str, white: float = 0.0) -> Image.Image:
    """Mode L or RGB of an image of any mode, as `decode` makes it. Raises as it does, and ValueError."""
    return _from_values(image, name, white) if _has_values(image.mode) else _grey_or_rgb(image)


def _has_values(mode: str) -> bool:
    """Whether an image's values have more than 8 bits."""
    return mode in ("I", "F") or mode.startswith("I;16")


def _grey_or_rgb(image: Image.Image) -> Image.Image:
    """Mode L or RGB of an image whose channels have up to 8 bits."""
    mode = image.mode
    if mode in _TRANSPARENT or "transparency" in image.info:
        # pillow has no way from premultiplied grey but this one
        rgba = (image.convert("LA") if mode == "La" else image).convert("RGBA")
        background = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        rgb = Image.alpha_composite(background, rgba).convert("RGB")
        return rgb.convert("L") if mode in ("LA", "La", "L", "1") or (_has_palette(mode) and looks_grey(rgb)) else rgb
    if mode in ("1", "L"):
        return image.convert("L")
    rgb = image.convert("RGB")
    return rgb.convert("L") if _has_palette(mode) and looks_grey(rgb) else rgb


def _has_palette(mode: str) -> bool:
    return mode in ("P", "PA")


def looks_grey(image: Image.Image) -> bool:
    """Whether an image has no colour: mode L, or RGB with three equal channels."""
    if image.mode == "L":
        return True
    red, green, blue = (channel.tobytes() for channel in image.split())
    return red == green == blue


def _from_values(image: Image.Image, name: str, white: float) -> Image.Image:
    """Mode L of a grey image whose values have more than 8 bits."""
    values = np.asarray(image)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("holds values that are not finite")
    low, high = values.min().item(), values.max().item()
    found = f"mode {image.mode}, values {low:,.6g} to {high:,.6g}"
    top = white or _white_of_format(image)
    # --- refuse what would be guessed ---
    if not top:
        raise ValueError(f"{found}: which value is white is not known: set data.white, or save it with 8 bits")
    if low < 0 or high > top:
        said = "data.white =" if white else "white ="
        raise ConfigError(f"image {name}: {found} lie outside 0 to {said} {top:,.6g}: set data.white to fit")
    if not white and 0 < high <= _DARKEST_OF_16_BITS < top:
        likely = (1 << max(8, int(high).bit_length())) - 1
        raise ConfigError(
            f"image {name}: {found} of {top:,} would come out black: set data.white = {likely} (or = {top}, if the "
            "images are as dark as that)"
        )
    # --- scale, some rows at a time: a float64 of every pixel would take gigabytes ---
    bytes_ = np.empty(values.shape, dtype=np.uint8)
    for rows in (slice(start, start + _ROWS) for start in range(0, len(values), _ROWS)):
        if values.dtype.kind == "f" or top != int(top):
            bytes_[rows] = np.floor(values[rows].astype(np.float64) / top * 255 + 0.5)
        else:
            bytes_[rows] = values[rows].astype(np.int64) * 256 // (int(top) + 1)
    if _tiff_tag(image, _TIFF_PHOTOMETRIC) == 0:  # white is zero; pillow heeds that up to 8 bits
        bytes_ = 255 - bytes_
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        bytes_[values == clear] = 255
    return Image.fromarray(bytes_)


def _white_of_format(image: Image.Image) -> int:
    """The largest value of an image's format where that is agreed upon, else 0."""
    if image.mode.startswith("I;16"):
        bits = _tiff_tag(image, _TIFF_BITS)
        return (1 << bits) - 1 if isinstance(bits, int) and 8 < bits < 16 else 0xFFFF
    # pillow gives 16-bit PNG in mode I in some releases, and scales all of PGM's larger ranges to 16 bits
    return 0xFFFF if image.mode == "I" and image.format in ("PNG", "PPM") else 0


def _refuse_black(image: Image.Image) -> None:
    """Raise ValueError where the upper 8 bits of all colours are 0, and pillow has dropped the lower ones."""
    colours = "L" if image.mode in ("L", "LA") else "RGB"
    if not any(np.asarray(image.getchannel(c)).any() for c in colours if c in image.getbands()):
        raise ValueError(f"mode {image.mode} of 16 bits, all values from 0 to 255 of 65,535: save it with 8 bits")


def _tiff_tag(image: Image.Image, tag: int) -> Any:
    """A TIFF's tag, of several values the first; None for other formats."""
    value = getattr(image, "tag_v2", {}).get(tag)
    return value[0] if isinstance(value, tuple) and value else value


# --- PNG --------------------------------------------------------------------------------------------------------------


def _without_extras(data: bytes) -> bytes | None:
    """A PNG without what is not in its pixels (texts, colour profile, ...); None where nothing is to be left out."""
    if not data.startswith(_PNG_SIGNATURE):
        return None
    kept = [chunk for kind, chunk in _png_chunks(data) if kind[:1].isupper() or kind in _PNG_KEPT]
    bare = _PNG_SIGNATURE + b"".join(kept)
    return bare if len(bare) < len(data) else None


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, whole chunk) one after the other; the last one may be cut off."""
    place = len(_PNG_SIGNATURE)
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        yield data[place + 4 : place + 8], data[place:end]
        place = end
