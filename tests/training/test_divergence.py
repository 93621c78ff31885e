"""When training stops by itself: losses that are no numbers, and overflows without end."""

from __future__ import annotations

import pytest
import torch
from zero_worker import make, profile, train

from nvae_lowmem.config.sections import Precision
from nvae_lowmem.model.objective import LossTerms
from nvae_lowmem.training.divergence import STUCK_AFTER, Diverged, DivergenceGuard, check_loss_is_finite
from nvae_lowmem.training.ema import WeightEma
from nvae_lowmem.training.engines.engine import Update
from nvae_lowmem.training.engines.torch_engine import TorchEngine

SKIPPED, DONE = Update(True, None), Update(False, None)


def terms(loss: float, kl: tuple[float, ...] = (1.0, 2.0)) -> LossTerms:
    zeros = torch.zeros(len(kl))
    return LossTerms(torch.tensor(loss), torch.tensor(0.5), torch.tensor(kl), zeros, zeros)


@pytest.mark.parametrize(("precision", "advice"), [("fp16", "bf16 or fp32"), ("fp32", "learning_rate")])
def test_endless_overflow_ends_with_advice(precision: Precision, advice: str) -> None:
    guard = DivergenceGuard(precision)
    for start in (0, STUCK_AFTER):
        for step in range(start, start + STUCK_AFTER - 1):
            guard.check(SKIPPED, step)
        guard.check(DONE, start + STUCK_AFTER - 1)  # one good step forgives all before it
    for step in range(100, 149):
        guard.check(SKIPPED, step)
    with pytest.raises(Diverged, match=f"step 149: 50 steps in a row.*{advice}"):
        guard.check(SKIPPED, 149)
    assert guard.overflows == 3 * 49 + 1


def test_a_loss_that_is_no_number_names_its_groups() -> None:
    check_loss_is_finite(terms(1.0), 7)
    with pytest.raises(Diverged, match="step 7: the loss is nan: the KL of groups 0, 2"):
        check_loss_is_finite(terms(float("nan"), (float("nan"), 1.0, float("inf"))), 7)
    with pytest.raises(Diverged, match="the loss is inf: the likelihood is not finite"):
        check_loss_is_finite(terms(float("inf")), 1)


@pytest.mark.parametrize("plan", [{}, {"offload_optimizer": True}], ids=["device", "host"])
def test_a_loss_that_is_no_number_leaves_weights_states_and_average_as_they_were(plan: dict[str, object]) -> None:
    run = profile({"micro_batch": 2, **plan})
    engine = make(TorchEngine, run, accumulation=2)
    ema = WeightEma(engine.model, 0.9)
    train(engine, run, range(2), accumulation=2, ema=ema)
    before = engine.state() | {f"ema.{k}": v.clone() for k, v in ema.state_dict().items()}
    forward, calls = engine.forward, iter((1.0, float("nan")))  # the second micro-batch is the bad one

    def breaking(*arguments: object) -> LossTerms:
        found = forward(*arguments)
        return found._replace(loss=found.loss * next(calls))

    engine.forward = breaking
    with pytest.raises(Diverged, match="step 3: the loss is nan"):
        train(engine, run, range(2, 3), accumulation=2, ema=ema)
    after = engine.state() | {f"ema.{k}": v for k, v in ema.state_dict().items()}
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert [name for name in moved if not name.startswith("buffer.")] == []  # statistics move in the forward pass
