"""Latent variables: soft-clamped normals, the noise that drives them, and where a group's z comes from.

All of this is fp32, whatever the activations are. Shapes: B images, L latent channels, h x w pixels of the group.
Equations and sections are those of NVAE (arXiv 2007.03898).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nvae_lowmem.model.functional import soft_clamp
from nvae_lowmem.splitmix import seed_of

SIGMA_FLOOR = 1e-2


class Normal(NamedTuple):
    """A diagonal normal: mu and sigma, each (B, L, h, w)."""

    mu: Tensor
    sigma: Tensor

    @staticmethod
    def from_parameters(mu: Tensor, log_sigma: Tensor) -> Normal:
        """The normal of what a convolution put out, mu and log sigma (B, L, h, w) each.

            mu = soft_clamp(mu),   sigma = exp(soft_clamp(log sigma)) + 1e-2,   soft_clamp(x) = 5 tanh(x / 5)

        For a residual posterior (section 3.2) the prior's outputs have been added to both before.
        """
        return Normal(soft_clamp(mu), soft_clamp(log_sigma).exp() + SIGMA_FLOOR)

    def draw(self, eps: Tensor, temperature: float = 1.0) -> Tensor:
        """mu + temperature * sigma * eps."""
        return self.mu + self.sigma * (temperature * eps if temperature != 1.0 else eps)

    def log_density(self, z: Tensor) -> Tensor:
        """log N(z; mu, sigma^2) elementwise, (B, L, h, w)."""
        return -0.5 * ((z - self.mu) / self.sigma).square() - 0.5 * math.log(2 * math.pi) - self.sigma.log()

    def divergence(self, prior: Normal) -> Tensor:
        """KL(self || prior) elementwise, (B, L, h, w): equation 2 for any two normals, q this one and p the prior.

        KL = ((mu_q - mu_p)^2 / sigma_p^2 + sigma_q^2 / sigma_p^2 - log(sigma_q^2 / sigma_p^2) - 1) / 2
        """
        shift = (self.mu - prior.mu) / prior.sigma
        ratio = self.sigma / prior.sigma
        return 0.5 * (shift.square() + ratio.square()) - 0.5 - ratio.log()


# --- noise ------------------------------------------------------------------------------------------------------------


class Noise(Protocol):
    """Standard normal draws of one pass. The model asks for them by group; it never draws by itself."""

    def normal(self, group: int, shape: Sequence[int], device: torch.device) -> Tensor:
        """eps (B, L, h, w) fp32 of the given group; the same at every call."""
        ...


@enum.unique
class NoiseStep(enum.IntEnum):
    """What stands for the step in the noise of a pass that does not train. Training counts its steps from 0 up.

    Every kind of pass has a number of its own, so that no two of them see the same draws.
    """

    VALIDATION = -1
    """The ELBO of held-out images: while training and afterwards, so that both print the same number."""
    SAMPLING = -2
    PREVIEW = -3
    """Reconstructions that are shown beside samples."""
    RECALIBRATION = -4
    IMPORTANCE_WEIGHTS = -5
    PRIOR_OF_LATER_GROUPS = -6
    """Reconstruction: the groups that are drawn from the prior."""
    ACTIVITY = -7
    """Traversal: which channels are active."""
    RECONSTRUCTION = -8
    RESTORATION = -9
    ANOMALY = -10
    ANOMALY_OF_LATER_GROUPS = -11
    """Anomaly scores: the groups that are drawn from the prior."""
    RESTORATION_STARTS = -12
    """Restoration: the samples from the prior that later guesses begin with."""


@dataclass(frozen=True)
class SeededNoise:
    """Draws that are a function of (seed, step, sample slot, group); step: of training, or a NoiseStep.

    Sample slots number the images of the whole total batch, so that any split into micro-batches and processes sees the
    same noise. A recomputed block asks again and gets the same numbers; no generator state is kept anywhere.
    """

    seed: int
    step: int = 0
    first_slot: int = 0

    def normal(self, group: int, shape: Sequence[int], device: torch.device) -> Tensor:
        eps = torch.empty(tuple(shape), device=device)
        generator = torch.Generator(device=device)
        for i in range(shape[0]):
            generator.manual_seed(seed_of(self.seed, self.step, self.first_slot + i, group))
            eps[i].normal_(generator=generator)  # in place: as many allocations for any batch size
        return eps

    def at(self, first_slot: int) -> SeededNoise:
        """The same noise for a later part of the batch."""
        return replace(self, first_slot=first_slot)


class NoNoise:
    """eps = 0: every latent is its mean."""

    def normal(self, group: int, shape: Sequence[int], device: torch.device) -> Tensor:
        return torch.zeros(tuple(shape), device=device)


# --- where a group's z comes from -------------------------------------------------------------------------------------


class Latent(NamedTuple):
    """A group's z (B, L, h, w) where it is kept, and for posterior sources kl (B, L) and log densities (B,)."""

    z: Tensor | None
    kl: Tensor | None = None
    log_q: Tensor | None = None
    log_p: Tensor | None = None


