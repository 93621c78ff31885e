"""The very step that trains, run on fake tensors: every allocation and free, who made it, and what for.

A dispatch mode watches storages, not tensors: a storage that an operation returns for the first time is an allocation
of its bytes; the storage's death is the free. Fake tensors on device "cpu" stand in for the card (fake tensors on
"cuda" need a GPU). What is made inside `host_memory()` is counted apart.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nvae_lowmem.config import Profile
from nvae_lowmem.model.functional import as_on_card
from nvae_lowmem.model.host import in_host_memory
from nvae_lowmem.model.keep import apply_plan
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training.engine import TorchEngine
from nvae_lowmem.training.objective import Objective
from nvae_lowmem.training.step import BatchPlan, training_step

aten = torch.ops.aten

CATEGORIES = (
    "weight", "optimizer state", "gradient", "block input", "saved activation", "temporary", "noise", "data", "host",
)  # fmt: skip
HOST = CATEGORIES.index("host")


@dataclass
class Allocation:
    """One storage's life. Times are indices into `Trace.events`; died is -1 while it lives."""

    nbytes: int
    category: str
    block: str
    phase: str  # setup, forward, backward, update
    operation: str
    born: int
    died: int = -1


@dataclass
class Trace:
    """What happened: `events` holds the allocation's number, negative minus one (~n) for its free, in order."""

    allocations: list[Allocation] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)  # name of a moment -> number of events before it

    def live_bytes(self, rounding: int = 512) -> Iterator[tuple[int, int]]:
        """(event index, bytes on the card after it), each storage rounded up as the CUDA allocator does."""
        live = 0
        for i, event in enumerate(self.events):
            a = self.allocations[event if event >= 0 else ~event]
            if a.category != "host":
                size = -(-a.nbytes // rounding) * rounding
                live += size if event >= 0 else -size
            yield i, live

    def peak(self, rounding: int = 512) -> Peak:
        """The largest number of bytes on the card at once, when, and what they are."""
        at, peak_bytes = max(self.live_bytes(rounding), key=lambda pair: pair[1], default=(0, 0))
        by_category = dict.fromkeys(CATEGORIES[:HOST], 0)
        by_block: dict[str, int] = {}
        for a in self.allocations:
            if a.category != "host" and a.born <= at and (a.died < 0 or a.died > at):
                by_category[a.category] += a.nbytes
                by_block[a.block] = by_block.get(a.block, 0) + a.nbytes
        event = self.events[at] if self.events else 0
        owner = self.allocations[event if event >= 0 else ~event] if self.allocations else None
        return Peak(
            peak_bytes, at, owner.block if owner else "", owner.phase if owner else "", owner.operation if owner else "",
            by_category, by_block,
        )  # fmt: skip

    def host_bytes(self) -> int:
        """Bytes of host memory live at the end."""
        return sum(a.nbytes for a in self.allocations if a.category == "host" and a.died < 0)


@dataclass(frozen=True)
class Peak:
    """A moment of largest use: bytes, event index, the block, phase and operation that reached it, and the split."""

    nbytes: int
    event: int
    block: str
    phase: str
    operation: str
    by_category: dict[str, int]
    by_block: dict[str, int]


class Watcher(TorchDispatchMode):
    """Records storages as operations make them. `phase`, `block` and `category` are what new ones are filed under."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self.phase, self.block, self.category = "setup", "", ""
        self._known: set[int] = set()
        self._number: dict[int, int] = {}
        self._values: dict[int, float] = {}  # of 0-dim tensors, as far as .item() is asked of them
        self._constants = {aten.full.default: lambda a: a[1], aten.zeros.default: lambda a: 0.0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return self._values.get(_key(args[0]), 1.0)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf, func.name() if hasattr(func, "name") else str(func))
        if func in self._constants and isinstance(out, Tensor) and out.dim() == 0:
            self._values[_key(out)] = float(self._constants[func](args))
        elif func is aten.add_.Tensor and args[0].dim() == 0 and _key(args[0]) in self._values:
            self._values[_key(args[0])] += 1.0
        return out

    def see(self, tensor: Tensor, operation: str, category: str = "") -> int | None:
        """File the tensor's storage if it is new; its allocation's number, None for an empty one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return self._number.get(key)
        nbytes = storage.nbytes()
        if nbytes == 0:
            return None
        self._known.add(key)
        number = len(self.trace.allocations)
        self._number[key] = number
        filed = "host" if in_host_memory() else category or self.category or "temporary"
        self.trace.allocations.append(
            Allocation(nbytes, filed, self.block, self.phase, operation, len(self.trace.events))
        )
        self.trace.events.append(number)
        weakref.finalize(storage, self._gone, key, number).atexit = False
        return number

    def _gone(self, key: int, number: int) -> None:
        self._known.discard(key)
        self._number.pop(key, None)
        self._values.pop(key, None)
        self.trace.allocations[number].died = len(self.trace.events)
        self.trace.events.append(~number)

    def refile(self, tensor: Tensor, category: str) -> None:
        """The storage turns out to be something more particular."""
        number = self._number.get(_key(tensor))
        if number is not None and self.trace.allocations[number].category != "host":
            self.trace.allocations[number].category = category

    def mark(self, name: str) -> None:
        """Remember this moment."""
        self.trace.marks[name] = len(self.trace.events)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class WatchedRunner:
    """Runs blocks as the model's own runner does, telling the watcher which block is at work, also in backward."""

    def __init__(self, inner: Any, watcher: Watcher) -> None:
        self.inner, self.watcher = inner, watcher

    def __call__(self, name: str, block: Any, *args: Any) -> Any:
        w = self.watcher
        for leaf in tree_leaves(args):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                w.refile(leaf, "block input")
        w.block = name
        out = self.inner(name, block, *args)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.grad_fn is not None:
                leaf.register_hook(lambda g, name=name: self._enter(name))
        return out

    def _enter(self, name: str) -> None:
        self.watcher.block = name

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.inner


class AbsentAdamax(torch.optim.Adamax):
    """Stands where the host updates its own weights, which takes nothing of the card."""

    def step(self, closure: Any = None) -> Any:
        """Nothing."""


class WatchedEngine(TorchEngine):
    """The torch engine with its phases told to the watcher."""

    watcher: Watcher

    def forward(self, *args: Any) -> Any:
        self.watcher.phase = "forward"
        return super().forward(*args)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.watcher.phase = "backward"
        super().backward(loss, last)

    def update(self) -> Any:
        self.watcher.phase, self.watcher.block = "update", "optimizer"
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self.watcher, "category", "")
            self.watcher.category = "optimizer state"
            return super().update()


