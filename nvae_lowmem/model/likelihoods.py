"""Which likelihood an image has, and its negative log-probability in chunks that never exist whole.

At 256 x 256 with ten mixture components the intermediate values of one image's likelihood fill about 100 MiB, more
than what a whole group of the network keeps. ``negative_log_likelihood`` therefore works through images and rows in
chunks and keeps nothing but its inputs; the backward pass computes each chunk again.

Shapes: B images, C image channels, P = ``likelihood.parameter_channels``, H rows, W columns.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nvae_lowmem.config.model import LikelihoodName
from nvae_lowmem.errors import raise_problems
from nvae_lowmem.model.functional import computing_type
from nvae_lowmem.model.pixel_distributions import (
    Bernoulli,
    DiscretisedNormal,
    Likelihood,
    LogisticMixture,
    SquaredError,
    quantise,
)

__all__ = [
    "Bernoulli",
    "DiscretisedNormal",
    "Likelihood",
    "LogisticMixture",
    "SquaredError",
    "make_likelihood",
    "negative_log_likelihood",
    "quantise",
]

Region = tuple[slice, slice, slice, slice]  # images, channels, rows, columns


def make_likelihood(name: str, image_channels: int, bits: int, mixtures: int = 10) -> Likelihood:
    """The likelihood called ``name``, or with "auto" the one that fits the data:

    * 1 bit: Bernoulli;
    * more bits, one component: DiscretisedNormal, as in the published models;
    * more bits, several components: the logistic mixture, colours coupled in RGB.

    By name, Bernoulli and DiscretisedNormal have no components and ignore ``mixtures``; the logistic mixture takes any
    number.

    Raises:
        ConfigError: an unknown name, or values that do not go together; lists all problems.
    """
    raise_problems(_problems(name, image_channels, bits, mixtures), "likelihood")
    if name == "auto":
        name = "bernoulli" if bits == 1 else "normal" if mixtures == 1 else "logistic_mixture"
    if name == "bernoulli":
        return Bernoulli(image_channels)
    if name == "normal":
        return DiscretisedNormal(image_channels, bits)
    if name == "squared_error":
        return SquaredError(image_channels, bits)
    return LogisticMixture(image_channels, bits, mixtures)


def negative_log_likelihood(
    likelihood: Likelihood,
    parameters: Tensor,
    x: Tensor,
    crop: int = 0,
    chunk_images: int = 1,
    chunk_bytes: int = 64 << 20,
) -> Tensor:
    """-log p(x | parameters), summed over pixels and channels: (B,), nats, float32 (float64 for float64 parameters).

    Equals ``-likelihood.log_prob(...)`` and its gradient. Keeps only ``parameters``, in their own type, and ``x`` for
    the backward pass. x gets no gradient.

    Args:
        likelihood: the distribution.
        parameters: (B, P, H, W), any floating type, the image head's output.
        x: (B, C, H, W) in [0, 1], float32: half types cannot tell 8-bit values apart near 1.
        crop: pixels to leave out on all four sides (padding of the images); they get zero gradient.
        chunk_images: images per chunk, where ``chunk_bytes`` allows it. Not more by itself: so the memory of a chunk
            does not depend on the batch.
        chunk_bytes: upper bound of a chunk's temporaries; chunks go down to one row of one image, not further.
    """
    batch, _, height, width = parameters.shape
    assert parameters.shape[1] == likelihood.parameter_channels, (parameters.shape, likelihood.describe())
    assert x.shape == (batch, likelihood.image_channels, height, width), (x.shape, parameters.shape)
    assert min(height, width) > 2 * crop >= 0, f"nothing is left of {height} x {width} after cropping {crop}"
    assert not x.requires_grad, "the likelihood has no gradient with respect to the images"
    row_bytes = likelihood.working_values_per_pixel * (width - 2 * crop) * computing_type(parameters).itemsize
    regions = _regions((batch, height, width), crop, chunk_images, max(1, chunk_bytes // row_bytes))
    return _ChunkedNegativeLogLikelihood.apply(parameters, x, likelihood, regions)


class _ChunkedNegativeLogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameters: Tensor, x: Tensor, likelihood: Likelihood, regions: list[Region]) -> Tensor:
        ctx.save_for_backward(parameters, x)
        ctx.likelihood, ctx.regions = likelihood, regions
        nll = parameters.new_zeros(parameters.shape[0], dtype=computing_type(parameters))
        for region in regions:
            nll[region[0]] -= likelihood.log_prob(parameters[region], x[region])
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, nll_gradient: Tensor) -> tuple[Tensor, None, None, None]:
        parameters, x = ctx.saved_tensors
        gradient = torch.zeros_like(parameters)  # zeros for the cropped border
        for region in ctx.regions:
            gradient[region] = _chunk_gradient(ctx.likelihood, parameters[region], x[region], -nll_gradient[region[0]])
        return gradient, None, None, None


def _chunk_gradient(likelihood: Likelihood, parameters: Tensor, x: Tensor, log_prob_gradient: Tensor) -> Tensor:
    """Gradient of one chunk, (b, P, h, w). A function of its own, so that no chunk outlives its turn."""
    with torch.enable_grad():
        leaf = parameters.detach().requires_grad_()
        log_prob = likelihood.log_prob(leaf, x)
    return torch.autograd.grad(log_prob, leaf, log_prob_gradient)[0]


def _regions(shape: tuple[int, int, int], crop: int, chunk_images: int, max_rows: int) -> list[Region]:
    """Chunks of a (B, H, W) batch without its border, each with at most ``max_rows`` rows, counted over its images.

    Whole images, up to ``chunk_images`` of them, while they fit; otherwise even shares of one image's rows.
    """
    batch, height, width = shape
    rows = height - 2 * crop
    images_per_chunk = max(1, min(chunk_images, max_rows // rows))
    shares = -(-rows // max_rows)
    cuts = [crop + rows * share // shares for share in range(shares + 1)]
    return [
        (slice(image, min(image + images_per_chunk, batch)), slice(None), slice(top, bottom), slice(crop, width - crop))
        for image in range(0, batch, images_per_chunk)
        for top, bottom in pairwise(cuts)
    ]


def _problems(name: str, image_channels: int, bits: int, mixtures: int) -> list[str]:
    problems = []
    if name not in get_args(LikelihoodName):
        problems.append(f"model.likelihood = {name!r} is unknown: choose one of {', '.join(get_args(LikelihoodName))}")
    if not 1 <= bits <= 8:
        problems.append(f"model.bits = {bits} must be from 1 (binary) to 8")
    if image_channels < 1:
        problems.append(f"model.image_channels = {image_channels} must be at least 1")
    if mixtures < 1:
        problems.append(f"model.mixtures = {mixtures} must be at least 1")
    if name == "bernoulli" and bits > 1:
        problems.append(
            f"model.likelihood = 'bernoulli' describes binary images, but model.bits = {bits}: "
            "set model.bits = 1, or model.likelihood = 'auto'"
        )
    return problems
