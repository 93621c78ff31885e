"""A whole run in small, as requests to the allocator: set-up, steps, and what is done between them.

The first step makes the optimiser's states, and what it leaves in fragments is what later steps meet; validation and
pictures leave fragments of other sizes, which the steps after them meet. So the run is: set-up, two steps, validation
and pictures, a step, validation and pictures once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nvae_lowmem.hardware.budget import Budget, memory_fraction
from nvae_lowmem.memory.allocator.allocator import CHECKPOINT, FREE_ID, AllocatorSettings, CachingAllocator, Replay
from nvae_lowmem.memory.allocator.settings import UNLIMITED_BYTES
from nvae_lowmem.memory.predict.untraced import AROUND, Entry, overlaid
from nvae_lowmem.memory.trace.events import Allocation, Category, Trace
from nvae_lowmem.units import format_bytes


def address_orders(settings: AllocatorSettings) -> tuple[bool, ...]:
    """Whether segments' addresses fall, for each order that a driver may have.

    Free blocks of equal size are chosen by address, and no document says which way a driver goes. An expandable segment
    grows upwards.
    """
    return (False,) if settings.expandable_segments else (False, True)


@dataclass(frozen=True)
class WholeRun:
    """Requests as CachingAllocator.replay takes them, with CHECKPOINTs before and after the last step."""

    requests: Sequence[tuple[int, int]]
    allocations: Sequence[Allocation]
    """Of request id n: allocations[n % len(allocations)]; a step that happens again has other ids."""

    def replays(
        self, settings: AllocatorSettings, budget: Budget | None = None, margin_bytes: int = 0
    ) -> tuple[Replay, ...]:
        """On a card without limits, or under the budget's cap less `margin_bytes`.

        Once for each order of addresses.
        """
        total, context, share = UNLIMITED_BYTES >> 1, 0, 0.0
        if budget is not None:
            total, context = budget.total_bytes, budget.context_bytes
            share = memory_fraction(max(1, budget.cap_bytes - margin_bytes), context, total)
        return tuple(
            CachingAllocator(settings, total, context, share, falling).replay(self.requests)
            for falling in address_orders(settings)
        )

    def why(self, replays: Iterable[Replay], margin_bytes: int = 0) -> str | None:
        """What the allocator said where it first ran out of memory, and at which operation; None where it never did."""
        replay = next((r for r in replays if r.oom is not None), None)
        if replay is None or replay.oom_index is None:
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
