"""What an allocation of a trace was for, told from when it lived: known only when all is over."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

from nvae_lowmem.memory.trace.events import Allocation, Trace


def file_by_life(trace: Trace) -> None:
    """Tell saved activations, gradients, noise and what blocks hand on from temporaries by when they lived."""
    phases, blocks = _starts(trace, lambda a: a.phase), _starts(trace, lambda a: (a.phase, a.block))
    for a in trace.allocations:
        if a.category in ("temporary", "block input", "optimizer state"):
            died = a.died if a.died >= 0 else len(trace.events)
            if a.phase == "update":
                a.category = "optimizer state" if a.died < 0 else "temporary"
            elif a.phase == "forward" and _crosses(phases, a.born, died):
                if a.category != "block input":
                    a.category = "noise" if "normal" in a.operation else "saved activation"
            elif a.phase == "backward" and _crosses(phases, a.born, died):
                a.category = "gradient"
            elif a.phase == "evaluation" and _crosses(blocks, a.born, died):
                a.category = "block input"
            else:
                a.category = "temporary"


def _starts(trace: Trace, part: Callable[[Allocation], Any]) -> list[int]:
    """The allocations' events with which another part of the trace begins."""
    starts: list[int] = []
    last: Any = ""
    for i, event in enumerate(trace.events):
        if event >= 0:
            now = part(trace.allocations[event])
            if now != last:
                starts.append(i)
                last = now
    return starts


def _crosses(starts: list[int], born: int, died: int) -> bool:
    """Whether a new part began during the life (born, died)."""
    return bisect.bisect_right(starts, born) < bisect.bisect_right(starts, died)
