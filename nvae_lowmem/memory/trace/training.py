"""The very step that trains, run on tensors without memory: every allocation and free, who made it, and what for.

A dispatch mode watches storages, not tensors: a storage that an operation returns for the first time is an allocation
of its bytes; the storage's death is the free. Tensors on device "cpu" stand in for the card. What is made inside
`host_memory()` is counted apart.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.memory.trace.events import CATEGORIES, Allocation, Peak, Trace
from nvae_lowmem.memory.trace.lifetimes import file_by_life
from nvae_lowmem.memory.trace.storageless import Ghosts, nature_of
from nvae_lowmem.model.blocks import Head
from nvae_lowmem.model.functional import as_on_card
from nvae_lowmem.model.host import in_host_memory
from nvae_lowmem.model.keep import apply_plan
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.objective import Objective
from nvae_lowmem.training.engines.torch_engine import TorchEngine
from nvae_lowmem.training.step import BatchPlan, training_step

__all__ = [
    "CATEGORIES", "Allocation", "Peak", "Trace", "Watcher", "finished", "quiet_gc", "trace_training", "watch",
    "watched_engine",
]  # fmt: skip

aten = torch.ops.aten
_CONSTANTS: dict[str, Callable[[Any], float]] = {"aten::full": lambda a: a[1], "aten::zeros": lambda a: 0.0}
"""Operations whose 0-dim results are known numbers: loss scales and step counts are asked for by .item()."""

_COPIES = ("aten::_to_copy", "aten::clone")  # GradScaler copies its overflow flag to each device


class Watcher(TorchDispatchMode):
    """Records storages as operations make them. `phase`, `block` and `category` are what new ones are filed under.

    ghosts: what runs the operations; without it they really run.
    """

    def __init__(self, ghosts: Ghosts | None) -> None:
        super().__init__()
        self.trace = Trace()
        self.phase, self.block, self.category = "setup", "", ""
        self.pass_number = 0
        self._ghosts = ghosts
        self._ties: dict[int, _Tie] = {}  # by address of the storage
        self._values: dict[int, float] = {}  # of 0-dim tensors, as far as .item() is asked of them
        self._chunk_run: tuple[Any, ...] = ()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap every dispatch to hide it from its compiler, which nobody runs here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return self._values.get(_key(args[0]), 1.0)
        nature = nature_of(func)
        if self._ghosts is not None:
            out = self._ghosts.run(func, nature, args, kwargs or {})
        else:
            out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.see(out, nature.name)
        elif isinstance(out, (list, tuple)):
            for leaf in out:
                if isinstance(leaf, Tensor):
                    self.see(leaf, nature.name)
        if nature.name in _CONSTANTS and out.dim() == 0:
            self._values[_key(out)] = float(_CONSTANTS[nature.name](args))
        elif nature.name in _COPIES and _key(args[0]) in self._values:
            self._values[_key(out)] = self._values[_key(args[0])]
        elif func is aten.add_.Tensor and args[0].dim() == 0 and _key(args[0]) in self._values:
            self._values[_key(args[0])] += 1.0
        return out

    def see(self, tensor: Tensor, operation: str) -> None:
        """File the tensor's storage if it is new and not empty."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._ties:
            return
        nbytes = storage.nbytes()
        if nbytes == 0:
            return
        trace = self.trace
        number = len(trace.allocations)
        filed = "host" if in_host_memory() else self.category or "temporary"
        trace.allocations.append(Allocation(nbytes, filed, self.block, self.phase, operation, len(trace.events)))
        trace.events.append(number)
        self._ties[key] = _Tie(storage, self._gone, key, number)

    def _gone(self, tie: _Tie) -> None:
        del self._ties[tie.key]
        self._values.pop(tie.key, None)
        self.trace.allocations[tie.number].died = len(self.trace.events)
        self.trace.events.append(~tie.number)

    def refile(self, tensor: Tensor, category: str) -> None:
        """The storage turns out to be something more particular."""
        tie = self._ties.get(_key(tensor))
        if tie is not None and self.trace.allocations[tie.number].category != "host":
            self.trace.allocations[tie.number].category = category

    def is_on_card(self, tensor: Tensor) -> bool:
        """Whether the tensor's storage is one of the card's; what was made before the watcher came is the host's."""
        tie = self._ties.get(_key(tensor))
        return tie is not None and self.trace.allocations[tie.number].category != "host"

    def mark(self, name: str) -> None:
        """Remember this moment."""
        self.trace.marks[name] = len(self.trace.events)

    def chunk(self) -> None:
        """A chunk of the likelihood begins, in the forward pass of the head or (with gradient) in its backward pass."""
        run = (self.phase, self.pass_number, torch.is_grad_enabled())
        if run != self._chunk_run:
            self._chunk_run = run
            self.trace.chunks.append([])
        self.trace.chunks[-1].append(len(self.trace.events))

    def close(self) -> Trace:
        """The trace; what is freed from now on is not in it."""
        self._ties.clear()
        return self.trace


class _Tie(weakref.ref):  # type: ignore[type-arg]
    """Holds on to a storage's number until the storage is gone."""

    __slots__ = ("key", "number")

    def __new__(cls, storage: Any, callback: Any, key: int, number: int) -> _Tie:
        return super().__new__(cls, storage, callback)

    def __init__(self, storage: Any, callback: Any, key: int, number: int) -> None:
        super().__init__(storage, callback)  # type: ignore[call-arg]
        self.key, self.number = key, number


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _differentiable(value: Any) -> Iterator[Tensor]:
    """The tensors that carry gradients in a block's arguments or results, which nest tuples and lists."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _differentiable(part)


class WatchedRunner:
    """Runs blocks as the model's own runner does, telling the watcher which block is at work, also in backward."""

    def __init__(self, inner: Any, watcher: Watcher) -> None:
        self.inner, self.watcher = inner, watcher

    def __call__(self, name: str, block: Any, *args: Any) -> Any:
        w = self.watcher
        for tensor in _differentiable(args):
            w.refile(tensor, "block input")
        w.block = name
        out = self.inner(name, block, *args)
        for tensor in _differentiable(out):
            if tensor.grad_fn is not None:
                tensor.register_hook(functools.partial(self._enter, name))
        return out

    def _enter(self, name: str, gradient: Tensor) -> None:
        self.watcher.block = name


