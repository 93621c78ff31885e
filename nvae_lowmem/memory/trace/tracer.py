"""Records every allocation and free of a step as operations make them: the trace of `events.py`.

A dispatch mode follows storages, not tensors: a storage that an operation returns for the first time is an allocation
of its bytes; the storage's death is the free. Tensors on device "cpu" stand in for the card. What is made inside
`host_memory()` is counted apart.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nvae_lowmem.memory.trace.events import Category, Phase, Trace
from nvae_lowmem.memory.trace.storageless import StoragelessTensors, operator_info
from nvae_lowmem.model.blocks import Head
from nvae_lowmem.model.host import in_host_memory
from nvae_lowmem.model.nvae import NVAE

aten = torch.ops.aten
_CONSTANTS: dict[str, Callable[[Any], float]] = {"aten::full": lambda a: a[1], "aten::zeros": lambda a: 0.0}
"""Operations whose 0-dim results are known numbers: loss scales and step counts are asked for by .item()."""

_CONVOLUTIONS = {aten.convolution.default: 2, aten.convolution_backward.default: 3}
"""Convolutions, and how many of their first arguments are images and weights."""

_COPIES = ("aten::_to_copy", "aten::clone")  # GradScaler copies its overflow flag to each device


class _GradientCounts(TorchDispatchMode):
    """Notes how many references autograd's addition sees of a gradient that nobody else holds, and of its storage."""

    counts = (0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.add.Tensor and not torch.is_grad_enabled():
            self.counts = _reference_counts(args[0])
        return func(*args, **(kwargs or {}))


def _reference_counts(tensor: Tensor) -> tuple[int, int]:
    """References to the tensor and to its storage, the ones of these functions among them."""
    return tensor._use_count(), torch._C._storage_Use_Count(_address(tensor))  # type: ignore[attr-defined]


@functools.cache
def _counts_of_sole_owner() -> tuple[int, int]:
    """What `_reference_counts` says of a gradient that autograd alone holds, in this version of torch."""
    with torch.enable_grad(), _GradientCounts() as mode:
        x = torch.ones(1, requires_grad=True) * 1
        (2 * x + 3 * x).backward()
    return mode.counts


def _adds_to_gradient(func: Any, args: Any) -> bool:
    """Whether autograd, where no mode watches it, adds the second gradient of a tensor into the first one's memory.

    torch/csrc/autograd/input_buffer.cpp: if it alone holds a dense one. Under a dispatch mode it never does.
    """
    if func is not aten.add.Tensor or torch.is_grad_enabled():
        return False
    by_engine = sys._getframe(2).f_code.co_name == "_engine_run_backward"  # no Python of a block's own is in between
    if not by_engine or not isinstance(args[1], Tensor) or torch._debug_has_internal_overlap(args[0]) != 0:
        return False
    return _reference_counts(args[0]) == _counts_of_sole_owner()


class StorageTracer(TorchDispatchMode):
    """Records the life of every storage that operations make while this mode is active.

    The caller sets what new storages are recorded under: `phase`, `block`, and `category` (None: a temporary).
    storageless: runs the operations without memory; None: they really run.
    """

    def __init__(self, storageless: StoragelessTensors | None) -> None:
        super().__init__()
        _counts_of_sole_owner()  # before any mode is active
        self.trace = Trace()
        self.phase = Phase.SETUP
        self.block = ""
        self.category: Category | None = None
        self.pass_number = 0
        self._storageless = storageless
        self._references: dict[int, _StorageReference] = {}  # by address of the storage
        self._values: dict[int, float] = {}  # of 0-dim tensors, as far as .item() is asked of them
        self._chunk_run: tuple[Any, ...] = ()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap every dispatch to hide it from its compiler, which nobody runs here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return self._values.get(_address(args[0]), 1.0)
        if _adds_to_gradient(func, args):
            func = aten.add_.Tensor
        info = operator_info(func)
        copies = self._allocate_copies(func, args)
        if self._storageless is not None:
            out = self._storageless.run(func, info, args, kwargs or {})
        else:
            out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.record(out, info.name)
        elif isinstance(out, (list, tuple)):
            for part in out:
                if isinstance(part, Tensor):
                    self.record(part, info.name)
        for number in copies:
            self.trace.free(number)
        if info.name in _CONSTANTS and out.dim() == 0:
            self._values[_address(out)] = float(_CONSTANTS[info.name](args))
        elif info.name in _COPIES and _address(args[0]) in self._values:
            self._values[_address(out)] = self._values[_address(args[0])]
        elif func is aten.add_.Tensor and args[0].dim() == 0 and _address(args[0]) in self._values:
            self._values[_address(args[0])] += 1.0
        return out

    def _allocate_copies(self, func: Any, args: Any) -> list[int]:
        """What a convolution on the card copies first: cuDNN takes contiguous arguments only."""
        count = _CONVOLUTIONS.get(func, 0)
        return [
            self.trace.allocate(
                t.numel() * t.element_size(), Category.TEMPORARY, self.block, self.phase, "aten::contiguous"
            )
            for t in args[:count]
            if not t.is_contiguous()
        ]

    def record(self, tensor: Tensor, operation: str) -> None:
        """Record the tensor's storage as an allocation of `operation`, if it is new and not empty."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._references:
            return
        nbytes = storage.nbytes()
        if nbytes == 0:
            return
        from_numbers = operation == "aten::lift_fresh"  # torch.tensor(...): an optimiser counts its steps on the host
        category = Category.HOST if in_host_memory() or from_numbers else self.category or Category.TEMPORARY
        number = self.trace.allocate(nbytes, category, self.block, self.phase, operation)
        self._references[address] = _StorageReference(storage, self._record_free, address, number)

    def _record_free(self, reference: _StorageReference) -> None:
        del self._references[reference.address]
        self._values.pop(reference.address, None)
        self.trace.free(reference.number)

    def set_category(self, tensor: Tensor, category: Category) -> None:
        """Record the tensor's storage under `category`; one in host memory, or an unknown one, stays what it is."""
        reference = self._references.get(_address(tensor))
        if reference is not None and self.trace.allocations[reference.number].on_card:
            self.trace.allocations[reference.number].category = category

    def is_on_card(self, tensor: Tensor) -> bool:
        """Whether the tensor's storage was recorded as on the card; one made before tracing began counts as host."""
        reference = self._references.get(_address(tensor))
        return reference is not None and self.trace.allocations[reference.number].on_card

    def mark(self, name: str) -> None:
        """Give this moment a name: `Trace.marks`."""
        self.trace.marks[name] = len(self.trace.events)

    def chunk(self) -> None:
        """Record that a chunk of the likelihood begins: in the head's forward pass or, with gradients, its backward."""
        run = (self.phase, self.pass_number, torch.is_grad_enabled())
        if run != self._chunk_run:
            self._chunk_run = run
            self.trace.chunks.append([])
        self.trace.chunks[-1].append(len(self.trace.events))

    def close(self) -> Trace:
        """End the recording and return the trace; frees from now on are not in it."""
        self._references.clear()
        return self.trace


class _StorageReference(weakref.ref):  # type: ignore[type-arg]
    """A weak reference to a storage, with its address and the number of its allocation."""

    __slots__ = ("address", "number")

    def __new__(cls, storage: Any, callback: Any, address: int, number: int) -> _StorageReference:
        return super().__new__(cls, storage, callback)

    def __init__(self, storage: Any, callback: Any, address: int, number: int) -> None:
        super().__init__(storage, callback)  # type: ignore[call-arg]
        self.address, self.number = address, number


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _differentiable(value: Any) -> Iterator[Tensor]:
    """The tensors that carry gradients in a block's arguments or results, which nest tuples and lists."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _differentiable(part)


class TracedRunner:
    """Runs blocks as the model's own runner does, and tells the tracer which block is at work, also in backward."""

    def __init__(self, inner: Any, tracer: StorageTracer) -> None:
        self._inner, self._tracer = inner, tracer

    def __call__(self, name: str, block: Any, *args: Any) -> Any:
        for tensor in _differentiable(args):
            self._tracer.set_category(tensor, Category.BLOCK_INPUT)
        self._tracer.block = name
        out = self._inner(name, block, *args)
        for tensor in _differentiable(out):
            if tensor.grad_fn is not None:
                tensor.register_hook(functools.partial(self._enter_backward, name))
        return out

    def _enter_backward(self, name: str, gradient: Tensor) -> None:
        self._tracer.block = name


class TracedLikelihood:
    """The model's likelihood, which tells the tracer when a chunk of images begins."""

    def __init__(self, inner: Any, tracer: StorageTracer) -> None:
        self._inner, self._tracer = inner, tracer

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        """As the likelihood's own."""
        self._tracer.chunk()
        return self._inner.log_prob(parameters, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def attach_tracer(model: NVAE, tracer: StorageTracer) -> None:
    """Have the model tell the tracer which block is at work, when a chunk begins, and what are its weights."""
    model.run_block = TracedRunner(model.run_block, tracer)
    head = model.blocks["head"]
    assert isinstance(head, Head)
    head.likelihood = TracedLikelihood(head.likelihood, tracer)  # type: ignore[assignment]
    for tensor in [*model.parameters(), *model.buffers()]:
        tracer.set_category(tensor, Category.WEIGHT)


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """Pause garbage collection, so that frees happen by reference counting alone and at the same events every time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
