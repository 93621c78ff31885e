"""Blend two images in the latent groups: every group by its own weight, later groups knowing what earlier ones became.

The posterior of a group depends on all groups above it. So a blend is no mix of finished latents: the top-down pass
runs on rows in pairs, one with the encoder's maps of A and one with those of B. In each group both posteriors are asked
what they want given the state so far, their answers are mixed, and both rows go on with the same z.
Legend: P points (blends of one pair), groups counted from the top (lowest resolution) down; weight 0 is A, 1 is B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nvae_lowmem.config import ConfigError, ModelConfig
from nvae_lowmem.generation import grids
from nvae_lowmem.generation.images import numbers
from nvae_lowmem.generation.reconstruct import RowNoise, reconstruct
from nvae_lowmem.generation.sample import Progress
from nvae_lowmem.model.latents import FlowFunction, FromPosterior, Given, Latent, Noise, NoNoise, Normal
from nvae_lowmem.model.nvae import NVAE

Mode = Literal["linear", "scales", "simple"]
A_SLOT, B_SLOT = 0, 1


# --- mixing -----------------------------------------------------------------------------------------------------------


def mix_normals(a: Normal, b: Normal, weight: Tensor) -> Normal:
    """The normal between two: means linearly, sigmas geometrically; exactly a at weight 0 and exactly b at weight 1."""
    # a product of powers, not the exponential of mixed logarithms, which would not give sigma back to the last bit
    return Normal(torch.lerp(a.mu, b.mu, weight), a.sigma.pow(1 - weight) * b.sigma.pow(weight))


def spherical(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Between two draws of noise (P, L, h, w) along the great circle; exactly a at weight 0 and exactly b at weight 1.

    A straight line would lead through the middle of the sphere near which all normal draws of many dimensions lie.
    sin((1-t) w) / sin(w) a + sin(t w) / sin(w) b, w the angle between a and b; straight where that angle vanishes.
    """
    dot, norms = (a * b).sum((1, 2, 3), keepdim=True), a.norm(dim=(1, 2, 3), keepdim=True) * b.norm(
        dim=(1, 2, 3), keepdim=True
    )
    angle = torch.acos((dot / norms.clamp(min=1e-12)).clamp(-1, 1))
    sine = angle.sin()
    straight = sine < 1e-4
    divisor = torch.where(straight, torch.ones_like(sine), sine)
    curved = torch.sin((1 - weight) * angle) / divisor * a + torch.sin(weight * angle) / divisor * b
    return torch.where(straight, torch.lerp(a, b, weight), curved)


@dataclass(frozen=True)
class Blend:
    """The merged z of pairs: rows 0 ... P-1 of the batch have A's maps, rows P ... 2P-1 those of B.

    weights: (groups, P) in [0, 1]. noise: of all 2P rows.
    """

    weights: Tensor
    noise: Noise

    def latent(self, group: int, prior: Normal, posterior: Normal | None, flow: FlowFunction | None) -> Latent:
        """z0 = mixed mu + mixed sigma * mixed eps, the same for both rows of a pair; z = flow(z0)."""
        assert posterior is not None, "a blend needs images"
        weight = self.weights[group].to(posterior.mu.device).view(-1, 1, 1, 1)
        eps_a, eps_b = self.noise.normal(group, posterior.mu.shape, posterior.mu.device).chunk(2)
        a, b = (Normal(*halves) for halves in zip(posterior.mu.chunk(2), posterior.sigma.chunk(2), strict=True))
        mixed = mix_normals(a, b, weight).draw(spherical(eps_a, eps_b, weight))
        z0 = torch.cat([mixed, mixed])
        return Latent(z0 if flow is None else flow(z0))


# --- where a blend goes -----------------------------------------------------------------------------------------------


def parse_weights(text: str, config: ModelConfig) -> Tensor:
    """(groups,) from the top, of "0.5", or one number per scale or per group, HIGHEST RESOLUTION FIRST.

    Raises ConfigError for another count, and for weights outside 0 to 1.
    """
    weights = numbers(text, "--weights", float)
    if not all(0 <= weight <= 1 for weight in weights):
        raise ConfigError(f"--weights {text}: every weight must be from 0 (the first image) to 1 (the second)")
    if len(weights) == 1:
        per_group = weights * config.total_groups
    elif len(weights) == config.scales:
        per_group = [w for w, count in zip(weights, config.scale_groups, strict=True) for _ in range(count)]
    elif len(weights) == config.total_groups:
        per_group = weights
    else:
        raise ConfigError(
            f"--weights {text}: {len(weights)} weights; give 1 for all, {config.scales} for the scales or "
            f"{config.total_groups} for the groups of this model, highest resolution first"
        )
    return torch.tensor(per_group[::-1], dtype=torch.float32)


