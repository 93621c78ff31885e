"""What an allocator was really asked for: from PyTorch's snapshot to two small files that the simulator can replay.

    recording = from_snapshot("mnist", torch.cuda.memory._snapshot()["device_traces"][0], moments, place)
    save_recordings(folder, [recording])     # then: python -m nvae_lowmem.memory.allocator FOLDER
    recording.differences()                  # simulated against recorded figures; empty: equal to the byte

A block can be used again once its free is complete, which is later than the free was asked for where another stream
still reads it. So events are allocations and completed frees, and `allocated_bytes` means what PyTorch calls active.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.memory.allocator.allocator import (
    CHECKPOINT,
    EMPTY_CACHE,
    FREE_ID,
    AllocatorSettings,
    AllocatorStats,
    CachingAllocator,
)
from nvae_lowmem.memory.allocator.replay import load_traces

OUT_OF_MEMORY = "out of memory"
TRACES, EXPECTED = "traces.npz", "expected.json"
_IN_ROW = ("allocated_bytes", "peak_allocated_bytes", "reserved_bytes", "peak_reserved_bytes", "retries")
_BESIDE_ROW = ("requested_bytes", "peak_requested_bytes", "ooms")


class Moment(NamedTuple):
    """Something that happened when so many allocations and completed frees had been counted."""

    events: int
    what: Literal["phase", "checkpoint", "empty cache"]
    name: str = ""
    stats: AllocatorStats | None = None
    """At a checkpoint."""


class Place(NamedTuple):
    """The card and the allocator's settings that a recording was made under, in bytes."""

    settings: str
    total_bytes: int
    context_bytes: int
    memory_fraction: float
    """0: no cap."""


class Difference(NamedTuple):
    """One figure that the simulator got wrong; None where one side has no such checkpoint."""

    checkpoint: str
    figure: str
    recorded: int | None
    simulated: int | None


@dataclass(frozen=True)
class Recording:
    """A stream of requests, who made them, and what the allocator said on the way."""

    name: str
    place: Place
    events: list[tuple[int, int]]
    """(op, id) as in traces.npz: see replay.py. Numbers are used again once they are free."""
    phases: tuple[tuple[int, str], ...]
    """(index of an event, the phase that begins with it), in order."""
    checkpoints: tuple[tuple[str, AllocatorStats], ...]
    """One per CHECKPOINT event, and one for the end; none for a stream that no allocator served."""
    streams: int = 1
    """CUDA streams that memory was allocated on; the simulator knows one."""

    @property
    def ran_out(self) -> bool:
        """Whether the last event is the request that could not be served."""
        return bool(self.checkpoints) and self.checkpoints[-1][0] == OUT_OF_MEMORY

    def requests(self) -> Iterator[tuple[str, int]]:
        """(phase, bytes) of every allocation, in order."""
        starts = dict(self.phases)
        phase = ""
        for index, (op, _) in enumerate(self.events):
            phase = starts.get(index, phase)
            if op > 0:
                yield phase, op

    def sizes(self) -> Counter[tuple[str, int]]:
        """How often each phase asked for each number of bytes."""
        return Counter(self.requests())

    def kept(self) -> Counter[tuple[str, int]]:
        """How many allocations of each phase and size are never freed."""
        requests = self.requests()
        live: dict[int, tuple[str, int]] = {}
        for op, number in self.events:
            if op > 0:
                live[number] = next(requests)
            elif op == FREE_ID:
                del live[number]
        return Counter(live.values())

    def differences(self) -> list[Difference]:
        """Where the simulated allocator's figures are not the recorded ones, checkpoint by checkpoint.

        Raises ConfigError where the recording makes no sense.
        """
        place = self.place
        try:
            allocator = CachingAllocator(
                AllocatorSettings.from_string(place.settings),
                place.total_bytes,
                place.context_bytes,
                place.memory_fraction,
            )
            simulated = allocator.replay(self.events).checkpoints
        except ValueError as error:
            raise ConfigError(f"recording {self.name!r}: {error}") from error
        out = []
        for recorded, stats in zip_longest(self.checkpoints, simulated):
            if recorded is None or stats is None:
                out.append(Difference(recorded[0] if recorded else "", "checkpoints", *_counts(self, simulated)))
                break
            name, said = recorded
            for field in fields(AllocatorStats):
                a, b = getattr(said, field.name), getattr(stats, field.name)
                if a != b:
                    out.append(Difference(name, field.name, a, b))
        return out


