"""Training that ends at an hour, by a clock that the test moves: whatever happens, it ends when it was promised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvae_lowmem.config.sections import TrainConfig
from nvae_lowmem.training.pace import PERIODIC, Pace
from nvae_lowmem.training.schedule import Schedule
from nvae_lowmem.training.time_budget import TimeBudget

HOURS = 2.0
SECONDS = 3600 * HOURS
ASKED = Schedule(10_000, 500, 250, 1e-2)


class Clock:
    """Stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Life(NamedTuple):
    """What one process of a run did."""

    step: int
    spent: float
    schedule: Schedule
    state: dict[str, Tensor]
    done: list[tuple[str, float]]
    """(one of PERIODIC, seconds of the run at which it was done), in order."""
    plans: int


def live(
    speed: Callable[[float], float],
    costs: dict[str, float],
    training: TrainConfig,
    before: Life | None = None,
    stop_after: float = float("inf"),
    seconds_per_step: float = 0.0,
) -> Life:
    """One process, as the trainer does it. speed: seconds of a step at so many seconds of the run."""
    clock = Clock()
    pace = Pace(clock)
    step, state = (before.step, before.state) if before is not None else (0, {})
    budget = TimeBudget(training, pace, state)
    schedule, plans, done = budget.taken_up(ASKED, step, state, seconds_per_step), 0, []

    def agree() -> set[str]:
        nonlocal schedule, plans
        if planned := budget.plan(step, schedule.total_steps):
            schedule, plans = budget.planned(schedule, step, planned), plans + 1
        return budget.due(save_failed=False)

    def do(what: str) -> None:
        nonlocal state
        with pace.timing(what):
            if what == "save":
                state = budget.state(schedule)
            clock.seconds += costs[what]
        done.append((what, budget.spent))

    agree()
    while step < schedule.total_steps and budget.spent < stop_after:
        clock.seconds += speed(budget.spent)
        step += 1
        pace.step_done()
        due, last = agree(), step == schedule.total_steps
        for what in PERIODIC:
            every = int(getattr(training, f"{what}_every"))
            if last or what in due or (every and step % every == 0):
                do(what)
    if step < schedule.total_steps:
        do("save")
    return Life(step, budget.spent, schedule, state, done, plans)


def training(**changes: float) -> TrainConfig:
    return replace(TrainConfig(hours=HOURS), **changes)  # type: ignore[arg-type]


CHEAP = {"evaluate": 20.0, "sample": 5.0, "save": 2.0}
per_step = st.floats(4, 60)
costs = st.fixed_dictionaries({what: st.floats(0, 150) for what in PERIODIC})


@settings(max_examples=30, deadline=None)
@given(per_step, costs, st.floats(0, 100))
def test_it_ends_within_a_twentieth_of_the_promised_time(
    seconds: float, costs: dict[str, float], estimated: float
) -> None:
    life = live(lambda _: seconds, costs, training(), seconds_per_step=estimated)
    assert life.spent == pytest.approx(SECONDS, rel=0.05)
    assert [what for what, _ in life.done[-3:]] == [*PERIODIC]


@settings(max_examples=30, deadline=None)
@given(per_step, costs, st.lists(st.floats(0.01, 0.99), max_size=3), st.floats(0.3, 3))
def test_it_ends_then_over_stops_and_resumes_too_also_on_another_machine(
    seconds: float, costs: dict[str, float], stops: list[float], factor: float
) -> None:
    life, speed = None, seconds
    for stop in [*sorted(share * SECONDS for share in stops), float("inf")]:
        if life is None or life.step < life.schedule.total_steps:
            life = live(lambda _, speed=speed: speed, costs, training(), life, stop)  # type: ignore[misc]
        speed = speed * factor
    assert life is not None and life.spent == pytest.approx(SECONDS, rel=0.05)


@settings(max_examples=30, deadline=None)
@given(per_step, st.floats(0.25, 4), st.floats(0, 1))
def test_it_ends_then_on_a_machine_whose_speed_changes(seconds: float, factor: float, when: float) -> None:
    def speed(spent: float) -> float:
        return min(100.0, seconds * factor) if spent > when * SECONDS else seconds

    assert live(speed, CHEAP, training()).spent == pytest.approx(SECONDS, rel=0.05)


