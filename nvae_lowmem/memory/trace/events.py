"""A traced step as data: every allocation's life, the order of allocations and frees, and what the peak is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

CATEGORIES = (
    "weight", "optimizer state", "gradient", "block input", "saved activation", "temporary", "noise", "data", "buffer",
    "host",
)  # fmt: skip
ON_CARD = CATEGORIES[:-1]
"""buffer: what engines and libraries hold, which no trace sees (overlay.py)."""
BLOCK_BYTES = 512
"""The CUDA caching allocator rounds every request up to a multiple of this."""


@dataclass(slots=True)
class Allocation:
    """One storage's life. Times are indices into `Trace.events`; died is -1 while it lives."""

    nbytes: int
    category: str
    block: str
    phase: str  # setup, forward, backward, update, evaluation
    operation: str
    born: int
    died: int = -1

    @property
    def kind(self) -> tuple[str, str, str, str]:
        """All that is known of it but its size and its time."""
        return self.category, self.block, self.phase, self.operation


@dataclass(frozen=True)
class Peak:
    """A moment of largest use: bytes, event index, the block, phase and operation that reached it, and the split."""

    nbytes: int
    event: int
    block: str
    phase: str
    operation: str
    by_category: dict[str, int]
    by_block: dict[str, int]


@dataclass
class Trace:
    """What happened: `events` holds the allocation's number, negative minus one (~n) for its free, in order."""

    allocations: list[Allocation] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)  # name of a moment -> number of events before it
    chunks: list[list[int]] = field(default_factory=list)
    """Per run through the likelihood's chunks: the number of events before each chunk."""
    chunk_images: int = 0
    """Images in a whole chunk of the likelihood."""
    micro_batch: int = 0
    parameter_bytes: tuple[int, ...] = ()
    """Bytes of each parameter of the model."""

    def live_bytes(self, rounding: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
        """(event index, bytes on the card after it), each storage rounded up as the CUDA allocator does."""
        live = 0
        sizes = [0 if a.category == "host" else -(-a.nbytes // rounding) * rounding for a in self.allocations]
        for i, event in enumerate(self.events):
            live += sizes[event] if event >= 0 else -sizes[~event]
            yield i, live

    def peak(self, rounding: int = BLOCK_BYTES) -> Peak:
        """The largest number of bytes on the card at once, when, and what they are."""
        at, peak_bytes = max(self.live_bytes(rounding), key=lambda pair: pair[1], default=(0, 0))
        return self.moment(at, peak_bytes)

    def moment(self, at: int, nbytes: int) -> Peak:
        """What lives on the card after event `at`, where `nbytes` are in use; sizes of the split are not rounded."""
        by_category = dict.fromkeys(ON_CARD, 0)
        by_block: dict[str, int] = {}
        for a in self.allocations:
            if a.category != "host" and a.born <= at and (a.died < 0 or a.died > at):
                by_category[a.category] += a.nbytes
                by_block[a.block] = by_block.get(a.block, 0) + a.nbytes
        event = self.events[at] if self.events else 0
        owner = self.allocations[event if event >= 0 else ~event] if self.events else Allocation(0, "", "", "", "", 0)
        return Peak(nbytes, at, owner.block, owner.phase, owner.operation, by_category, by_block)

    def host_bytes(self) -> int:
        """The largest number of bytes of host memory at once."""
        live = most = 0
        for event in self.events:
            a = self.allocations[event if event >= 0 else ~event]
            if a.category == "host":
                live += a.nbytes if event >= 0 else -a.nbytes
                most = max(most, live)
        return most

    def without_temporaries(self, end: int) -> Trace:
        """The trace without what was born and freed among the first `end` events."""
        return self.only([not (a.born < end and 0 <= a.died < end) for a in self.allocations])

    def only(self, keep: list[bool]) -> Trace:
        """The trace of those allocations that are kept."""
        copy = _Copy(self, keep)
        copy.span(0, len(self.events))
        return copy.finished()


class Window(NamedTuple):
    """Events start to end (exclusive), to happen `times` more."""

    start: int
    end: int
    times: int


def repeat(trace: Trace, windows: Sequence[Window]) -> tuple[Trace, list[int]]:
    """The trace in which each window happens `times` more, and of each allocation its number in the original.

    Windows are in order and do not overlap. Raises ValueError where a window does not leave behind what it found: it
    then cannot happen twice in a row.
    """
    copy = _Copy(trace)
    done = 0
    for start, end, times in windows:
        copy.span(done, end)
        pairs = handed_on(trace, start, end)
        for _ in range(times):
            for found, left in pairs:
                copy.number[found] = copy.number[left]
            copy.span(start, end)
        done = end
    copy.span(done, len(trace.events))
    return copy.finished(), copy.origins


def handed_on(trace: Trace, start: int, end: int) -> list[tuple[int, int]]:
    """Pairs: what the window frees though it was born before, and its like, born in the window and freed after it.

    Raises ValueError where there are no such pairs.
    """
    window = trace.events[start:end]
    found = [~e for e in window if e < 0 and trace.allocations[~e].born < start]
    left = [e for e in window if e >= 0 and not 0 <= trace.allocations[e].died < end]
    found.sort(key=lambda n: trace.allocations[n].born)
    sizes = [[trace.allocations[n].nbytes for n in numbers] for numbers in (found, left)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"events {start} to {end} free {sizes[0]} bytes from before them and leave {sizes[1]} bytes")
    return list(zip(found, left, strict=True))


class _Copy:
    """A trace written anew, span of events by span of events; a span may come several times."""

    def __init__(self, source: Trace, keep: list[bool] | None = None) -> None:
        self.source, self._keep = source, keep
        self.made = replace(source, allocations=[], events=[], marks={}, chunks=[])
        self.number: dict[int, int] = {}  # of the copy that stands for the source's allocation now
        self.origins: list[int] = []
        self._position: dict[int, int] = {}  # where the copy first came to an event of the source that is marked
        self._marked = {*source.marks.values(), *(at for group in source.chunks for at in group)}

    def span(self, start: int, end: int) -> None:
        """Copy events start to end, end excluded."""
        allocations, events, number = self.made.allocations, self.made.events, self.number
        for i in range(start, end):
            if i in self._marked:
                self._position.setdefault(i, len(events))
            event = self.source.events[i]
            n = event if event >= 0 else ~event
            if self._keep is not None and not self._keep[n]:
                continue
            if event >= 0:
                a = self.source.allocations[n]
                number[n] = len(allocations)
                self.origins.append(n)
                allocations.append(Allocation(a.nbytes, a.category, a.block, a.phase, a.operation, len(events)))
                events.append(number[n])
            else:
                allocations[number[n]].died = len(events)
                events.append(~number[n])

    def finished(self) -> Trace:
        """The copy, with the marks of the source where they belong."""
        self._position.setdefault(len(self.source.events), len(self.made.events))
        self.made.marks = {name: self._position[at] for name, at in self.source.marks.items()}
        self.made.chunks = [[self._position[at] for at in group] for group in self.source.chunks]
        return self.made
