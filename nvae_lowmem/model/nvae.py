"""NVAE (arXiv 2007.03898): encoder tower, decoder tower, and ONE top-down pass for everything.

    x -> 2x-1 -> stem -> pre-process -> encoder tower -----------> top
                                           | one map per group      |
    likelihood <- head <- post-process <- decoder tower: cells, prior, posterior, z, combiner, group by group

Every direct child of `NVAE.blocks` is a block: the unit that a memory policy applies to, named as `block_names` says.
Legend: B images, C channels of a scale, L latents per group, H x W pixels. Scale 0 has the highest resolution; groups
of a pass are counted from the top (lowest resolution) down.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae_lowmem.config import ModelConfig
from nvae_lowmem.model.cells import make_cell
from nvae_lowmem.model.flows import Flow
from nvae_lowmem.model.functional import Regularisation
from nvae_lowmem.model.latents import FromPosterior, Latent, Noise, Normal, Source
from nvae_lowmem.model.layers import ConvUnit, Normed
from nvae_lowmem.model.likelihoods import Likelihood, make_likelihood, negative_log_likelihood


HEAD_CHUNK_BYTES = 8 << 20


class ElboTerms(NamedTuple):
    """What a pass over images yields, in nats: the ELBO is -(nll + sum of kl)."""

    nll: Tensor  # (B,) -log p(x|z)
    kl: list[Tensor]  # per group, top first: (B, L)
    log_q: list[Tensor]  # per group (B,), if the source gives densities
    log_p: list[Tensor]


# --- blocks -----------------------------------------------------------------------------------------------------------


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


class DecoderGroup(nn.Module):
    """One latent group: cells, prior, encoder combiner, posterior, z (with flows), combiner.

    (state (B, C, H, W), encoder map (B, C_enc, H, W) or None) -> (state with z merged in, Latent without z).
    The first group has no cells, a standard normal prior, and reads the top encoder map as it is.
    """

    def __init__(self, config: ModelConfig, group: int, channels: int, encoder_channels: int) -> None:
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
        # a plain VAE has no state before its only group: its decoder starts with a 1x1 convolution of z alone
        self.combiner = ConvUnit(config.latents + (0 if config.vanilla else channels), channels, 1)

    def forward(self, state: Tensor, encoder_map: Tensor | None, source: Source) -> tuple[Tensor, Latent]:
        for cell in self.cells:
            state = cell(state)
        latent = self.choose(state, encoder_map, source)
        z = latent.z
        assert z is not None
        return self.combiner(torch.cat([state, z.to(state.dtype)], dim=1)), latent

    def choose(self, state: Tensor, encoder_map: Tensor | None, source: Source) -> Latent:
        """z_l given z_<l (in the state) and the image (in the encoder map), in fp32."""
        batch, _, height, width = state.shape
        if self.prior is None:
            zero = torch.zeros(batch, self.latents, height, width, device=state.device)
            prior_parameters = (zero, zero)
            prior = Normal(zero, torch.ones_like(zero))
        else:
            prior_parameters = self.prior(state).float().chunk(2, dim=1)
            prior = Normal.from_parameters(*prior_parameters)
        if encoder_map is None:
            return source.latent(self.group, prior, None, None)
        seen = encoder_map
        if self.encoder_combiner is not None:
            seen = encoder_map + self.encoder_combiner(state)
        mu, log_sigma = self.posterior(seen).float().chunk(2, dim=1)
        if self.residual_posterior and self.prior is not None:
            mu, log_sigma = mu + prior_parameters[0], log_sigma + prior_parameters[1]
        posterior = Normal.from_parameters(mu, log_sigma)
        flow = None if self.flow is None else functools.partial(self.flow, dtype=state.dtype)
        return source.latent(self.group, prior, posterior, flow)


class Head(nn.Module):
    """ELU, 3x3 convolution to the likelihood's parameters; with an image, its negative log-likelihood (B,)."""

    def __init__(self, config: ModelConfig, likelihood: Likelihood) -> None:
        super().__init__()
        self.conv = ConvUnit(config.channels_decoder, likelihood.parameter_channels, 3, activation="elu")
        self.likelihood, self.padding = likelihood, config.padding
        self.chunk_bytes = 64 << 20  # bound of the likelihood's temporaries, set from outside
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


