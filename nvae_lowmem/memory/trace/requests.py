"""The requests that a traced step makes of the card's allocator."""

from __future__ import annotations

from nvae_lowmem.memory.allocator.allocator import (
    FREE_ID,
)
from nvae_lowmem.memory.allocator.recording import Place, Recording
from nvae_lowmem.memory.trace.events import Trace


def from_trace(name: str, trace: Trace, settings: str = "") -> Recording:
    """The requests of a trace for memory on the card; no allocator served them, so there are no checkpoints."""
    events: list[tuple[int, int]] = []
    phases: list[tuple[int, str]] = []
    for event in trace.events:
        number = event if event >= 0 else ~event
        a = trace.allocations[number]
        if a.category == "host":
            continue
        if event >= 0 and (not phases or phases[-1][1] != a.phase):
            phases.append((len(events), a.phase))
        events.append((a.nbytes if event >= 0 else FREE_ID, number))
    return Recording(name, Place(settings, 1, 0, 0.0), events, tuple(phases), ())
