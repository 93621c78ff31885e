"""A ladder of model sizes, from the demos' to the published recipes', and what each of them needs to be worth it.

Every rung is one rule over all image sizes. Widths are those at 64 pixels and go with one over the square root of the
image's side, as the published recipes' do: 128 channels at 32 pixels, 64 at 64, 30 at 256 (arXiv 2007.03898, table 6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.errors import ConfigError

SMALLEST_SIDE, LARGEST_SIDE = 8, 512
"""Pixels per side of the images that the ladder has models for."""
_MULTIPLE, _MULTIPLE_ABOVE_256 = 16, 32
"""Of pixels that the network works on: what its halvings down to 16 or fewer pixels need; the rest is padded."""
_LEAST_WIDTH, _WIDTH_STEP = 8, 4
_LEAST_GROUPS = 2


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One size of model."""

    number: int
    width: int
    """Channels at the image's resolution for images of 64 pixels."""
    groups: int
    """Latent groups of the finest scale; half as many on each coarser one, at least two."""
    latents: int
    """Latent channels of a group."""
    cells: int
    """Cells per group of either tower, and per pre- and post-process block."""
    finest: int
    """Latents begin at this many pixels per side, or at half the image's where that is less."""
    coarsest: int
    """They end at this many; small models have too few groups to reach over the whole image otherwise."""
    mixtures: int
    """Components of the likelihood of images in more than one bit."""
    images_seen: int
    """The fewest images seen in training for which this rung is taken (docs/hours.md)."""
    training_images: int
    """The fewest different ones."""

    def model(self, image_size: int, image_channels: int, bits: int) -> ModelConfig:
        """The network of this rung for such images."""
        padding = padding_of(image_size)
        side = image_size + 2 * padding
        halvings = 1
        while side >> halvings > self.finest:
            halvings += 1
        scales, coarsest = 1, side >> halvings
        while coarsest % 2 == 0 and coarsest // 2 >= self.coarsest:
            scales, coarsest = scales + 1, coarsest // 2
        width = self.width_at(side)
        return ModelConfig(
            image_channels=image_channels, image_size=image_size, padding=padding, bits=bits, mixtures=self.mixtures,
            channels_encoder=width, channels_decoder=width,
            scales=scales, groups=self.groups, min_groups=_LEAST_GROUPS, latents=self.latents,
            cells_encoder=self.cells, cells_decoder=self.cells,
            preprocess_blocks=halvings, postprocess_blocks=halvings,
            preprocess_cells=self.cells, postprocess_cells=self.cells,
        )  # fmt: skip

    def width_at(self, side: int) -> int:
        """Channels at the resolution of an image of so many pixels per side: a multiple of 4, at least 8."""
        return max(_LEAST_WIDTH, round(self.width * math.sqrt(64 / side) / _WIDTH_STEP) * _WIDTH_STEP)


def padding_of(image_size: int) -> int:
    """Zero pixels on each side of the image for the network. Raises ConfigError for a size there is no model for."""
    if not SMALLEST_SIDE <= image_size <= LARGEST_SIDE or image_size % 2:
        nearest = min(max(image_size + image_size % 2, SMALLEST_SIDE), LARGEST_SIDE)
        raise ConfigError(
            f"--size {image_size}: models are chosen for images of an even number of pixels per side from "
            f"{SMALLEST_SIDE} to {LARGEST_SIDE}: the nearest is --size {nearest}, and 32, 64, 128 and 256 need no "
            "padding"
        )
    return -image_size % (_MULTIPLE if image_size <= 256 else _MULTIPLE_ABOVE_256) // 2


# The last two columns. Rung 6 is what was published: with 12 to 24 million images seen of 27,000 and more (CelebA-HQ),
# and a third of the least of these is taken as enough. From there down they shrink by about one factor per rung. So far
# benchmarks/hours_study.py has shown only that below 2,000 images seen smaller is better: where rungs 1 and 2 overtake
# is for a longer study to say (docs/hours.md).
# fmt: off
LADDER: tuple[Rung, ...] = tuple(
    Rung(number=number, width=width, groups=groups, latents=latents, cells=cells, finest=finest, coarsest=coarsest,
         mixtures=mixtures, images_seen=seen, training_images=different)
    for number, (width, groups, latents, cells, finest, coarsest, mixtures, seen, different) in enumerate([
        # width groups latents cells finest coarsest mixtures images seen  different
        (8,     3,     8,      1,    16,    4,       3,       0,           0),        # the demos
        (12,    4,     12,     1,    16,    4,       3,       40_000,      800),
        (16,    6,     16,     1,    32,    4,       3,       100_000,     1_700),
        (24,    8,     20,     2,    32,    8,       10,      250_000,     3_400),
        (32,    12,    20,     2,    128,   8,       10,      650_000,     6_800),
        (48,    16,    20,     2,    128,   8,       10,      1_600_000,   13_500),
        (64,    20,    20,     2,    128,   8,       10,      4_000_000,   27_000),   # the published recipes
    ])
)
# fmt: on
