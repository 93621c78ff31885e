"""The blocks of the network: what a memory policy applies to. `nvae.py` puts them in order.

Legend: B images, C channels of a scale, L latents per group, H x W pixels.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.model.cells import make_cell
from nvae_lowmem.model.flows import Flow
from nvae_lowmem.model.functional import full_precision, recompute_in_backward
from nvae_lowmem.model.latents import Latent, Normal, Source
from nvae_lowmem.model.layers import ConvUnit
from nvae_lowmem.model.likelihoods import Likelihood, negative_log_likelihood

HEAD_CHUNK_BYTES = 8 << 20
"""Small images share a chunk of the likelihood up to about this many bytes of temporaries."""


class Stem(nn.Module):
    """2x - 1, 3x3 convolution: image (B, channels, S, S) in [0,1] -> (B, C, S, S) in the compute dtype."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.conv = ConvUnit(config.image_channels, config.channels_encoder, 3)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.conv((2 * x - 1).to(dtype))


class EncoderGroup(nn.Module):
    """The cells of one group of the encoder tower, (B, C, H, W) -> same."""

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList(
            make_cell(config.architecture, "encoder", channels, channels, squeeze_excitation=config.squeeze_excitation)
            for _ in range(config.cells_encoder)
        )

    def forward(self, x: Tensor) -> Tensor:
        for cell in self.cells:
            x = cell(x)
        return x


class EncoderTop(nn.Module):
    """ELU, 1x1, ELU on the topmost encoder map: what the first posterior reads."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = ConvUnit(channels, channels, 1, activation="elu")

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.conv(x))


class LearnedStart(nn.Module):
    """The decoder's learned constant h (C, h, w), U[0,1) at first, shared over the batch."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.h = nn.Parameter(torch.rand(channels, size, size))

    def forward(self, batch: int, dtype: torch.dtype) -> Tensor:
        return self.h.to(dtype).expand(batch, -1, -1, -1)


CLASS_GAIN = 10.0
"""What rows of class tables are multiplied by. A row has a gradient from the images of its class alone, below the eps
of Adamax (1e-3), and steps as small as those of all weights: without this it is learned many times more slowly."""


class ClassTable(nn.Module):
    """A learned row for each class and a last one for "no class"; zero at first, so that labels begin without effect.

    labels (B, classes + 1) -> (B, *shape) fp32; None: "no class" for all images, (1, *shape). A product, not a look-up:
    its gradient needs no atomic additions, and each sum has one term that is not zero, so it is exact.
    """

    def __init__(self, classes: int, *shape: int) -> None:
        super().__init__()
        self.shape = shape
        self.rows = nn.Parameter(torch.zeros(classes + 1, math.prod(shape)))

    def forward(self, labels: Tensor | None) -> Tensor:
        rows = CLASS_GAIN * self.rows[-1:] if labels is None else (CLASS_GAIN * labels) @ self.rows
        return rows.unflatten(1, self.shape)