def _counts(recording: Recording, simulated: Sequence[AllocatorStats]) -> tuple[int, int]:
    return len(recording.checkpoints), len(simulated)


# --- from PyTorch's snapshot ------------------------------------------------------------------------------------------


def from_snapshot(
    name: str, entries: Iterable[Mapping[str, Any]], moments: Sequence[Moment], place: Place
) -> Recording:
    """A recording from one device's trace in `torch.cuda.memory._snapshot()`, begun before the first allocation.

    It ends at the last checkpoint, or at the first request that ran out of memory. Entries need action, addr and size
    (2.4 to 2.13 write more, which is ignored), and stream on allocations.
    Raises ConfigError where entries are missing or make no sense: a history that began too late or was cut short.
    """
    builder = _Builder(name)
    waiting = iter(moments)
    moment = next(waiting, None)
    for entry in entries:
        action = entry.get("action")
        if action not in ("alloc", "free_completed", "oom"):
            continue
        while moment is not None and moment.events <= builder.counted and not _after_failure(moment):
            builder.moment(moment)
            moment = next(waiting, None)
        if action == "alloc":
            builder.allocate(entry.get("addr"), entry.get("size"), entry.get("stream", 0))
        elif action == "free_completed":
            builder.free(entry.get("addr"))
        else:
            builder.fail(entry.get("size"))
            break
    if builder.failed:
        if moment is not None and moment.name == OUT_OF_MEMORY:
            builder.moment(moment)
        return builder.finished(place)
    while moment is not None and moment.events <= builder.counted:
        builder.moment(moment)
        moment = next(waiting, None)
    if moment is not None:
        raise ConfigError(
            f"recording {name!r}: {moment.events} allocations and frees were counted, but the history has only "
            f"{builder.counted}: it was cut short, so record fewer steps"
        )
    return builder.finished(place)


def _after_failure(moment: Moment) -> bool:
    """Whether a request had failed by then, which the number of events does not tell."""
    return moment.stats is not None and moment.stats.ooms > 0


