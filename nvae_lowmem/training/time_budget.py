"""Training that ends at an hour: what of the time is spent, how many steps the rest is good for, what is due by time.

Process 0 looks at its clock between steps and decides; all others hear of it. The time of a run adds up over its
processes: a checkpoint says how much was spent when it was written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nvae_lowmem.config.limits import LARGEST_STEPS
from nvae_lowmem.config.sections import TrainConfig
from nvae_lowmem.training.pace import ENOUGH_STEPS, IN_WORDS, PERIODIC, WARM_STEPS, Pace
from nvae_lowmem.training.schedule import Knot, Schedule
from nvae_lowmem.units import clock_time, format_seconds

FIRST_MARK = 0.02
"""Share of the time that is left to a process after which its steps are planned from what it measured."""
NEXT_MARK = 0.2
"""Share of the time, or of the steps, that are left, after which the plan is looked at again."""
TOLERANCE = 0.02
"""Share of the budget by which the end may be expected to be off without another plan."""
HOME_STRETCH, HOME_TOLERANCE = 0.05, 0.005
"""The last share of the budget, and what may be off as it begins: the schedules are to end, not to be cut off."""
LARGEST_SHARE = 0.05
"""Of the time that each of evaluations, pictures and saves may take, where nobody said how often they are wanted."""
GUESSED_STEPS = 1000
"""Steps that are still to come, at least, where nobody knows how long one takes; measured after a few."""
STATE, KNOTS = "time_budget", "schedule_knots"
"""In a checkpoint: (hours, spent seconds, seconds of a step and of PERIODIC), and the schedule's plans."""


