"""NVAE (arXiv 2007.03898): encoder tower, decoder tower, and ONE top-down pass for everything.

    x -> 2x-1 -> stem -> pre-process -> encoder tower -----------> top
                                           | one map per group      |
    likelihood <- head <- post-process <- decoder tower: cells, prior, posterior, z, combiner, group by group

Every direct child of `NVAE.blocks` is a block: the unit that a memory policy applies to, named as `block_names` says.
Legend: B images, C channels of a scale, L latents per group, H x W pixels. Scale 0 has the highest resolution; groups
of a pass are counted from the top (lowest resolution) down.
labels, where a model has classes: (B, classes + 1) fp32, a 1 in the column of each image's class, the last one for "no
class"; None: no class for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.model.blocks import DecoderGroup, EncoderGroup, EncoderTop, Head, LearnedStart, Stem
from nvae_lowmem.model.cells import Cell, Resample, Side, make_cell
from nvae_lowmem.model.functional import full_precision
from nvae_lowmem.model.hooks import BlockRunner, LayerSettings, run_plainly
from nvae_lowmem.model.latents import FromPosterior, Latent, Noise, Source
from nvae_lowmem.model.layers import NormLayer
from nvae_lowmem.model.likelihoods import make_likelihood


class ElboTerms(NamedTuple):
    """What a pass over images yields, in nats: the ELBO is -(nll + sum of kl)."""

    nll: Tensor  # (B,) -log p(x|z)
    kl: list[Tensor]  # per group, top first: (B, L)
    log_q: list[Tensor]  # per group (B,), if the source gives densities
    log_p: list[Tensor]


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
        self.settings = LayerSettings()  # a hook
        for module in self.layers():
            module.settings = self.settings
        self.run_block: BlockRunner = run_plainly  # a hook

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
                resample: Resample = "down" if down else "keep"
                add(f"pre_{block}_{cell}", self._cell("preprocess", channels, out, resample))
                channels = out
        if not c.vanilla:
            for scale, groups in enumerate(c.scale_groups):
                for group in range(groups):
                    add(f"enc_{scale}_{groups - 1 - group}", EncoderGroup(c, channels), feeds=True)
                if scale < c.scales - 1:
                    add(f"enc_{scale}_down", self._cell("encoder", channels, 2 * channels, "down"))
                    channels *= 2
        self.blocks["top"] = EncoderTop(channels)
        return channels

    def _cell(self, side: Side, in_channels: int, out_channels: int, resample: Resample) -> Cell:
        c = self.config
        return make_cell(
            c.architecture, side, in_channels, out_channels, resample, squeeze_excitation=c.squeeze_excitation
        )

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
                self.blocks[f"dec_{scale}_up"] = self._cell("decoder", channels, channels // 2, "up")
                self._decoder_order.append(f"dec_{scale}_up")
                channels, encoder_channels = channels // 2, encoder_channels // 2
        for block in range(c.postprocess_blocks):
            for cell in range(c.postprocess_cells):
                out = channels // 2 if cell == 0 else channels
                name = f"post_{block}_{cell}"
                self.blocks[name] = self._cell("postprocess", channels, out, "up" if cell == 0 else "keep")
                self._decoder_order.append(name)
                channels = out
        self.blocks["head"] = Head(c, self.likelihood)

    # -- passes --

    def forward(self, x: Tensor, noise: Noise, labels: Tensor | None = None) -> ElboTerms:
        """The terms of the ELBO of images x (B, channels, S, S) in [0,1], S = network_size."""
        return self.elbo_terms(x, FromPosterior(noise), labels)

    def elbo_terms(self, x: Tensor, source: Source, labels: Tensor | None = None) -> ElboTerms:
        """The terms of the ELBO, of log p(x|y) with labels, with latents from any source that has densities."""
        features, latents = self.top_down(source, self.encode(x), labels=labels)
        with _no_autocast(x.device):
            nll = self._block("head", features, x)
        pick = [[getattr(latent, name) for latent in latents] for name in ("kl", "log_q", "log_p")]
        kl, log_q, log_p = ([v for v in values if v is not None] for values in pick)
        return ElboTerms(nll, kl, log_q, log_p)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Bottom-up: one map per group, top first; the first of them already through `top`."""
        dtype = _compute_dtype(x)
        maps: list[Tensor] = []
        with _no_autocast(x.device):
            stem, *rest = self._encoder_order
            e = self._block(stem[0], x, dtype)
            for name, feeds in rest:
                e = self._block(name, e)
                if feeds:
                    maps.append(e)
            if maps:
                maps.pop()
            maps.append(self._block("top", e))
        return maps[::-1]

    def top_down(
        self,
        source: Source,
        maps: list[Tensor] | None = None,
        batch: int = 1,
        return_z: bool = False,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, list[Latent]]:
        """THE pass: from the learned start through all groups. Returns (what the head reads, one Latent per group).

        maps: what `encode` returned, for sources that use the posterior; without it `batch` latents are made. They are
        taken out of the list one by one, so that none outlives its group: whoever needs them again hands over a copy.
        return_z: whether the Latents hold their z; it is in the state anyway, and only some callers need it.
        """
        parameter = next(self.parameters())
        dtype = maps[0].dtype if maps is not None else _compute_dtype(parameter)
        batch = len(maps[0]) if maps is not None else batch
        latents: list[Latent] = []
        with _no_autocast(parameter.device):
            state = self._start(batch, dtype, parameter.device)
            for name in self._decoder_order:
                if isinstance(self.blocks[name], DecoderGroup):
                    state, latent = self._block(name, state, maps.pop(0) if maps is not None else None, source, labels)
                    latents.append(latent if return_z else latent._replace(z=None))
                else:
                    state = self._block(name, state)
        return state, latents

    def _block(self, name: str, *args: Any) -> Any:
        return self.run_block(name, self.blocks[name], *args)

    def _start(self, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if not self.config.vanilla:
            return self.blocks["start"](batch, dtype)
        size = self.config.scale_sizes[0]  # a plain VAE: no channels yet
        return torch.empty(batch, 0, size, size, dtype=dtype, device=device)

    def decode(
        self,
        source: Source,
        maps: list[Tensor] | None = None,
        batch: int = 1,
        return_z: bool = False,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, list[Latent]]:
        """The likelihood's parameters (B, P, S - 2 padding, S - 2 padding) in fp32, and one Latent per group."""
        features, latents = self.top_down(source, maps, batch, return_z, labels)
        with _no_autocast(features.device):
            parameters = full_precision(self._block("head", features))
        p = self.config.padding
        return (parameters[:, :, p:-p, p:-p] if p else parameters), latents

    # -- what others need to know of the model --

    def layers(self) -> Iterator[NormLayer]:
        """Every module with weights to regularise or statistics to keep."""
        return (m for m in self.modules() if isinstance(m, NormLayer))

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
