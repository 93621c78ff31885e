"""Images through the posterior and back, whole or from the first groups alone, and how good the result is.

Legend: B images, C image channels, S pixels per side, S' = S + 2 padding pixels per side inside the network; groups are
counted from the top (lowest resolution) down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nvae_lowmem.config.choices import Posterior
from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.data.pipeline import without_padding
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.generation import grids
from nvae_lowmem.generation.sample import decoded_mean
from nvae_lowmem.model.latents import (
    FirstGroups,
    FromPosterior,
    FromPrior,
    Noise,
    NoiseStep,
    NoNoise,
    SeededNoise,
    Source,
)
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.progress import OnProgress
from nvae_lowmem.text_table import text_table
from nvae_lowmem.training.validation import nll_of_decoded
from nvae_lowmem.units import numbers

# --- sources ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowNoise:
    """Standard normal draws of a batch whose row i shows image number slots[i]: the same image, the same draws.

    So they depend neither on how images are split into chunks, nor on how often one of them is in a batch.
    """

    seed: int
    slots: tuple[int, ...]
    step: NoiseStep = NoiseStep.RECONSTRUCTION

    def normal(self, group: int, shape: Sequence[int], device: torch.device) -> Tensor:
        """eps (B, L, h, w) fp32 of the given group, B = len(slots)."""
        assert shape[0] == len(self.slots), (shape, self.slots)
        draws = {
            slot: SeededNoise(self.seed, self.step, slot).normal(group, (1, *shape[1:]), device)
            for slot in set(self.slots)
        }
        return torch.cat([draws[slot] for slot in self.slots])


def posterior_noise(posterior: Posterior, seed: int, slots: Sequence[int]) -> Noise:
    """The noise of a batch whose row i shows image number slots[i]."""
    return NoNoise() if posterior == "mean" else RowNoise(seed, tuple(slots))


def parse_first_groups(text: str, config: ModelConfig) -> tuple[int, ...]:
    """Numbers of groups to reconstruct from: "1,3,6", "none", or "auto" for one, a quarter and a half of the groups.

    Raises ConfigError for numbers below 1 or above the model's number of groups.
    """
    total = config.total_groups
    if text == "none":
        return ()
    if text == "auto":
        return tuple(sorted({1, max(1, total // 4), max(1, total // 2)} - {total}))
    counts = numbers(text, "--first-groups", int)
    if not all(1 <= count <= total for count in counts):
        raise ConfigError(f"--first-groups {text}: every number must be from 1 to {total}, the groups of this model")
    return tuple(counts)


# --- the pass ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Reconstructions:
    """Images as the model sees them; everything on the host."""

    originals: Tensor
    """(B, C, S, S) in [0, 1]."""
    images: Tensor
    """(B, C, S, S): the mean of p(x|z), z from q(z|x)."""
    from_first: Mapping[int, Tensor]
    """k -> (B, C, S, S): z of the first k groups from q, that of the later ones from the prior."""
    nll: Tensor
    """(B,) -log p(x|z), nats."""
    kl: Tensor
    """(B, groups), nats."""
    posterior: Posterior
    """The ELBO is -(nll + sum of kl) where z was drawn; at the posterior's mean the two bound nothing."""


@torch.no_grad()
def reconstruct(
    model: NVAE,
    images: Tensor,
    seed: int,
    micro_batch: int,
    posterior: Posterior = "sample",
    first_groups: Sequence[int] = (),
    temperature: float = 0.3,
    progress: OnProgress | None = None,
) -> Reconstructions:
    """Images (B, C, S', S') in [0, 1] through the model in evaluation mode, micro_batch of them at a time.

    first_groups: for each of these numbers k also the images from the first k groups, the later ones drawn from the
    prior at `temperature`. Image i has the noise of slot i, whatever the chunks.
    """
    assert not model.training, "images must not lean on each other: put the model into evaluation mode"
    parts: list[tuple[Tensor, ...]] = []
    for first in range(0, len(images), micro_batch):
        x = images[first : first + micro_batch]
        slots = tuple(range(first, first + len(x)))
        from_image = FromPosterior(posterior_noise(posterior, seed, slots))
        from_prior = FromPrior(RowNoise(seed, slots, NoiseStep.PRIOR_OF_LATER_GROUPS), temperature)
        parts.append(_reconstruct_chunk(model, x, from_image, from_prior, first_groups))
        if progress is not None:
            progress(first + len(x), len(images))
    nll, kl, whole, *partial = (torch.cat(values) for values in zip(*parts, strict=True))
    originals = without_padding(images, model.config).cpu()
    from_first = dict(zip(first_groups, partial, strict=True))
    return Reconstructions(
        originals=originals, images=whole, from_first=from_first, nll=nll, kl=kl, posterior=posterior
    )


