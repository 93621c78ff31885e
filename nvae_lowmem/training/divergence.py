"""Notices when training cannot go on: a loss that is no number, or gradients that overflow step after step."""

from __future__ import annotations

from nvae_lowmem.config.sections import Precision
from nvae_lowmem.training.step import StepResult

STUCK_AFTER = 50
"""Skipped steps in a row. From the largest loss scale, 2^24, down to 1 there are 24 halvings."""


class Watch:
    """Looks at every step's result; the same for every engine. overflows: steps skipped so far, in any precision."""

    def __init__(self, precision: Precision) -> None:
        self._precision = precision
        self.overflows = self._in_a_row = 0

    def check(self, result: StepResult, step: int) -> None:
        """Step `step` (from 1) is done. Raises Diverged with advice where more steps would be for nothing."""
        skipped = result.update.overflow
        self.overflows += skipped
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if not bool(result.loss.isfinite()):
            raise Diverged(self._not_finite(result, step))
        if self._in_a_row >= STUCK_AFTER:
            raise Diverged(self._stuck(step))

    def _not_finite(self, result: StepResult, step: int) -> str:
        bad = [str(i) for i, ok in enumerate(result.kl.isfinite().tolist()) if not ok]
        groups = f"the KL of group{'s' if len(bad) > 1 else ''} {', '.join(bad)} (from the top)"
        return (
            f"step {step}: the loss is {result.loss.item()}: {groups if bad else 'the likelihood'} is not finite. The "
            "last checkpoint is untouched. Try a lower --set training.learning_rate, a larger training.regulariser, or "
            "--precision fp32."
        )

    def _stuck(self, step: int) -> str:
        precision = "--precision bf16 or fp32, " if self._precision == "fp16" else ""
        return (
            f"step {step}: {self._in_a_row} steps in a row had a gradient that is not finite, so the weights no longer "
            f"change. Go back to an earlier checkpoint with {precision}a lower --set training.learning_rate, or "
            "clipped gradients (--set training.clip_norm=200)."
        )


class Diverged(RuntimeError):
    """Training cannot go on: the loss or the gradients are no numbers any more. Its text says where and what to do."""
