"""What a training step will take of a card: the traced step and what a trace cannot see, through the allocator."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from nvae_lowmem.config import Profile
from nvae_lowmem.memory.cards import Budget, Card
from nvae_lowmem.memory.trace import Peak


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Peaks of training in bytes, and what owns them. `measure` fills the same fields from a real run."""

    micro_batch: int
    accumulation: int
    allocated_peak_bytes: int
    """Most bytes in blocks of the caching allocator at once: torch.cuda.max_memory_allocated()."""
    reserved_peak_bytes: int
    """Most bytes the allocator took from the card: torch.cuda.max_memory_reserved()."""
    peak: Peak
    """The moment of the largest use: block, phase, operation, and the split by category and block."""
    timeline: tuple[tuple[int, dict[str, int]], ...]
    """One settled step, thinned out: (event, bytes by category)."""
    host_bytes: int
    """Host memory for weights, gradients, states, averages and parked activations, page-locked part included."""
    pinned_bytes: int
    """Page-locked part of it."""
    context_bytes: int
    """Outside the allocator: CUDA context and other programs."""
    init_peak_bytes: int
    """Most bytes while the engine is built, before the first step."""
    margin_bytes: int
    """What may come on top of the reserved peak and never falls below it: upper bounds of unknown workspaces."""
    oom: str | None
    """Why the allocator ran out of memory under the budget's cap, if it did."""

    def fits(self, cap_bytes: int) -> bool:
        """Whether training runs when the allocator may take `cap_bytes`, the margin included."""
        return self.oom is None and self.reserved_peak_bytes + self.margin_bytes <= cap_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain tables, numbers and texts."""
        return json.loads(json.dumps(asdict(self)))


def predict(
    profile: Profile,
    micro_batch: int,
    accumulation: int = 1,
    card: Card | None = None,
    budget: Budget | None = None,
    settings: str = "",
) -> Prediction:
    """Predict training of the profile's model under its plan."""
    raise NotImplementedError
