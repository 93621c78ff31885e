"""What any PyTorch training step will take of a card, without a card and without its memory.

    def build(device):
        model = Net().to(device)
        optimizer = torch.optim.AdamW(model.parameters())
        x, y = torch.randn(32, 3, 224, 224, device=device), torch.zeros(32, dtype=torch.long, device=device)
        def step():
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return step

    print(predict_step(build, card="gtx-970"))

The step runs on tensors without storage (memory/trace): nothing is computed, nothing of the model's size is allocated,
and every allocation and free goes through the simulated CUDA caching allocator, in order.

What it sees: tensors that PyTorch's operators make. What it cannot see is listed in `StepPrediction.unseen`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.budget import Budget, chosen_card, memory_fraction, parse_gpu_mem, this_os
from nvae_lowmem.memory.allocator.allocator import CHECKPOINT, CachingAllocator
from nvae_lowmem.memory.allocator.settings import UNLIMITED_BYTES, AllocatorSettings
from nvae_lowmem.memory.predict.untraced import DEFAULT_CUBLAS_CONFIG, cublas_workspace_bytes
from nvae_lowmem.memory.predict.whole_run import address_orders
from nvae_lowmem.memory.trace.events import Category, Peak, Phase, Trace
from nvae_lowmem.memory.trace.storageless import StoragelessTensors
from nvae_lowmem.memory.trace.tracer import StorageTracer, paused_gc
from nvae_lowmem.text_table import text_table
from nvae_lowmem.units import MIB, format_bytes

Step = Callable[[], object]
Build = Callable[[torch.device], Step]
"""Makes model, optimiser and batch on the device that it is given, and returns the step, which takes no arguments."""

_CPU = torch.device("cpu")  # stands in for the card
_MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear")


@dataclass(frozen=True, kw_only=True)
class StepPrediction:
    """Peaks of a training step on a card, in bytes, and what owns them."""

    allocated_peak_bytes: int
    """Most bytes in blocks of the caching allocator at once: torch.cuda.max_memory_allocated()."""
    reserved_peak_bytes: int
    """Most bytes the allocator takes from the card: torch.cuda.max_memory_reserved()."""
    peak: Peak
    """The moment of the largest use: module, phase, operation, and the split by category and module."""
    allocations: int
    """Allocations on the card, of all steps."""
    cap_bytes: int
    """What the allocator may take; 0: no cap was given."""
    oom: str | None
    """Why the allocator runs out of memory under the cap, if it does."""
    unseen: tuple[str, ...]
    """What comes on top and no trace sees, each with its size where it is known."""
    trace: Trace
    """Every allocation and free."""

    @property
    def fits(self) -> bool:
        """Whether the step runs under the cap; true where there is none."""
        return self.oom is None

    def __str__(self) -> str:
        peak = self.peak
        rows = [
            ("allocated peak", format_bytes(self.allocated_peak_bytes)),
            ("reserved peak", format_bytes(self.reserved_peak_bytes)),
            ("reached in", f"{peak.phase} of {peak.block or 'the step itself'}, {peak.operation}"),
        ]
        rows += [(f"  {name}", format_bytes(nbytes)) for name, nbytes in peak.by_category.items() if nbytes]
        if self.cap_bytes:
            rows.append((f"fits {format_bytes(self.cap_bytes)}", "yes" if self.fits else f"NO: {self.oom}"))
        table = "\n".join(text_table("<<", rows, rule=False))
        return "\n".join([table, "not in these figures:", *(f"  {text}" for text in self.unseen)])


def predict_step(
    build: Build,
    *,
    card: str | None = None,
    gpu_mem: str | None = None,
    cap: str | int | None = None,
    steps: int = 3,
    settings: str = "",
) -> StepPrediction:
    """Predict the memory of `steps` steps of any PyTorch training, from the building of the model on.

    build: is given the device to use, and returns the step. It is called once. What it makes on that device counts as
    on the card; what the host keeps there for itself is made inside `on_host()`. Three steps, because an optimiser's
    states appear in the first, and later ones meet the fragments that it leaves.
    card, gpu_mem: what the step has to fit, as `--card` and `--gpu-mem` take them; cap: so many bytes of the allocator
    ("3.2G") instead. settings: of PyTorch's allocator (PYTORCH_CUDA_ALLOC_CONF).
    Raises ConfigError for an unknown card, size or setting; what `build` and the step raise comes through.
    """
    if steps < 1:
        raise ConfigError(f"steps = {steps}: must be at least 1")
    parsed = AllocatorSettings.from_string(settings)
    chosen = chosen_card(card, gpu_mem, this_os())
    budget = chosen[1] if chosen else None
    cap_bytes = _cap(cap, budget)
    trace = trace_step(build, steps)
    requests = [*trace.requests(), (CHECKPOINT, 0)]
    orders = address_orders(parsed)
    ends = [CachingAllocator(parsed, UNLIMITED_BYTES >> 1, falling=f).replay(requests).checkpoints[-1] for f in orders]
    oom = None
    for falling in orders if cap_bytes else ():
        replay = _capped(parsed, cap_bytes, budget, falling).replay(requests)
        if oom is None and replay.oom is not None and replay.oom_index is not None:
            a = trace.allocations[requests[replay.oom_index][1]]
            oom = f"{a.phase} of {a.block or 'the step itself'}, {a.operation}: {replay.oom}"
    return StepPrediction(
        allocated_peak_bytes=max(end.peak_allocated_bytes for end in ends),
        reserved_peak_bytes=max(end.peak_reserved_bytes for end in ends),
        peak=trace.peak(),
        allocations=sum(a.on_card for a in trace.allocations),
        cap_bytes=cap_bytes,
        oom=oom,
        unseen=tuple(_unseen(trace)),
        trace=trace,
    )


def _cap(cap: str | int | None, budget: Budget | None) -> int:
    if cap is None:
        return budget.cap_bytes if budget is not None else 0
    return cap if isinstance(cap, int) else parse_gpu_mem(cap)


def _capped(settings: AllocatorSettings, cap_bytes: int, budget: Budget | None, falling: bool) -> CachingAllocator:
    """The allocator under the cap, on the card where there is one, else on one that has just so much."""
    if budget is None or cap_bytes + budget.context_bytes > budget.total_bytes:
        return CachingAllocator(settings, cap_bytes, falling=falling)
    share = memory_fraction(cap_bytes, budget.context_bytes, budget.total_bytes)
    return CachingAllocator(settings, budget.total_bytes, budget.context_bytes, share, falling)


_ATTENTION = "scaled_dot_product_attention"
_FP32_UNDER_AUTOCAST = (
    "layer_norm", "group_norm", "softmax", "log_softmax", "cross_entropy", "nll_loss", "mse_loss", "l1_loss",
    "smooth_l1_loss", "kl_div", "binary_cross_entropy_with_logits", "softplus", "cosine_similarity",
)  # fmt: skip
"""What autocast computes in fp32 on a card but not on the CPU, of torch.nn.functional (torch's documentation)."""


# --- the trace --------------------------------------------------------------------------------------------------------


def trace_step(build: Build, steps: int = 3, storageless: bool = True, as_on_card: bool = True) -> Trace:
    """Every allocation and free of building and of `steps` steps.

    storageless False: really run on the CPU, to compare with. as_on_card: choose what torch chooses for a card where it
    is known to choose otherwise on the CPU (see `_card_functions` and `_hooks`).

    Phases: setup, forward, backward (operations that run within autograd's backward pass, recomputation included) and
    update (within an optimiser's step). Blocks: the path of the module whose forward pass, or whose recomputation, made
    the allocation; in backward, where no module runs, the name of autograd's node.
    """
    tracer = _StepTracer(StoragelessTensors() if storageless else None)
    functions = _card_functions() if as_on_card else contextlib.nullcontext()
    with paused_gc(), _hooks(tracer, as_on_card), functions, tracer:
        step = build(_CPU)
        tracer.mark("setup done")
        for number in range(1, steps + 1):
            tracer.mark(f"step {number}")
            tracer.phase = Phase.FORWARD
            step()
        tracer.mark("end")
        trace = tracer.close()
        del step
    return trace


class _StepTracer(StorageTracer):
    """The tracer that finds out by itself in which phase and in which module a step is."""

    def __init__(self, storageless: StoragelessTensors | None) -> None:
        super().__init__(storageless)
        self.names: dict[int, str] = {}  # id of a module -> its path
        self.running: list[str] = []  # the modules whose forward pass is under way, outermost first
        self.updating = False

    def record(self, tensor: Tensor, operation: str) -> None:
        """As every tracer; the phase and the block are looked up first."""
        node = torch._C._current_autograd_node()
        if self.updating:
            self.phase, self.block = Phase.UPDATE, "optimizer"
        elif node is not None:
            self.phase, self.block = Phase.BACKWARD, self.running[-1] if self.running else node.name()
        else:
            self.phase = Phase.SETUP if "step 1" not in self.trace.marks else Phase.FORWARD
            self.block = self.running[-1] if self.running else ""
        super().record(tensor, operation)

    def name_of(self, module: nn.Module) -> str:
        """The module's path below the outermost one that was ever run, which goes by its class."""
        if id(module) not in self.names:
            root = type(module).__name__
            for name, part in module.named_modules():
                self.names[id(part)] = f"{root}.{name}" if name else root
        return self.names[id(module)]


@contextlib.contextmanager
def _card_functions() -> Iterator[None]:
    """Inside, the functions of `torch.nn.functional` are made of the operations that a card runs for them.

    Dropout keeps a mask of one byte per value, not a factor of the values' type. Attention with dropout, for which the
    CPU has only the form that keeps a square matrix, is the fused kernel's; that one keeps q, k, v, its result and
    one number per row. Under autocast a card computes normalisations, softmax and losses in fp32, the CPU does not.
    """
    own = {name: getattr(functional, name) for name in (*_FP32_UNDER_AUTOCAST, "dropout", _ATTENTION)}
    dropout, attention = own["dropout"], own[_ATTENTION]

    def card_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if training and 0 < p < 1 and not inplace:
            return torch.native_dropout(input, p, True)[0]
        return dropout(input, p, training, inplace)

    def card_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **others: Any,
    ) -> Tensor:
        if query.dim() == 4 and query.shape[-1] == value.shape[-1] and not others.get("enable_gqa"):
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            out: Tensor = fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
            return out
        return attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **others)

    def in_fp32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            if not torch.is_autocast_enabled("cpu"):
                return function(*args, **kwargs)
            args, kwargs = tuple(map(_in_fp32, args)), {name: _in_fp32(value) for name, value in kwargs.items()}
            with torch.autocast("cpu", enabled=False):
                return function(*args, **kwargs)

        return call

    replaced = {name: in_fp32(own[name]) for name in _FP32_UNDER_AUTOCAST}
    replaced |= {"dropout": card_dropout, _ATTENTION: card_attention}
    try:
        for name, function in replaced.items():
            setattr(functional, name, function)
        yield
    finally:
        for name, function in own.items():
            setattr(functional, name, function)


