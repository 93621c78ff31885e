"""Skips the update of a step whose gradient is too large: one bad batch is not to undo thousands of good ones.

Very deep VAEs were trained so (Child 2021, arXiv 2011.10650, section 4: updates with a gradient norm above a threshold
are skipped, a few in a run). What is skipped is counted, and `DivergenceGuard` ends a training that skips too often.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from nvae_lowmem.config.sections import TrainConfig

WINDOW = 1000
"""Norms that the quantile is taken of."""
ENOUGH = 100
"""Norms before there is a quantile to speak of."""
STATE = "gradient_norms"


class GradientGate:
    """Judges the true gradient norm of every step, before its update; the same in all processes."""

    def __init__(self, config: TrainConfig) -> None:
        self._largest, self._quantile = config.skip_gradient_norm, config.skip_gradient_quantile
        self._norms: deque[float] = deque(maxlen=WINDOW)

    @property
    def active(self) -> bool:
        """Whether a limit is set, so that the norm has to be computed."""
        return self._largest > 0 or self._quantile > 0

    def refuses(self, norm: float) -> bool:
        """Whether the step with this norm is to be skipped; the norm is taken in. An infinite one is an overflow."""
        if not self.active or not math.isfinite(norm):
            return False
        limit = self._limit()
        self._norms.append(norm)
        return norm > limit

    def _limit(self) -> float:
        limit = self._largest or math.inf
        if self._quantile and len(self._norms) >= ENOUGH:
            limit = min(limit, float(torch.tensor([*self._norms], dtype=torch.float64).quantile(self._quantile)))
        return limit

    def state(self) -> dict[str, Tensor]:
        """The norms so far, for a checkpoint: a resumed run is to skip what the other would have."""
        return {STATE: torch.tensor([*self._norms], dtype=torch.float64)} if self._norms else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        self._norms.clear()
        self._norms.extend(state[STATE].tolist() if STATE in state else [])
