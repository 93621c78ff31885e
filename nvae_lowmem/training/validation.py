"""The ELBO on held-out images, in nats and bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from nvae_lowmem.model.latents import SeededNoise
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training.objective import AUTOCAST_DTYPES

ACTIVE_NATS = 0.1
"""A latent channel counts as active when its mean KL is above this."""


class Validation(NamedTuple):
    """Means over images, in nats unless said otherwise."""

    nelbo: float
    nll: float
    kl: list[float]  # per group, top first
    active: list[float]  # share of active latent channels per group
    bits_per_dim: float
    images: int


@torch.no_grad()
def validate(model: NVAE, batches: Iterable[Tensor], seed: int, precision: str = "fp32") -> Validation:
    """-ELBO of the images in `batches` ((b, C, S, S) each), one posterior sample per image, in evaluation mode."""
    was_training = model.training
    model.eval()
    dtype, images, nll, kl = AUTOCAST_DTYPES[precision], 0, 0.0, None
    try:
        for x in batches:
            kind = x.device.type
            with torch.autocast(kind, dtype=dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
                terms = model(x, SeededNoise(seed, step=-1, first_slot=images))
            per_channel = torch.stack([k.sum(0) for k in terms.kl]).double()  # (groups, L)
            kl = per_channel if kl is None else kl + per_channel
            nll += float(terms.nll.double().sum())
            images += len(x)
    finally:
        model.train(was_training)
    if kl is None:
        raise ValueError("there are no held-out images to evaluate on")
    mean_kl = kl / images
    nelbo = nll / images + float(mean_kl.sum())
    return Validation(
        nelbo=nelbo,
        nll=nll / images,
        kl=mean_kl.sum(1).tolist(),
        active=(mean_kl > ACTIVE_NATS).double().mean(1).tolist(),
        bits_per_dim=nelbo / (model.config.image_dims * math.log(2)),
        images=images,
    )