FlowFunction = Callable[[Tensor], Tensor]


class Source(Protocol):
    """Decides a group's latent from its prior, its posterior (None without images) and the posterior's flow."""

    def latent(self, group: int, prior: Normal, posterior: Normal | None, flow: FlowFunction | None) -> Latent:
        """The latent of group `group`, counted from the top."""
        ...


@dataclass(frozen=True)
class FromPosterior:
    """z ~ q(z_l | z_<l, x): training, evaluation and reconstruction; the terms KL_l of equation 1.

    KL is analytic without flows. With flows (section 3.2) z = flow(z0), whose log-det is 0, and at the sample

        KL = log q(z0) - log p(z)

    densities: also log q and log p per image, which the importance-weighted bound needs.
    """

    noise: Noise
    densities: bool = False

    def latent(self, group: int, prior: Normal, posterior: Normal | None, flow: FlowFunction | None) -> Latent:
        assert posterior is not None, "the posterior needs images"
        z0 = posterior.draw(self.noise.normal(group, posterior.mu.shape, posterior.mu.device))
        z = z0 if flow is None else flow(z0)
        if flow is None and not self.densities:
            return Latent(z, posterior.divergence(prior).sum((2, 3)))
        log_q, log_p = posterior.log_density(z0), prior.log_density(z)
        elementwise = posterior.divergence(prior) if flow is None else log_q - log_p
        return Latent(z, elementwise.sum((2, 3)), log_q.sum((1, 2, 3)), log_p.sum((1, 2, 3)))


@dataclass(frozen=True)
class FromPrior:
    """z ~ p(z_l | z_<l), sigma multiplied by the temperature (one for all groups, or one per group)."""

    noise: Noise
    temperature: float | Sequence[float] = 1.0

    def latent(self, group: int, prior: Normal, posterior: Normal | None, flow: FlowFunction | None) -> Latent:
        t = self.temperature if isinstance(self.temperature, (int, float)) else self.temperature[group]
        return Latent(prior.draw(self.noise.normal(group, prior.mu.shape, prior.mu.device), float(t)))


@dataclass(frozen=True)
class Guided:
    """One z for two rows of a batch: its first half has labels, its second half the same images without.

    z comes from `source` and a prior further from that without a label than the label's own, s = guidance:

        mu = mu_none + s (mu_label - mu_none),   log sigma = log sigma_none + s (log sigma_label - log sigma_none)

    with sigma at most the larger of the two: beyond s = 1 the extrapolation would widen exactly those priors that the
    label widens, and guidance is to make images surer. s = 1 is the label's prior, s = 0 the one without.
    """

    source: Source
    guidance: float

    def latent(self, group: int, prior: Normal, posterior: Normal | None, flow: FlowFunction | None) -> Latent:
        assert posterior is None, "guidance is for samples"
        (mu, mu_none), (sigma, sigma_none) = (values.chunk(2) for values in prior)
        log_sigma = torch.lerp(sigma_none.log(), sigma.log(), self.guidance)
        guided = Normal(
            torch.lerp(mu_none, mu, self.guidance), torch.minimum(log_sigma.exp(), torch.maximum(sigma, sigma_none))
        )
        latent = self.source.latent(group, guided, None, None)
        assert latent.z is not None
        return latent._replace(z=torch.cat([latent.z, latent.z]))


@dataclass(frozen=True)
class Given:
    """z as given, one tensor per group, top first."""

    latents: Sequence[Tensor]

    def latent(self, group: int, prior: Normal, posterior: Normal | None, flow: FlowFunction | None) -> Latent:
        return Latent(self.latents[group])


@dataclass(frozen=True)
class FirstGroups:
    """The first `count` groups from one source, the later ones from another."""

    count: int
    first: Source
    later: Source

    def latent(self, group: int, prior: Normal, posterior: Normal | None, flow: FlowFunction | None) -> Latent:
        """The latent of group `group`."""
        source = self.first if group < self.count else self.later
        return source.latent(group, prior, posterior, flow)
