"""Restoring images with a trained model: missing pixels, noise, low resolution. No gradients, no training for the task.

What is known of an image x is y = A x + noise. Two steps alternate (plug-and-play; the prior is a hierarchical VAE,
arXiv 2303.11217):

    r   = E[x | z],  z ~ q(z | x)                    the model says what images look like: one pass, as reconstruction's
    x   = argmin |A x - y|^2 / sigma^2 + |x - r|^2 / s^2      the data say what is known, closed form below

Where pixels are missing, x takes a draw from p(x | z) there instead of r: then the two steps are the imputation of
arXiv 1401.4082, appendix F, whose x settle at draws from p(missing pixels | known ones).

One guess is the mean of the last half of all r, with what is known put in. Where pixels are missing, the mean is also
moved by what it is off at the known pixels around them: a small model gets the shapes right before the shades.

Where much is missing, several images could have been. The nearest to all of these in squared error is their mean,
E[x | y], which the mean of `guesses` estimates: each later one begins with another sample from the prior in the missing
pixels, since passes are too few to get from one of those images to another.

A step takes what a reconstruction takes, which is less than training (docs/performance.md).
Legend: B images, C image channels, S pixels per side, S' = S + 2 padding pixels per side inside the network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.generation.reconstruct import RowNoise
from nvae_lowmem.generation.sample import decoded_mean, drawn_pixels
from nvae_lowmem.model.latents import FromPosterior, FromPrior, NoiseStep
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.progress import OnProgress

_MOST_PASSES = 1 << 16
"""Image i has this many slots of noise, one for each iteration of each guess."""


# --- what is known of an image ----------------------------------------------------------------------------------------


class Observation(Protocol):
    """What is known of images: y = A x + noise."""

    imputes: ClassVar[bool]
    """Whether a draw from p(x | z) takes the place of what is not known, instead of its mean."""

    def first_guess(self) -> Tensor:
        """Images (B, C, S, S) to begin with, in [0, 1]."""
        ...

    def put_in(self, images: Tensor) -> Tensor:
        """The images nearest to `images` (B, C, S, S) that agree with what is known."""
        ...

    def result(self, mean: Tensor) -> Tensor:
        """The final images (B, C, S, S), from the mean of what the model made of them."""
        ...

    def shown(self) -> Tensor:
        """What is known, for people to look at (B, C, S, S)."""
        ...


@dataclass(frozen=True)
class KnownPixels:
    """Some pixels are known: A picks them. images (B, C, S, S) in [0, 1]; known (B or 1, 1, S, S) bool."""

    images: Tensor
    known: Tensor
    imputes: ClassVar[bool] = True

    def first_guess(self) -> Tensor:
        """Each unknown pixel from the known ones around it."""
        return self.put_in(self._spread(self.images))

    def put_in(self, images: Tensor) -> Tensor:
        """x = y where it is known, the model's elsewhere."""
        return torch.where(self.known, self.images, images)

    def result(self, mean: Tensor) -> Tensor:
        """Unknown pixels moved by what the mean is off at the known ones around them, which keep their values."""
        return self.put_in((mean + self._spread(self.images - mean)).clamp(0, 1))

    def shown(self) -> Tensor:
        """Unknown pixels in grey."""
        return self.put_in(torch.full_like(self.images, 0.5))

    def _spread(self, values: Tensor) -> Tensor:
        """Values (B, C, S, S) at known pixels, blurred with normalised weights; far from all of them, their mean.

        The Gaussian's deviation is about the distance between neighbours that are known, 0.65 / sqrt(share) pixels.
        """
        known = self.known.expand(len(values), *self.known.shape[1:]).float()
        sigma = 0.65 / max(float(known.mean()), 0.01) ** 0.5
        weight, total = _blurred(known, sigma), _blurred(values * known, sigma)
        count = known.sum((2, 3), keepdim=True).clamp(min=1)
        mean = (values * known).sum((2, 3), keepdim=True) / count
        return torch.where(weight > 1e-6, total / weight.clamp(min=1e-6), mean)


@dataclass(frozen=True)
class NoisyPixels:
    """Every pixel is known with Gaussian noise of deviation `sigma`: A is the identity. images (B, C, S, S)."""

    images: Tensor
    sigma: float
    model_sigma: float = 0.1
    """s: how far the model's reconstructions of clean images are off, per pixel."""
    imputes: ClassVar[bool] = False

    def first_guess(self) -> Tensor:
        """The noisy images, as far as they are colours."""
        return self.images.clamp(0, 1)

    def shown(self) -> Tensor:
        """The noisy images."""
        return self.first_guess()

    def result(self, mean: Tensor) -> Tensor:
        """As in every turn."""
        return self.put_in(mean)

    def put_in(self, images: Tensor) -> Tensor:
        """x = (y / sigma^2 + r / s^2) / (1 / sigma^2 + 1 / s^2)."""
        share = self.model_sigma**2 / (self.model_sigma**2 + self.sigma**2)
        return torch.lerp(images, self.images, share).clamp(0, 1)


