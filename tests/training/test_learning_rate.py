"""The learning-rate schedule, and the rule for small batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.training.learning_rate import learning_rate, suggest_learning_rate

SCHEDULE: dict[str, Any] = {
    "peak": 1e-2,
    "minimum": 1e-4,
    "warmup_steps": 50,
    "steps_per_epoch": 10,
    "total_steps": 400,
}


def test_the_rate_climbs_linearly_to_the_peak_over_the_warm_up() -> None:
    rates = [learning_rate(step, **SCHEDULE) for step in range(50)]
    assert rates == pytest.approx([1e-2 * (step + 1) / 50 for step in range(50)])
    assert rates[-1] == 1e-2


def test_the_cosine_starts_at_the_peak_and_ends_at_the_minimum_epoch_by_epoch() -> None:
    epochs = [[learning_rate(step, **SCHEDULE) for step in range(e * 10, e * 10 + 10)] for e in range(5, 40)]
    assert all(len(set(rates)) == 1 for rates in epochs)
    assert epochs[0][0] == 1e-2 and epochs[-1][0] == pytest.approx(1e-4)
    assert epochs[17][0] == pytest.approx((1e-2 + 1e-4) / 2)  # 17 of 34 epochs: half way


def test_the_cosine_is_torchs_cosine() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=34, eta_min=1e-4)
    for epoch in range(5, 40):
        assert learning_rate(epoch * 10, **SCHEDULE) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()


@given(
    warmup_steps=st.integers(0, 200),
    steps_per_epoch=st.integers(1, 60),
    total_steps=st.integers(1, 500),
    peak=st.floats(1e-4, 1e-1),
)
def test_the_rate_rises_in_the_warm_up_then_falls_and_stays_in_range(
    warmup_steps: int, steps_per_epoch: int, total_steps: int, peak: float
) -> None:
    rates = [
        learning_rate(
            step,
            peak=peak,
            minimum=1e-4,
            warmup_steps=warmup_steps,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
        )
        for step in range(total_steps + 5)
    ]
    climb, fall = rates[:warmup_steps], rates[warmup_steps:]
    assert climb == sorted(climb) and fall == sorted(fall, reverse=True)
    assert all(0 < rate <= peak for rate in climb) and all(1e-4 <= rate <= peak * (1 + 1e-12) for rate in fall)


def test_a_schedule_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="steps_per_epoch=0"):
        learning_rate(0, **{**SCHEDULE, "steps_per_epoch": 0})


def test_the_published_batch_gets_the_published_rate() -> None:
    for total_batch in (256, 1000):
        rate, reason = suggest_learning_rate(total_batch, 256, 1e-2)
        assert rate == 1e-2 and f"this run's is {total_batch}" in reason


@pytest.mark.parametrize("total_batch, expected", [(64, 5e-3), (32, 3.5e-3), (8, 1.8e-3), (2, 1e-3)])
def test_a_small_batch_gets_the_square_root_rule_and_the_reason_says_so(total_batch: int, expected: float) -> None:
    rate, reason = suggest_learning_rate(total_batch, 256, 1e-2)
    assert rate == expected
    assert f"learning rate {expected:g}" in reason and f"sqrt({total_batch} / 256)" in reason
    assert ("raised to 0.001" in reason) == (total_batch == 2)


@given(batch=st.integers(1, 2000), published_batch=st.integers(1, 1000), published=st.floats(1e-5, 1e-1))
def test_the_suggested_rate_stays_between_the_floor_and_the_published_rate(
    batch: int, published_batch: int, published: float
) -> None:
    rate, _ = suggest_learning_rate(batch, published_batch, published)
    rule = published * math.sqrt(min(1.0, batch / published_batch))
    assert min(1e-3, published) <= rate <= published
    assert rate == pytest.approx(max(rule, min(1e-3, published)), rel=0.051)
    assert rate <= suggest_learning_rate(batch + 1, published_batch, published)[0]


def test_an_impossible_batch_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match="training.total_batch = 0"):
        suggest_learning_rate(0, 256, 1e-2)
    with pytest.raises(ConfigError, match="set training.learning_rate"):
        suggest_learning_rate(8, 0, 1e-2)
