"""Likelihoods of every kind, with random parameters and images for them: what the tests of likelihoods share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nvae_lowmem.model.likelihoods import Bernoulli, DiscretisedNormal, Likelihood, LogisticMixture, quantise

ALL_KINDS = [
    Bernoulli(1),
    Bernoulli(3),
    DiscretisedNormal(1, 8),
    DiscretisedNormal(3, 5),
    LogisticMixture(1, 8, 10),
    LogisticMixture(2, 4, 3),
    LogisticMixture(1, 8, 1),
    LogisticMixture(3, 5, 10),
    LogisticMixture(3, 8, 2, published_edges=True),
]
every_kind = pytest.mark.parametrize("likelihood", ALL_KINDS, ids=lambda likelihood: likelihood.describe())


def random_parameters(likelihood: Likelihood, *shape: int, seed: int = 0, spread: float = 1.5) -> Tensor:
    """(B, P, H, W), float64; log scales reach from wide to far narrower than a bin."""
    batch, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    parameters = torch.randn(
        batch, likelihood.parameter_channels, height, width, generator=generator, dtype=torch.float64
    )
    parameters *= spread
    if isinstance(likelihood, LogisticMixture):
        blocks = parameters.split(likelihood.mixtures, dim=1)
        per_channel = (len(blocks) - 1) // likelihood.image_channels
        for log_scales in blocks[2::per_channel]:
            log_scales.uniform_(-8.5, 1.5, generator=generator)
    if isinstance(likelihood, DiscretisedNormal):
        parameters[:, likelihood.image_channels :].uniform_(-12.0, 3.0, generator=generator)
    return parameters


def random_images(likelihood: Likelihood, *shape: int, seed: int = 1) -> Tensor:
    """(B, C, H, W), float64, on the likelihood's grid; every third value at an end of the range."""
    batch, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(batch, likelihood.image_channels, height, width, generator=generator, dtype=torch.float64)
    values = (values * 1.5 - 0.25).clamp(0.0, 1.0)
    return quantise(values, likelihood.bits)


def all_pixel_values(likelihood: Likelihood) -> Tensor:
    """Every colour that one pixel can have: (2^(bits C), C, 1, 1), float64."""
    steps = 2**likelihood.bits - 1
    levels = torch.arange(steps + 1, dtype=torch.float64) / steps
    return torch.cartesian_prod(*[levels] * likelihood.image_channels).reshape(-1, likelihood.image_channels, 1, 1)