def parse_split(text: str, config: ModelConfig) -> int:
    """How many groups from the top are coarse: of "scale:N" (the N lowest resolutions) or "group:N"; empty: half.

    Half: of the scales where there are several, of the groups otherwise. Raises ConfigError for anything else.
    """
    from_top = config.scale_groups[::-1]
    if not text:
        return sum(from_top[: config.scales // 2]) if config.scales > 1 else config.total_groups // 2
    kind, _, count_text = text.partition(":")
    most = {"scale": config.scales, "group": config.total_groups}.get(kind)
    if most is None or not count_text.isdecimal() or int(count_text) > most:
        raise ConfigError(
            f"--split {text}: must be scale:N with N from 0 to {config.scales}, or group:N with N from 0 to "
            f"{config.total_groups}; N lowest resolutions, or first groups, belong to the first image"
        )
    return sum(from_top[: int(count_text)]) if kind == "scale" else int(count_text)


def strip_weights(end: Tensor, steps: int) -> Tensor:
    """(steps, groups): from A (all 0) in equal steps to the weights `end` (groups,); one step: only these."""
    _at_least_one("--steps", steps)
    shares = torch.linspace(0, 1, steps)[:, None] if steps > 1 else torch.ones(1, 1)
    return shares * end


def matrix_weights(steps: int, split: int, groups: int) -> Tensor:
    """(steps * steps, groups): row by row a larger weight of the first `split` groups, within a row of the others."""
    if steps < 2:
        raise ConfigError(f"--matrix {steps}: must be at least 2 (or 0 for no matrix)")
    shares = torch.linspace(0, 1, steps)
    coarse = shares.repeat_interleave(steps)[:, None].expand(-1, split)
    fine = shares.repeat(steps)[:, None].expand(-1, groups - split)
    return torch.cat([coarse, fine], dim=1)


def scale_weights(splits: Sequence[int], groups: int) -> Tensor:
    """(len(splits), groups): the first groups, as many as the split says, from A, the others from B."""
    return torch.stack([(torch.arange(groups) >= split).float() for split in splits])


def even_splits(steps: int, groups: int) -> list[int]:
    """From all groups of A to none, in at most so many even steps."""
    _at_least_one("--steps", steps)
    if steps == 1:
        return [groups // 2]
    cuts = (round(groups * (steps - 1 - i) / (steps - 1)) for i in range(steps))
    return sorted(set(cuts), reverse=True)


def _at_least_one(flag: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{flag} {value}: must be at least 1")


# --- the pass ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def blend_images(
    model: NVAE,
    pair: Tensor,
    weights: Tensor,
    mode: Mode = "linear",
    posterior: Literal["sample", "mean"] = "sample",
    seed: int = 0,
    micro_batch: int = 16,
    progress: Progress | None = None,
) -> Tensor:
    """Blends of the images A and B, `pair` (2, C, S', S'), at weights (P, groups): (P, C, S, S) in [0, 1] on the host.

    posterior: z with the noise of `reconstruct`, or the posteriors' means. mode simple: the latents of two independent
    passes, mixed linearly, whatever the groups above became; any other mode: groups merged from the top down.
    """
    assert pair.shape[0] == 2 and not model.training, (pair.shape, model.training)
    ends = _ends(model, pair, posterior, seed, micro_batch)
    # Kernels round differently at other batch sizes. So where a blend is A or B, it is taken from the reconstruction's
    # own pass: the ends of a strip are the reconstructions to the last bit.
    pure = {i: int(row[0]) for i, row in enumerate(weights) if bool((row == 0).all() or (row == 1).all())}
    open_points = [i for i in range(len(weights)) if i not in pure]
    out = torch.stack([ends[pure.get(i, 0)] for i in range(len(weights))])
    run = _Simple(model, pair, posterior, seed) if mode == "simple" else _Merged(model, pair, posterior, seed)
    chunk = max(1, micro_batch // run.rows_per_point)
    for first in range(0, len(open_points), chunk):
        points = open_points[first : first + chunk]
        out[points] = model.likelihood.mean(run.parameters(weights[points])).cpu()
        if progress is not None:
            progress(first + len(points), len(open_points))
    return out
