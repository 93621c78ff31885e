"""The distinct convolutions of a step, and what workspace each of them takes forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
Extra = Callable[[Callable[[], Any]], "int | None"]
"""Runs a function and returns the most bytes that it took beyond its result (CudaMonitor.extra_bytes)."""


class Convolution(NamedTuple):
    """What decides the algorithm of a convolution, and so its workspace."""

    input: tuple[int, ...]  # (B, C, H, W)
    input_stride: tuple[int, ...]
    weight: tuple[int, ...]  # (O, C / groups, k, k)
    weight_stride: tuple[int, ...]
    dtype: torch.dtype
    options: tuple[Any, ...]
    """Stride, padding, dilation, transposed, output padding, groups: the last arguments of aten::convolution."""

    def __str__(self) -> str:
        stride, padding, dilation, transposed, _, groups = self.options
        kind = "transposed " if transposed else ""
        return (
            f"{kind}{list(self.input)} * {list(self.weight)} {str(self.dtype).removeprefix('torch.')}, stride "
            f"{list(stride)}, padding {list(padding)}, dilation {list(dilation)}, groups {groups}"
        )


class ConvolutionRecorder(TorchDispatchMode):
    """Notes each kind of convolution once, forward or backward, whichever is met; results are unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Convolution, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.convolution.default:
            self._note(args[0], args[1], args[3:9])
        elif func is aten.convolution_backward.default:
            self._note(args[1], args[2], args[4:10])
        return func(*args, **(kwargs or {}))

    def _note(self, x: Tensor, weight: Tensor, options: Any) -> None:
        fixed = tuple(tuple(o) if isinstance(o, (list, tuple)) else o for o in options)
        shapes = (tuple(x.shape), x.stride(), tuple(weight.shape), weight.stride())
        self.found[Convolution(*shapes, x.dtype, fixed)] = None


class Workspaces(NamedTuple):
    """What a convolution took beside its result, in bytes; None where there was not enough memory to run it."""

    convolution: str
    forward_bytes: int | None
    input_gradient_bytes: int | None
    weight_gradient_bytes: int | None

    @property
    def sizes(self) -> list[int]:
        """Bytes of each that is known and not 0."""
        return [nbytes for nbytes in self[1:] if nbytes]


def workspaces(convolutions: Iterable[Convolution], device: torch.device, extra: Extra) -> tuple[Workspaces, ...]:
    """The workspaces of each convolution, run once forward, for the input's gradient and for the weight's."""
    return tuple(_workspaces(c, device, extra) for c in convolutions)


@torch.no_grad()
def _workspaces(c: Convolution, device: torch.device, extra: Extra) -> Workspaces:
    x = _zeros(c.input, c.input_stride, c.dtype, device)
    weight = _zeros(c.weight, c.weight_stride, c.dtype, device)
    slope = torch.zeros_like(aten.convolution(x, weight, None, *c.options))  # d loss / d output

    def backward(*wanted: bool) -> Any:
        return aten.convolution_backward(slope, x, weight, None, *c.options, list(wanted))

    return Workspaces(
        str(c),
        forward_bytes=extra(lambda: aten.convolution(x, weight, None, *c.options)),
        input_gradient_bytes=extra(lambda: backward(True, False, False)),
        weight_gradient_bytes=extra(lambda: backward(False, True, False)),
    )


def largest_bytes(measured: Iterable[Workspaces]) -> int:
    """The largest workspace among those measured."""
    return max((nbytes for one in measured for nbytes in one.sizes), default=0)


def _zeros(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of that layout; of a slice a copy without gaps, or the one that cuDNN makes would pass for a workspace."""
    zeros = torch.empty_strided(size, stride, dtype=dtype, device=device).zero_()
    return zeros if aten.is_non_overlapping_and_dense(zeros) else zeros.contiguous()
