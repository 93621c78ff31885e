"""What a run is made of: frozen, keyword-only dataclasses, and every problem reported at once.

A field's docstring is its help text and its documentation. `Profile` is the one type that travels: the planner writes
it, training reads it, every checkpoint carries it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from nvae_lowmem.config.limits import LARGEST_STEPS, Range, range_problems
from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.paths import absolute_path
from nvae_lowmem.errors import raise_problems

Precision = Literal["auto", "fp32", "bf16", "fp16"]
EngineName = Literal["auto", "torch", "deepspeed"]
Crop = Literal["centre", "none", "celeba"]
Keep = Literal["all", "cheap", "input", "host"]
Cosine = Literal["epoch", "step"]
Statistics = Literal["keep", "estimate"]
FacesStyle = Literal["mixed", "toon-head", "avataaars", "open-peeps"]
EMBEDDED_SETS = ("mnist5k", "faces")
LATEST = ("latest",)
"""What names a run without being its path."""
KEEPS: tuple[Keep, ...] = ("all", "cheap", "input", "host")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and what is done to them before the network sees them."""

    source: str = "mnist5k"
    """Folder of images, ZIP, LMDB, MNIST IDX files, CIFAR-10 python batches, or an embedded set: mnist5k, faces."""
    test_source: str = ""
    """Held-out images in the same forms; empty: the source's own test part, or a fixed share of the source."""
    test_fraction: Annotated[float, Range(0, 1, above_least=True, below_most=True)] = 0.05
    """Share held out when the source has no test part of its own."""
    crop: Crop = "centre"
    """centre: the largest centred square, then resized; none: the image must be square already; celeba: the published
    square (15, 40, 163, 188) of CelebA's aligned 178 x 218 images."""
    crop_pixels: Annotated[int, Range(0, 1 << 16)] = 0
    """Side of the centred square cut before resizing (CelebA: 148 or 140); 0: the largest that fits."""
    white: Annotated[float, Range(0, 1e12)] = 0.0
    """The value that is white in images of more than 8 bits per channel, such as 1 or 4095; 0: as their format says."""
    flip: bool = False
    """Mirror images at random while training."""
    dynamic_binarisation: bool = True
    """1-bit data: each pixel is drawn with its grey value as probability, anew in every step; false: threshold 1/2."""
    max_images: Annotated[int, Range(0, 10**9)] = 0
    """Use only the first so many training images; 0: all."""
    faces_count: Annotated[int, Range(1, 10**6)] = 4000
    """Embedded set faces: how many to draw."""
    faces_style: FacesStyle = "mixed"
    """Embedded set faces: who draws them; mixed: ToonHead and Avataaars in turn."""
    cache_dir: str = ""
    """Where embedded sets are kept; empty: the user's cache folder."""
    class_names: tuple[str, ...] = ()
    """With model.classes: what the classes are called, by their numbers; empty: as the data say (names of sub-folders
    in their order). A run keeps them."""

    def problems(self) -> list[str]:
        """Every reason why this data section cannot be used."""
        out = []
        if len(set(self.class_names)) < len(self.class_names):
            out.append("data.class_names has a name twice: every class needs a name of its own")
        if not self.source:
            out.append("data.source is empty: name a folder, a ZIP, or an embedded set (mnist5k, faces)")
        return out + range_problems(self, "data")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The objective, the optimiser and the loop."""

    init_from: str = ""
    """Weights to start from: a run's folder, one of its checkpoints (averaged weights; its training.safetensors: those
    without averaging), an export (folder or ZIP), or a published checkpoint.pt; empty: random ones."""
    init_statistics: Statistics = "keep"
    """BatchNorm's running statistics with init_from: keep those of the weights, or estimate them from the first 32
    micro-batches of training images."""
    freeze: tuple[str, ...] = ()
    """Blocks that are not trained, by name or by a prefix of it ending in *: ["stem", "pre_*", "enc_*", "top"] is the
    encoder."""
    total_batch: Annotated[int, Range(1, 1 << 20)] = 200
    """Images per optimiser step over all processes and micro-batches."""
    epochs: Annotated[float, Range(0, 10**9)] = 400.0
    """Passes over the training images; used when steps is 0."""
    steps: Annotated[int, Range(0, LARGEST_STEPS)] = 0
    """Optimiser steps; 0: from epochs."""
    hours: Annotated[float, Range(0, 100_000)] = 0.0
    """Hours that training may take altogether, over all interruptions; the number of steps then follows from the
    measured speed, whatever steps and epochs say, and every schedule ends at that hour; 0: no limit."""
    learning_rate: Annotated[float, Range(0, 1000)] = 0.0
    """Peak learning rate of Adamax; 0: derived from the total batch and the next two, with the reason printed."""
    published_total_batch: Annotated[int, Range(1, 1 << 20)] = 256
    """Images per optimiser step of the recipe as published, over all its GPUs."""
    published_learning_rate: Annotated[float, Range(0, 1000, above_least=True)] = 1e-2
    """Peak learning rate of the recipe as published."""
    learning_rate_min: Annotated[float, Range(0, 1000, above_least=True)] = 1e-4
    """Where the cosine ends."""
    cosine: Cosine = "epoch"
    """When the cosine moves: epoch, as published; step: with every step, so that only the last one is at the minimum.
    With hours it moves with every step."""
    warmup_epochs: Annotated[float, Range(0, 10**9)] = 5.0
    """Epochs of linear warm-up."""
    weight_decay: Annotated[float, Range(0, 1000)] = 3e-4
    """Weight decay of Adamax (L2, added to the gradient)."""
    adamax_eps: Annotated[float, Range(0, 1000, above_least=True)] = 1e-3
    """Epsilon of Adamax."""
    clip_norm: Annotated[float, Range(0, 10**12)] = 0.0
    """Clip the true (unscaled) gradient to this norm; 0: off."""
    label_dropout: Annotated[float, Range(0, 1, below_most=True)] = 0.1
    """With model.classes: share of images that are trained without their label, so that the model also knows the data
    as a whole, which guidance needs when sampling."""
    skip_gradient_norm: Annotated[float, Range(0, 10**12)] = 0.0
    """Skip the update of a step whose true gradient norm is larger; 0: off."""
    skip_gradient_quantile: Annotated[float, Range(0, 1, below_most=True)] = 0.0
    """Skip the update of a step whose norm is above this quantile of the last 1,000, for example 0.999; 0: off."""
    kl_warmup_fraction: Annotated[float, Range(0, 1)] = 0.3
    """Share of all steps over which beta rises to 1."""
    kl_constant_fraction: Annotated[float, Range(0, 1)] = 1e-4
    """Share of all steps before beta starts to rise."""
    kl_beta_min: Annotated[float, Range(0, 1000)] = 1e-4
    """Smallest beta."""
    kl_beta_max: Annotated[float, Range(0, 1000)] = 1.0
    """Beta after the warm-up: 1 is the ELBO, less favours reconstructions over samples."""
    kl_balance: bool = True
    """Balance the groups' KL while beta < 1."""
    regulariser: Annotated[float, Range(0, 1000)] = 1e-2
    """Weight lambda of the spectral and BatchNorm regularisers at the end of annealing."""
    regulariser_start: Annotated[float, Range(0, 1000)] = 0.0
    """Lambda at beta = 0, annealed log-linearly along beta; 0: constant lambda."""
    ema_decay: Annotated[float, Range(0, 1, below_most=True, note="off")] = 0.9999
    """Decay of the averaged weights that evaluation and sampling use; 0: off."""
    ema_on_host: bool = True
    """Keep the averaged weights in host memory."""
    seed: Annotated[int, Range(-(2**63), 2**63 - 1)] = 1
    """Seed of initialisation, data order, flips, binarisation and noise."""
    log_every: Annotated[int, Range(1, LARGEST_STEPS)] = 50
    """Steps between log lines (also at 1, 2, 4, 8, ...)."""
    sample_every: Annotated[int, Range(0, LARGEST_STEPS)] = 0
    """Steps between sample grids; 0: ten times per run, or with hours every tenth of them."""
    evaluate_every: Annotated[int, Range(0, LARGEST_STEPS)] = 0
    """Steps between evaluations on held-out images; 0: ten times per run, or with hours every tenth of them."""
    evaluate_images: Annotated[int, Range(0, 10**9)] = 500
    """Held-out images of a periodic evaluation; 0: all."""
    save_every: Annotated[int, Range(0, LARGEST_STEPS)] = 0
    """Steps between checkpoints; 0: ten times per run."""
    save_minutes: Annotated[float, Range(0, 1e7)] = 30.0
    """Most minutes between checkpoints where save_every is 0; 0: only ten times per run."""
    keep_last: Annotated[int, Range(1, 10**6)] = 2
    """Newest checkpoints kept, beside the best one and the last one before an alarm."""
    rewinds: Annotated[int, Range(0, 1000)] = 3
    """How often training may go back after a blow-up, each time with half the learning rate or less; 0: it ends
    instead."""

    def problems(self) -> list[str]:
        """Every reason why this training section cannot be used."""
        out = range_problems(self, "training")
        if self.steps == 0 and self.epochs == 0:
            out.append("training.epochs = 0 must be larger than 0 (or set training.steps)")
        if self.kl_beta_min > self.kl_beta_max:
            out.append(f"training.kl_beta_min = {self.kl_beta_min} must be at most kl_beta_max = {self.kl_beta_max}")
        return out


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How the training step uses the card; found by the planner, obeyed by the trainer."""

    cap_bytes: Annotated[int, Range(0, 1 << 50)] = 0
    """Bytes the CUDA allocator may use; 0: no cap."""
    precision: Precision = "auto"
    """Dtype of activations; parameters, latents, KL, likelihood and regularisers are always fp32."""
    micro_batch: Annotated[int, Range(0, 1 << 16)] = 0
    """Images per forward pass and process; 0: the whole share of a process in one pass."""
    engine: EngineName = "auto"
    """auto: deepspeed where installed and started by it or offload asked for, else torch."""
    zero_stage: Annotated[int, Range(0, 3)] = 2
    """ZeRO stage of the deepspeed engine, 0 to 3."""
    offload_optimizer: bool = False
    """Gradients, master weights and Adamax states in host memory."""
    offload_parameters: bool = False
    """ZeRO stage 3: the weights too."""
    bucket_elements: Annotated[int, Range(2, 1 << 40)] = 5_000_000
    """Elements of DeepSpeed's reduce and all-gather buckets."""
    pin_memory: bool = False
    """Page-locked host buffers: faster copies, more host memory."""
    keep: Keep = "all"
    """What a block keeps for the backward pass, unless keep_blocks says otherwise."""
    keep_blocks: Mapping[str, Keep] = field(default_factory=dict)
    """Block name (or a prefix of it ending in *) -> what that block keeps."""
    allocator_settings: str = ""
    """PyTorch's allocator settings (PYTORCH_CUDA_ALLOC_CONF), such as expandable_segments:True; empty: its defaults."""
    likelihood_chunk_bytes: Annotated[int, Range(1, 1 << 50)] = 64 << 20
    """Upper bound of the likelihood's temporaries per chunk."""

    def keep_of(self, block: str) -> Keep:
        """What the named block keeps: its own entry, else the longest matching prefix, else the default."""
        if block in self.keep_blocks:
            return self.keep_blocks[block]
        prefixes = [k for k in self.keep_blocks if k.endswith("*") and block.startswith(k[:-1])]
        return self.keep_blocks[max(prefixes, key=len)] if prefixes else self.keep

    def problems(self) -> list[str]:
        """Every reason why this plan cannot be obeyed."""
        out = range_problems(self, "plan")
        if self.offload_parameters and self.zero_stage != 3:
            out.append("plan.offload_parameters needs plan.zero_stage = 3")
        if self.offload_parameters and self.engine == "torch":
            out.append("plan.offload_parameters needs plan.engine = 'deepspeed'")
        if self.bucket_elements % 2:
            out.append(f"plan.bucket_elements = {self.bucket_elements} must be an even number")
        return out


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

    def micro_batch(self, processes: int = 1) -> int:
        """Images per forward pass of each of so many processes: the plan's, or where it says 0 the whole share."""
        return self.plan.micro_batch or self.training.total_batch // processes

    def with_plan(self, **changes: Any) -> Profile:
        """The same profile with other values in its plan: `profile.with_plan(keep="input", micro_batch=8)`."""
        return replace(self, plan=replace(self.plan, **changes))

    def problems(self) -> list[str]:
        """Every problem of every section."""
        sections = (self.model, self.data, self.training, self.plan)
        out = [problem for section in sections for problem in section.problems()]
        names, classes = len(self.data.class_names), self.model.classes
        if names and names != classes:
            out.append(f"data.class_names has {names} names, but model.classes = {classes}: they must be as many")
        batch, micro = self.training.total_batch, self.plan.micro_batch
        if micro > 0 and batch > 0 and batch % micro:
            out.append(f"training.total_batch = {batch} is not a multiple of plan.micro_batch = {micro}")
        return out

    def with_absolute_paths(self) -> Profile:
        """The same run from any folder: paths of data as seen from the root; names of embedded sets stay."""
        data = self.data
        located = replace(
            data,
            source=absolute_path(data.source, unless=EMBEDDED_SETS),
            test_source=absolute_path(data.test_source, unless=EMBEDDED_SETS),
            cache_dir=absolute_path(data.cache_dir),
        )
        begun = absolute_path(self.training.init_from, unless=LATEST)
        return replace(self, data=located, training=replace(self.training, init_from=begun))

    def check(self, where: str = "profile") -> Profile:
        """Itself, or a ConfigError that lists every problem."""
        raise_problems(self.problems(), where)
        return self
