"""How far training is at every step, and the learning rate there.

Where the number of steps is fixed, everything is a function of step and total. Where training is to end at an hour, the
number of steps is planned, and planned anew as the speed is measured: progress is then linear between those plans.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from nvae_lowmem.config.sections import Cosine
from nvae_lowmem.training.learning_rate import cosine_at, learning_rate, warm_up

LONGEST_WARM_UP = 0.1
"""Largest share of a run that ends at an hour over which the learning rate rises, however many epochs are asked for."""


class Knot(NamedTuple):
    """A plan of how many steps there will be."""

    step: int
    """Finished steps when it was made."""
    progress: float
    """How far training was there."""
    total_steps: int
    """Where progress reaches 1, from here on."""


class Schedule(NamedTuple):
    """Counts of optimiser steps, and the peak learning rate."""

    total_steps: int
    steps_per_epoch: int
    warmup_steps: int
    peak_rate: float
    cosine: Cosine = "epoch"
    knots: tuple[Knot, ...] = ()
    """The plans of a run that ends at an hour, oldest first; none where the number of steps is fixed."""

    # -- how far --

    def progress(self, step: int) -> float:
        """How far training is at optimiser step `step` (from 0): 0 at the first, 1 at the last, linear between knots.

        p = p_k + (1 - p_k) (step - step_k) / (T_k - 1 - step_k),   k: the last knot up to `step`
        """
        knot = next((k for k in reversed(self.knots) if k.step <= step), Knot(0, 0.0, self.total_steps))
        steps = knot.total_steps - 1 - knot.step
        share = min(1.0, (step - knot.step) / steps) if steps > 0 else 1.0
        return knot.progress + (1 - knot.progress) * share

    def position(self, step: int) -> tuple[float, float]:
        """(how far, of how much) for schedules that go by shares of the run: (step, steps), or (progress, 1)."""
        return (self.progress(step), 1.0) if self.knots else (step, self.total_steps)

    def planned(self, total_steps: int) -> Schedule:
        """A schedule of so many steps from the very first one on, whatever was planned before."""
        return self._replace(total_steps=total_steps, knots=(Knot(0, 0.0, total_steps),))

    def planned_anew(self, step: int, total_steps: int) -> Schedule:
        """From `step` finished steps on, progress goes to 1 at another number of steps; up to there nothing changes."""
        before = tuple(knot for knot in self.knots if knot.step < step)
        return self._replace(total_steps=total_steps, knots=(*before, Knot(step, self.progress(step), total_steps)))

    # -- the learning rate --

    def learning_rate(self, step: int, minimum: float) -> float:
        r"""The learning rate of optimiser step `step`, counted from 0; the cosine ends at `minimum`.

        With W = `warmup_steps`, T = `total_steps` and cosine = "step", after the published linear warm-up:

            minimum + (peak - minimum) * (1 + cos(pi * (step - W) / (T - 1 - W))) / 2

        With knots, progress takes the place of step / (T - 1), and the warm-up ends after a tenth of it at the latest.
        """
        peak, minimum = self.peak_rate, min(self.peak_rate, minimum)
        if self.knots:
            return self._rate_of_progress(step, minimum)
        if self.cosine == "epoch":
            return learning_rate(
                step,
                peak=peak,
                minimum=minimum,
                warmup_steps=self.warmup_steps,
                steps_per_epoch=self.steps_per_epoch,
                total_steps=self.total_steps,
            )
        if step < self.warmup_steps:
            return warm_up(step, peak, self.warmup_steps)
        steps = max(1, self.total_steps - 1 - self.warmup_steps)
        return cosine_at((step - self.warmup_steps) / steps, peak, minimum)

    def _rate_of_progress(self, step: int, minimum: float) -> float:
        progress = self.progress(step)
        by_steps = (step + 1) / self.warmup_steps if self.warmup_steps else math.inf
        risen = max(by_steps, progress / LONGEST_WARM_UP)
        if risen < 1:
            return self.peak_rate * risen
        warm = min(LONGEST_WARM_UP, self.progress(self.warmup_steps))
        return cosine_at(max(0.0, progress - warm) / (1 - warm), self.peak_rate, minimum)