@dataclass(frozen=True)
class LowResolution:
    """The means of squares of `factor` x `factor` pixels are known. images (B, C, S / factor, S / factor)."""

    images: Tensor
    factor: int
    imputes: ClassVar[bool] = False

    def first_guess(self) -> Tensor:
        """Bilinear interpolation."""
        return functional.interpolate(self.images, scale_factor=self.factor, mode="bilinear").clamp(0, 1)

    def shown(self) -> Tensor:
        """Squares of one colour."""
        return functional.interpolate(self.images, scale_factor=self.factor, mode="nearest").clamp(0, 1)

    def result(self, mean: Tensor) -> Tensor:
        """As in every turn."""
        return self.put_in(mean)

    def put_in(self, images: Tensor) -> Tensor:
        """x = r + A^T (A A^T)^-1 (y - A r): every square of r is moved to its mean."""
        error = self.images - functional.avg_pool2d(images, self.factor)
        return (images + functional.interpolate(error, scale_factor=self.factor, mode="nearest")).clamp(0, 1)


# --- the iteration ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def restore(
    model: NVAE,
    measured: Observation,
    iterations: int = 32,
    seed: int = 0,
    micro_batch: int = 16,
    progress: OnProgress | None = None,
    guesses: int = 1,
) -> Tensor:
    """Images (B, C, S, S) in [0, 1] on the host that agree with what was measured and with the model.

    model: in evaluation mode. Every guess has noise of its own, the first of them the same however many there are, and
    image i the same whatever the chunks are. The result is the mean of the guesses, kept as a running sum on the host.
    Raises ConfigError for fewer than 2 iterations or one guess, and for more than 65,536 passes in all.
    """
    assert not model.training, "images must not lean on each other: put the model into evaluation mode"
    if not 2 <= iterations <= _MOST_PASSES:
        raise ConfigError(f"--iterations {iterations}: must be from 2 to {_MOST_PASSES}")
    if not 1 <= guesses <= _MOST_PASSES // iterations:
        raise ConfigError(f"--guesses {guesses}: must be from 1 to {_MOST_PASSES // iterations}")
    start = measured.first_guess()
    total = torch.zeros_like(start)
    for guess in range(guesses):
        x = start
        if guess and measured.imputes:
            x = measured.put_in(_samples(model, len(x), seed, guess, micro_batch))
        for iteration in range(iterations):
            done = guess * iterations + iteration
            mean, drawn = _reconstructed(model, x, seed, done, micro_batch, measured.imputes)
            x = measured.put_in(drawn)
            if iteration >= iterations // 2:
                total += mean
            if progress is not None:
                progress(done + 1, guesses * iterations)
    return measured.result(total / (guesses * (iterations - iterations // 2)))


def _reconstructed(
    model: NVAE, images: Tensor, seed: int, number: int, micro_batch: int, draw: bool
) -> tuple[Tensor, Tensor]:
    """The mean of p(x|z), z ~ q(z|images), and a draw from it, or the mean again: (B, C, S, S) each, on the host.

    number: of the pass.
    """
    device, p = next(model.parameters()).device, model.config.padding
    means, draws = [], []
    for first in range(0, len(images), micro_batch):
        x = functional.pad(images[first : first + micro_batch], (p,) * 4).to(device)
        slots = tuple(image * _MOST_PASSES + number for image in range(first, first + len(x)))
        parameters, _ = model.decode(FromPosterior(RowNoise(seed, slots, NoiseStep.RESTORATION)), model.encode(x))
        means.append(model.likelihood.mean(parameters).cpu())
        draws.append(drawn_pixels(model, parameters, seed, slots) if draw else means[-1])
        del x, parameters  # before the next ones are made
    return torch.cat(means), torch.cat(draws)


def _samples(model: NVAE, count: int, seed: int, guess: int, micro_batch: int) -> Tensor:
    """Images from the prior for a guess to begin with, (count, C, S, S) on the host."""
    out = []
    for first in range(0, count, micro_batch):
        slots = tuple(image * _MOST_PASSES + guess for image in range(first, min(first + micro_batch, count)))
        source = FromPrior(RowNoise(seed, slots, NoiseStep.RESTORATION_STARTS))
        out.append(decoded_mean(model, source, None, len(slots)))
    return torch.cat(out)


def _blurred(images: Tensor, sigma: float) -> Tensor:
    """Images (B, C, S, S) under a Gaussian of `sigma` pixels, not normalised; nothing comes from beyond the edges."""
    radius = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype)
    line = torch.exp(-0.5 * (offsets / sigma) ** 2).expand(images.shape[1], 1, 1, -1)
    rows = functional.conv2d(images, line, padding=(0, radius), groups=images.shape[1])
    return functional.conv2d(rows, line.transpose(2, 3), padding=(radius, 0), groups=images.shape[1])


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images (B, C, S, S) in [0, 1] to their originals, (B,), in dB; at most 100."""
    error = (images - originals).double().square().mean((1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()