def trace_training(
    profile: Profile, micro_batch: int, accumulation: int = 1, steps: int = 3, fake: bool = True
) -> Trace:
    """Trace `steps` optimiser steps of the profile's model and plan at `micro_batch`; precision must be decided.

    With `fake` nothing is computed and nothing of the model's size is allocated; without it the same step really runs
    on the CPU, for comparison.
    """
    watcher = Watcher()
    total = micro_batch * accumulation
    profile = replace(
        profile,
        plan=replace(profile.plan, micro_batch=micro_batch),
        training=replace(profile.training, total_batch=total),
    )
    with FakeTensorMode() if fake else contextlib.nullcontext(), _quiet_gc(), as_on_card():
        with watcher:
            model = NVAE(profile.model).train()
            apply_plan(model, profile.plan)
            model.run_block = WatchedRunner(model.run_block, watcher)
            objective = Objective(model, profile.training, profile.plan.precision)
            # on the card an optimiser's temporaries count; on the host nobody needs to compute for the card's sake
            offloaded = profile.plan.offload_optimizer
            optimizer = AbsentAdamax if offloaded else functools.partial(torch.optim.Adamax, foreach=False)
            engine = WatchedEngine(objective, profile, torch.device("cpu"), accumulation, optimizer)
            engine.watcher = watcher
            for tensor in [*model.parameters(), *model.buffers()]:
                watcher.refile(tensor, "weight")
            split = BatchPlan(total, micro_batch, accumulation, 1)
            size = profile.model.network_size
            for step in range(1, steps + 1):  # not step 0: its 40 power iterations allocate what 4 do, ten times over

                def images(step: int, slot: int, count: int) -> Tensor:
                    watcher.phase, watcher.block = "forward", "data"
                    x = torch.rand(count, profile.model.image_channels, size, size)
                    watcher.refile(x, "data")
                    return x

                watcher.mark(f"step {step}")
                result = training_step(engine, profile, split, images, step, 100, 1e-3)
                del result
        watcher.mark("end")
        trace = watcher.trace
        trace.marks["setup done"] = trace.marks["step 1"]
        _file_by_life(trace)
        return trace


def _file_by_life(trace: Trace) -> None:
    """Tell saved activations, gradients and noise from temporaries by when they lived."""
    phases = _phase_starts(trace)
    for a in trace.allocations:
        if a.category in ("temporary", "block input", "optimizer state"):
            died = a.died if a.died >= 0 else len(trace.events)
            if a.phase == "update":
                a.category = "optimizer state" if a.died < 0 else "temporary"
            elif a.phase == "forward" and _crosses(phases, a.born, died):
                if a.category != "block input":
                    a.category = "noise" if "normal" in a.operation else "saved activation"
            elif a.phase == "backward" and _crosses(phases, a.born, died):
                a.category = "gradient"
            else:
                a.category = "temporary"


def _phase_starts(trace: Trace) -> list[int]:
    starts, last = [], ""
    for i, event in enumerate(trace.events):
        if event >= 0:
            phase = trace.allocations[event].phase
            if phase != last:
                starts.append(i)
                last = phase
    return starts


def _crosses(starts: list[int], born: int, died: int) -> bool:
    """Whether a new phase began during the life (born, died)."""
    import bisect

    return bisect.bisect_right(starts, born) < bisect.bisect_right(starts, died)


@contextlib.contextmanager
def _quiet_gc() -> Iterator[None]:
    """Frees happen by reference counting alone, as in a real step; a collection in between would move them."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