class _Builder:
    """Writes events under small numbers, which compress well."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.counted = 0
        self.failed = False
        self._events: list[tuple[int, int]] = []
        self._phases: list[tuple[int, str]] = []
        self._checkpoints: list[tuple[str, AllocatorStats]] = []
        self._end = 0  # events before the last checkpoint
        self._numbers: dict[Any, int] = {}  # by address
        self._unused: list[int] = []
        self._streams: set[Any] = set()

    def allocate(self, address: Any, nbytes: Any, stream: Any) -> None:
        """An allocation that succeeded."""
        if address in self._numbers:
            raise ConfigError(f"recording {self.name!r}: address {address!r} is allocated twice: entries are missing")
        number = self._numbers[address] = self._unused.pop() if self._unused else len(self._numbers)
        self._streams.add(stream)
        self._events.append((self._size(nbytes), number))
        self.counted += 1

    def free(self, address: Any) -> None:
        """A free that is complete."""
        number = self._numbers.pop(address, None)
        if number is None:
            raise ConfigError(
                f"recording {self.name!r}: address {address!r} is freed but was never allocated: recording has to "
                "begin before the first allocation"
            )
        self._unused.append(number)
        self._events.append((FREE_ID, number))
        self.counted += 1

    def fail(self, nbytes: Any) -> None:
        """A request that could not be served; PyTorch says its rounded size, which is refused just so."""
        self._events.append((self._size(nbytes), len(self._numbers) + len(self._unused)))
        self.failed = True

    def moment(self, moment: Moment) -> None:
        """What happened between the last event and the next."""
        if moment.what == "phase":
            self._phases.append((len(self._events), moment.name))
        elif moment.what == "empty cache":
            self._events.append((EMPTY_CACHE, 0))
        else:
            assert moment.stats is not None
            self._end = len(self._events)
            self._events.append((CHECKPOINT, 0))
            self._checkpoints.append((moment.name, moment.stats))

    def finished(self, place: Place) -> Recording:
        """All up to the last checkpoint, which is the end and no event."""
        events = self._events[: self._end]
        phases = tuple(p for p in self._phases if p[0] < self._end)
        return Recording(self.name, place, events, phases, tuple(self._checkpoints), max(1, len(self._streams)))

    def _size(self, nbytes: Any) -> int:
        if not isinstance(nbytes, int) or nbytes < 1:
            raise ConfigError(f"recording {self.name!r}: an allocation of {nbytes!r} bytes makes no sense")
        return nbytes


# --- files ------------------------------------------------------------------------------------------------------------


def save_recordings(folder: Path, recordings: Sequence[Recording]) -> None:
    """Write traces.npz and expected.json as the replay reads them, with what more there is to know under further keys.

    Raises OSError where the folder cannot be written.
    """
    arrays = {r.name: _compact(np.array(r.events, dtype=np.int64).reshape(-1, 2)) for r in recordings}
    np.savez_compressed(folder / TRACES, **arrays)  # type: ignore[arg-type]
    (folder / EXPECTED).write_text(json.dumps([_entry(r) for r in recordings]) + "\n", encoding="utf-8")


def _compact(rows: np.ndarray) -> np.ndarray:
    return rows.astype(np.int32) if rows.max(initial=0) < 1 << 31 else rows


def _entry(recording: Recording) -> dict[str, Any]:
    rows: list[list[Any]] = [[name, *_figures(stats, _IN_ROW)] for name, stats in recording.checkpoints]
    if recording.ran_out:
        rows.insert(-1, ["OOM", len(recording.events) - 1])
    return {
        "trace": recording.name,
        **recording.place._asdict(),
        "checkpoints": rows,
        "more": [_figures(stats, _BESIDE_ROW) for _, stats in recording.checkpoints],
        "phases": recording.phases,
        "streams": recording.streams,
    }


def _figures(stats: AllocatorStats, names: Sequence[str]) -> list[int]:
    return [getattr(stats, name) for name in names]


def load_recordings(folder: Path) -> list[Recording]:
    """What `save_recordings` wrote. Raises ConfigError where files are missing, damaged or of another kind."""
    traces = load_traces(folder)
    entries = json.loads((folder / EXPECTED).read_text(encoding="utf-8"))
    return [
        _loaded(trace.events, entry, f"{folder / EXPECTED}, entry {i}")
        for i, (trace, entry) in enumerate(zip(traces, entries, strict=True))
    ]


def _loaded(events: list[tuple[int, int]], entry: Mapping[str, Any], where: str) -> Recording:
    rows = [row for row in entry["checkpoints"] if row[0] != "OOM"]
    more, phases, streams = (entry.get(key) for key in ("more", "phases", "streams"))
    tables = _is_table(rows, [str] + [int] * 5) and _is_table(more, [int] * 3) and _is_table(phases, [int, str])
    if not (tables and isinstance(streams, int) and more is not None and phases is not None) or len(more) != len(rows):
        raise ConfigError(
            f"{where} is a trace but no recording: it must have more (3 numbers per checkpoint), phases (pairs of "
            "event and name) and streams; record it anew with tools/measure_memory.py"
        )
    checkpoints = tuple(
        (row[0], AllocatorStats(**dict(zip((*_IN_ROW, *_BESIDE_ROW), (*row[1:], *beside), strict=True))))
        for row, beside in zip(rows, more, strict=True)
    )
    place = Place(entry["settings"], entry["total_bytes"], entry["context_bytes"], float(entry["memory_fraction"]))
    pairs = tuple((index, name) for index, name in phases)
    return Recording(entry["trace"], place, [(op, n) for op, n in events], pairs, checkpoints, streams)


def _is_table(rows: Any, kinds: Sequence[type]) -> bool:
    """Whether these are rows with columns of those types."""
    return isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == len(kinds) and all(map(isinstance, row, kinds)) for row in rows
    )