@settings(max_examples=30, deadline=None)
@given(per_step, st.floats(0.25, 4), st.floats(0, 1), st.integers(0, 2000))
def test_it_ends_then_with_evaluations_and_saves_by_steps(
    seconds: float, factor: float, when: float, every: int
) -> None:
    often = training(evaluate_every=every, save_every=every, sample_every=every // 2)
    costs = dict.fromkeys(PERIODIC, min(SECONDS / 10, every * seconds / 50))
    life = live(lambda s: seconds * factor if s > when * SECONDS else seconds, costs, often)
    assert life.spent == pytest.approx(SECONDS, rel=0.05)


@settings(max_examples=20, deadline=None)
@given(st.floats(4, 20), st.floats(0.5, 2), st.floats(0.05, 0.9))
def test_progress_never_goes_back_or_jumps_and_the_rate_ends_at_the_minimum(
    seconds: float, factor: float, when: float
) -> None:
    life = live(lambda s: seconds * factor if s > when * SECONDS else seconds, CHEAP, training())
    assert life.step == life.schedule.total_steps
    progress = [life.schedule.progress(step) for step in range(life.step)]
    jumps = [b - a for a, b in pairwise(progress)]
    assert min(jumps) > 0 and progress[0] == 0 and progress[-1] == pytest.approx(1, abs=0.01)
    assert max(jumps) < 8 * factor / life.step + 1 / life.step
    rates = [life.schedule.learning_rate(step, 1e-4) for step in range(life.step)]
    assert rates[-1] == pytest.approx(1e-4, rel=0.05) and max(rates) == pytest.approx(1e-2, rel=0.02)


def test_beta_and_the_rate_follow_the_time() -> None:
    """Half-way through the time, whatever the number of steps, the cosine is half-way down."""
    for seconds in (0.5, 4.0, 30.0):
        life = live(lambda _, s=seconds: s, CHEAP, training())  # type: ignore[misc]
        half = life.schedule.learning_rate(round(0.5 * SECONDS / seconds * 0.97), 1e-4)
        assert half == pytest.approx(5.5e-3, rel=0.1)
        assert life.schedule.position(round(0.3 * life.step))[0] == pytest.approx(0.3, abs=0.02)


def test_the_warm_up_takes_the_steps_asked_for_or_a_tenth_of_a_short_run() -> None:
    long = live(lambda _: 0.5, CHEAP, training()).schedule
    assert long.learning_rate(ASKED.warmup_steps - 1, 1e-4) == pytest.approx(1e-2)
    assert long.learning_rate(ASKED.warmup_steps // 2 - 1, 1e-4) == pytest.approx(5e-3)
    short = live(lambda _: 20.0, CHEAP, training())
    rates = [short.schedule.learning_rate(step, 1e-4) for step in range(short.step)]
    assert short.step < 400 and rates.index(max(rates)) == pytest.approx(0.1 * short.step, abs=3)


def test_a_steady_machine_is_planned_for_a_few_times_at_most() -> None:
    assert live(lambda _: 1.0, CHEAP, training()).plans <= 3


def test_evaluations_come_every_tenth_of_the_time_and_saves_every_half_hour() -> None:
    life = live(lambda _: 1.0, CHEAP, training(hours=10.0), seconds_per_step=1.0)
    at = {what: [seconds for kind, seconds in life.done if kind == what] for what in PERIODIC}
    assert len(at["evaluate"]) == len(at["sample"]) == 10
    assert max(b - a for a, b in pairwise([0.0, *at["save"]])) < 1900
    after = {b for (a, _), (b, _) in pairwise(life.done) if a == "sample"}
    assert after == {"save"}, "an evaluation's figure belongs to a checkpoint"


def test_what_takes_long_is_done_seldom() -> None:
    life = live(lambda _: 1.0, {**CHEAP, "evaluate": 600.0}, training())
    assert len([what for what, _ in life.done if what == "evaluate"]) == 2  # the first tenth, and the end
    assert life.spent == pytest.approx(SECONDS, rel=0.05)


def test_other_hours_stretch_the_schedule_to_the_new_end() -> None:
    first = live(lambda _: 1.0, CHEAP, training())
    more = live(lambda _: 1.0, CHEAP, training(hours=2 * HOURS), first)
    assert more.spent == pytest.approx(2 * SECONDS, rel=0.05)
    assert more.schedule.progress(first.step) == pytest.approx(0.5, abs=0.03)
    less = live(lambda _: 1.0, CHEAP, training(hours=HOURS / 2), first)
    assert less.step == first.step + 1  # its time is over: one step, and the evaluation, and the checkpoint
    assert [what for what, _ in less.done] == [*PERIODIC]


def test_a_limit_for_a_run_without_one_counts_from_there_on() -> None:
    steps = Life(700, 0.0, ASKED, {}, [], 0)
    life = live(lambda _: 1.0, CHEAP, training(), steps)
    assert life.spent == pytest.approx(SECONDS, rel=0.05) and life.step > 700 + 0.9 * SECONDS
    assert life.schedule.progress(700) == pytest.approx(700 / life.step, rel=0.05)
