"""The distributions of an image given the image head's output: log-probability, sampling, mean.

Every likelihood here is a distribution over the 2^bits values that a pixel can take, so its probabilities sum to one:
a pixel's value stands for the bin around it, and the lowest and the highest bin take the open tails.

Shapes: B images, C image channels, P = ``parameter_channels``, K mixture components, H rows, W columns.
All arithmetic is float32 whatever the parameters' type (float64 stays float64).
Images are in [0, 1]; inside, locations and scales live on [-1, 1], where a bin's half width is 1 / (2^bits - 1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae_lowmem.model.functional import full_precision, soft_clamp
from nvae_lowmem.model.latents import SIGMA_FLOOR

_MIN_LOG_SCALE = -7.0
_MAX_LOG_SCALE = 60.0  # beyond it exp(-log scale) leaves float32's normal range; no sensible network comes near
_PUBLISHED_NARROW_BIN = 1e-5  # below this probability the published formula takes density * width (PixelCNN++)


def quantise(x: Tensor, bits: int) -> Tensor:
    """Reduce 8-bit images in [0, 1] to ``bits`` bits: floor(255 x / 2^(8-bits)) / (2^bits - 1). Any shape.

    With 8 bits the values k / 255 stay where they are.
    """
    # An image that was rescaled on its way may lie one rounding error below k / 255; the nudge is far below one step.
    eight_bit = x * 255.0 + 1e-3
    return torch.floor(eight_bit / 2 ** (8 - bits)) / (2**bits - 1)


class Likelihood(ABC):
    """p(x | parameters) of quantised images; holds no learned parameters.

    Attributes:
        name: what a configuration calls it.
        image_channels: C.
        bits: bits per channel, 1 to 8.
        parameter_channels: P, how many channels the image head must output.
    """

    name: str
    parameter_channels: int

    def __init__(self, image_channels: int, bits: int) -> None:
        self.image_channels = image_channels
        self.bits = bits

    @abstractmethod
    def log_prob_per_pixel(self, parameters: Tensor, x: Tensor) -> Tensor:
        """(B, P, H, W), (B, C, H, W) in [0, 1] -> (B, H, W), nats, summed over channels."""

    @abstractmethod
    def sample(self, parameters: Tensor, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """(B, P, H, W) -> (B, C, H, W) in [0, 1], on the grid of ``bits`` bits.

        The noise is drawn on the generator's own device, so one seed gives one image on every device.
        Temperature 0 gives the mode of the component choice and its location.
        """

    @abstractmethod
    def mean(self, parameters: Tensor) -> Tensor:
        """(B, P, H, W) -> (B, C, H, W) in [0, 1], not rounded to the grid."""

    @abstractmethod
    def describe(self) -> str:
        """One line for people."""

    @property
    @abstractmethod
    def working_values_per_pixel(self) -> int:
        """Upper bound of the values that log_prob and its backward pass hold at once, per pixel of the image.

        Values of the computing type; the given parameters and images are not counted, converted copies are.
        """

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        """(B, P, H, W), (B, C, H, W) in [0, 1] -> (B,), nats, summed over pixels and channels."""
        return self.log_prob_per_pixel(parameters, x).sum(dim=(1, 2))

    @property
    def _half_bin(self) -> float:
        return 1.0 / (2**self.bits - 1)

    def _to_grid(self, value: Tensor) -> Tensor:
        """Nearest grid value of anything on the real line, on [-1, 1]; the tails go to the two ends."""
        steps = 2**self.bits - 1
        return torch.round((value.clamp(-1.0, 1.0) + 1.0) * (0.5 * steps)) * (2.0 / steps) - 1.0

    def _edges(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Masks of the pixels in the lowest and in the highest bin. x on [-1, 1]."""
        inside = 1.0 - self._half_bin
        return x < -inside, x > inside