class WatchedLikelihood:
    """The model's likelihood, telling the watcher when a chunk of it begins."""

    def __init__(self, inner: Any, watcher: Watcher) -> None:
        self._inner, self._watcher = inner, watcher

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        """As the likelihood's own."""
        self._watcher.chunk()
        return self._inner.log_prob(parameters, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class AbsentAdamax(torch.optim.Adamax):
    """Stands where the host updates its own weights, which takes nothing of the card."""

    def step(self, closure: Any = None) -> Any:
        """Nothing."""


class WatchedEngine(TorchEngine):
    """The torch engine with its phases told to the watcher."""

    watcher: Watcher
    offloaded = False

    def forward(self, *args: Any) -> Any:
        """One micro-batch. One power iteration stands for all: each frees what it allocates before the next begins."""
        self.watcher.phase = "forward"
        self.watcher.pass_number += 1
        regularisation = self.model.regularisation
        regularisation.iterations = min(regularisation.iterations, 1)
        return super().forward(*args)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.watcher.phase = "backward"
        super().backward(loss, last)

    def update(self) -> Any:
        """What an offloaded optimiser's loss scale and norms need is the host's, like the weights it works on."""
        self.watcher.phase, self.watcher.block = "update", "optimizer"
        self.watcher.category = "host" if self.offloaded else "optimizer state"
        try:
            return super().update()
        finally:
            self.watcher.category = ""


def trace_training(
    profile: Profile, micro_batch: int, accumulation: int = 1, steps: int = 2, fake: bool = True
) -> Trace:
    """Trace `steps` optimiser steps of the profile's model and plan at `micro_batch`; precision must be decided.

    With `fake` nothing is computed and nothing of the model's size is allocated; without it the same step really runs
    on the CPU, for comparison. The model is built elsewhere and moved to the card: of the set-up only what stays is
    in the trace.
    """
    watcher = Watcher(Ghosts() if fake else None)
    total = micro_batch * accumulation
    profile = replace(profile.with_plan(micro_batch=micro_batch), training=replace(profile.training, total_batch=total))
    with quiet_gc(), as_on_card(), watcher:
        engine = watched_engine(NVAE(profile.model).train(), profile, accumulation, watcher)
        watcher.mark("setup done")
        split = BatchPlan(total, micro_batch, accumulation, 1)
        size = profile.model.network_size

        def images(step: int, slot: int, count: int) -> Tensor:
            watcher.phase, watcher.block = "forward", "data"
            x = torch.rand(count, profile.model.image_channels, size, size)
            watcher.refile(x, "data")
            return x

        for step in range(1, steps + 1):
            watcher.mark(f"step {step}")
            training_step(engine, profile, split, images, step, 100, 1e-3)
        watcher.mark("end")
        trace = watcher.close()
    return finished(trace, engine.model, micro_batch)


def finished(trace: Trace, model: NVAE, micro_batch: int) -> Trace:
    """The trace from the end of the set-up on, with what stays of that, every allocation filed."""
    file_by_life(trace)
    trace.micro_batch = micro_batch
    trace.parameter_bytes = tuple(p.numel() * p.element_size() for p in model.parameters())
    trace.chunk_images = _images_per_chunk(model)
    return trace.without_temporaries(trace.marks["setup done"])


def watched_engine(model: NVAE, profile: Profile, accumulation: int, watcher: Watcher) -> WatchedEngine:
    """The engine that trains the model under the profile's plan, watched."""
    apply_plan(model, profile.plan)
    watch(model, watcher)
    objective = Objective(model, profile.training, profile.plan.precision)
    # on the card an optimiser's temporaries count; on the host nobody needs to compute for the card's sake
    offloaded = profile.plan.offload_optimizer
    optimizer = AbsentAdamax if offloaded else functools.partial(torch.optim.Adamax, foreach=False)
    engine = WatchedEngine(objective, profile, torch.device("cpu"), accumulation, optimizer)
    engine.watcher, engine.offloaded = watcher, offloaded
    return engine


def watch(model: NVAE, watcher: Watcher) -> None:
    """Have the model tell the watcher which block is at work and when a chunk of the likelihood begins."""
    model.run_block = WatchedRunner(model.run_block, watcher)
    head = model.blocks["head"]
    assert isinstance(head, Head)
    head.likelihood = WatchedLikelihood(head.likelihood, watcher)  # type: ignore[assignment]
    for tensor in [*model.parameters(), *model.buffers()]:
        watcher.refile(tensor, "weight")


def _images_per_chunk(model: NVAE) -> int:
    """Images that share a chunk of the likelihood, whatever the batch (see `negative_log_likelihood`)."""
    head = model.blocks["head"]
    assert isinstance(head, Head)
    image_bytes = head.likelihood.working_values_per_pixel * model.config.image_size**2 * 4
    return max(1, min(head.chunk_images, head.chunk_bytes // image_bytes))


@contextlib.contextmanager
def quiet_gc() -> Iterator[None]:
    """Frees happen by reference counting alone, as in a real step; a collection in between would move them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
