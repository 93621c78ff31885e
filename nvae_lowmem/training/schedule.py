"""How far training is at every step, and the learning rate there."""

from __future__ import annotations

from typing import NamedTuple

from nvae_lowmem.config.sections import Cosine
from nvae_lowmem.training.learning_rate import cosine_at, learning_rate, warm_up


class Schedule(NamedTuple):
    """Counts of optimiser steps, and the peak learning rate."""

    total_steps: int
    steps_per_epoch: int
    warmup_steps: int
    peak_rate: float
    cosine: Cosine = "epoch"

    def learning_rate(self, step: int, minimum: float) -> float:
        r"""The learning rate of optimiser step `step`, counted from 0; the cosine ends at `minimum`.

        With W = `warmup_steps`, T = `total_steps` and cosine = "step", after the published linear warm-up:

            minimum + (peak - minimum) * (1 + cos(pi * (step - W) / (T - 1 - W))) / 2
        """
        peak, minimum = self.peak_rate, min(self.peak_rate, minimum)
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
