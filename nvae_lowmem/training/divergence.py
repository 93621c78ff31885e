"""Notices when training cannot go on: a loss that is no number, or gradients that overflow step after step."""

from __future__ import annotations

import math
from collections import deque

from nvae_lowmem.config.sections import Precision
from nvae_lowmem.errors import Diverged
from nvae_lowmem.model.objective import LossTerms
from nvae_lowmem.training.engines.distributed import any_process
from nvae_lowmem.training.engines.engine import Update

STUCK_AFTER = 50
"""Skipped steps in a row. From the largest loss scale, 2^24, down to 1 there are 24 halvings."""


MOST_REFUSALS, REFUSALS_AMONG = 50, 100
"""More refused steps than this among the last so many, and skipping is no exception any more."""


def check_loss_is_finite(terms: LossTerms, step: int) -> None:
    """Raises Diverged with advice if a micro-batch of step `step` (from 1) has a loss that is infinite or no number.

    All processes call it with their own micro-batch, and all of them raise if one has to.
    """
    loss = terms.loss.item()
    bad = not math.isfinite(loss)
    if not any_process(bad, terms.loss.device):
        return
    if bad:
        wrong = [str(i) for i, ok in enumerate(terms.kl.isfinite().tolist()) if not ok]
        groups = f"the KL of group{'s' if len(wrong) > 1 else ''} {', '.join(wrong)} (from the top)"
        cause = f"the loss is {loss}: {groups if wrong else 'the likelihood'} is not finite"
    else:
        cause = "the loss of another process is not finite"
    raise Diverged(
        f"step {step}: {cause}. The last checkpoint is untouched. Try a lower --set training.learning_rate or a larger "
        "training.regulariser."
    )


class DivergenceGuard:
    """Looks at every step's update; the same for every engine.

    overflows: steps skipped so far because a gradient was not finite; refused: because its norm was too large.
    """

    def __init__(self, precision: Precision) -> None:
        self._precision = precision
        self.overflows = self.refused = self._in_a_row = 0
        self._recently_refused: deque[bool] = deque(maxlen=REFUSALS_AMONG)

    def check(self, update: Update, step: int) -> None:
        """Take in the update of step `step` (from 1). Raises Diverged with advice where further steps are pointless."""
        self.overflows += update.overflow
        self._in_a_row = self._in_a_row + 1 if update.overflow else 0
        if self._in_a_row >= STUCK_AFTER:
            raise Diverged(self._stuck(step))
        self.refused += update.refused
        self._recently_refused.append(update.refused)
        if sum(self._recently_refused) > MOST_REFUSALS:
            raise Diverged(
                f"step {step}: {sum(self._recently_refused)} of the last {len(self._recently_refused)} steps were "
                "skipped because their gradient norm was too large, so training no longer gets on. Set a larger "
                "training.skip_gradient_norm or skip_gradient_quantile, or a lower training.learning_rate.",
                curable=False,
            )

    def _stuck(self, step: int) -> str:
        precision = "--precision bf16 or fp32, " if self._precision == "fp16" else ""
        return (
            f"step {step}: {self._in_a_row} steps in a row had a gradient that is not finite, so the weights no longer "
            f"change. Go back to an earlier checkpoint with {precision}a lower --set training.learning_rate, or "
            "clipped gradients (--set training.clip_norm=200)."
        )
