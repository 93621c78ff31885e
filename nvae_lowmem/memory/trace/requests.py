"""The requests that a traced step makes of the card's allocator."""

from __future__ import annotations

from nvae_lowmem.memory.allocator.recording import RecordedCard, Recording
from nvae_lowmem.memory.trace.events import Trace


def from_trace(name: str, trace: Trace, settings: str = "") -> Recording:
    """The requests of a trace for memory on the card; no allocator served them, so there are no checkpoints."""
    phases: list[tuple[int, str]] = []
    for index, (a, is_alloc) in enumerate((a, is_alloc) for a, is_alloc in trace.walk() if a.on_card):
        if is_alloc and (not phases or phases[-1][1] != a.phase):
            phases.append((index, a.phase))
    return Recording(name, RecordedCard(settings, 1, 0, 0.0), list(trace.requests()), tuple(phases), ())
