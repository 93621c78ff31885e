"""What a calibration takes for a workspace: not the copy that cuDNN makes of a slice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nvae_lowmem.memory.measure.convolutions import ConvolutionRecorder, workspaces

aten = torch.ops.aten


class Contiguity(TorchDispatchMode):
    """Whether every convolution's images and weights were contiguous."""

    seen: list[bool]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        count = {aten.convolution.default: 2, aten.convolution_backward.default: 3}.get(func, 0)
        self.seen += [tensor.is_contiguous() for tensor in args[:count]]
        return func(*args, **(kwargs or {}))


def test_a_convolution_of_a_slice_is_measured_without_its_copy() -> None:
    with ConvolutionRecorder() as recorder:
        aten.convolution(torch.ones(2, 4, 9, 9)[:, :, 1:, 1:], torch.ones(3, 4, 1, 1), None, [2, 2], [0, 0], [1, 1],
                         False, [0, 0], 1)  # fmt: skip
    mode = Contiguity()
    mode.seen = []

    def extra(run: Callable[[], Any]) -> int:
        with mode:
            run()
        return 0

    assert len(workspaces(recorder.found, torch.device("cpu"), extra)) == 1
    assert len(mode.seen) == 8 and all(mode.seen)
