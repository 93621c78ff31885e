"""The search over policies, against trying every assignment."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import RATES, SIX_BLOCKS, table_of

from nvae_lowmem.config.sections import KEEPS
from nvae_lowmem.memory.plan import search as fit_search
from nvae_lowmem.memory.plan.block_costs import Choice
from nvae_lowmem.memory.plan.search import Assignment, fastest, least_peak

choices = st.builds(
    Choice, st.sampled_from(KEEPS), st.integers(-20, 40), st.integers(0, 60), st.integers(1, 30).map(float)
)
row_lists = st.lists(st.lists(choices, min_size=1, max_size=4), min_size=1, max_size=6)


def every(rows: Sequence[Sequence[Choice]]) -> list[Assignment]:
    return [Assignment(picked) for picked in itertools.product(*rows)]


@settings(max_examples=150, deadline=None)
@given(row_lists, st.integers(0, 200))
def test_the_search_finds_what_trying_everything_finds(rows: list[list[Choice]], room: int) -> None:
    fitting = [a for a in every(rows) if a.peak_bytes <= room]
    found = fastest(rows, room)
    if not fitting:
        assert found is None
    else:
        assert found is not None and found.peak_bytes <= room
        assert found.seconds == min(a.seconds for a in fitting)


@settings(max_examples=100, deadline=None)
@given(row_lists)
def test_the_least_peak_is_the_least_of_all_assignments(rows: list[list[Choice]]) -> None:
    assert least_peak(rows).peak_bytes == min(a.peak_bytes for a in every(rows))


@settings(max_examples=50, deadline=None)
@given(row_lists, st.integers(0, 200))
def test_thinning_the_states_out_never_loses_that_something_fits(rows: list[list[Choice]], room: int) -> None:
    whole = fastest(rows, room)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_search, "MOST_STATES", 2)
        thinned = fastest(rows, room)
    assert (whole is None) == (thinned is None)
    if whole is not None and thinned is not None:
        assert thinned.peak_bytes <= room
        assert thinned.seconds >= whole.seconds


def test_on_a_real_model_of_six_blocks_the_search_equals_trying_all_4096_assignments() -> None:
    named = table_of(SIX_BLOCKS.model).choices((1,), 16, RATES, gradients_stay=False)
    assert len(named) == 6
    rows = [row for _, row in named]
    priced = sorted({(a.peak_bytes, a.seconds) for a in every(rows)})
    peaks = [peak for peak, _ in priced]
    for room in (peaks[0] - 1, *peaks[:: len(peaks) // 12], peaks[-1]):
        found = fastest(rows, room)
        possible = [seconds for peak, seconds in priced if peak <= room]
        assert (found is None) == (not possible)
        if found is not None:
            assert found.seconds == pytest.approx(min(possible), rel=1e-12)
