"""What a run is made of: frozen, keyword-only dataclasses, the published recipes, and every problem reported at once.

A field's docstring is its help text and its documentation. `Profile` is the one type that travels: the planner writes
it, training reads it, every checkpoint carries it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

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
LikelihoodName = Literal["auto", "bernoulli", "logistic_mixture", "normal"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
EngineName = Literal["auto", "torch", "deepspeed"]
Keep = Literal["all", "cheap", "input", "host"]
KEEPS: tuple[Keep, ...] = ("all", "cheap", "input", "host")


class ConfigError(ValueError):
    """Something a user gave is wrong. Its text is the whole message: what, which value, what is allowed, what to do."""


def raise_problems(problems: Iterable[str], where: str) -> None:
    """Raise one ConfigError that lists every problem; do nothing if there is none."""
    found = list(problems)
    if found:
        head = f"{where}: {len(found)} problem{'s' if len(found) > 1 else ''} in the configuration"
        raise ConfigError("\n  - ".join([head, *found]))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. Defaults are the published choices; sizes are per image."""

    image_channels: int = 1
    """Colour channels of an image: 1 grey, 3 RGB, or any other number."""
    image_size: int = 28
    """Height and width of an image in pixels, before padding."""
    padding: int = 0
    """Zero pixels added on each side for the network (MNIST: 2, so 28 -> 32); the likelihood crops them off again."""
    bits: int = 8
    """Bits per channel value, 1 to 8; 1 means binary images."""
    likelihood: LikelihoodName = "auto"
    """p(x|z): auto takes bernoulli for 1 bit, normal for one mixture component, else the discretised logistic mixture."""
    mixtures: int = 10
    """Components of the discretised logistic mixture; 1 means a normal."""
    channels_encoder: int = 32
    """Channels of the stem; they double with every halving of the resolution."""
    channels_decoder: int = 32
    """Channels of the decoder at the image's resolution; doubled in the same way."""
    scales: int = 2
    """Resolutions that carry latent groups."""
    groups: int = 10
    """Latent groups of the highest resolution (of every one, unless adaptive)."""
    adaptive: bool = True
    """Halve the number of groups with every scale going down in resolution."""
    min_groups: int = 1
    """Adaptive groups never go below this."""
    groups_per_scale: tuple[int, ...] | None = None
    """Groups per scale, highest resolution first, given outright (what the planner sets when fewer groups must do)."""
    latents: int = 20
    """Latent channels of one group."""
    cells_encoder: int = 2
    """Cells per group of the encoder tower."""
    cells_decoder: int = 2
    """Cells per group of the decoder tower."""
    preprocess_blocks: int = 2
    """Blocks before the encoder tower; each halves the resolution."""
    preprocess_cells: int = 3
    """Cells per pre-process block."""
    postprocess_blocks: int = 2
    """Blocks after the decoder tower; each doubles the resolution. As many as pre-process blocks."""
    postprocess_cells: int = 3
    """Cells per post-process block."""
    flows: int = 0
    """Pairs of autoregressive cells per group's posterior."""
    architecture: Architecture = "res_mbconv"
    """Which cells: see docs/architecture.md for the table."""
    squeeze_excitation: bool = True
    """Squeeze-and-excitation in every cell."""
    residual_posterior: bool = True
    """q(z|x) is parameterised relative to the prior p(z)."""
    data_init: bool = False
    """res_elu only: initialise weight normalisation from the first batch."""

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
        out = _at_least_one(
            self,
            "model",
            "image_channels image_size mixtures channels_encoder channels_decoder scales groups min_groups "
            "latents preprocess_cells postprocess_cells",
        )
        for name in ("padding", "flows", "preprocess_blocks", "postprocess_blocks", "cells_encoder", "cells_decoder"):
            if getattr(self, name) < 0:
                out.append(f"model.{name} = {getattr(self, name)} must not be negative")
        if not 1 <= self.bits <= 8:
            out.append(f"model.bits = {self.bits} must be from 1 (binary) to 8")
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
            out.append(f"model.groups_per_scale {list(self.groups_per_scale)} needs model.scales = {self.scales} numbers")
        elif any(g < 1 for g in self.scale_groups):
            out.append(f"model: groups per scale {list(self.scale_groups)}: every scale needs a group; set min_groups = 1")
        halvings = self.preprocess_blocks + self.scales - 1
        if self.network_size % (1 << halvings):
            good = -(-self.network_size >> halvings) << halvings
            out.append(
                f"model.image_size {self.image_size} + 2 x padding {self.padding} = {self.network_size} pixels cannot be "
                f"halved {halvings} times (preprocess_blocks {self.preprocess_blocks} + scales {self.scales} - 1): use "
                f"{good} pixels, a padding that gets there, or fewer scales"
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


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and what is done to them before the network sees them."""

    source: str = "mnist5k"
    """Folder of images, ZIP, LMDB, MNIST IDX files, CIFAR-10 python batches, or an embedded set: mnist5k, faces."""
    test_source: str = ""
    """Held-out images in the same forms; empty: the source's own test part, or a fixed share of the source."""
    test_fraction: float = 0.05
    """Share held out when the source has no test part of its own."""
    crop: Literal["centre", "none"] = "centre"
    """centre: the largest centred square, then resized; none: the image must be square already."""
    crop_pixels: int = 0
    """Side of the centred square cut before resizing (CelebA: 148 or 140); 0: the largest that fits."""
    flip: bool = False
    """Mirror images at random while training."""
    dynamic_binarisation: bool = True
    """1-bit data: each pixel is drawn with its grey value as probability, anew in every step; false: threshold 1/2."""
    max_images: int = 0
    """Use only the first so many training images; 0: all."""
    faces_count: int = 4000
    """Embedded set faces: how many to draw."""
    cache_dir: str = ""
    """Where embedded sets are kept; empty: the user's cache folder."""

    def problems(self) -> list[str]:
        """Every reason why this data section cannot be used."""
        out = []
        if not self.source:
            out.append("data.source is empty: name a folder, a ZIP, or an embedded set (mnist5k, faces)")
        if not 0 < self.test_fraction < 1:
            out.append(f"data.test_fraction = {self.test_fraction} must lie between 0 and 1, for example 0.05")
        for name in ("crop_pixels", "max_images"):
            if getattr(self, name) < 0:
                out.append(f"data.{name} = {getattr(self, name)} must not be negative")
        return out + _at_least_one(self, "data", "faces_count")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The objective, the optimiser and the loop."""

    total_batch: int = 200
    """Images per optimiser step over all processes and micro-batches."""
    epochs: float = 400.0
    """Passes over the training images; used when steps is 0."""
    steps: int = 0
    """Optimiser steps; 0: from epochs."""
    learning_rate: float = 0.0
    """Peak learning rate of Adamax; 0: derived from the total batch, with the reason printed."""
    learning_rate_min: float = 1e-4
    """Where the cosine ends."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up."""
    weight_decay: float = 3e-4
    """Weight decay of Adamax (L2, added to the gradient)."""
    adamax_eps: float = 1e-3
    """Epsilon of Adamax."""
    clip_norm: float = 0.0
    """Clip the true (unscaled) gradient to this norm; 0: off."""
    kl_warmup_fraction: float = 0.3
    """Share of all steps over which beta rises to 1."""
    kl_constant_fraction: float = 1e-4
    """Share of all steps before beta starts to rise."""
    kl_beta_min: float = 1e-4
    """Smallest beta."""
    kl_balance: bool = True
    """Balance the groups' KL while beta < 1."""
    regulariser: float = 1e-2
    """Weight lambda of the spectral and BatchNorm regularisers at the end of annealing."""
    regulariser_start: float = 0.0
    """Lambda at beta = 0, annealed log-linearly along beta; 0: constant lambda."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights that evaluation and sampling use; 0: off."""
    ema_on_host: bool = True
    """Keep the averaged weights in host memory."""
    seed: int = 1
    """Seed of initialisation, data order, flips, binarisation and noise."""
    log_every: int = 50
    """Steps between log lines (also at 1, 2, 4, 8, ...)."""
    sample_every: int = 0
    """Steps between sample grids; 0: ten times per run."""
    evaluate_every: int = 0
    """Steps between evaluations on held-out images; 0: ten times per run."""
    evaluate_images: int = 500
    """Held-out images of a periodic evaluation; 0: all."""
    save_every: int = 0
    """Steps between checkpoints; 0: ten times per run."""
    keep_last: int = 2
    """Checkpoints kept."""

    def problems(self) -> list[str]:
        """Every reason why this training section cannot be used."""
        out = _at_least_one(self, "training", "total_batch log_every keep_last")
        for name in (
            "steps learning_rate weight_decay clip_norm warmup_epochs regulariser regulariser_start "
            "sample_every evaluate_every evaluate_images save_every kl_warmup_fraction kl_constant_fraction"
        ).split():
            if not getattr(self, name) >= 0:
                out.append(f"training.{name} = {getattr(self, name)} must not be negative")
        for name in ("learning_rate_min", "adamax_eps"):
            if not getattr(self, name) > 0:
                out.append(f"training.{name} = {getattr(self, name)} must be larger than 0")
        if self.steps == 0 and not self.epochs > 0:
            out.append(f"training.epochs = {self.epochs} must be larger than 0 (or set training.steps)")
        if not 0 <= self.ema_decay < 1:
            out.append(f"training.ema_decay = {self.ema_decay} must be from 0 (off) to below 1")
        if not 0 <= self.kl_beta_min <= 1:
            out.append(f"training.kl_beta_min = {self.kl_beta_min} must be from 0 to 1")
        return out


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How the training step uses the card; found by the planner, obeyed by the trainer."""

    cap_bytes: int = 0
    """Bytes the CUDA allocator may use; 0: no cap."""
    precision: Precision = "auto"
    """Dtype of activations; parameters, latents, KL, likelihood and regularisers are always fp32."""
    micro_batch: int = 0
    """Images per forward pass and process; 0: the largest divisor of the total batch up to 32."""
    engine: EngineName = "auto"
    """auto: deepspeed where installed and started by it or offload asked for, else torch."""
    zero_stage: int = 2
    """ZeRO stage of the deepspeed engine, 0 to 3."""
    offload_optimizer: bool = False
    """Gradients, master weights and Adamax states in host memory."""
    offload_parameters: bool = False
    """ZeRO stage 3: the weights too."""
    bucket_elements: int = 5_000_000
    """Elements of DeepSpeed's reduce and all-gather buckets."""
    pin_memory: bool = False
    """Page-locked host buffers: faster copies, more host memory."""
    keep: Keep = "all"
    """What a block keeps for the backward pass, unless keep_blocks says otherwise."""
    keep_blocks: Mapping[str, Keep] = field(default_factory=dict)
    """Block name (or a prefix of it ending in *) -> what that block keeps."""
    likelihood_chunk_bytes: int = 64 << 20
    """Upper bound of the likelihood's temporaries per chunk."""

    def keep_of(self, block: str) -> Keep:
        """What the named block keeps: its own entry, else the longest matching prefix, else the default."""
        if block in self.keep_blocks:
            return self.keep_blocks[block]
        prefixes = [k for k in self.keep_blocks if k.endswith("*") and block.startswith(k[:-1])]
        return self.keep_blocks[max(prefixes, key=len)] if prefixes else self.keep

    def problems(self) -> list[str]:
        """Every reason why this plan cannot be obeyed."""
        out = []
        if not 0 <= self.zero_stage <= 3:
            out.append(f"plan.zero_stage = {self.zero_stage} must be 0, 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            out.append("plan.offload_parameters needs plan.zero_stage = 3")
        if self.offload_parameters and self.engine == "torch":
            out.append("plan.offload_parameters needs plan.engine = 'deepspeed'")
        for name in ("cap_bytes", "micro_batch"):
            if getattr(self, name) < 0:
                out.append(f"plan.{name} = {getattr(self, name)} must not be negative")
        if self.bucket_elements < 2 or self.bucket_elements % 2:
            out.append(f"plan.bucket_elements = {self.bucket_elements} must be an even number from 2 up")
        return out + _at_least_one(self, "plan", "likelihood_chunk_bytes")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One run: the model, the data, the training, how memory is used, and where this profile comes from."""

    name: str = "unnamed"
    """Short name; becomes part of the run folder's name."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainConfig = field(default_factory=TrainConfig)
    plan: MemoryPlan = field(default_factory=MemoryPlan)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Who made this profile and from what: card, versions, prediction. Read by people and reports, never obeyed."""

    def problems(self) -> list[str]:
        """Every problem of every section."""
        sections = (self.model, self.data, self.training, self.plan)
        out = [problem for section in sections for problem in section.problems()]
        batch, micro = self.training.total_batch, self.plan.micro_batch
        if micro > 0 and batch > 0 and batch % micro:
            out.append(f"training.total_batch = {batch} is not a multiple of plan.micro_batch = {micro}")
        return out

    def check(self, where: str = "profile") -> Profile:
        """Itself, or a ConfigError that lists every problem."""
        raise_problems(self.problems(), where)
        return self


def _at_least_one(section: Any, prefix: str, names: str) -> list[str]:
    return [
        f"{prefix}.{name} = {getattr(section, name)} must be at least 1"
        for name in names.split()
        if getattr(section, name) < 1
    ]


# The published recipes (arXiv 2007.03898, table 6), one row each; `batch` is the published batch per GPU.
# fmt: off
_RECIPES: dict[str, tuple] = {
    # name          size pad chan bits |  ch scales groups adapt min | pre/post cells flows | batch gpus epochs warm lambda0 lambda lr
    "mnist":       (28,  2,  1,   1,     32, 2,  10, True,  1,   2, 3,  0,   200,  2, 400, 5, 0.0, 1e-2, 1e-2),
    "cifar10":     (32,  0,  3,   8,    128, 1,  30, False, 1,   1, 2,  1,    32,  8, 400, 5, 0.0, 1e-2, 1e-2),
    "celeba64":    (64,  0,  3,   8,     64, 3,  20, True,  1,   1, 2,  1,    16,  8,  90, 5, 0.0, 1e-1, 1e-2),
    "imagenet32":  (32,  0,  3,   8,    192, 1,  28, False, 1,   1, 2,  1,    24, 24,  45, 1, 1.0, 1e-2, 1e-2),
    "celebahq256": (256, 0,  3,   5,     30, 5,  16, True,  4,   1, 2,  2,     4, 24, 300, 5, 1.0, 1e-2, 1e-2),
    "ffhq256":     (256, 0,  3,   5,     30, 5,  16, True,  4,   1, 2,  2,     4, 24, 200, 5, 1.0, 1e-1, 8e-3),
    "tiny":        (28,  2,  1,   1,      8, 2,   3, False, 1,   1, 2,  0,    32,  1, 100, 5, 0.0, 1e-2, 3e-3),
}
# fmt: on
RECIPES: tuple[str, ...] = tuple(_RECIPES)
PUBLISHED_RECIPES: tuple[str, ...] = RECIPES[:6]
_SOURCES = {"mnist": "mnist5k", "tiny": "mnist5k"}


def recipe(name: str) -> Profile:
    """The named recipe as published, at its per-GPU batch on one card.

    Raises ConfigError for an unknown name, with the known ones and the nearest.
    """
    if name not in _RECIPES:
        raise ConfigError(unknown_name("recipe", name, _RECIPES))
    (size, pad, channels, bits, width, scales, groups, adaptive, min_groups, blocks, cells, flows,
     batch, gpus, epochs, warmup, lambda_start, lambda_end, rate) = _RECIPES[name]  # fmt: skip
    model = ModelConfig(
        image_channels=channels, image_size=size, padding=pad, bits=bits, channels_encoder=width, channels_decoder=width,
        scales=scales, groups=groups, adaptive=adaptive, min_groups=min_groups, latents=8 if name == "tiny" else 20,
        preprocess_blocks=blocks, preprocess_cells=cells, postprocess_blocks=blocks, postprocess_cells=cells, flows=flows,
    )  # fmt: skip
    training = TrainConfig(
        total_batch=batch, epochs=epochs, warmup_epochs=warmup, regulariser=lambda_end, regulariser_start=lambda_start
    )
    data = DataConfig(source=_SOURCES.get(name, name), flip=channels == 3)
    provenance = {"recipe": name, "published_total_batch": batch * gpus, "published_learning_rate": rate}
    return Profile(name=name, model=model, data=data, training=training, provenance=provenance)


def with_groups(model: ModelConfig, groups_per_scale: tuple[int, ...]) -> ModelConfig:
    """The same model with other numbers of groups per scale, highest resolution first."""
    return replace(model, scales=len(groups_per_scale), groups=groups_per_scale[0], groups_per_scale=groups_per_scale)


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name nobody knows: the nearest one and the list."""
    import difflib

    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}: {hint}known: {', '.join(names)}"
