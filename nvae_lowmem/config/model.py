"""The network's configuration: sizes, groups per scale, cells, likelihood, and why one cannot be built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from nvae_lowmem.config.limits import Range, range_problems

Architecture = Literal[
    "res_elu",
    "res_bnelu",
    "res_bnswish",
    "res_mbconv",
    "res53_mbconv",
    "res35_mbconv",
    "res55_mbconv",
    "mbconv_sep",
    "mbconv_sep11",
    "mbconv_res",
    "mbconv_den",
]
WIDEST = 1 << 14
"""Channels of any layer, at the lowest resolution too."""
MOST_GROUPS = 1000
"""Latent groups of a whole hierarchy."""
MOST_CLASSES = 1 << 15
"""Class labels of one model; ImageNet's larger set has 21,841."""
LikelihoodName = Literal["auto", "bernoulli", "logistic_mixture", "normal", "squared_error"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. Defaults are the published choices; sizes are per image."""

    image_channels: Annotated[int, Range(1, 1024)] = 1
    """Colour channels of an image: 1 grey, 3 RGB, or any other number."""
    image_size: Annotated[int, Range(1, 8192)] = 28
    """Height and width of an image in pixels, before padding."""
    padding: Annotated[int, Range(0, 1024)] = 0
    """Zero pixels added on each side for the network (MNIST: 2, so 28 -> 32); the likelihood crops them off again."""
    bits: Annotated[int, Range(1, 8, note="binary")] = 8
    """Bits per channel value, 1 to 8; 1 means binary images."""
    likelihood: LikelihoodName = "auto"
    """p(x|z): auto takes bernoulli for 1 bit, normal for one mixture component, else logistic_mixture.
    squared_error is what plain autoencoders minimise; it is here to compare with."""
    mixtures: Annotated[int, Range(1, 1000)] = 10
    """Components of the discretised logistic mixture; 1 means a normal."""
    channels_encoder: Annotated[int, Range(1, WIDEST)] = 32
    """Channels of the stem; they double with every halving of the resolution."""
    channels_decoder: Annotated[int, Range(1, WIDEST)] = 32
    """Channels of the decoder at the image's resolution; doubled in the same way."""
    scales: Annotated[int, Range(1, 13)] = 2
    """Resolutions that carry latent groups."""
    groups: Annotated[int, Range(1, MOST_GROUPS)] = 10
    """Latent groups of the highest resolution (of every one, unless adaptive)."""
    adaptive: bool = True
    """Halve the number of groups with every scale going down in resolution."""
    min_groups: Annotated[int, Range(1, MOST_GROUPS)] = 1
    """Adaptive groups never go below this."""
    groups_per_scale: Annotated[tuple[int, ...] | None, Range(1, MOST_GROUPS)] = None
    """Groups per scale, highest resolution first, given outright (what the planner sets when fewer groups must do)."""
    latents: Annotated[int, Range(1, 4096)] = 20
    """Latent channels of one group."""
    cells_encoder: Annotated[int, Range(0, 100)] = 2
    """Cells per group of the encoder tower."""
    cells_decoder: Annotated[int, Range(0, 100)] = 2
    """Cells per group of the decoder tower."""
    preprocess_blocks: Annotated[int, Range(0, 13)] = 2
    """Blocks before the encoder tower; each halves the resolution."""
    preprocess_cells: Annotated[int, Range(1, 100)] = 3
    """Cells per pre-process block."""
    postprocess_blocks: Annotated[int, Range(0, 13)] = 2
    """Blocks after the decoder tower; each doubles the resolution. As many as pre-process blocks."""
    postprocess_cells: Annotated[int, Range(1, 100)] = 3
    """Cells per post-process block."""
    flows: Annotated[int, Range(0, 100)] = 0
    """Pairs of autoregressive cells per group's posterior."""
    architecture: Architecture = "res_mbconv"
    """Which cells each part of the network has: the table is in nvae_lowmem/model/cells.py."""
    squeeze_excitation: bool = True
    """Squeeze-and-excitation in every cell."""
    residual_posterior: bool = True
    """q(z|x) is parameterised relative to the prior p(z)."""
    data_init: bool = False
    """res_elu only: initialise weight normalisation from the first batch."""
    classes: Annotated[int, Range(0, MOST_CLASSES)] = 0
    """Classes whose labels the model is given, so that each can be asked for when sampling; 0: no labels."""

    @property
    def network_size(self) -> int:
        """Pixels per side inside the network."""
        return self.image_size + 2 * self.padding

    @property
    def scale_groups(self) -> tuple[int, ...]:
        """Groups per scale, highest resolution first."""
        if self.groups_per_scale is not None:
            return self.groups_per_scale
        if not self.adaptive:
            return (self.groups,) * self.scales
        return tuple(max(self.min_groups, self.groups >> s) for s in range(self.scales))

    @property
    def total_groups(self) -> int:
        """Latent groups of the whole hierarchy."""
        return sum(self.scale_groups)

    @property
    def vanilla(self) -> bool:
        """One scale with one group is a plain VAE: no towers."""
        return self.scale_groups == (1,)

    @property
    def scale_sizes(self) -> tuple[int, ...]:
        """Pixels per side of each scale, highest resolution first."""
        top = self.network_size >> self.preprocess_blocks
        return tuple(top >> s for s in range(self.scales))

    @property
    def latent_dims(self) -> int:
        """Latent dimensions of one image."""
        return sum(self.latents * g * s * s for g, s in zip(self.scale_groups, self.scale_sizes, strict=True))

    @property
    def image_dims(self) -> int:
        """Channel values of one image, what bits per dimension are counted over."""
        return self.image_channels * self.image_size**2

    def problems(self) -> list[str]:
        """Every reason why this model cannot be built, each with what to do."""
        out = range_problems(self, "model")
        if self.likelihood == "bernoulli" and self.bits != 1:
            out.append(f"model.likelihood = 'bernoulli' describes binary images, but model.bits = {self.bits}: set 1")
        if self.preprocess_blocks != self.postprocess_blocks:
            out.append(
                f"model.preprocess_blocks = {self.preprocess_blocks} halvings and model.postprocess_blocks = "
                f"{self.postprocess_blocks} doublings must be equal, or the output has another size than the image"
            )
        if out:
            return out
        if self.groups_per_scale is not None and len(self.groups_per_scale) != self.scales:
            out.append(
                f"model.groups_per_scale {list(self.groups_per_scale)} needs model.scales = {self.scales} numbers"
            )
        if self.total_groups > MOST_GROUPS:
            out.append(f"model: {self.total_groups:,} latent groups over all scales; at most {MOST_GROUPS:,} are built")
        halvings = self.preprocess_blocks + self.scales - 1
        for name in ("channels_encoder", "channels_decoder"):
            if (channels := getattr(self, name)) << halvings > WIDEST:
                out.append(
                    f"model.{name} = {channels:,} doubled {halvings} times is {channels << halvings:,} channels; "
                    f"at most {WIDEST:,} are built"
                )
        if self.network_size % (1 << halvings):
            good = -(-self.network_size >> halvings) << halvings
            out.append(
                f"model.image_size {self.image_size} + 2 x padding {self.padding} = {self.network_size} pixels cannot "
                f"be halved {halvings} times (preprocess_blocks {self.preprocess_blocks} + scales {self.scales} - 1): "
                f"use {good} pixels, a padding that gets there, or fewer scales"
            )
        elif self.network_size >> halvings < 1:
            out.append(f"model: {halvings} halvings of {self.network_size} pixels leave nothing: use fewer scales")
        if self.data_init and self.architecture != "res_elu":
            out.append(f"model.data_init belongs to architecture 'res_elu', not {self.architecture!r}: set it to false")
        if self.architecture == "mbconv_den":
            out += [
                f"model.{name} = {getattr(self, name)} must be divisible by 8 for architecture 'mbconv_den' (8 groups)"
                for name in ("channels_encoder", "channels_decoder")
                if getattr(self, name) % 8
            ]
        return out