def _reconstruct_chunk(
    model: NVAE, x: Tensor, from_image: Source, from_prior: Source, first_groups: Sequence[int]
) -> tuple[Tensor, ...]:
    """(nll, kl, images, images from the first groups ...) of images that share a pass, all on the host."""
    x = x.to(next(model.parameters()).device)
    maps = model.encode(x)
    parameters, latents = model.decode(from_image, [*maps])
    nll = nll_of_decoded(model, parameters, without_padding(x, model.config)).cpu()
    kl = torch.stack([latent.kl.sum(1) for latent in latents if latent.kl is not None], dim=1).cpu()
    pictures = [model.likelihood.mean(parameters).cpu()]
    del parameters, latents  # before another pass makes its own
    pictures += [decoded_mean(model, FirstGroups(count, from_image, from_prior), [*maps]) for count in first_groups]
    return nll, kl, *pictures


# --- for people -------------------------------------------------------------------------------------------------------


def error_table(result: Reconstructions, names: Sequence[str], bits: int) -> str:
    """One line per image and their mean: MSE and L1 of values in [0, 1], the terms of the ELBO, MSE from k groups.

    The ELBO is in bits per dimension, or in nats where images are binary, as the literature gives it.
    """
    columns: dict[str, tuple[Tensor, int]] = {  # heading -> (one value per image, decimals)
        "MSE": (_mean_square(result.images - result.originals), 5),
        "L1": ((result.images - result.originals).abs().mean((1, 2, 3)), 5),
    }
    if result.posterior == "sample":
        kl, dims = result.kl.sum(1), result.originals[0].numel()
        columns |= {"-log p(x|z) nats": (result.nll, 1), "KL nats": (kl, 1)}
        if bits == 1:
            columns["-ELBO nats"] = (result.nll + kl, 2)
        else:
            columns["-ELBO bits/dim"] = ((result.nll + kl) / (dims * math.log(2)), 3)
    for count, images in result.from_first.items():
        columns[f"MSE from {count}"] = (_mean_square(images - result.originals), 5)
    per_image = torch.stack([values.double() for values, _ in columns.values()], dim=1)  # (B, columns)
    rows = [
        [name, *(f"{value:.{decimals}f}" for value, (_, decimals) in zip(values, columns.values(), strict=True))]
        for name, values in zip([*names, "mean"], [*per_image.tolist(), per_image.mean(0).tolist()], strict=True)
    ]
    return "\n".join(text_table("<>", [["image", *columns], *rows], rule=False))


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().mean((1, 2, 3))


def picture_of(result: Reconstructions, groups: int, temperature: float, scale: int = 0) -> np.ndarray:
    """Labelled rows, one below the other: originals, reconstructions, reconstructions from the first groups alone."""
    columns = grids.default_columns(result.images.shape[-1], scale)
    rows = {"original": result.originals, f"reconstruction from all {groups} groups": result.images}
    for count, images in result.from_first.items():
        groups_text = "the first group" if count == 1 else f"the first {count} groups"
        rows[f"{groups_text} of the image, the rest from the prior at temperature {temperature:g}"] = images
    blocks = zip(*(images.split(columns) for images in rows.values()), strict=True)
    return grids.stack(
        [
            grids.labelled(grids.grid(images, columns, scale=scale), caption)
            for block in blocks
            for caption, images in zip(rows, block, strict=True)
        ]
    )
