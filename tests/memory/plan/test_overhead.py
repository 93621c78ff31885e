"""What the planner learns from predictions: the overhead per size, narrowed from both sides."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from planner_cases import GIB, MIB, SIX_BLOCKS, predicted

from nvae_lowmem.memory.plan.overhead import OverheadModel, Size, Taken
from nvae_lowmem.memory.predict.predict import Prediction
from nvae_lowmem.memory.trace.events import Peak

CAP, SIZE = 4 * GIB, Size((2,), 8)


def prediction(reserved_bytes: int, host_bytes: int = 0, retries: int = 0, oom: str | None = None) -> Prediction:
    found = predicted(SIX_BLOCKS, Peak(reserved_bytes, 0, "", "", "", {}, {}), reserved_bytes, host_bytes)
    return replace(found, run_retries=retries, oom=oom)


def test_a_fitting_prediction_says_the_overhead_and_untried_sizes_are_taken_to_be_alike() -> None:
    model = OverheadModel(CAP)
    guess = model.estimate(SIZE)
    assert 0 < guess.card_bytes < CAP // 10 and guess.host_bytes == 0
    model.observe(SIZE, Taken(2 * GIB, 100), prediction(2 * GIB + 300 * MIB, host_bytes=150))
    assert model.estimate(SIZE) == model.estimate(Size((5,), 1)) == Taken(300 * MIB, 50)
    model.observe(Size((5,), 1), Taken(GIB, 0), prediction(GIB + 40 * MIB))
    assert model.estimate(SIZE).card_bytes == 300 * MIB  # what was seen of a size stays its own


@given(table=st.integers(1, 3 * GIB), needs=st.lists(st.integers(0, 5 * GIB), min_size=1, max_size=6))
def test_where_it_does_not_fit_more_and_more_is_left_free(table: int, needs: list[int]) -> None:
    model = OverheadModel(CAP)
    for needed in needs:
        before = model.estimate(SIZE).card_bytes
        model.observe(SIZE, Taken(table, 0), prediction(needed, oom="no piece is large enough"))
        assert model.estimate(SIZE).card_bytes >= before + CAP // 100


def test_a_plan_that_lives_from_the_cache_being_given_back_had_too_little_left_free() -> None:
    calm, retrying = OverheadModel(CAP), OverheadModel(CAP)
    calm.observe(SIZE, Taken(3 * GIB, 0), prediction(3 * GIB + 10 * MIB))
    before = retrying.estimate(SIZE).card_bytes
    retrying.observe(SIZE, Taken(3 * GIB, 0), prediction(3 * GIB + 10 * MIB, retries=2))
    assert calm.estimate(SIZE).card_bytes == 10 * MIB < before < retrying.estimate(SIZE).card_bytes


def test_between_too_little_and_enough_the_middle_is_tried() -> None:
    model = OverheadModel(CAP)
    model.observe(SIZE, Taken(3 * GIB, 0), prediction(3 * GIB, oom="in pieces"))
    too_little, enough = OverheadModel(CAP).estimate(SIZE).card_bytes, model.estimate(SIZE).card_bytes
    model.observe(SIZE, Taken(3 * GIB, 0), prediction(3 * GIB))
    assert model.estimate(SIZE).card_bytes == (too_little + enough) // 2
