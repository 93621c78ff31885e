"""Blend two images in the latent groups: every group by its own weight, later groups knowing what earlier ones became.

The posterior of a group depends on all groups above it. So a blend is no mix of finished latents: the top-down pass
runs on rows in pairs, one with the encoder's maps of A and one with those of B. In each group both posteriors are asked
what they want given the state so far, their answers are mixed, and both rows go on with the same z.
Legend: P points (blends of one pair), groups counted from the top (lowest resolution) down; weight 0 is A, 1 is B.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nvae_lowmem.config.choices import BlendMode, Posterior
from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.files import writable_file, write_atomically
from nvae_lowmem.generation import grids
from nvae_lowmem.generation.reconstruct import posterior_noise, reconstruct
from nvae_lowmem.generation.sample import decoded_mean
from nvae_lowmem.model.latents import FlowFunction, FromPosterior, Latent, Noise, Normal
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.progress import OnProgress
from nvae_lowmem.units import numbers

A_SLOT, B_SLOT = 0, 1  # of the noise, as `reconstruct` numbers them
STRIP_COLUMNS = 16
ANIMATIONS = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG"}


# --- mixing -----------------------------------------------------------------------------------------------------------


def mix_normals(a: Normal, b: Normal, weight: Tensor) -> Normal:
    """The normal between two: means linearly, sigmas geometrically; exactly a at weight 0 and exactly b at weight 1."""
    between = torch.lerp(a.sigma.log(), b.sigma.log(), weight).exp()
    # a logarithm and its exponential do not give a number back to the last bit
    sigma = torch.where(weight == 0, a.sigma, torch.where(weight == 1, b.sigma, between))
    return Normal(torch.lerp(a.mu, b.mu, weight), sigma)


def spherical(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Between two draws of noise (P, L, h, w) along the great circle; exactly a at weight 0 and exactly b at weight 1.

    A straight line would lead through the middle of the sphere near which all normal draws of many dimensions lie.
    sin((1-t) w) / sin(w) a + sin(t w) / sin(w) b, w the angle between a and b; straight where that angle vanishes.
    """
    dot = (a * b).sum((1, 2, 3), keepdim=True)
    length_a, length_b = (torch.linalg.vector_norm(eps, dim=(1, 2, 3), keepdim=True) for eps in (a, b))
    angle = torch.acos((dot / (length_a * length_b).clamp(min=1e-12)).clamp(-1, 1))
    sine = angle.sin()
    straight = sine < 1e-4
    divisor = torch.where(straight, torch.ones_like(sine), sine)
    curved = torch.sin((1 - weight) * angle) / divisor * a + torch.sin(weight * angle) / divisor * b
    return torch.where(straight, torch.lerp(a, b, weight), curved)


@dataclass(frozen=True)
class MergedPosteriors:
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


@dataclass(frozen=True)
class MixedLatents:
    """z = (1 - w) z_A + w z_B in every group; latents (2, L, h, w) of A and B per group, weights (groups, P)."""

    latents: Sequence[Tensor | None]
    weights: Tensor

    def latent(self, group: int, prior: Normal, posterior: Normal | None, flow: FlowFunction | None) -> Latent:
        """The mixed z, made when its group is reached: of all groups at once they would fill memory needlessly."""
        z = self.latents[group]
        assert z is not None, "the pass must keep its z"
        return Latent(torch.lerp(z[:1], z[1:], self.weights[group].to(z.device).view(-1, 1, 1, 1)))


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


def path_weights(config: ModelConfig, mode: BlendMode, weights: str, split: str, steps: int) -> Tensor:
    """(P, groups): the points of a strip, or of an animation, from A to B.

    linear, simple: `steps` equal steps from A to the blend at `weights`; one step: only that blend.
    scales: B's groups follow A's at `split`; without a split, every one of at most `steps` even splits.
    Raises ConfigError for what does not fit the model or the mode.
    """
    if steps < 1:
        raise ConfigError(f"--steps {steps}: must be at least 1")
    if mode != "scales":
        shares = torch.linspace(0, 1, steps)[:, None] if steps > 1 else torch.ones(1, 1)
        return shares * parse_weights(weights, config)
    if weights != "1":
        raise ConfigError(f"--weights {weights}: --mode scales takes whole groups of either image: use --split instead")
    groups = config.total_groups
    splits = [parse_split(split, config)] if split else _even_splits(steps, groups)
    return torch.stack([(torch.arange(groups) >= first).float() for first in splits])


