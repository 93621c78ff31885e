"""A whole run in small, as requests to the allocator: set-up, steps, and what is done between them.

The first step makes the optimiser's states, and what it leaves in fragments is what later steps meet; validation and
pictures leave fragments of other sizes, which the steps after them meet. So the run is: set-up, two steps, validation
and pictures, a step, validation and pictures once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nvae_lowmem.hardware.budget import Budget, memory_fraction
from nvae_lowmem.memory.allocator.allocator import CHECKPOINT, FREE_ID, AllocatorSettings, CachingAllocator, Replay
from nvae_lowmem.memory.allocator.settings import UNLIMITED_BYTES
from nvae_lowmem.memory.predict.untraced import AROUND, Entry, overlaid
from nvae_lowmem.memory.trace.events import Allocation, Category, Trace
from nvae_lowmem.units import format_bytes


@dataclass(frozen=True)
class WholeRun:
    """Requests as CachingAllocator.replay takes them, with CHECKPOINTs before and after the last step."""

    requests: Sequence[tuple[int, int]]
    allocations: Sequence[Allocation]
    """Of request id n: allocations[n % len(allocations)]; a step that happens again has other ids."""

    def replay(self, settings: AllocatorSettings, budget: Budget | None = None, margin_bytes: int = 0) -> Replay:
        """On a card without limits, or under the budget's cap less `margin_bytes`."""
        if budget is None:
            return CachingAllocator(settings, UNLIMITED_BYTES >> 1).replay(self.requests)
        cap = max(1, budget.cap_bytes - margin_bytes)
        share = memory_fraction(cap, budget.context_bytes, budget.total_bytes)
        return CachingAllocator(settings, budget.total_bytes, budget.context_bytes, share).replay(self.requests)

    def why(self, replay: Replay, margin_bytes: int = 0) -> str | None:
        """What the allocator said where it ran out of memory, and at which operation; None where it did not."""
        if replay.oom is None or replay.oom_index is None:
            return None
        a = self.allocations[self.requests[replay.oom_index][1] % len(self.allocations)]
        kept = f" ({format_bytes(margin_bytes)} kept free as a margin)" if margin_bytes else ""
        return f"{a.phase} of {a.block}, {a.operation}: {replay.oom}{kept}"


def whole_run(steps: Trace, between: Trace, held: Sequence[Entry]) -> WholeRun:
    """The run of traced `steps` (the set-up, the first and, where it differs, the second) and what is between steps.

    held: entries in the allocator, put in where libraries and engine hold them.
    """
    steps = overlaid(steps, held)
    between = overlaid(between, [entry for entry in held if entry.span in AROUND])
    start, period = last_step(steps), len(steps.allocations) + len(between.allocations)
    first = sum(name.startswith("step ") for name in steps.marks) - 1
    again = [_step(steps, start, k, period) for k in range(3 - first)]
    pause = list(_without_setup(between, len(steps.allocations)))
    requests = [*steps.requests(0, start), *(request for step in again[:-1] for request in step), *pause]
    requests += [(CHECKPOINT, 0), *again[-1], (CHECKPOINT, 0), *pause]
    return WholeRun(requests, [*steps.allocations, *between.allocations])


def _step(trace: Trace, start: int, time: int, period: int) -> Iterator[tuple[int, int]]:
    """The requests from event `start` on for the n-th time, n from 0; ids grow by `period` each time.

    Each repetition frees what the step before left, and leaves the same again. Libraries keep what they took at first.
    """
    born = [(n, a) for n, a in enumerate(trace.allocations) if a.born >= start and a.died < 0 and a.on_card]
    stays = {n for n, a in born if a.category is Category.BUFFER}
    found = [n for n, a in enumerate(trace.allocations) if a.born < start <= a.died and a.on_card]
    carried = dict(zip(found, (n for n, _ in born if n not in stays), strict=True))
    for op, n in trace.requests(start):
        if n in stays:
            if time == 0:
                yield op, n
        elif trace.allocations[n].born >= start:
            yield op, n + time * period
        else:
            yield op, carried[n] + (time - 1) * period if time else n


def last_step(trace: Trace) -> int:
    """The event with which the last traced step begins."""
    return max(at for name, at in trace.marks.items() if name.startswith("step "))


def last_step_retries(replay: Replay) -> int:
    """How often the allocator gave back its cache in the last step."""
    before, after = replay.checkpoints[:2]
    return after.retries - before.retries


def _without_setup(trace: Trace, offset: int) -> Iterator[tuple[int, int]]:
    """The requests for what is made after the set-up, ids from `offset` on; what still lives at the end is freed."""
    live: dict[int, None] = {}
    for op, number in trace.requests(trace.marks["setup done"]):
        if op > 0:
            live[number] = None
        elif number not in live:
            continue
        else:
            del live[number]
        yield op, offset + number
    yield from ((FREE_ID, offset + number) for number in live)
