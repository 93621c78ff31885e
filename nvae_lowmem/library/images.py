"""Images in and out of the library: tensors, arrays, PIL images and files become one batch, and a batch any of them.

Legend: B images, C image channels, S pixels per side, S' = S + 2 padding pixels per side inside the network.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.data.decode import as_grey_or_rgb
from nvae_lowmem.data.image_files import load_images
from nvae_lowmem.data.pipeline import to_network
from nvae_lowmem.data.preparation import Preparation
from nvae_lowmem.errors import ConfigError

Images = Any
"""A tensor or an array, one PIL image or file name, or a sequence of them: see `as_batch`."""
Output = Literal["tensor", "array", "pil"]
"""What comes out: a tensor (B, C, S, S) fp32 in [0, 1], an array (B, S, S, C) uint8, or a list of PIL images."""


def as_batch(images: Images, profile: Profile) -> Tensor:
    """Any kind of images as the network takes them: (B, C, S', S') fp32 in [0, 1], with the model's bits and padding.

    Tensors are (B, C, S, S) or (C, S, S), arrays (B, S, S, C), (S, S, C) or (S, S); both uint8 from 0 to 255, or
    floating point from 0 to 1, and already of the model's size. PIL images and files may have any size: they are
    squared, resized and given the model's colours as the run's own data were. A sequence may mix all of them.

    Raises ConfigError, naming the image: a wrong shape, range or type, a file that is no image, no images at all.
    """
    return to_network(as_pixels(images, profile), profile.model, None)


def as_pixels(images: Images, profile: Profile, where: str = "images") -> Tensor:
    """The same images as data sets keep them: (B, C, S, S) uint8. Raises ConfigError as `as_batch` does."""
    if isinstance(images, (Tensor, np.ndarray, str, os.PathLike, Image.Image)):
        pixels = [_of_one(images, profile, where)]
    elif isinstance(images, Sequence):
        pixels = [_of_one(image, profile, f"{where}[{i}]") for i, image in enumerate(images)]
    else:
        raise ConfigError(
            f"{where}: {type(images).__name__} is no tensor, array, PIL image or file name, and no list of them"
        )
    if not pixels or not sum(map(len, pixels)):
        raise ConfigError(f"{where}: there are none; give at least one")
    return torch.cat(pixels)


def as_output(images: Tensor, output: Output) -> Any:
    """Images (B, C, S, S) fp32 in [0, 1] as what was asked for. Raises ConfigError for an unknown output."""
    if output == "tensor":
        return images
    if output not in ("array", "pil"):
        raise ConfigError(f"output = {output!r}: must be 'tensor', 'array' or 'pil'")
    array = images.mul(255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    if output == "array":
        return array
    return [Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image) for image in array]


def _of_one(image: Any, profile: Profile, where: str) -> Tensor:
    """(b, C, S, S) uint8 of one entry of a sequence."""
    if isinstance(image, Tensor):
        return _of_tensor(image, profile, where)
    if isinstance(image, np.ndarray):
        return _of_array(image, profile, where)
    if isinstance(image, Image.Image):
        prepare = Preparation.of(profile.data, profile.model)
        try:
            plain = as_grey_or_rgb(image, where, profile.data.white)
        except (ValueError, OSError) as error:
            raise ConfigError(f"{where}: {error}") from None
        return torch.tensor(prepare(plain, where))[None]
    if isinstance(image, (str, os.PathLike)):
        return _without_network_form(load_images([str(Path(image))], profile), profile)
    raise ConfigError(f"{where}: {type(image).__name__} is no tensor, array, PIL image or file name")


def _without_network_form(batch: Tensor, profile: Profile) -> Tensor:
    """(B, C, S', S') as `to_network` made it, back to bytes that it makes the same of."""
    p, levels = profile.model.padding, (1 << profile.model.bits) - 1
    inner = batch[:, :, p:-p, p:-p] if p else batch
    return (inner * levels).round().mul(1 << (8 - profile.model.bits)).to(torch.uint8)


def _of_tensor(images: Tensor, profile: Profile, where: str) -> Tensor:
    batch = images[None] if images.ndim == 3 else images
    return _bytes(batch.detach().cpu(), profile, where, "(B, C, S, S) or (C, S, S)")


def _of_array(images: np.ndarray, profile: Profile, where: str) -> Tensor:
    layout = "(B, S, S, C), (S, S, C) or (S, S)"
    batch = images[None, :, :, None] if images.ndim == 2 else images[None] if images.ndim == 3 else images
    if batch.ndim != 4:
        raise ConfigError(f"{where}: an array of shape {images.shape} is no image: give {layout}")
    pixels = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)))
    return _bytes(pixels, profile, where, layout)


def _bytes(batch: Tensor, profile: Profile, where: str, layout: str) -> Tensor:
    """The batch (B, C, S, S) as uint8. Raises ConfigError for another shape, and for values outside the range."""
    c = profile.model
    wanted = (c.image_channels, c.image_size, c.image_size)
    if batch.ndim != 4 or tuple(batch.shape[1:]) != wanted:
        raise ConfigError(
            f"{where}: the model takes {c.image_channels} channels of {c.image_size} x {c.image_size}, {layout}; "
            f"these have shape {tuple(batch.shape)} (PIL images and files would be resized)"
        )
    if batch.dtype == torch.uint8:
        return batch
    if not batch.is_floating_point():
        raise ConfigError(f"{where}: {batch.dtype} has no known range: give uint8, or floats from 0 to 1")
    low, high = (float(batch.min()), float(batch.max())) if batch.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise ConfigError(f"{where}: floats go from 0 to 1, and these from {low:g} to {high:g}")
    return batch.float().mul(255).round().to(torch.uint8)