def matrix_weights(config: ModelConfig, mode: BlendMode, split: str, steps: int) -> Tensor:
    """(steps * steps, groups): row by row more of B in the coarse groups, within a row more of B in the fine ones.

    Raises ConfigError for fewer than two steps, and for mode scales, which has no weights.
    """
    if steps < 2:
        raise ConfigError(f"--matrix {steps}: must be at least 2, or 0 for no matrix")
    if mode == "scales":
        raise ConfigError("--matrix needs weights between 0 and 1, which --mode scales has not: use linear or simple")
    coarse_groups, shares = parse_split(split, config), torch.linspace(0, 1, steps)
    coarse = shares.repeat_interleave(steps)[:, None].expand(-1, coarse_groups)
    fine = shares.repeat(steps)[:, None].expand(-1, config.total_groups - coarse_groups)
    return torch.cat([coarse, fine], dim=1)


def animation_weights(config: ModelConfig, mode: BlendMode, weights: str, frames: int, path: str) -> Tensor | None:
    """(F, groups): the points of an animation, one way; None without a path. Raises ConfigError, also for the path."""
    if not path:
        return None
    if frames < 2:
        raise ConfigError(f"--frames {frames}: an animation needs at least 2")
    _animation_format(path)
    writable_file("--animation", Path(path))
    return path_weights(config, mode, weights, "", frames)