class TimeBudget:
    """The time of one run as one process sees it."""

    def __init__(
        self, training: TrainConfig, pace: Pace, state: Mapping[str, Tensor], began: float | None = None
    ) -> None:
        """state: of the checkpoint that training goes on from; empty at the beginning.

        began: when the process began, by pace.clock; None: now.
        """
        self.seconds = training.hours * 3600
        self.pace = pace
        self._hours, self._save_seconds = training.hours, training.save_minutes * 60
        self._every = {what: int(getattr(training, f"{what}_every")) for what in PERIODIC}
        spent = 0.0
        if STATE in state:
            _, spent, *known = state[STATE].tolist()
            pace.seconds |= {what: value for what, value in zip(("step", *PERIODIC), known, strict=True) if value}
        self._began = (pace.clock() if began is None else began) - spent
        self._first_mark = self.spent + FIRST_MARK * max(0.0, self.left)
        self._next_look = (math.inf, math.inf)  # (spent seconds, steps): whichever comes first
        self._looked_at = self.spent
        self._home = False
        self._wants_plan = self._guessing = True

    @property
    def spent(self) -> float:
        """Seconds since the run began, without those between its processes."""
        return self.pace.clock() - self._began

    @property
    def left(self) -> float:
        """Seconds that are left; below 0 after the end."""
        return self.seconds - self.spent

    # -- the schedule that a process begins with --

    def taken_up(
        self, schedule: Schedule, step: int, state: Mapping[str, Tensor], seconds_per_step: float = 0.0
    ) -> Schedule:
        """The schedule from which training goes on after `step` steps, the same in every process.

        With the hours as before, the checkpoint's. With others, or at the beginning, a guess from seconds_per_step (0:
        not known), which the first plan replaces from the first step on: the schedules stretch to the new end.
        """
        self._wants_plan = True
        self._guessing = KNOTS not in state or float(state[STATE][0]) != self._hours
        if not self._guessing:
            knots = tuple(Knot(int(s), progress, int(total)) for s, progress, total in state[KNOTS].tolist())
            return schedule._replace(total_steps=knots[-1].total_steps, knots=knots)
        steps: float = max(schedule.total_steps, step + GUESSED_STEPS)
        if seconds_per_step > 0:
            steps = max(self.seconds / seconds_per_step, step + 10 * ENOUGH_STEPS)
        return schedule.planned(int(min(steps, LARGEST_STEPS)))

    def state(self, schedule: Schedule) -> dict[str, Tensor]:
        """What a checkpoint that is written now has to hold; the writing itself is counted in as it took last time."""
        known = [self.pace.seconds.get(what, 0.0) for what in ("step", *PERIODIC)]
        figures = torch.tensor([self._hours, self.spent + known[-1], *known], dtype=torch.float64)
        return {STATE: figures, KNOTS: torch.tensor(schedule.knots, dtype=torch.float64)}

    # -- between steps --

    def plan(self, step: int, total_steps: int) -> int:
        """After `step` steps: the number of steps that the run is to have, or 0 for the `total_steps` that it has."""
        last = sum(self._seconds(what) for what in PERIODIC)
        if self.left - last < self._seconds("step") / 2:
            ends = step if self.pace.steps else step + 1  # a process does one step at least, to end as others do
            return ends if ends != total_steps else 0
        firm = self._is_new_speed()
        if not firm and not self._is_at_mark(step):
            return 0
        between = sum(self._seconds(what) * self._times(what) for what in PERIODIC if not self._every[what])
        per_step = self._seconds("step") + sum(self._seconds(w) / every for w, every in self._every.items() if every)
        planned = step + max(1, round((self.left - last - between) / per_step))
        off = abs(planned - total_steps) * per_step / self.seconds
        home, self._home = self._home, self.left < HOME_STRETCH * self.seconds
        allowed = 0.0 if firm else HOME_TOLERANCE if self._home and not home else TOLERANCE
        kept = planned if off > allowed else total_steps
        self._next_look = (self.spent + NEXT_MARK * self.left, step + NEXT_MARK * (kept - step))
        return planned if kept != total_steps else 0

    def planned(self, schedule: Schedule, step: int, total_steps: int) -> Schedule:
        """The schedule after `plan` said total_steps; every process calls it. The first plan replaces a guess."""
        guessed, self._guessing = self._guessing, False
        return schedule.planned(total_steps) if guessed else schedule.planned_anew(step, total_steps)

    def describe(self, step: int, before: int, total_steps: int) -> str:
        """A sentence on a new plan, for people."""
        if total_steps <= step:
            return f"step {step}: the time is over, so this is the last step, of {before:,} planned"
        known = [f"{name} {self._seconds(what):.3g} s" for what, name in IN_WORDS.items() if self._seconds(what)]
        measured = ", ".join([f"{self._seconds('step'):.3g} s per step", *known])
        return (
            f"step {step}: {measured}: {total_steps:,} steps in all instead of {before:,}; training ends "
            f"{clock_time(self.left)}, in {format_seconds(max(0.0, self.left))}"
        )

    def summary(self) -> str:
        """How much of the time is spent, for people."""
        return f"{format_seconds(self.spent)} of {format_seconds(self.seconds)} spent"

    def due(self, save_failed: bool) -> set[str]:
        """What of PERIODIC goes by time and is to be done now; to be called once after every step."""
        before, self._looked_at = self._looked_at, self.spent
        unknown = [what for what in PERIODIC if what not in self.pace.seconds]  # the end must leave time for them
        intervals = {w: self._interval(w) for w in PERIODIC if not self._every[w] or w in unknown}
        if save_failed and "save" in intervals:
            intervals["save"] /= 10
        due = {what for what, each in intervals.items() if int(self._looked_at / each) > int(before / each)}
        with_evaluation = "evaluate" in due and "save" in intervals  # so that its figure belongs to a checkpoint
        return due | {"save"} if with_evaluation else due

    # -- pieces --

    def _seconds(self, what: str) -> float:
        return self.pace.seconds.get(what, 0.0)

    def _is_new_speed(self) -> bool:
        """Whether a speed was just learned that the plan must follow: a few steps' here, or the checkpoint's."""
        if self.pace.steps == WARM_STEPS + ENOUGH_STEPS:
            self.pace.measure()
            self._wants_plan = True
        elif self._first_mark and self.spent >= self._first_mark and self.pace.is_measurable:
            self.pace.measure()
            self._wants_plan, self._first_mark = True, 0.0
        if not self._wants_plan or not self._seconds("step"):
            return False
        self._wants_plan = False
        return True

    def _is_at_mark(self, step: int) -> bool:
        """Whether it is time to look at the plan."""
        spent, steps = self._next_look
        if (self.spent < spent and step < steps) or not self.pace.is_measurable:
            return False
        self.pace.measure()
        return True

    def _interval(self, what: str) -> float:
        """Seconds between two of PERIODIC that go by time: a tenth of the budget, more where each takes long."""
        tenth = self.seconds / 10
        usual = min(tenth, self._save_seconds or tenth) if what == "save" else tenth
        return max(usual, self._seconds(what) / LARGEST_SHARE)

    def _times(self, what: str) -> int:
        """How often one of PERIODIC that goes by time is still to come before the end, at most."""
        interval = self._interval(what)
        times = math.ceil(self.seconds / interval) - 1 - int(self.spent / interval)
        apart = what == "save" and not self._every["evaluate"] and interval != self._interval("evaluate")
        return times + self._times("evaluate") if apart else times
