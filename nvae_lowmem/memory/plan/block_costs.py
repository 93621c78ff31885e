"""What every block of a model takes under every policy: bytes as functions of the batch, and work.

A block passes twice through a step, forward and backward, and each pass is a segment: how far memory rises in it and
where it ends, counted from where it began. Segments follow one another whatever the blocks before decided, so a table
of them prices every assignment of policies without another trace.

Two things keep the table cheap. Groups of one scale are alike, so a model with one group per scale (two at the top,
whose first group is special) stands for any number of groups. And sizes are a fixed part plus a part per image: traced
with a prime batch that divides no other size, divisibility tells one from the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.recipes import with_groups
from nvae_lowmem.config.sections import KEEPS, Keep, MemoryPlan, Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.memory.allocator.settings import MIN_BLOCK_BYTES, round_to_block
from nvae_lowmem.memory.plan.roofline import OperationCosts, Rates, operation_costs
from nvae_lowmem.memory.trace.events import Category, Phase
from nvae_lowmem.memory.trace.storageless import StoragelessTensors
from nvae_lowmem.memory.trace.tracer import StorageTracer, TracedRunner, paused_gc
from nvae_lowmem.model.freeze import freeze_blocks, frozen_blocks
from nvae_lowmem.model.functional import as_on_card
from nvae_lowmem.model.keep import apply_plan
from nvae_lowmem.model.latents import SeededNoise
from nvae_lowmem.model.layers import ConvUnit
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.objective import Objective
from nvae_lowmem.model.regularizers import begin_micro_batch

_PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PassBytes:
    """Bytes on the card after each event of one pass of a block, from where the pass began: fixed + per_image x B."""

    fixed: Ints
    per_image: Ints

    def peak_above_start(self, images: int) -> int:
        """The highest point for a batch of `images`; at least where the pass began."""
        return max(0, int((self.fixed + self.per_image * images).max(initial=0)))

    def net_change(self, images: int) -> int:
        """Where the pass ends."""
        return int(self.fixed[-1] + self.per_image[-1] * images) if len(self.fixed) else 0


@dataclass(frozen=True)
class BlockCosts:
    """One block under one policy."""

    forward: PassBytes
    backward: PassBytes
    host_bytes_per_image: int
    """Block inputs parked in host memory."""
    operations: OperationCosts


@dataclass(frozen=True)
class Choice:
    """What one policy means for one block at one batch size; the search sees nothing else."""

    keep: Keep
    kept_bytes: int
    """What stays on the card when the block has run forward."""
    peak_above_start_bytes: int
    """The most on the card while the block runs, in either direction, above what was there before it ran forward."""
    seconds: float
    host_bytes: int = 0


@dataclass(frozen=True)
class PlannedBlock:
    """A block of the full model and the one of the traced model that stands for it."""

    name: str
    stands_for: str


class BlockRecorder(StorageTracer):
    """Traces storages as its parent does, and notes what every operation computes and moves, by block."""

    def __init__(self, batch: int) -> None:
        super().__init__(StoragelessTensors())
        self.batch = batch
        self.operations: dict[str, list[tuple[float, float, float, bool]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        row = operation_costs(func, args, kwargs, out, self.batch)
        if row is not None:
            self.operations.setdefault(self.block, []).append(row)
        return out

    def costs(self) -> dict[str, BlockCosts]:
        """What each block took, from all that was recorded."""
        passes: dict[tuple[Phase, str], list[tuple[int, int]]] = {}
        host: dict[str, int] = {}
        at = passes.setdefault((Phase.FORWARD, "stem"), [])
        for a, is_alloc in self.trace.walk():
            if is_alloc:
                at = passes.setdefault((a.phase, a.block), [])
            if not a.on_card:
                host[a.block] = host.get(a.block, 0) + (a.nbytes // self.batch if is_alloc and a.died >= 0 else 0)
            elif a.category is not Category.WEIGHT:
                fixed, per_image = self._split(a.nbytes)
                at.append((fixed, per_image) if is_alloc else (-fixed, -per_image))
        blocks = {block for _, block in passes}
        return {
            block: BlockCosts(
                forward=_pass_bytes(passes.get((Phase.FORWARD, block), [])),
                backward=_pass_bytes(passes.get((Phase.BACKWARD, block), [])),
                host_bytes_per_image=host.get(block, 0),
                operations=OperationCosts.of(self.operations.get(block, [])),
            )
            for block in blocks
        }

    def _split(self, nbytes: int) -> tuple[int, int]:
        """(fixed bytes, bytes per image) of a storage; small ones take a whole block of the allocator."""
        if nbytes % self.batch or nbytes <= MIN_BLOCK_BYTES:
            return round_to_block(nbytes), 0
        return 0, nbytes // self.batch


def _pass_bytes(changes: list[tuple[int, int]]) -> PassBytes:
    table = np.array(changes, dtype=np.int64).reshape(-1, 2).cumsum(axis=0)
    return PassBytes(table[:, 0], table[:, 1])


@dataclass(frozen=True)
class BlockTable:
    """Costs of every kind of block of a model, for any number of groups per scale and any batch."""

    model: ModelConfig
    batch: int
    """The batch that was traced."""
    costs: dict[Keep, dict[str, BlockCosts]]
    parameters: dict[str, tuple[int, ...]]
    """Elements of each parameter that learns, by traced block."""
    parameter_bytes: dict[str, int]
    """Their fp32 weights on the card, each rounded up as the allocator does."""
    state_bytes: dict[str, int]
    """The same of all parameters and buffers."""
    copy_bytes: dict[str, int]
    """All parameters and buffers without rounding."""
    convolutions: dict[str, int]
    order: tuple[str, ...]
    """The traced blocks as a pass runs them."""

    def blocks(self, groups: tuple[int, ...]) -> list[PlannedBlock]:
        """The blocks of the model with `groups` per scale, highest resolution first, as a pass runs them."""
        return _planned_blocks(self.order, groups)

    def sources(self, groups: tuple[int, ...]) -> list[str]:
        """The traced block behind every block of the model with `groups`, the learned start first."""
        start = ["start"] if "start" in self.parameters else []
        return start + [b.stands_for for b in self.blocks(groups) if b.name != "start"]

    def count(self, per_block: dict[str, int], groups: tuple[int, ...]) -> int:
        """The sum of a figure per block, such as state_bytes, over the blocks of the model with `groups`."""
        return sum(per_block.get(source, 0) for source in self.sources(groups))

    def parameter_elements(self, groups: tuple[int, ...]) -> list[int]:
        """Elements of every parameter of the model with `groups`."""
        return [elements for source in self.sources(groups) for elements in self.parameters[source]]

    def choices(
        self, groups: tuple[int, ...], images: int, rates: Rates, gradients_stay: bool
    ) -> list[tuple[str, tuple[Choice, ...]]]:
        """(block, its choices) in the order of a pass.

        gradients_stay: each block's gradients (4 bytes per parameter) remain on the card once backward has passed it.
        """
        priced: dict[str, tuple[Choice, ...]] = {}
        left: dict[str, int] = {}
        blocks = [b for b in self.blocks(groups) if b.name != "start"]
        out: list[tuple[str, tuple[Choice, ...]]] = []
        after = 0  # what the backward passes of all later blocks left behind: gradients of maps and of weights
        for block in reversed(blocks):
            source = block.stands_for
            if source not in left:
                left[source] = self._left_behind(source, images)
                left[source] += self.parameter_bytes[source] if gradients_stay else 0
                priced[source] = self._price(source, images, rates)
            own_gradients = self.parameter_bytes[source] if gradients_stay else 0
            moved = tuple(
                replace(c, peak_above_start_bytes=max(forward, c.kept_bytes + after + own_gradients + backward))
                for c, (forward, backward) in zip(priced[source], self._peaks(source, images), strict=True)
            )
            out.append((block.name, moved))
            after += left[source]
        return out[::-1]

    def _left_behind(self, source: str, images: int) -> int:
        """What a block's two passes leave on the card, whatever its policy: above all gradients of encoder maps.

        A parked input is fetched one block ahead, so that with `host` a neighbour's bytes would be counted here.
        """
        own = [costs[source] for keep, costs in self.costs.items() if keep != "host"] or [self.costs["host"][source]]
        return max(c.forward.net_change(images) + c.backward.net_change(images) for c in own)

    def _peaks(self, source: str, images: int) -> list[tuple[int, int]]:
        own = [costs[source] for costs in self.costs.values()]
        return [(c.forward.peak_above_start(images), c.backward.peak_above_start(images)) for c in own]

    def _price(self, source: str, images: int, rates: Rates) -> tuple[Choice, ...]:
        out = []
        for keep, costs in self.costs.items():
            c, host_bytes = costs[source], costs[source].host_bytes_per_image * images
            if source == "head":  # works through chunks of images one after the other, however many there are
                seconds = c.operations.seconds(self.batch, rates) * images / self.batch
            else:
                seconds = c.operations.seconds(images, rates)
            # down and up again on a stream of its own: the card waits only for what outlasts the block's own work
            seconds += max(0.0, 2 * host_bytes / rates.pinned_link_bytes - seconds) if host_bytes else 0.0
            out.append(Choice(keep, c.forward.net_change(images), 0, seconds, host_bytes))
        return tuple(out)


def _planned_blocks(order: Sequence[str], groups: tuple[int, ...]) -> list[PlannedBlock]:
    """The blocks of the model with `groups` per scale, from those of the traced model in `order`."""
    top = len(groups) - 1
    out = []
    for name in order:
        tower, _, rest = name.partition("_")
        scale, _, index = rest.partition("_")
        if tower not in ("enc", "dec") or not index.isdecimal():
            out.append(PlannedBlock(name, name))
        elif index == "0":  # in both towers, group 0 is the one that is always there
            count, others = groups[int(scale)], f"{tower}_{scale}_{1 if int(scale) == top else 0}"
            numbers = range(count) if tower == "dec" else range(count - 1, -1, -1)
            out += [PlannedBlock(f"{tower}_{scale}_{i}", others if i else name) for i in numbers]
    return out


def _frozen_in_small(order: Sequence[str], groups: tuple[int, ...], freeze: Sequence[str]) -> list[str]:
    """The blocks of the traced model, all of which are frozen that it stands for in the model with `groups`.

    One that stands for others as well counts as learning, so that it is never priced too low; the predictor, which
    traces the model as it is, has the last word. Raises ConfigError as `frozen_blocks` does.
    """
    stands_for = {block.name: block.stands_for for block in _planned_blocks(order, groups)}
    frozen = set(frozen_blocks(list(stands_for), freeze))
    learning = {source for name, source in stands_for.items() if name not in frozen}
    return [name for name in order if name not in learning]


def record_blocks(profile: Profile, keeps: tuple[Keep, ...] = KEEPS) -> BlockTable:
    """Trace one micro-batch of a small model of the same blocks under every policy. Precision must be decided."""
    config = profile.model
    *lower, top = config.scale_groups
    small = replace(profile, model=with_groups(config, (*[1] * len(lower), min(top, 2))))
    costs: dict[Keep, dict[str, BlockCosts]] = {}
    with paused_gc(), as_on_card():
        with StorageTracer(StoragelessTensors()):
            model = NVAE(small.model).train()
            freeze_blocks(model, _frozen_in_small(model.block_names(), config.scale_groups, profile.training.freeze))
        batch = _batch_prime(model)
        for keep in keeps:
            costs[keep] = _record(model, small, keep, batch)
        blocks = {name: model.blocks[name] for name in model.blocks}
        learning = {name: [p for p in block.parameters() if p.requires_grad] for name, block in blocks.items()}
        return BlockTable(
            model=config,
            batch=batch,
            costs=costs,
            parameters={n: tuple(p.numel() for p in own) for n, own in learning.items()},
            parameter_bytes={n: sum(map(_rounded_bytes, own)) for n, own in learning.items()},
            state_bytes={n: sum(map(_rounded_bytes, [*b.parameters(), *b.buffers()])) for n, b in blocks.items()},
            copy_bytes={n: sum(t.nbytes for t in [*b.parameters(), *b.buffers()]) for n, b in blocks.items()},
            convolutions={n: sum(isinstance(m, ConvUnit) for m in b.modules()) for n, b in blocks.items()},
            order=tuple(name for name in model.block_names() if name != "start"),
        )


def _rounded_bytes(tensor: torch.Tensor) -> int:
    return round_to_block(tensor.nbytes)


def _record(model: NVAE, profile: Profile, keep: Keep, batch: int) -> dict[str, BlockCosts]:
    recorder = BlockRecorder(batch)
    plan: MemoryPlan = replace(profile.plan, keep=keep, keep_blocks={})
    apply_plan(model, plan)
    model.run_block = TracedRunner(model.run_block, recorder)
    learning = [p for p in model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in learning]
    begin_micro_batch(model, 1, 2, 1.0, 1)  # not the first of its step: power iterations belong to no batch size
    with recorder:
        recorder.category = Category.WEIGHT
        objective = Objective(model, profile.training, plan.precision)
        for tensor in [*objective.parameters(), *objective.buffers()]:
            recorder.record(tensor, "setup")
        recorder.category = None
        recorder.phase, recorder.block = Phase.FORWARD, "stem"
        x = torch.rand(batch, profile.model.image_channels, *[profile.model.network_size] * 2)
        labels = torch.rand(batch, profile.model.classes + 1) if profile.model.classes else None
        terms = objective(x, SeededNoise(1, 1, 0), 0.5, labels)
        recorder.phase = Phase.BACKWARD
        terms.loss.backward()
    for hook in hooks:
        hook.remove()
    return recorder.costs()


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _batch_prime(model: NVAE) -> int:
    """A prime that divides no size of the network, so that what it divides belongs to the batch."""
    c = model.config
    sizes = {d for t in [*model.parameters(), *model.buffers()] for d in t.shape} | set(c.scale_sizes)
    sizes |= {c.network_size, c.image_size, c.image_channels, *(s for shape in model.latent_shapes for s in shape)}
    prime = next((p for p in _PRIMES if all(size % p for size in sizes if size)), None)
    if prime is None:
        raise ConfigError(
            f"the model's sizes have every prime from {_PRIMES[0]} to {_PRIMES[-1]} as a factor, so the planner cannot "
            "tell what grows with the batch: choose rounder channel numbers"
        )
    return prime