def _even_splits(steps: int, groups: int) -> list[int]:
    """From all groups of A to none, in at most so many even steps."""
    if steps == 1:
        return [groups // 2]
    return sorted({round(groups * i / (steps - 1)) for i in range(steps)}, reverse=True)


# --- the pass ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def blend_images(
    model: NVAE,
    pair: Tensor,
    weights: Tensor,
    mode: BlendMode = "linear",
    posterior: Posterior = "sample",
    seed: int = 0,
    micro_batch: int = 16,
    progress: OnProgress | None = None,
) -> Tensor:
    """Blends of the images A and B, `pair` (2, C, S', S'), at weights (P, groups): (P, C, S, S) in [0, 1] on the host.

    Mode simple mixes the latents of two independent passes, whatever the groups above became; linear and scales merge
    the groups from the top down (their weights differ, not their passes). Points with all weights 0, or all 1, are the
    images that `reconstruct` makes of the pair.
    """
    assert len(pair) == 2 and not model.training, (pair.shape, model.training)
    # Kernels round differently at other batch sizes: taken from the reconstructions' own pass, the ends of a strip
    # are the reconstructions to the last bit.
    ends = reconstruct(model, pair, seed, micro_batch, posterior).images
    points = [set(row) for row in weights.tolist()]
    out = torch.stack([ends[1 if weights_of_point == {1.0} else 0] for weights_of_point in points])
    between = [i for i, weights_of_point in enumerate(points) if weights_of_point not in ({0.0}, {1.0})]
    maps = model.encode(pair.to(next(model.parameters()).device))
    make, images_per_point = (_simple, 1) if mode == "simple" else (_merged, 2)
    points_per_pass = max(1, micro_batch // images_per_point)
    for first in range(0, len(between), points_per_pass):
        chunk = between[first : first + points_per_pass]
        out[chunk] = make(model, maps, weights[chunk], posterior, seed)
        if progress is not None:
            progress(first + len(chunk), len(between))
    return out


def _merged(model: NVAE, maps: list[Tensor], weights: Tensor, posterior: Posterior, seed: int) -> Tensor:
    """Blends (P, C, S, S) merged group by group, on the host."""
    points = len(weights)
    noise = posterior_noise(posterior, seed, [A_SLOT] * points + [B_SLOT] * points)
    rows = [encoded.repeat_interleave(points, dim=0) for encoded in maps] if points > 1 else [*maps]
    parameters, _ = model.decode(MergedPosteriors(weights.T, noise), rows)
    return model.likelihood.mean(parameters[:points]).cpu()  # both rows of a pair have the same state


def _simple(model: NVAE, maps: list[Tensor], weights: Tensor, posterior: Posterior, seed: int) -> Tensor:
    """Blends (P, C, S, S) of z = (1 - w) z_A + w z_B in every group, z of two independent passes, on the host."""
    noise = posterior_noise(posterior, seed, [A_SLOT, B_SLOT])
    _, latents = model.top_down(FromPosterior(noise), [*maps], return_z=True)
    return decoded_mean(model, MixedLatents([latent.z for latent in latents], weights.T), None, len(weights))


# --- for people -------------------------------------------------------------------------------------------------------


def weight_texts(weights: Tensor) -> list[str]:
    """What stands below the blend of each point of (P, groups): its weight of B, or the weights' mean where they differ
    ("~0.4"); of whole groups, how many are B's ("B: 3")."""
    texts = []
    for row in weights:
        if len(row.unique()) == 1:
            texts.append(f"{float(row[0]):.2g}")
        elif bool(((row == 0) | (row == 1)).all()):
            texts.append(f"B: {int(row.sum())}")
        else:
            texts.append(f"~{float(row.mean()):.2g}")
    return texts


def strip_picture(
    originals: Tensor, blends: Tensor, names: Sequence[str], weights: Tensor, scale: int = 0
) -> np.ndarray:
    """The two images (2, C, S, S) above their blends (P, C, S, S), at most sixteen in a row, each above its weight."""
    above = grids.labelled(grids.grid(originals, 2, scale=scale), f"{names[0]} and {names[1]}")
    below = grids.grid(blends, STRIP_COLUMNS, under=weight_texts(weights), scale=scale)
    return grids.stack([above, grids.labelled(below, f"their blends, by the weight of {names[1]}")])


def matrix_picture(blends: Tensor, names: Sequence[str], scale: int = 0) -> np.ndarray:
    """The blends (n * n, C, S, S) of `matrix_weights` as a labelled square; below each: coarse, fine weight."""
    caption = f"down: coarse groups {names[0]} -> {names[1]}; right: fine groups {names[0]} -> {names[1]}"
    side = math.isqrt(len(blends))
    shares = [f"{share:.2g}" for share in torch.linspace(0, 1, side).tolist()]
    under = [f"{coarse}, {fine}" for coarse in shares for fine in shares]
    return grids.labelled(grids.grid(blends, side, under=under, scale=scale), caption)


def save_animation(images: Tensor, path: Path, frame_seconds: float = 1 / 12, scale: int = 0) -> Path:
    """Images (F, C, S, S) there and back again, endlessly, as a GIF, WebP or animated PNG by the ending of `path`."""
    there_and_back = [*images, *images[1:-1].flip(0)]
    first, *others = (Image.fromarray(grids.grid(image[None], 1, padding=0, scale=scale)) for image in there_and_back)
    kind, milliseconds = _animation_format(str(path)), max(1, round(1000 * frame_seconds))
    options = {"lossless": True} if kind == "WEBP" else {}
    buffer = io.BytesIO()
    first.save(buffer, kind, save_all=True, append_images=others, duration=milliseconds, loop=0, **options)
    return write_atomically(path, buffer.getvalue())


def _animation_format(path: str) -> str:
    """Pillow's name of the format that a file name asks for. Raises ConfigError for endings that cannot move."""
    kind = ANIMATIONS.get(Path(path).suffix.lower())
    if kind is None:
        raise ConfigError(f"--animation {path}: must end in one of {', '.join(ANIMATIONS)}")
    return kind
