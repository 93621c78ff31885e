"""A look at images before anything is decided: how many, which colours and sizes, what a crop cuts off.

    look = look_at(DataConfig(source="photos.zip"), size=0)
    look.images, look.channels, look.native_side, look.lost_share

A look takes seconds on any set: names are counted, and at most `LOOKED_AT` images, evenly spread, are decoded.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import DataConfig, Profile
from nvae_lowmem.data.decode import UnreadableImage, looks_grey
from nvae_lowmem.data.pipeline import to_network
from nvae_lowmem.data.preparation import CELEBA_SIZE, Preparation
from nvae_lowmem.data.randomness import Stream, keys
from nvae_lowmem.data.sources import open_parts
from nvae_lowmem.data.stores import Store
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.progress import Log

LOOKED_AT = 200
_MOST_PIXELS = 300_000_000  # decoded in one look: about five seconds, and 25 images of a large camera
_SMALL_SIDE = 64
"""Images whose sides are at most this are trained at their own size."""
PHOTOGRAPH_SHARE = 0.2
"""A pixel of a photograph is seldom near black or white; of MNIST's digits, 5 % are between."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a source of images holds, as far as a look can tell."""

    description: str
    images: int
    """Readable or not; where the source has a part of held-out ones, without these."""
    has_test_part: bool
    looked_at: int
    unreadable: int
    """Of those that were looked at."""
    grey: int
    """Of those that were looked at: images without colour."""
    levels: int
    """Different values of all channels together, 2 to 256: 2 are black and white."""
    least_size: tuple[int, int]
    """Width and height of the image with the shortest side."""
    most_size: tuple[int, int]
    """Of the one with the longest shortest side."""
    same_size: bool
    lost_share: float
    """Mean share of an image's pixels that the centred square leaves out."""
    most_lost_share: float
    middle_share: float
    """Share of pixels, cropped and resized, that are neither dark nor light."""

    def training_images(self, config: DataConfig) -> int:
        """How many are left to train on, about: which ones are held out is a matter of their names."""
        held_out = 0 if self.has_test_part else max(1, round(config.test_fraction * self.images))
        return max(0, min(self.images - held_out, config.max_images or self.images))

    @property
    def channels(self) -> int:
        """1 where every image that was looked at is grey, else 3 (a mixed set is trained in colour)."""
        return 1 if self.grey == self.looked_at - self.unreadable else 3

    @property
    def native_side(self) -> int:
        """Pixels per side to train at when nobody says otherwise: the images' own where they are small, else 64.

        An even number, because padding is the same on both sides.
        """
        side = min(self.least_size)
        return side + side % 2 if side <= _SMALL_SIDE else _SMALL_SIDE

    @property
    def binary_like(self) -> bool:
        """Whether one bit per pixel says what these images say: grey, and nearly all of it dark or light."""
        return self.channels == 1 and self.middle_share < PHOTOGRAPH_SHARE

    @property
    def is_aligned_celeba(self) -> bool:
        """Whether all images have the size of CelebA's aligned ones, for which there is a published square."""
        return self.same_size and self.least_size == CELEBA_SIZE


def look_at(config: DataConfig, size: int = 0, *, log: Log = print) -> Look:
    """Look at the images of `config.source`; size: that they are to be trained at, 0: their own.

    Raises ConfigError where the source is none, and where not one of the images that were looked at can be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        # drawn faces have the size that they are asked for
        whole, test = open_parts(config, ModelConfig(image_size=size or _SMALL_SIDE, image_channels=3), log=log)
        return _looked(whole, test is not None, config, size)


def _looked(store: Store, has_test_part: bool, config: DataConfig, size: int) -> Look:
    sizes: list[tuple[int, int]] = []
    levels = np.zeros(256, dtype=bool)
    grey = unreadable = pixels = looked_at = 0
    middle: list[float] = []
    problem = ""
    for number in spread(len(store), LOOKED_AT):
        if pixels > _MOST_PIXELS:
            break
        looked_at += 1
        try:
            image = store.image(number)
        except UnreadableImage as error:
            unreadable, problem = unreadable + 1, str(error)
            continue
        pixels += image.width * image.height
        sizes.append(image.size)
        grey += looks_grey(image)
        levels[np.unique(np.asarray(image))] = True
        prepare = Preparation(channels=1, size=size or min(_SMALL_SIDE, *image.size), crop="centre", crop_pixels=0)
        values = prepare(image, store.name(number))
        middle.append(middle_share(values))
    if not sizes:
        raise ConfigError(f"{store.description}: none of the {looked_at} images looked at can be read: {problem}")
    lost = [1 - min(w, h) / max(w, h) for w, h in sizes]
    return Look(
        description=store.description,
        images=len(store),
        has_test_part=has_test_part,
        looked_at=looked_at,
        unreadable=unreadable,
        grey=grey,
        levels=int(levels.sum()),
        least_size=min(sizes, key=min),
        most_size=max(sizes, key=min),
        same_size=len(set(sizes)) == 1,
        lost_share=float(np.mean(lost)),
        most_lost_share=max(lost),
        middle_share=float(np.mean(middle)),
    )


def middle_share(pixels: np.ndarray) -> float:
    """Share of bytes that are neither dark nor light: above 63 and below 192."""
    return float(((pixels > 63) & (pixels < 192)).mean())


def spread(total: int, count: int) -> list[int]:
    """At most `count` numbers from 0 to total - 1, evenly spread and rising."""
    if total <= count:
        return list(range(total))
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def seen_by_training(profile: Profile, count: int, *, log: Log = print) -> Tensor:
    """What the network will see of `count` images: cropped, resized, in the model's bits; (B, C, S, S) fp32 in [0, 1].

    Fewer where the source has fewer or some cannot be read. Raises ConfigError for images that the settings do not fit.
    """
    prepare = Preparation.of(profile.data, profile.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        store, _ = open_parts(profile.data, profile.model, log=log)
        found = []
        for number in spread(len(store), count):
            try:
                found.append(prepare(store.image(number), store.name(number)))
            except UnreadableImage:
                continue
    if not found:
        raise ConfigError(f"{store.description}: none of {count} images can be read")
    binary = profile.model.bits == 1 and profile.data.dynamic_binarisation
    key = keys(profile.training.seed, Stream.BINARISE, np.arange(len(found))) if binary else None
    return to_network(torch.from_numpy(np.stack(found)), replace(profile.model, padding=0), key)
