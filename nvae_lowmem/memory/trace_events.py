"""A traced step as data: every allocation's life, the order of allocations and frees, and what the peak is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

CATEGORIES = (
    "weight", "optimizer state", "gradient", "block input", "saved activation", "temporary", "noise", "data", "host",
)  # fmt: skip
ON_CARD = CATEGORIES[:-1]
BLOCK_BYTES = 512
"""The CUDA caching allocator rounds every request up to a multiple of this."""


@dataclass(slots=True)
class Allocation:
    """One storage's life. Times are indices into `Trace.events`; died is -1 while it lives."""

    nbytes: int
    category: str
    block: str
    phase: str  # setup, forward, backward, update
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
        owner = self.allocations[event if event >= 0 else ~event] if self.allocations else Allocation(0, *4 * [""], 0)
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
        keep = [not (a.born < end and 0 <= a.died < end) for a in self.allocations]
        return _Copy(self).run([(0, len(self.events))], keep)

    def repeated(self, windows: Sequence[Window]) -> Trace:
        """The trace in which each window happens `times` more; windows are in order and do not overlap.

        Raises ValueError where a window does not leave behind what it found: it then cannot happen twice in a row.
        """
        copy = _Copy(self)
        spans: list[tuple[int, int]] = []
        links: dict[int, list[tuple[int, int]]] = {}
        done = 0
        for start, end, times in windows:
            spans.append((done, end))
            pairs = self._handed_on(start, end)
            for _ in range(times):
                links[len(spans)] = pairs
                spans.append((start, end))
            done = end
        spans.append((done, len(self.events)))
        return copy.run(spans, [True] * len(self.allocations), links)

    def _handed_on(self, start: int, end: int) -> list[tuple[int, int]]:
        """(freed in the window but born before it, its successor, born in the window and freed after it) in pairs."""
        window = self.events[start:end]
        found = [~e for e in window if e < 0 and self.allocations[~e].born < start]
        left = [e for e in window if e >= 0 and not 0 <= self.allocations[e].died < end]
        found.sort(key=lambda n: self.allocations[n].born)
        sizes = [[self.allocations[n].nbytes for n in numbers] for numbers in (found, left)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"events {start} to {end} free allocations of {sizes[0]} bytes from before and leave {sizes[1]} bytes"
            )
        return list(zip(found, left, strict=True))


class Window(NamedTuple):
    """Events start to end (exclusive), to happen `times` more."""

    start: int
    end: int
    times: int


class _Copy:
    """Writes a trace anew, span of events by span of events; a span may come several times."""

    def __init__(self, source: Trace) -> None:
        self.source = source
        self.made = replace(source, allocations=[], events=[], marks={}, chunks=[])

    def run(
        self, spans: list[tuple[int, int]], keep: list[bool], links: dict[int, list[tuple[int, int]]] | None = None
    ) -> Trace:
        source, made = self.source, self.made
        number: dict[int, int] = {}  # of the allocation that the source's n-th stands for now
        position: dict[int, int] = {}  # first time that the copy stands before an event of the source
        wanted = {*source.marks.values(), *(at for group in source.chunks for at in group)}
        for index, (start, end) in enumerate(spans):
            for freed, successor in (links or {}).get(index, ()):
                number[freed] = number[successor]
            for i in range(start, end):
                if i in wanted:
                    position.setdefault(i, len(made.events))
                event = source.events[i]
                if not keep[event if event >= 0 else ~event]:
                    continue
                if event >= 0:
                    number[event] = len(made.allocations)
                    a = source.allocations[event]
                    made.allocations.append(
                        Allocation(a.nbytes, a.category, a.block, a.phase, a.operation, len(made.events))
                    )
                    made.events.append(number[event])
                else:
                    made.allocations[number[~event]].died = len(made.events)
                    made.events.append(~number[~event])
        position[len(source.events)] = len(made.events)
        made.marks = {name: position[at] for name, at in source.marks.items()}
        made.chunks = [[position[at] for at in group] for group in source.chunks]
        return made
