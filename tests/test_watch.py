"""When training stops by itself: losses that are no numbers, and overflows without end."""

from __future__ import annotations

import pytest
import torch

from nvae_lowmem.config.sections import Precision
from nvae_lowmem.training.divergence import STUCK_AFTER, Diverged, Watch
from nvae_lowmem.training.engines.engine import Update
from nvae_lowmem.training.step import StepResult


def result(loss: float = 1.0, kl: tuple[float, ...] = (1.0, 2.0), overflow: bool = False) -> StepResult:
    zeros = torch.zeros(len(kl))
    return StepResult(
        torch.tensor(loss), torch.tensor(0.5), torch.tensor(kl), zeros, zeros, 1.0, 1e-2, Update(overflow, None)
    )


@pytest.mark.parametrize(("precision", "advice"), [("fp16", "bf16 or fp32"), ("fp32", "learning_rate")])
def test_endless_overflow_ends_with_advice(precision: Precision, advice: str) -> None:
    watch = Watch(precision)
    for start in (0, STUCK_AFTER):
        for step in range(start, start + STUCK_AFTER - 1):
            watch.check(result(overflow=True), step)
        watch.check(result(), start + STUCK_AFTER - 1)  # one good step forgives all before it
    for step in range(100, 149):
        watch.check(result(overflow=True), step)
    with pytest.raises(Diverged, match=f"step 149: 50 steps in a row.*{advice}"):
        watch.check(result(overflow=True), 149)
    assert watch.overflows == 3 * 49 + 1


def test_a_loss_that_is_no_number_names_its_groups() -> None:
    with pytest.raises(Diverged, match="step 7: the loss is nan: the KL of groups 0, 2"):
        Watch("fp32").check(result(float("nan"), (float("nan"), 1.0, float("inf"))), 7)
    with pytest.raises(Diverged, match="the loss is inf: the likelihood is not finite"):
        Watch("fp32").check(result(float("inf")), 1)
