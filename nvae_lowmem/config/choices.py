"""Words that flags choose from and the work obeys. They stand here because a command line must not wait for torch."""

from __future__ import annotations

from typing import Literal

DeviceChoice = Literal["auto", "cpu", "cuda"]
"""auto: the GPU where there is one."""

Posterior = Literal["sample", "mean"]
"""Which z an image has: a draw from q(z|x), or the mean of every group's q given the groups above it."""

BlendMode = Literal["linear", "scales", "simple"]
"""linear: both posteriors mixed group by group, each given what the groups above became; scales: coarse groups of one
image, fine ones of the other; simple: the latents of two independent passes, mixed."""

Prefer = Literal["speed", "batch", "groups"]
"""What a planner gains with the card's memory."""
