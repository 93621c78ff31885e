"""Bounds of log p(x) on held-out images: the ELBO with all its parts, and the importance-weighted bound.

    log p(x) >= E[log 1/k sum_j w_j] >= ELBO,   w_j = p(x|z_j) p(z_j) / q(z_j|x),   z_j ~ q(z|x)

(arXiv 1509.00519, equation 8.) Everything is in nats per image. A draw is a function of (seed, number of the image,
number of the draw, group): how images and draws are split into passes does not matter, and the first k of 2k draws are
the draws of k. Legend: B images, k draws, G latent groups, L latent channels of a group, S x S pixels without padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nvae_lowmem.data.pipeline import without_padding
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.model.latents import FromPosterior, Noise, NoiseStep, SeededNoise
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training.validation import evaluating, nll_of_decoded

Advance = Callable[[int], None]
"""Called after each pass with the number of draws that it made."""

_DRAWS_PER_IMAGE = 1 << 32


# --- the ELBO ---------------------------------------------------------------------------------------------------------


class ElboOfImages(NamedTuple):
    """The ELBO of each image, -(nll + sum of kl), and what one posterior sample reconstructs; all on the host."""

    nll: Tensor  # (B,) float64, -log p(x|z)
    kl: Tensor  # (B, G) float64, top group first
    channel_kl: Tensor  # (G, L) float64, summed over images
    squared_error: Tensor  # (B,) float64: of the likelihood's mean, averaged over pixels and channels in [0, 1]
    reconstructions: Tensor  # (B, C, S, S) fp32 in [0, 1]: the likelihood's mean


@torch.no_grad()
def elbo_of_images(
    model: NVAE,
    x: Tensor,
    seed: int,
    precision: str = "fp32",
    first_image: int = 0,
    labels: Tensor | None = None,
) -> ElboOfImages:
    """The ELBO of images x (B, C, padded, padded) in [0, 1] with one posterior sample each, in evaluation mode.

    first_image: number of the first of them among all held-out images, which its noise depends on. labels: as `NVAE`
    takes them; with them all is of log p(x|y).
    """
    noise = SeededNoise(seed, step=NoiseStep.VALIDATION, first_slot=first_image)
    with evaluating(model, x.device, precision):
        parameters, latents = model.decode(FromPosterior(noise), model.encode(x), labels=labels)
        nll = nll_of_decoded(model, parameters, without_padding(x, model.config))
        reconstructions = model.likelihood.mean(parameters)
    kl = torch.stack([_kl(latent.kl) for latent in latents], dim=1).double()  # (B, G, L)
    error = (reconstructions - without_padding(x, model.config)).double().square().mean((1, 2, 3))
    return ElboOfImages(nll.double().cpu(), kl.sum(2).cpu(), kl.sum(0).cpu(), error.cpu(), reconstructions.cpu())


# --- the importance-weighted bound ------------------------------------------------------------------------------------


class Densities(Protocol):
    """Draws of z ~ q(z|x) and their densities: all that the bound needs to know of a model."""

    def __call__(self, images: range, draws: range) -> tuple[Tensor, Tensor]:
        """log p(x, z) and log q(z|x) of these draws of these images, each (len(images), len(draws)), nats."""
        ...


def log_mean_weight(
    densities: Densities, images: int, samples: int, micro_batch: int, advance: Advance | None = None
) -> Tensor:
    """log 1/k sum_j p(x, z_j) / q(z_j|x) of each image, k = samples: (images,) float64 on the host.

    No call of `densities` asks for more than micro_batch pairs of an image and a draw.

    Raises:
        ConfigError: samples or micro_batch below 1.
    """
    for flag, value in (("--iw-samples", samples), ("--micro-batch", micro_batch)):
        if value < 1:
            raise ConfigError(f"{flag} {value}: must be at least 1")
    images_per_pass = max(1, micro_batch // samples)
    draws_per_pass = min(samples, micro_batch)
    out = torch.full((images,), -math.inf, dtype=torch.float64)
    for first_image in range(0, images, images_per_pass):
        rows = range(first_image, min(first_image + images_per_pass, images))
        total = out[rows.start : rows.stop]  # running log sum of weights, a view
        for first_draw in range(0, samples, draws_per_pass):
            draws = range(first_draw, min(first_draw + draws_per_pass, samples))
            log_joint, log_q = densities(rows, draws)
            log_weights = (log_joint.double() - log_q.double()).cpu()
            torch.logaddexp(total, log_weights.logsumexp(1), out=total)
            if advance is not None:
                advance(len(rows) * len(draws))
    return out - math.log(samples)


@torch.no_grad()
def importance_weighted_bound(
    model: NVAE,
    x: Tensor,
    samples: int,
    seed: int,
    micro_batch: int,
    precision: str = "fp32",
    first_image: int = 0,
    advance: Advance | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """log 1/k sum_j p(x|z_j) p(z_j) / q(z_j|x) of images x (B, C, padded, padded), k = samples: (B,) float64, nats.

    No pass holds more than micro_batch draws. Latents and densities are fp32 whatever `precision` says, their sums
    over groups and the sum of weights float64. first_image: number of the first image among all held-out images.
    labels: as `NVAE` takes them; with them it is a bound of log p(x|y).

    Raises:
        ConfigError: samples or micro_batch below 1.
    """
    with evaluating(model, x.device, precision):
        return log_mean_weight(
            _ModelDensities(model, x, seed, first_image, labels), len(x), samples, micro_batch, advance
        )


class _ModelDensities:
    """The densities of an NVAE's draws. Encodes images once for all their draws, and keeps only the last ones' maps."""

    def __init__(self, model: NVAE, x: Tensor, seed: int, first_image: int, labels: Tensor | None) -> None:
        self.model, self.x, self.seed, self.first_image, self.labels = model, x, seed, first_image, labels
        self._encoded: tuple[range, list[Tensor]] = (range(0), [])

    def __call__(self, images: range, draws: range) -> tuple[Tensor, Tensor]:
        x = self.x[images.start : images.stop]
        if self._encoded[0] != images:
            self._encoded = range(0), []  # the last ones go before there are others
            self._encoded = images, self.model.encode(x)
        # draws of an image follow each other: (images, draws) flattened
        maps = [_repeated(m, len(draws)) for m in self._encoded[1]]
        noise = _DrawNoise(self.seed, [self.first_image + i for i in images], draws)
        labels = None if self.labels is None else _repeated(self.labels[images.start : images.stop], len(draws))
        parameters, latents = self.model.decode(FromPosterior(noise, densities=True), maps, labels=labels)
        nll = nll_of_decoded(self.model, parameters, _repeated(without_padding(x, self.model.config), len(draws)))
        log_p, log_q = torch.zeros_like(nll, dtype=torch.float64), torch.zeros_like(nll, dtype=torch.float64)
        for latent in latents:
            assert latent.log_p is not None and latent.log_q is not None
            log_p += latent.log_p
            log_q += latent.log_q
        shape = len(images), len(draws)
        return (log_p - nll).view(shape), log_q.view(shape)


def _repeated(rows: Tensor, times: int) -> Tensor:
    """Each row so many times in succession; of a single row, and at a single time, views that take no memory."""
    if len(rows) == 1:
        return rows.expand(times, *rows.shape[1:])
    return rows.repeat_interleave(times, dim=0) if times > 1 else rows


@dataclass(frozen=True)
class _DrawNoise(Noise):
    """The same draws of each of several images: every image has 2^32 sample slots of its own."""

    seed: int
    images: Sequence[int]
    draws: range

    def normal(self, group: int, shape: Sequence[int], device: torch.device) -> Tensor:
        rows = (len(self.draws), *shape[1:])
        noise = SeededNoise(self.seed, step=NoiseStep.IMPORTANCE_WEIGHTS)
        slots = (image * _DRAWS_PER_IMAGE + self.draws.start for image in self.images)
        return torch.cat([noise.at(slot).normal(group, rows, device) for slot in slots])


# --- what both need ---------------------------------------------------------------------------------------------------


def _kl(kl: Tensor | None) -> Tensor:
    assert kl is not None, "the posterior has a KL"
    return kl