def _in_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value


@contextlib.contextmanager
def _hooks(tracer: _StepTracer, as_on_card: bool) -> Iterator[None]:
    """Inside, modules and optimisers tell the tracer when they run."""

    def enter(module: nn.Module, args: Any) -> None:
        tracer.running.append(tracer.name_of(module))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        tracer.running.pop()

    def begin_update(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        tracer.updating = True
        for group in optimizer.param_groups:
            if as_on_card and "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = True  # its temporaries are larger than those of the loop that the CPU gets
            for parameter in group["params"]:
                tracer.set_category(parameter, Category.WEIGHT)
                if parameter.grad is not None:
                    tracer.set_category(parameter.grad, Category.GRADIENT)

    def end_update(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        tracer.updating = False
        for state in optimizer.state.values():
            for value in state.values() if isinstance(state, dict) else ():
                if isinstance(value, Tensor):
                    tracer.set_category(value, Category.OPTIMIZER_STATE)

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
        register_optimizer_step_pre_hook(begin_update),
        register_optimizer_step_post_hook(end_update),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unseen(trace: Trace) -> Iterator[str]:
    operations = {a.operation for a in trace.allocations}
    if any("convolution" in operation for operation in operations):
        yield (
            "workspaces of cuDNN's convolutions: none to hundreds of MiB each, returned at once; "
            "torch.backends.cudnn.benchmark = True takes the largest"
        )
    if any(operation.startswith(_MATRIX_PRODUCTS) for operation in operations):
        megabytes = 2 * cublas_workspace_bytes(DEFAULT_CUBLAS_CONFIG) / MIB
        yield f"cuBLAS's workspaces: {megabytes:.2f} MiB (forward and backward thread), kept; 32 MiB each on Hopper"
    if any("scaled_dot_product" in operation for operation in operations):
        yield "attention: the card's kernels save other statistics, and the mathematical one a square matrix"
    yield "CUDA context and other programs: 70 to 300 MiB on a small card, outside the allocator"
    yield "memory taken by extensions with operators of their own, by CUDA graphs, and by code that asks for `.cuda()`"
    yield "autocast on the card has other lists than on the CPU: normalisations and losses may be fp32 there"
