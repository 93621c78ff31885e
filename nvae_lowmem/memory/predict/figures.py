"""What training takes of memory, predicted or measured: both say it in the same figures, so that they compare."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MemoryFigures:
    """The most bytes at once in a whole run, its set-up included."""

    allocated_peak_bytes: int
    """In blocks of the caching allocator: torch.cuda.max_memory_allocated()."""
    reserved_peak_bytes: int
    """Taken from the card by the allocator: torch.cuda.max_memory_reserved()."""
    host_bytes: int
    """Host memory for weights, gradients, states, averages and parked activations."""