class Bernoulli(Likelihood):
    """Binary images, one logit per channel; P = C."""

    name = "bernoulli"

    def __init__(self, image_channels: int) -> None:
        super().__init__(image_channels, bits=1)
        self.parameter_channels = image_channels

    @property
    def working_values_per_pixel(self) -> int:
        return 5 * self.image_channels

    def log_prob_per_pixel(self, parameters: Tensor, x: Tensor) -> Tensor:
        logits = full_precision(parameters)
        return -F.binary_cross_entropy_with_logits(logits, x.to(logits.dtype), reduction="none").sum(dim=1)

    def sample(self, parameters: Tensor, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        logits = full_precision(parameters)
        return (logits + temperature * _logistic_noise(logits, generator) > 0).to(logits.dtype)

    def mean(self, parameters: Tensor) -> Tensor:
        return torch.sigmoid(full_precision(parameters))

    def describe(self) -> str:
        return f"Bernoulli, 1 bit, {self.image_channels} image channel(s), {self.parameter_channels} output channel(s)"


class LogisticMixture(Likelihood):
    """Mixture of K discretised logistics (PixelCNN++, arXiv 1701.05517).

    A pixel's P parameters are K logits, shared by its channels, then for each channel K means and K log scales and,
    in RGB images, K coefficients, which couple a component's colours:
    mean_G += tanh(c_0) R, mean_B += tanh(c_1) R + tanh(c_2) G. Hence P = K (1 + 2 C), in RGB 10 K.

    ``published_edges`` switches to the formula of the published models, for figures that must match theirs. It is no
    exact distribution: at 8 bits it treats value 254 as a highest bin too, and it replaces improbable bins by
    density * width, which underrates them where the scale is narrow.
    """

    name = "logistic_mixture"

    def __init__(self, image_channels: int, bits: int, mixtures: int = 10, published_edges: bool = False) -> None:
        super().__init__(image_channels, bits)
        self.mixtures = mixtures
        self.published_edges = published_edges
        self._couples_colours = image_channels == 3
        self._blocks_per_channel = 3 if self._couples_colours else 2
        self.parameter_channels = mixtures * (1 + image_channels * self._blocks_per_channel)

    @property
    def working_values_per_pixel(self) -> int:
        per_channel = 11 if self.published_edges else 8
        return (per_channel * self.image_channels + 11) * self.mixtures + 2 * self.image_channels

    def log_prob_per_pixel(self, parameters: Tensor, x: Tensor) -> Tensor:
        logits, channels = self._split(parameters)
        colours = (2.0 * x.to(logits.dtype) - 1.0).split(1, dim=1)  # C x (B, 1, H, W)
        coefficients = self._coefficients(channels)
        joint = logits  # (B, K, H, W): log weight + log probability of the channels so far
        for index, (means, log_scales, *_) in enumerate(channels):
            location = self._couple(means, coefficients, colours[:index])
            joint = joint + self._log_bin(colours[index], location, _clamp_log_scale(log_scales))
        return joint.logsumexp(dim=1) - logits.logsumexp(dim=1)

    def sample(self, parameters: Tensor, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        logits, channels = self._split(parameters)
        # argmax(logits + t * Gumbel) draws from softmax(logits / t), and is defined at t = 0 as well.
        gumbel = -torch.log(-torch.log(_uniform(logits, generator)))
        component = (logits + temperature * gumbel).argmax(dim=1, keepdim=True)  # (B, 1, H, W)
        chosen = [[block.gather(1, component) for block in blocks] for blocks in channels]
        coefficients = self._coefficients(chosen)
        colours: list[Tensor] = []
        for means, log_scales, *_ in chosen:
            location = self._couple(means, coefficients, colours)
            scale = temperature * torch.exp(_clamp_log_scale(log_scales))
            # Rounded before the next colour leans on it, as log_prob conditions on grid values.
            colours.append(self._to_grid(location + scale * _logistic_noise(location, generator)))
        return _to_unit_interval(torch.cat(colours, dim=1))

    def mean(self, parameters: Tensor) -> Tensor:
        """Components' coupled locations, each clamped to [-1, 1], averaged with the mixture's weights."""
        logits, channels = self._split(parameters)
        weights = logits.softmax(dim=1)
        coefficients = self._coefficients(channels)
        locations: list[Tensor] = []
        for means, *_ in channels:
            locations.append(self._couple(means, coefficients, locations).clamp(-1.0, 1.0))
        mean = torch.stack([(weights * location).sum(dim=1) for location in locations], dim=1)
        return _to_unit_interval(mean.clamp(-1.0, 1.0))  # rounded weights may sum to a little more than one

    def describe(self) -> str:
        coupling = "coupled RGB colours" if self._couples_colours else f"{self.image_channels} uncoupled channel(s)"
        return (
            f"discretised logistic mixture, {self.mixtures} component(s), {coupling}, {self.bits} bit(s), "
            f"{self.parameter_channels} output channels"
        )

    def _split(self, parameters: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        """(B, P, H, W) -> logits, and for each channel (means, log scales[, coefficients]); all (B, K, H, W)."""
        # One flat split: its backward pass is one concatenation, where slices would each pad a full-size gradient.
        # Blocks keep their type; each is converted where it is used, so that no float32 copy of all P channels exists.
        logits, *blocks = parameters.split(self.mixtures, dim=1)
        step = self._blocks_per_channel
        return full_precision(logits), [blocks[start : start + step] for start in range(0, len(blocks), step)]

    def _coefficients(self, channels: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        return [torch.tanh(full_precision(blocks[2])) for blocks in channels] if self._couples_colours else []

    def _couple(self, means: Tensor, coefficients: list[Tensor], earlier: Sequence[Tensor]) -> Tensor:
        """Location of the colour after the ``earlier`` ones, which are on [-1, 1] and broadcast over components."""
        location = full_precision(means)
        if not self._couples_colours:
            return location
        first = len(earlier) * (len(earlier) - 1) // 2  # G takes coefficient 0, B takes 1 and 2
        for offset, colour in enumerate(earlier):
            location = torch.addcmul(location, coefficients[first + offset], colour)
        return location

    def _log_bin(self, x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        """Log probability of x's bin, x (B, 1, H, W) on [-1, 1], location and log scale (B, K, H, W) -> (B, K, H, W).

        With a and b the bin's upper and lower end in units of the scale,
        sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)),
        a product without cancellation. An open tail means -a or b is -infinity, so its factor and the last become 1.
        """
        lowest, highest = (x < -0.999, x > 0.99) if self.published_edges else self._edges(x)
        edge = lowest | highest
        inverse_scale = torch.exp(-log_scale)
        middle = (x - location) * inverse_scale
        half_width = self._half_bin * inverse_scale
        below_top = _softplus((-middle - half_width).masked_fill_(highest, -math.inf))  # -log sigmoid(a)
        above_bottom = _softplus((middle - half_width).masked_fill_(lowest, -math.inf))  # -log sigmoid(-b)
        narrowness = torch.log(-torch.expm1((-2.0 * half_width).masked_fill_(edge, -math.inf)))
        log_bin = narrowness - below_top - above_bottom
        if not self.published_edges:
            return log_bin
        log_density = -_softplus(middle) - _softplus(-middle) - log_scale
        log_density_times_width = log_density + math.log(2.0 * self._half_bin)
        return torch.where(edge | (log_bin > math.log(_PUBLISHED_NARROW_BIN)), log_bin, log_density_times_width)


class DiscretisedNormal(Likelihood):
    """One discretised normal per channel: P = 2 C, the means then the log sigmas, both soft-clamped as the latents'."""

    name = "normal"

    def __init__(self, image_channels: int, bits: int) -> None:
        super().__init__(image_channels, bits)
        self.parameter_channels = 2 * image_channels

    @property
    def working_values_per_pixel(self) -> int:
        return 24 * self.image_channels

    def log_prob_per_pixel(self, parameters: Tensor, x: Tensor) -> Tensor:
        mu, sigma = self._mu_and_sigma(parameters)
        x = 2.0 * x.to(mu.dtype) - 1.0
        lowest, highest = self._edges(x)
        middle = (x - mu) / sigma
        half_width = self._half_bin / sigma
        # Phi(a) - Phi(b) cancels in the upper tail, so bins above the mean are mirrored below it. An open tail is one
        # Phi: of a for the lowest bin, of -b (mirrored) for the highest.
        mirrored = highest | (~lowest & (middle > 0))
        middle = torch.where(mirrored, -middle, middle)
        log_upper = torch.special.log_ndtr(middle + half_width)
        log_lower = torch.special.log_ndtr(middle - half_width)
        log_ratio = (log_lower - log_upper).masked_fill(lowest | highest, -math.inf)
        return (log_upper + torch.log(-torch.expm1(log_ratio))).sum(dim=1)

    def sample(self, parameters: Tensor, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        mu, sigma = self._mu_and_sigma(parameters)
        noise = torch.special.ndtri(_uniform(mu, generator))
        return _to_unit_interval(self._to_grid(mu + temperature * sigma * noise))

    def mean(self, parameters: Tensor) -> Tensor:
        """The normal's location, clamped to [0, 1]."""
        return _to_unit_interval(self._mu_and_sigma(parameters)[0].clamp(-1.0, 1.0))

    def describe(self) -> str:
        return (
            f"discretised normal, {self.image_channels} channel(s), {self.bits} bit(s), "
            f"{self.parameter_channels} output channels"
        )

    def _mu_and_sigma(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 2C, H, W) -> mu, sigma, both (B, C, H, W) on the scale of [-1, 1]."""
        mu, log_sigma = soft_clamp(full_precision(parameters)).chunk(2, dim=1)
        return mu, torch.exp(log_sigma) + SIGMA_FLOOR


class SquaredError(Likelihood):
    """A normal density of variance 1 around mu, P = C: -log p = (x - mu)^2 / 2 + constant."""

    name = "squared_error"

    def __init__(self, image_channels: int, bits: int) -> None:
        super().__init__(image_channels, bits)
        self.parameter_channels = image_channels

    @property
    def working_values_per_pixel(self) -> int:
        return 4 * self.image_channels

    def log_prob_per_pixel(self, parameters: Tensor, x: Tensor) -> Tensor:
        squared = (full_precision(parameters) - x).square().sum(dim=1)
        return -0.5 * (squared + self.image_channels * math.log(2 * math.pi))

    def sample(self, parameters: Tensor, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        mu = full_precision(parameters)
        return (mu + temperature * torch.special.ndtri(_uniform(mu, generator))).clamp(0.0, 1.0)

    def mean(self, parameters: Tensor) -> Tensor:
        return full_precision(parameters).clamp(0.0, 1.0)

    def describe(self) -> str:
        return f"squared error, {self.image_channels} channel(s)"


def _softplus(x: Tensor) -> Tensor:
    # The default threshold of 20 would cost float64 its accuracy. (logsigmoid keeps a buffer, on CPUs alone.)
    return F.softplus(x, threshold=40.0)


def _clamp_log_scale(log_scale: Tensor) -> Tensor:
    # Clamped first: both bounds are exact in half types, and what is kept for backward then is no converted copy.
    return full_precision(log_scale.clamp(_MIN_LOG_SCALE, _MAX_LOG_SCALE))


def _to_unit_interval(x: Tensor) -> Tensor:
    return (x + 1.0) * 0.5


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform draws strictly inside (0, 1) with the shape, type and device of ``like``."""
    eps = torch.finfo(like.dtype).eps
    draws = torch.rand(like.shape, dtype=like.dtype, device=generator.device, generator=generator)
    return draws.clamp(eps, 1.0 - eps).to(like.device)


def _logistic_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.logit(_uniform(like, generator))
