"""Traces as data: events read as allocations and requests, and windows of them repeated."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traced_steps import of_events

from nvae_lowmem.memory.allocator.allocator import FREE_ID
from nvae_lowmem.memory.trace.events import (
    Category,
    NotRepeatable,
    Phase,
    Trace,
    Window,
    categorise_by_lifetime,
    repeat,
)


def test_events_are_read_as_allocations_and_as_requests() -> None:
    trace = of_events([0, 1, ~0, 2, ~2, ~1])
    first, second, third = trace.allocations
    assert [*trace.walk()] == [
        (first, True), (second, True), (first, False), (third, True), (third, False), (second, False)
    ]  # fmt: skip
    assert [*trace.walk(2, 4)] == [(first, False), (third, True)]
    assert [*trace.requests(1)] == [(64, 1), (FREE_ID, 0), (64, 2), (FREE_ID, 2), (FREE_ID, 1)]
    second.category = Category.HOST
    assert [*trace.requests()] == [(64, 0), (FREE_ID, 0), (64, 2), (FREE_ID, 2)]
    assert trace.host_bytes() == 64 and trace.peak(rounded=False).nbytes == 64 and trace.peak().nbytes == 512


# --- repetition -------------------------------------------------------------------------------------------------------


@st.composite
def traces(draw: st.DrawFn) -> tuple[Trace, Window]:
    """Random allocations and frees, with a window that frees all it allocates and nothing else."""
    trace = Trace()
    live: list[int] = []

    def change(own: list[int]) -> None:
        if draw(st.booleans()) and own:
            number = own.pop(draw(st.integers(0, len(own) - 1)))
            trace.free(number)
        else:
            own.append(trace.allocate(draw(st.integers(1, 4096)), Category.TEMPORARY, "b", Phase.FORWARD, "op"))

    for _ in range(draw(st.integers(0, 8))):
        change(live)
    start = len(trace.events)
    inside: list[int] = []
    for _ in range(draw(st.integers(1, 8))):
        change(inside)
    for number in inside:
        trace.free(number)
    window = Window(start, len(trace.events), draw(st.integers(0, 3)))
    for _ in range(draw(st.integers(0, 8))):
        change(live)
    return trace, window


@given(traces())
def test_repeating_what_frees_all_its_own_repeats_the_curve(case: tuple[Trace, Window]) -> None:
    trace, (start, end, times) = case
    longer, origins = repeat(trace, [Window(start, end, times)])
    curve = [live for _, live in trace.live_bytes()]
    assert [live for _, live in longer.live_bytes()] == curve[:start] + (times + 1) * curve[start:end] + curve[end:]
    assert [a.nbytes for a in longer.allocations] == [trace.allocations[n].nbytes for n in origins]
    assert [a.born if is_alloc else a.died for a, is_alloc in longer.walk()] == [*range(len(longer.events))]


def test_what_one_round_hands_to_the_next_is_freed_by_the_next() -> None:
    trace = of_events([0, 1, ~0, 2, ~1, ~2])  # each is allocated before its predecessor is freed
    longer, _ = repeat(trace, [Window(1, 3, 2)])
    assert longer.events == [0, 1, ~0, 2, ~1, 3, ~2, 4, ~3, ~4]


def test_a_window_that_leaves_more_than_it_found_cannot_happen_twice() -> None:
    with pytest.raises(NotRepeatable, match="leave"):
        repeat(of_events([0]), [Window(0, 1, 1)])


# --- categories -------------------------------------------------------------------------------------------------------


def test_allocations_are_categorised_by_the_phases_they_outlive() -> None:
    trace = Trace()
    allocate, free = trace.allocate, trace.free
    activation = allocate(1, Category.TEMPORARY, "a", Phase.FORWARD, "aten::add")
    noise = allocate(1, Category.TEMPORARY, "a", Phase.FORWARD, "aten::normal_")
    handed_on = allocate(1, Category.BLOCK_INPUT, "a", Phase.FORWARD, "aten::mul")
    free(allocate(1, Category.BLOCK_INPUT, "a", Phase.FORWARD, "aten::mul"))
    gradient = allocate(1, Category.TEMPORARY, "a", Phase.BACKWARD, "aten::mm")
    free(allocate(1, Category.TEMPORARY, "a", Phase.BACKWARD, "aten::mm"))
    state = allocate(1, Category.OPTIMIZER_STATE, "optimizer", Phase.UPDATE, "aten::zeros")
    free(allocate(1, Category.OPTIMIZER_STATE, "optimizer", Phase.UPDATE, "aten::div"))
    for number in (activation, noise, handed_on, gradient):
        free(number)
    allocate(1, Category.WEIGHT, "", Phase.UPDATE, "aten::empty")
    categorise_by_lifetime(trace)
    assert [a.category for a in trace.allocations] == [
        "saved activation", "noise", "block input", "temporary", "gradient", "temporary", "optimizer state",
        "temporary", "weight",
    ]  # fmt: skip
    assert trace.allocations[state].died == -1


def test_names_of_phases_and_categories_are_texts_wherever_they_are_written() -> None:
    assert f"{Phase.FORWARD:<8}|{Category.SAVED_ACTIVATION}" == "forward |saved activation"
    assert json.dumps({Category.WEIGHT: Phase.SETUP}) == '{"weight": "setup"}'
    assert dict.fromkeys(Category, 0)["weight"] == 0  # type: ignore[index]