class DecoderGroup(nn.Module):
    """One latent group: cells, prior, encoder combiner, posterior, z (with flows), combiner.

    (state (B, C, H, W), encoder map (B, C_enc, H, W) or None, labels (B, classes + 1) or None) -> (state with z merged
    in, Latent without z). The first group has no cells, a standard normal prior, and reads the top encoder map as is.

    Of a model with classes each group first adds its class's bias to the state, so that cells, prior and, by way of the
    encoder combiner, posterior see it: p(z_l | z_<l, y), q(z_l | z_<l, x, y). The first group's prior is learned then:
    mu and log sigma of each class, p(z_1 | y).
    """

    def __init__(
        self,
        config: ModelConfig,
        group: int,  # from the top, 0 first
        channels: int,  # C of the state
        encoder_channels: int,  # C_enc of the encoder's map
    ) -> None:
        super().__init__()
        self.group, self.residual_posterior, self.latents = group, config.residual_posterior, config.latents
        first = group == 0
        self.cells = nn.ModuleList(
            make_cell(config.architecture, "decoder", channels, channels, squeeze_excitation=config.squeeze_excitation)
            for _ in range(0 if first else config.cells_decoder)
        )
        self.prior = None if first else ConvUnit(channels, 2 * config.latents, 1, activation="elu")
        self.encoder_combiner = None if first else ConvUnit(channels, encoder_channels, 1)
        self.posterior = ConvUnit(encoder_channels, 2 * config.latents, 3)
        self.flow = Flow(config.flows, config.latents) if config.flows else None
        self.class_bias = ClassTable(config.classes, channels) if config.classes and not config.vanilla else None
        first_shape = (2 * config.latents, *[config.scale_sizes[-1]] * 2)
        self.class_prior = ClassTable(config.classes, *first_shape) if config.classes and first else None
        self.recompute_latent = False  # a hook: keep what `latent` is given, and run it again in backward
        # a plain VAE has no state before its only group: its decoder starts with a 1x1 convolution of z alone
        self.combiner = ConvUnit(config.latents + (0 if config.vanilla else channels), channels, 1)

    def forward(
        self, state: Tensor, encoder_map: Tensor | None, source: Source, labels: Tensor | None = None
    ) -> tuple[Tensor, Latent]:
        if self.class_bias is not None:
            state = state + self.class_bias(labels).to(state.dtype)[:, :, None, None]
        for cell in self.cells:
            state = cell(state)
        latent = self.choose(state, encoder_map, source, labels)
        z = latent.z
        assert z is not None
        return self.combiner(torch.cat([state, z.to(state.dtype)], dim=1)), latent

    def choose(self, state: Tensor, encoder_map: Tensor | None, source: Source, labels: Tensor | None = None) -> Latent:
        """z_l given z_<l (in the state), the image (in the encoder map) and the label."""
        prior = None if self.prior is None else self.prior(state)  # (B, 2L, H, W): mu, log sigma
        if self.class_prior is not None:
            prior = self.class_prior(labels).expand(len(state), -1, -1, -1)
        posterior = None
        if encoder_map is not None:
            seen = encoder_map
            if self.encoder_combiner is not None:
                seen = encoder_map + self.encoder_combiner(state)
            posterior = self.posterior(seen)
        size = (len(state), *state.shape[2:])
        if self.recompute_latent:
            return recompute_in_backward(self.latent, prior, posterior, source, size, state.device)
        return self.latent(prior, posterior, source, size, state.device)

    def latent(
        self,
        prior_parameters: Tensor | None,
        posterior_parameters: Tensor | None,
        source: Source,
        size: tuple[int, int, int],
        device: torch.device,
    ) -> Latent:
        """The distributions from the convolutions' outputs, and z from them, in fp32."""
        if prior_parameters is None:
            zero = torch.zeros(size[0], self.latents, *size[1:], device=device)
            prior = Normal.from_parameters(zero, zero)  # sigma 1.01: the floor holds for the standard normal, too
        else:
            prior_mu, prior_log_sigma = full_precision(prior_parameters).chunk(2, dim=1)
            prior = Normal.from_parameters(prior_mu, prior_log_sigma)
        if posterior_parameters is None:
            return source.latent(self.group, prior, None, None)
        mu, log_sigma = full_precision(posterior_parameters).chunk(2, dim=1)
        if self.residual_posterior and prior_parameters is not None:
            mu, log_sigma = mu + prior_mu, log_sigma + prior_log_sigma
        flow = None if self.flow is None else functools.partial(self.flow, dtype=posterior_parameters.dtype)
        return source.latent(self.group, prior, Normal.from_parameters(mu, log_sigma), flow)


class Head(nn.Module):
    """ELU, 3x3 convolution to the likelihood's parameters; with an image, its negative log-likelihood (B,)."""

    def __init__(self, config: ModelConfig, likelihood: Likelihood) -> None:
        super().__init__()
        self.conv = ConvUnit(config.channels_decoder, likelihood.parameter_channels, 3, activation="elu")
        self.likelihood, self.padding = likelihood, config.padding
        self.chunk_bytes = 64 << 20  # a hook: bound of the likelihood's temporaries
        # small images go together, so that a chunk is worth a kernel launch; the number does not depend on the batch
        image_bytes = likelihood.working_values_per_pixel * config.image_size**2 * 4
        self.chunk_images = max(1, HEAD_CHUNK_BYTES // image_bytes)

    def forward(self, state: Tensor, x: Tensor | None = None) -> Tensor:
        parameters = self.conv(state)
        if x is None:
            return parameters
        return negative_log_likelihood(
            self.likelihood, parameters, x, self.padding, chunk_images=self.chunk_images, chunk_bytes=self.chunk_bytes
        )
