"""A traced step as data: every allocation's life, the order of allocations and frees, and what the peak is made of.

    for allocation, is_alloc in trace.walk(): ...
    trace.peak().by_category
    CachingAllocator(settings, total_bytes).replay(trace.requests())

Traces are made by `tracer.StorageTracer` and rewritten by `TraceWriter`.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple

from nvae_lowmem.memory.allocator.allocator import FREE_ID
from nvae_lowmem.memory.allocator.settings import round_to_block


class TextEnum(str, Enum):
    """An enumeration whose members are texts, print as them and become them in JSON (Python 3.11's StrEnum)."""

    __str__ = str.__str__


class Phase(TextEnum):
    """The part of a step in which an allocation is made."""

    SETUP = "setup"
    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"
    EVALUATION = "evaluation"
    """All work without gradients."""


class Category(TextEnum):
    """What an allocation is for."""

    WEIGHT = "weight"
    OPTIMIZER_STATE = "optimizer state"
    GRADIENT = "gradient"
    BLOCK_INPUT = "block input"
    SAVED_ACTIVATION = "saved activation"
    TEMPORARY = "temporary"
    NOISE = "noise"
    DATA = "data"
    BUFFER = "buffer"
    """What engines and libraries hold, which no trace sees: see predict/untraced.py."""
    HOST = "host"
    """In the host's memory, whatever for."""


CATEGORIES = tuple(Category)
ON_CARD = tuple(category for category in Category if category is not Category.HOST)
_HOST = Category.HOST  # read at every event


@dataclass(slots=True)
class Allocation:
    """One storage's life. Times are indices into `Trace.events`; died is -1 while it lives."""

    nbytes: int
    category: Category
    block: str
    phase: Phase
    operation: str
    born: int
    died: int = -1

    @property
    def kind(self) -> tuple[Category, str, Phase, str]:
        """What it is, without its size and its time."""
        return self.category, self.block, self.phase, self.operation

    @property
    def on_card(self) -> bool:
        """Whether it lies in the card's memory."""
        return self.category is not _HOST


@dataclass(frozen=True)
class Peak:
    """A moment of largest use: bytes, event index, the block, phase and operation that reached it, and the split."""

    nbytes: int
    event: int
    block: str
    phase: Phase
    operation: str
    by_category: dict[Category, int]
    by_block: dict[str, int]


@dataclass
class Trace:
    """The allocations and frees of a step, in order.

    An event is the number of an allocation, an index into `allocations`, or for its free the number's complement (~n):
    `walk()` and `requests()` read them, `allocate()` and `free()` append them, and nothing else needs to know.
    """

    allocations: list[Allocation] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)
    """Name of a moment -> number of events before it."""
    chunks: list[list[int]] = field(default_factory=list)
    """Per run through the likelihood's chunks: the number of events before each chunk."""
    chunk_images: int = 0
    """Images in a whole chunk of the likelihood."""
    micro_batch: int = 0
    parameter_bytes: tuple[int, ...] = ()
    """Bytes of each parameter that learns."""

    # -- appending --

    def allocate(self, nbytes: int, category: Category, block: str, phase: Phase, operation: str) -> int:
        """Append an allocation; returns its number."""
        number = len(self.allocations)
        self.allocations.append(Allocation(nbytes, category, block, phase, operation, len(self.events)))
        self.events.append(number)
        return number

    def free(self, number: int) -> None:
        """Append the free of an allocation."""
        self.allocations[number].died = len(self.events)
        self.events.append(~number)

    # -- reading --

    def walk(self, start: int = 0, end: int | None = None) -> Iterator[tuple[Allocation, bool]]:
        """(allocation, whether it is allocated rather than freed) of the events from `start` to `end`, excluded."""
        for event in self.events[start:end]:
            yield (self.allocations[event], True) if event >= 0 else (self.allocations[~event], False)

    def requests(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """What the events from `start` to `end` ask of the card's allocator: (op, id), see CachingAllocator.replay."""
        for event in self.events[start:end]:
            number = event if event >= 0 else ~event
            a = self.allocations[number]
            if a.category is not _HOST:
                yield (a.nbytes if event >= 0 else FREE_ID), number

    def live_bytes(self, rounded: bool = True) -> Iterator[tuple[int, int]]:
        """(event index, bytes on the card after it), each storage rounded up as the CUDA allocator does, or exact."""
        live = 0
        for i, (a, is_alloc) in enumerate(self.walk()):
            if a.category is not _HOST:
                nbytes = round_to_block(a.nbytes) if rounded else a.nbytes
                live += nbytes if is_alloc else -nbytes
            yield i, live

    def peak(self, rounded: bool = True) -> Peak:
        """The largest number of bytes on the card at once, when, and what they are."""
        at, peak_bytes = max(self.live_bytes(rounded), key=lambda pair: pair[1], default=(0, 0))
        return self.moment(at, peak_bytes)

    def moment(self, at: int, nbytes: int) -> Peak:
        """What lives on the card after event `at`, where `nbytes` are in use; sizes of the split are not rounded."""
        by_category: dict[Category, int] = dict.fromkeys(ON_CARD, 0)
        by_block: dict[str, int] = {}
        for a in self.allocations:
            if a.on_card and a.born <= at and (a.died < 0 or a.died > at):
                by_category[a.category] += a.nbytes
                by_block[a.block] = by_block.get(a.block, 0) + a.nbytes
        nobody = (Allocation(0, Category.TEMPORARY, "", Phase.SETUP, "", 0), True)
        owner, _ = next(self.walk(at), nobody)
        return Peak(nbytes, at, owner.block, owner.phase, owner.operation, by_category, by_block)

    def host_bytes(self) -> int:
        """The largest number of bytes of host memory at once."""
        live = most = 0
        for a, is_alloc in self.walk():
            if a.category is _HOST:
                live += a.nbytes if is_alloc else -a.nbytes
                most = max(most, live)
        return most

    # -- other traces made from this one --

    def without_temporaries(self, end: int) -> Trace:
        """The trace without what was born and freed among the first `end` events."""
        return self.only([not (a.born < end and 0 <= a.died < end) for a in self.allocations])

    def only(self, keep: Sequence[bool]) -> Trace:
        """The trace of those allocations that are kept."""
        writer = TraceWriter(self)
        for number, is_alloc in writer.span(0, len(self.events)):
            if keep[number]:
                writer.copy(number, is_alloc)
        return writer.finished()


class TraceWriter:
    """Rewrites a trace: its events may be left out, repeated, or have others between them.

    `trace` is what is written; allocate() and free() of it add what the source does not have.
    """

    def __init__(self, source: Trace) -> None:
        self.source = source
        self.trace = replace(source, allocations=[], events=[], marks={}, chunks=[])
        self.current: dict[int, int] = {}
        """Number of an allocation of the source -> of its latest copy."""
        self.origins: list[int] = []
        """Of every copy, in order, its number in the source."""
        self._positions: dict[int, int] = {}  # of marked events of the source, where the span first came to them
        self._marked = {*source.marks.values(), *(at for run in source.chunks for at in run)}

    def span(self, start: int, end: int) -> Iterator[tuple[int, bool]]:
        """(number in the source, whether it is allocated) of its events from `start` to `end`, to be copied or not."""
        for i in range(start, end):
            if i in self._marked:
                self._positions.setdefault(i, len(self.trace.events))
            event = self.source.events[i]
            yield (event, True) if event >= 0 else (~event, False)

    def copy(self, number: int, is_alloc: bool) -> None:
        """Write an event of the source."""
        if is_alloc:
            a = self.source.allocations[number]
            self.current[number] = self.trace.allocate(a.nbytes, a.category, a.block, a.phase, a.operation)
            self.origins.append(number)
        else:
            self.trace.free(self.current[number])

    def copy_span(self, start: int, end: int) -> None:
        """Write all events of the source from `start` to `end`."""
        for number, is_alloc in self.span(start, end):
            self.copy(number, is_alloc)

    def finished(self) -> Trace:
        """The trace, with the marks of the source where they belong."""
        self._positions.setdefault(len(self.source.events), len(self.trace.events))
        self.trace.marks = {name: self._positions[at] for name, at in self.source.marks.items()}
        self.trace.chunks = [[self._positions[at] for at in run] for run in self.source.chunks]
        return self.trace


# --- repetition -------------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Events start to end (exclusive), to happen `times` more."""

    start: int
    end: int
    times: int


class NotRepeatable(ValueError):
    """A window of events does not leave behind what it found, so it cannot happen twice in a row."""


def repeat(trace: Trace, windows: Sequence[Window]) -> tuple[Trace, list[int]]:
    """The trace in which each window happens `times` more, and of each allocation its number in the original.

    Windows are in order and do not overlap. Raises NotRepeatable.
    """
    writer = TraceWriter(trace)
    done = 0
    for start, end, times in windows:
        writer.copy_span(done, end)
        pairs = loop_carried(trace, start, end)
        for _ in range(times):
            for carried_in, carried_out in pairs:
                writer.current[carried_in] = writer.current[carried_out]
            writer.copy_span(start, end)
        done = end
    writer.copy_span(done, len(trace.events))
    return writer.finished(), writer.origins


def loop_carried(trace: Trace, start: int, end: int) -> list[tuple[int, int]]:
    """Loop-carried pairs of a window: (carried in and freed there, of the same size born there and carried out).

    Raises NotRepeatable where what is carried out is not of the sizes of what is carried in.
    """
    window = list(TraceWriter(trace).span(start, end))
    carried_in = [n for n, is_alloc in window if not is_alloc and trace.allocations[n].born < start]
    carried_out = [n for n, is_alloc in window if is_alloc and not 0 <= trace.allocations[n].died < end]
    carried_in.sort(key=lambda n: trace.allocations[n].born)
    freed, left = ([trace.allocations[n].nbytes for n in numbers] for numbers in (carried_in, carried_out))
    if freed != left:
        raise NotRepeatable(f"events {start} to {end} free {freed} bytes from before them and leave {left} bytes")
    return list(zip(carried_in, carried_out, strict=True))


# --- categories -------------------------------------------------------------------------------------------------------


def categorise_by_lifetime(trace: Trace) -> None:
    """Categorise allocations by lifetime, after tracing.

    The tracer records temporaries, block inputs and optimizer states before it can know what becomes of them. Which it
    is follows from the phase in which it was made and from what begins while it lives:

        update       outlives the trace: optimizer state
        forward      another phase begins: block input if recorded so, else noise or saved activation
        backward     another phase begins: gradient
        evaluation   another block begins: block input
        otherwise    temporary
    """
    phases, blocks = _starts(trace, lambda a: a.phase), _starts(trace, lambda a: (a.phase, a.block))
    for a in trace.allocations:
        if a.category in (Category.TEMPORARY, Category.BLOCK_INPUT, Category.OPTIMIZER_STATE):
            died = a.died if a.died >= 0 else len(trace.events)
            if a.phase is Phase.UPDATE:
                a.category = Category.OPTIMIZER_STATE if a.died < 0 else Category.TEMPORARY
            elif a.phase is Phase.FORWARD and _crosses(phases, a.born, died):
                if a.category is not Category.BLOCK_INPUT:
                    a.category = Category.NOISE if "normal" in a.operation else Category.SAVED_ACTIVATION
            elif a.phase is Phase.BACKWARD and _crosses(phases, a.born, died):
                a.category = Category.GRADIENT
            elif a.phase is Phase.EVALUATION and _crosses(blocks, a.born, died):
                a.category = Category.BLOCK_INPUT
            else:
                a.category = Category.TEMPORARY


def _starts(trace: Trace, part: Callable[[Allocation], Any]) -> list[int]:
    """The events with which another part of the trace begins, by what is allocated."""
    starts: list[int] = []
    last: Any = ""
    for i, (a, is_alloc) in enumerate(trace.walk()):
        if is_alloc and part(a) != last:
            starts.append(i)
            last = part(a)
    return starts


def _crosses(starts: list[int], born: int, died: int) -> bool:
    """Whether a new part began during the life (born, died)."""
    return bisect.bisect_right(starts, born) < bisect.bisect_right(starts, died)
