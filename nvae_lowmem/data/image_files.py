"""Images named one by one: read as a run's own data were, or a square cut out of them by hand.

Legend: B images, C image channels, S pixels per side, S' = S + 2 padding pixels per side inside the network.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.data.decode import MAX_FILE_BYTES, UnreadableImage, decode
from nvae_lowmem.data.pipeline import to_network
from nvae_lowmem.data.preparation import Preparation
from nvae_lowmem.errors import ConfigError, printable


class Box(NamedTuple):
    """A square of an image, in its pixels: left and upper edge, and the side."""

    left: int
    top: int
    side: int


def parse_box(text: str) -> Box:
    """The square "x,y,w,h" with w = h. Raises ConfigError for anything else."""
    try:
        x, y, width, height = (int(part) for part in text.split(","))
    except ValueError:
        x = y = width = height = -1
    if min(x, y) < 0 or width < 1 or width != height:
        raise ConfigError(
            f"--box {text}: must be x,y,w,h in pixels: the upper left corner and two equal sides, as in 40,10,148,148"
        )
    return Box(x, y, width)


def load_images(paths: Sequence[str], profile: Profile, boxes: Sequence[str] = ()) -> Tensor:
    """Image files as a run's own data: squared, resized, its colours and bits, padded; (B, C, S', S') fp32 in [0, 1].

    boxes: `x,y,w,h` of the square to take, none, one for all images, or one for each. Without one the square is that
    of the run's data settings. Binary models get pixels on either side of 1/2, not random ones.
    Raises ConfigError: a file that is missing or no image, a box that does not fit, more or fewer boxes than images.
    """
    if len(boxes) not in (0, 1, len(paths)):
        raise ConfigError(f"--box is given {len(boxes)} times for {len(paths)} images: give it once, or once per image")
    per_image: list[str | None] = [*boxes] * len(paths) if len(boxes) == 1 else [*boxes] or [None] * len(paths)
    prepare = Preparation.of(profile.data, profile.model)
    images = []
    for path, box in zip(paths, per_image, strict=True):
        image, path = _read(path, profile.data.white), printable(path)
        if box is None:
            pixels = prepare(image, path)
        else:
            pixels = replace(prepare, crop="centre", crop_pixels=0)(_cut(image, parse_box(box), path), path)
        images.append(torch.tensor(pixels))
    return to_network(torch.stack(images), profile.model, None)


def _read(path: str, white: float) -> Image.Image:
    name = printable(path)
    try:
        if os.path.getsize(path) > MAX_FILE_BYTES:
            raise ConfigError(f"image {name}: larger than {MAX_FILE_BYTES >> 20} MiB; make it smaller")
        with warnings.catch_warnings():  # pillow warns at the number of pixels that `decode` refuses with a message
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return decode(Path(path).read_bytes(), name, white)
    except OSError as error:
        raise ConfigError(f"image {name}: cannot be read: {error.strerror or error}") from None
    except UnreadableImage as error:
        raise ConfigError(f"image {error}; give a PNG, JPEG or WebP file") from None


def _cut(image: Image.Image, box: Box, path: str) -> Image.Image:
    right, bottom = box.left + box.side, box.top + box.side
    if right > image.width or bottom > image.height:
        raise ConfigError(
            f"--box {box.left},{box.top},{box.side},{box.side} reaches beyond image {path}, which is "
            f"{image.width} x {image.height} pixels (width x height)"
        )
    return image.crop((box.left, box.top, right, bottom))
