"""How the learning rate moves with every step."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvae_lowmem.training.schedule import Schedule


@given(total=st.integers(2, 400), data=st.data())
def test_a_cosine_by_step_moves_with_every_step_and_ends_at_the_minimum_on_the_last(
    total: int, data: st.DataObject
) -> None:
    warm_up = data.draw(st.integers(0, total // 2), label="warm-up")
    schedule = Schedule(total, data.draw(st.integers(1, 500), label="epoch"), warm_up, 1e-2, "step")
    rates = [schedule.learning_rate(step, 1e-4) for step in range(total)]
    climb, fall = rates[:warm_up], rates[warm_up:]
    assert all(a < b for a, b in pairwise(climb)) and all(a > b for a, b in pairwise(fall))
    assert rates[-1] == (pytest.approx(1e-4) if len(fall) > 1 else 1e-2)


def test_the_minimum_is_never_above_the_peak() -> None:
    assert Schedule(10, 5, 0, 1e-5, "step").learning_rate(9, 1e-4) == 1e-5