# --- the model --------------------------------------------------------------------------------------------------------


class NVAE(nn.Module):
    """The hierarchical VAE of a ModelConfig. `model(x, noise)`: it never draws by itself.

    Under autocast the activations take autocast's dtype; parameters and the fp32 islands stay fp32.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.likelihood = make_likelihood(config.likelihood, config.image_channels, config.bits, config.mixtures)
        self.blocks = nn.ModuleDict()
        self.latent_shapes: list[tuple[int, int, int]] = []  # per group, top first: (L, h, w)
        encoder_channels = self._build_encoder()
        self._build_decoder(encoder_channels)
        self.regularisation = Regularisation()
        for module in self.layers():
            module.regularisation = self.regularisation

    def _build_encoder(self) -> int:
        """Stem, pre-process, encoder tower, top. Returns the channels of the topmost map."""
        c, channels = self.config, self.config.channels_encoder
        self._encoder_order: list[tuple[str, bool]] = []  # (block, whether its output feeds a group)

        def add(name: str, block: nn.Module, feeds: bool = False) -> None:
            self.blocks[name] = block
            self._encoder_order.append((name, feeds))

        add("stem", Stem(c))
        for block in range(c.preprocess_blocks):
            for cell in range(c.preprocess_cells):
                down = cell == c.preprocess_cells - 1
                out = 2 * channels if down else channels
                resample = "down" if down else "keep"
                add(f"pre_{block}_{cell}", make_cell(c.architecture, "preprocess", channels, out, resample, squeeze_excitation=c.squeeze_excitation))  # fmt: skip
                channels = out
        if not c.vanilla:
            for scale, groups in enumerate(c.scale_groups):
                for group in range(groups):
                    add(f"enc_{scale}_{groups - 1 - group}", EncoderGroup(c, channels), feeds=True)
                if scale < c.scales - 1:
                    add(f"enc_{scale}_down", make_cell(c.architecture, "encoder", channels, 2 * channels, "down", squeeze_excitation=c.squeeze_excitation))  # fmt: skip
                    channels *= 2
        self.blocks["top"] = EncoderTop(channels)
        return channels

    def _build_decoder(self, encoder_channels: int) -> None:
        """Learned start, decoder tower, post-process, head."""
        c = self.config
        channels = c.channels_decoder << (c.preprocess_blocks + c.scales - 1)
        self._decoder_order: list[str] = []
        top = c.scales - 1
        group = 0
        if not c.vanilla:
            self.blocks["start"] = LearnedStart(channels, c.scale_sizes[top])
        for scale in range(top, -1, -1):
            for index in range(c.scale_groups[scale]):
                name = f"dec_{scale}_{index}"
                self.blocks[name] = DecoderGroup(c, group, channels, encoder_channels)
                self._decoder_order.append(name)
                self.latent_shapes.append((c.latents, c.scale_sizes[scale], c.scale_sizes[scale]))
                group += 1
            if scale:
                self.blocks[f"dec_{scale}_up"] = make_cell(c.architecture, "decoder", channels, channels // 2, "up", squeeze_excitation=c.squeeze_excitation)  # fmt: skip
                self._decoder_order.append(f"dec_{scale}_up")
                channels, encoder_channels = channels // 2, encoder_channels // 2
        for block in range(c.postprocess_blocks):
            for cell in range(c.postprocess_cells):
                out = channels // 2 if cell == 0 else channels
                name = f"post_{block}_{cell}"
                self.blocks[name] = make_cell(c.architecture, "postprocess", channels, out, "up" if cell == 0 else "keep", squeeze_excitation=c.squeeze_excitation)  # fmt: skip
                self._decoder_order.append(name)
                channels = out
        self.blocks["head"] = Head(c, self.likelihood)

    # -- passes --

    def forward(self, x: Tensor, noise: Noise) -> ElboTerms:
        """The terms of the ELBO of images x (B, channels, S, S) in [0,1], S = network_size."""
        return self.elbo_terms(x, FromPosterior(noise))

    def elbo_terms(self, x: Tensor, source: Source) -> ElboTerms:
        """The terms of the ELBO with latents from any source that has densities."""
        features, latents = self.top_down(source, self.encode(x))
        with _no_autocast(x.device):
            nll = self.blocks["head"](features, x)
        pick = [[getattr(latent, name) for latent in latents] for name in ("kl", "log_q", "log_p")]
        kl, log_q, log_p = ([v for v in values if v is not None] for values in pick)
        return ElboTerms(nll, kl, log_q, log_p)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Bottom-up: one map per group, top first; the first of them already through `top`."""
        dtype = _compute_dtype(x)
        maps: list[Tensor] = []
        with _no_autocast(x.device):
            stem, *rest = self._encoder_order
            e = self.blocks[stem[0]](x, dtype)
            for name, feeds in rest:
                e = self.blocks[name](e)
                if feeds:
                    maps.append(e)
            if maps:
                maps.pop()
            maps.append(self.blocks["top"](e))
        return maps[::-1]

    def top_down(
        self, source: Source, maps: list[Tensor] | None = None, batch: int = 1, keep_z: bool = False
    ) -> tuple[Tensor, list[Latent]]:
        """THE pass: from the learned start through all groups. Returns (what the head reads, one Latent per group).

        maps: what `encode` returned, for sources that use the posterior; without it `batch` latents are made.
        keep_z: whether the Latents hold their z; it is in the state anyway, and only some callers need it.
        """
        parameter = next(self.parameters())
        dtype = maps[0].dtype if maps is not None else _compute_dtype(parameter)
        batch = len(maps[0]) if maps is not None else batch
        latents: list[Latent] = []
        waiting = list(maps) if maps is not None else []
        with _no_autocast(parameter.device):
            state = self._start(batch, dtype, parameter.device)
            for name in self._decoder_order:
                block = self.blocks[name]
                if isinstance(block, DecoderGroup):
                    state, latent = block(state, waiting.pop(0) if maps is not None else None, source)
                    latents.append(latent if keep_z else latent._replace(z=None))
                else:
                    state = block(state)
        return state, latents

    def _start(self, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if not self.config.vanilla:
            return self.blocks["start"](batch, dtype)
        size = self.config.scale_sizes[0]  # a plain VAE: no channels yet
        return torch.empty(batch, 0, size, size, dtype=dtype, device=device)

    def decode(
        self, source: Source, maps: list[Tensor] | None = None, batch: int = 1, keep_z: bool = False
    ) -> tuple[Tensor, list[Latent]]:
        """The likelihood's parameters (B, P, S - 2 padding, S - 2 padding) in fp32, and one Latent per group."""
        features, latents = self.top_down(source, maps, batch, keep_z)
        with _no_autocast(features.device):
            parameters = self.blocks["head"](features).float()
        p = self.config.padding
        return (parameters[:, :, p:-p, p:-p] if p else parameters), latents

    # -- what others need to know of the model --

    def layers(self) -> Iterator[Normed]:
        """Every module with weights to regularise or statistics to keep."""
        return (m for m in self.modules() if isinstance(m, Normed))

    def block_names(self) -> list[str]:
        """The blocks in the order in which a pass runs them."""
        start = ["start"] if "start" in self.blocks else []
        return [name for name, _ in self._encoder_order] + ["top", *start, *self._decoder_order, "head"]


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else the dtype of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _no_autocast(device: torch.device) -> torch.autocast:
    # every dtype is explicit inside: CPU and CUDA autocast lists differ, and nothing here depends on them
    return torch.autocast(device.type, enabled=False)
