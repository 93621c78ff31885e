"""The ELBO on held-out images, in nats and bits per dimension."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nvae_lowmem.data.labels import label_rows
from nvae_lowmem.model.blocks import Head
from nvae_lowmem.model.latents import NoiseStep, SeededNoise
from nvae_lowmem.model.likelihoods import negative_log_likelihood
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.objective import AUTOCAST_DTYPES

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
def validate(
    model: NVAE, batches: Iterable[Tensor], seed: int, precision: str = "fp32", labels: np.ndarray | None = None
) -> Validation:
    """-ELBO of the images in `batches` ((b, C, S, S) each), one posterior sample per image, in evaluation mode.

    labels: the images' classes in their order, (N,) int64; with them the ELBO is of log p(x|y).
    """
    images, nll, kl = 0, 0.0, torch.zeros(())
    with evaluating(model, next(model.parameters()).device, precision):
        for x in batches:
            noise, rows = SeededNoise(seed, NoiseStep.VALIDATION, images), labels_of(model, labels, images, len(x))
            batch_nll, batch_kl = _sums(model, x, noise, rows)
            nll, kl, images = nll + batch_nll, kl + batch_kl, images + len(x)
    if not images:
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


def labels_of(model: NVAE, numbers: np.ndarray | None, first: int, count: int) -> Tensor | None:
    """What the model is given of the labels of images first, ..., first + count - 1, on its device.

    numbers: of all images, (N,) int64; None, or a model without classes: None.
    """
    if numbers is None or not model.config.classes:
        return None
    return label_rows(numbers[first : first + count], model.config.classes).to(next(model.parameters()).device)


def _sums(model: NVAE, x: Tensor, noise: SeededNoise, labels: Tensor | None) -> tuple[float, Tensor]:
    """Sums over the images x: -log p(x|z), and the KL of every group and channel (groups, L), float64 on the host.

    A function of its own, so that nothing of a batch is on the device when the next one comes.
    """
    terms = model(x, noise, labels)
    return float(terms.nll.double().sum()), torch.stack([k.sum(0) for k in terms.kl]).double().cpu()


@contextlib.contextmanager
def evaluating(model: NVAE, device: torch.device, precision: str) -> Iterator[None]:
    """Inside, the model is in evaluation mode and computes activations in `precision`."""
    was_training = model.training
    model.eval()
    try:
        with activations_in(precision, device):
            yield
    finally:
        model.train(was_training)


def activations_in(precision: str, device: torch.device) -> torch.autocast:
    """A context in which models compute activations in `precision`, without autocast's copies of the weights.

    An "auto" that nobody has decided is fp32.
    """
    dtype = AUTOCAST_DTYPES.get(precision)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False)


def nll_of_decoded(model: NVAE, parameters: Tensor, x: Tensor) -> Tensor:
    """-log p(x|z) (B,) of images x (B, C, S, S) without padding, from what `NVAE.decode` returned.

    In the chunks that the model's own head takes.
    """
    head = model.blocks["head"]
    assert isinstance(head, Head)
    return negative_log_likelihood(
        model.likelihood, parameters, x, chunk_images=head.chunk_images, chunk_bytes=head.chunk_bytes
    )
