"""A ladder of model sizes, from the demos' to the published recipes'. Every rung is one rule over all image sizes.

Widths are those at 64 pixels and change with one over the square root of the image's side, as the published recipes'
do: 128 channels at 32 pixels, 64 at 64, 30 at 256 (arXiv 2007.03898, table 6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nvae_lowmem.config.model import ModelConfig

SMALLEST_SIDE, LARGEST_SIDE = 16, 1024
"""Pixels per side of the images that the ladder has models for."""
_LEAST_WIDTH, _WIDTH_STEP = 8, 4
_COARSEST, _FINEST_OF_COARSEST = 4, 8


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

    def model(self, image_size: int, image_channels: int, bits: int, padding: int, mixtures: int) -> ModelConfig:
        """The network of this rung for such images."""
        side = image_size + 2 * padding
        finest = min(self.finest, side // 2)
        coarsest = min(max(side // 16, _COARSEST), _FINEST_OF_COARSEST, finest)
        halvings = int(math.log2(side // finest))
        width = self.width_at(side)
        return ModelConfig(
            image_channels=image_channels, image_size=image_size, padding=padding, bits=bits, mixtures=mixtures,
            channels_encoder=width, channels_decoder=width,
            scales=1 + int(math.log2(finest // coarsest)), groups=self.groups, min_groups=2, latents=self.latents,
            cells_encoder=self.cells, cells_decoder=self.cells,
            preprocess_blocks=halvings, postprocess_blocks=halvings,
            preprocess_cells=self.cells, postprocess_cells=self.cells,
        )  # fmt: skip

    def width_at(self, side: int) -> int:
        """Channels at the image's resolution: a multiple of 4, at least 8."""
        return max(_LEAST_WIDTH, round(self.width * math.sqrt(64 / side) / _WIDTH_STEP) * _WIDTH_STEP)


# fmt: off
LADDER: tuple[Rung, ...] = tuple(
    Rung(number=number, width=width, groups=groups, latents=latents, cells=cells, finest=finest)
    for number, (width, groups, latents, cells, finest) in enumerate([
        # width groups latents cells finest
        (8,     3,     8,      1,    16),    # the demos
        (12,    4,     12,     1,    16),
        (16,    6,     16,     1,    32),
        (24,    8,     20,     2,    32),
        (32,    12,    20,     2,    128),
        (48,    16,    20,     2,    128),
        (64,    20,    20,     2,    128),   # the published recipe at 64 pixels
    ])
)
# fmt: on
