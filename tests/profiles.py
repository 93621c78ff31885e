"""Profiles of models so small that a step of them is traced in a second."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import Profile, TrainConfig
from nvae_lowmem.hardware.budget import Budget
from nvae_lowmem.units import GIB, MIB

SMALL_RGB = ModelConfig(
    image_channels=3, image_size=16, mixtures=2, channels_encoder=8, channels_decoder=8, scales=2, groups=2,
    adaptive=False, latents=3, cells_encoder=1, cells_decoder=1, preprocess_blocks=1, preprocess_cells=1,
    postprocess_blocks=1, postprocess_cells=1, flows=1,
)  # fmt: skip
NANO = replace(SMALL_RGB, image_size=8, channels_encoder=4, channels_decoder=4, scales=1, latents=2, flows=0)


def profile_of(model: ModelConfig = NANO, clip_norm: float = 0.0, **plan: Any) -> Profile:
    """A profile for the torch engine in fp32, unless the plan's changes say otherwise."""
    base = Profile(model=model, training=TrainConfig(clip_norm=clip_norm))
    return base.with_plan(**{"engine": "torch", "precision": "fp32", **plan})


def budget_of(cap_bytes: int) -> Budget:
    """That cap on a card of 4 GiB with a context of 160 MiB."""
    return Budget(cap_bytes=cap_bytes, total_bytes=4 * GIB, context_bytes=160 * MIB, reason="test")
