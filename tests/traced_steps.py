"""Traces for the tests of tracing: of the nano model, and made up of events."""

from __future__ import annotations

from functools import cache
from typing import Any

from nvae_lowmem.memory.trace.events import Category, Phase, Trace
from nvae_lowmem.memory.trace.training import trace_training
from profiles import profile_of


def lives(trace: Trace) -> list[tuple[Any, ...]]:
    return [(a.nbytes, *a.kind, a.born, a.died) for a in trace.allocations]


@cache
def small(micro_batch: int, accumulation: int = 1, steps: int = 1, **plan: Any) -> Trace:
    return trace_training(profile_of(**plan), micro_batch, accumulation, steps)


def of_events(events: list[int], **more: Any) -> Trace:
    """A trace of 64-byte temporaries; an event is an allocation's number, in order, or ~number for its free."""
    trace = Trace(**more)
    for event in events:
        if event >= 0:
            trace.allocate(64, Category.TEMPORARY, "", Phase.FORWARD, "op")
        else:
            trace.free(~event)
    return trace
