"""Gradients of a tensor that is used more than once: traced as autograd adds them where nothing watches it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nvae_lowmem.memory.trace.storageless import StoragelessTensors
from nvae_lowmem.memory.trace.tracer import StorageTracer

USES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "two gradients of its own": (lambda x: 2 * x + 3 * x, 0),
    "three": (lambda x: 2 * x + 3 * x + 4 * x, 0),
    "one gradient in two places": (lambda x: 2 * (x.clone() + x.clone()), 1),
}


@pytest.mark.parametrize("fake", [True, False])
@pytest.mark.parametrize("use", USES)
def test_a_gradient_is_added_into_the_first_where_autograd_alone_holds_that(use: str, fake: bool) -> None:
    function, expected = USES[use]
    with StorageTracer(StoragelessTensors() if fake else None) as tracer:
        tracer.phase = "forward"
        x = torch.ones(600, requires_grad=True)
        y = function(x * 1).sum()
        tracer.phase = "backward"
        y.backward()
    trace = tracer.close()
    made = [a for a in trace.allocations if a.phase == "backward" and a.operation.startswith("aten::add")]
    assert len(made) == expected, [a.operation for a in made]


def test_the_sum_of_gradients_is_the_sum() -> None:
    x = torch.arange(4.0, requires_grad=True)
    with StorageTracer(None) as tracer:
        tracer.phase = "backward"
        y = x * 1
        (2 * y + 3 * y + y.view(2, 2).t().reshape(4)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [6.0] * 4
