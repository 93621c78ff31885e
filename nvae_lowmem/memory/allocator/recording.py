"""Recordings of a real allocator: made of PyTorch's snapshot, kept in two small files, replayed by the simulator.

    recording = from_snapshot("mnist", torch.cuda.memory._snapshot()["device_traces"][0], moments, card)
    save_recordings(folder, [recording])     # then: python -m nvae_lowmem.memory.allocator FOLDER
    recording.differences()                  # simulated against recorded figures; empty: equal to the byte

A block can be used again once its free is complete, which is later than the free was asked for where another stream
still reads it. So events are allocations and completed frees, and `allocated_bytes` means what PyTorch calls active.

A folder of recordings holds two files. traces.npz: integer arrays (events, 2) of rows (op, id): op > 0 allocates op
bytes as id, -1 frees id, 0 is a checkpoint, -3 empties the cache. expected.json: a list with, per trace,

    trace            its name in traces.npz
    settings         the allocator's settings string
    total_bytes, context_bytes, memory_fraction (0: none)
    checkpoints      [name, allocated, peak allocated, reserved, peak reserved, retries] for each checkpoint and for the
                     end, bytes but for the last; and ["OOM", event] before the end where memory ran out
    more             optional: [requested, peak requested, ooms] for each of these, but for OOM
    phases           optional: [event, name of the phase that begins with it]
    streams          optional: CUDA streams that memory was allocated on
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pydantic

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.memory.allocator.allocator import (
    CHECKPOINT,
    EMPTY_CACHE,
    FREE_ID,
    AllocatorSettings,
    AllocatorStats,
    CachingAllocator,
    Replay,
)

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


class RecordedCard(NamedTuple):
    """The card and the allocator's settings that a recording was made under, in bytes."""

    settings: str
    total_bytes: int
    context_bytes: int
    memory_fraction: float
    """0: no cap."""


class Checkpoint(NamedTuple):
    """A moment at which the allocator's figures were noted."""

    name: str
    figures: dict[str, int]
    """Fields of AllocatorStats, as far as they were recorded."""


class Difference(NamedTuple):
    """One figure that the simulator got wrong; None where one side has no such checkpoint or no failure."""

    number: int
    """Of the checkpoint, from 0."""
    checkpoint: str
    figure: str
    recorded: int | None
    simulated: int | None

    def __str__(self) -> str:
        return f"checkpoint {self.number}: {self.figure} recorded {self.recorded}, simulated {self.simulated}"


@dataclass(frozen=True)
class Recording:
    """The requests that an allocator served, by phase, and the figures that it reported at checkpoints."""

    name: str
    card: RecordedCard
    events: list[tuple[int, int]]
    """(op, id) as in traces.npz. Ids are used again once they are free."""
    phases: tuple[tuple[int, str], ...]
    """(index of an event, the phase that begins with it), in order."""
    checkpoints: tuple[Checkpoint, ...]
    """One per CHECKPOINT event, and one for the end; none for a stream that no allocator served."""
    streams: int = 1
    """CUDA streams that memory was allocated on; the simulator knows one."""
    oom_index: int | None = None
    """Index of the request that could not be served, if there is one."""

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

    def replay(self) -> Replay:
        """The same requests through the simulated allocator. Raises ConfigError where the recording makes no sense."""
        settings, total_bytes, context_bytes, memory_fraction = self.card
        try:
            parsed = AllocatorSettings.from_string(settings)
            return CachingAllocator(parsed, total_bytes, context_bytes, memory_fraction).replay(self.events)
        except ValueError as error:
            raise ConfigError(f"recording {self.name!r}: {error}") from error

    def differences(self) -> list[Difference]:
        """Where the simulated allocator's figures are not the recorded ones, checkpoint by checkpoint.

        Raises ConfigError where the recording makes no sense.
        """
        replay = self.replay()
        out = []
        if replay.oom_index != self.oom_index:
            figure, last = "event that ran out of memory", len(self.checkpoints) - 1
            out.append(Difference(last, OUT_OF_MEMORY, figure, self.oom_index, replay.oom_index))
        for index, (recorded, stats) in enumerate(zip_longest(self.checkpoints, replay.checkpoints)):
            if recorded is None or stats is None:
                counts = len(self.checkpoints), len(replay.checkpoints)
                out.append(Difference(index, recorded.name if recorded else "", "number of checkpoints", *counts))
                break
            for figure, value in recorded.figures.items():
                if value != getattr(stats, figure):
                    out.append(Difference(index, recorded.name, figure, value, getattr(stats, figure)))
        return out


# --- from PyTorch's snapshot ------------------------------------------------------------------------------------------


def from_snapshot(
    name: str, entries: Iterable[Mapping[str, Any]], moments: Sequence[Moment], card: RecordedCard
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
        return builder.finished(card)
    while moment is not None and moment.events <= builder.counted:
        builder.moment(moment)
        moment = next(waiting, None)
    if moment is not None:
        raise ConfigError(
            f"recording {name!r}: {moment.events} allocations and frees were counted, but the history has only "
            f"{builder.counted}: it was cut short, so record fewer steps"
        )
    return builder.finished(card)


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
        self._checkpoints: list[Checkpoint] = []
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
        """A request that could not be served. The history has its rounded size, which the simulator refuses as well."""
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
            self._checkpoints.append(Checkpoint(moment.name, asdict(moment.stats)))

    def finished(self, card: RecordedCard) -> Recording:
        """All up to the last checkpoint, which is the end and no event."""
        events = self._events[: self._end]
        phases = tuple(p for p in self._phases if p[0] < self._end)
        ran_out = bool(self._checkpoints) and self._checkpoints[-1].name == OUT_OF_MEMORY
        return Recording(
            self.name, card, events, phases, tuple(self._checkpoints), max(1, len(self._streams)),
            oom_index=len(events) - 1 if ran_out else None,
        )  # fmt: skip

    def _size(self, nbytes: Any) -> int:
        if not isinstance(nbytes, int) or nbytes < 1:
            raise ConfigError(f"recording {self.name!r}: an allocation of {nbytes!r} bytes makes no sense")
        return nbytes


# --- files ------------------------------------------------------------------------------------------------------------


def save_recordings(folder: Path, recordings: Sequence[Recording]) -> None:
    """Write traces.npz and expected.json. Raises OSError where the folder cannot be written."""
    arrays = {r.name: _compact(np.array(r.events, dtype=np.int64).reshape(-1, 2)) for r in recordings}
    np.savez_compressed(folder / TRACES, **arrays)  # type: ignore[arg-type]
    (folder / EXPECTED).write_text(json.dumps([_entry(r) for r in recordings]) + "\n", encoding="utf-8")


def _compact(rows: np.ndarray) -> np.ndarray:
    return rows.astype(np.int32) if rows.max(initial=0) < 1 << 31 else rows


def _entry(recording: Recording) -> dict[str, Any]:
    rows: list[list[Any]] = [[name, *(figures[n] for n in _IN_ROW)] for name, figures in recording.checkpoints]
    if recording.oom_index is not None:
        rows.insert(-1, ["OOM", recording.oom_index])
    return {
        "trace": recording.name,
        **recording.card._asdict(),
        "checkpoints": rows,
        "more": [[figures[n] for n in _BESIDE_ROW] for _, figures in recording.checkpoints],
        "phases": recording.phases,
        "streams": recording.streams,
    }


def _checked_row(row: list[str | int]) -> list[str | int]:
    if not (
        [type(value) for value in row] == [str, *[int] * len(_IN_ROW)]
        or (len(row) == 2 and row[0] == "OOM" and isinstance(row[1], int))
    ):
        raise ValueError('a checkpoint is [name and 5 numbers] or ["OOM", event]')
    return row


class _RecordedTrace(pydantic.BaseModel):
    """One trace of expected.json."""

    model_config = pydantic.ConfigDict(strict=True)

    trace: str
    settings: str
    total_bytes: int
    context_bytes: int
    memory_fraction: float
    checkpoints: list[Annotated[list[str | int], pydantic.AfterValidator(_checked_row)]]
    more: list[tuple[int, int, int]] | None = None
    phases: list[tuple[int, str]] = []
    streams: int = 1

    def recorded(self) -> tuple[Checkpoint, ...]:
        """The checkpoints. Raises ValueError where `more` belongs to other ones."""
        rows = [row for row in self.checkpoints if row[0] != "OOM"]
        if self.more is not None and len(self.more) != len(rows):
            raise ValueError(f"more has {len(self.more)} rows for {len(rows)} checkpoints")
        out = []
        for index, (name, *values) in enumerate(rows):
            figures = dict(zip(_IN_ROW, map(int, values), strict=True))
            if self.more is not None:
                figures |= zip(_BESIDE_ROW, self.more[index], strict=True)
            out.append(Checkpoint(str(name), figures))
        return tuple(out)

    def oom_index(self) -> int | None:
        """Index of the event that ran out of memory, if one did."""
        return next((int(row[1]) for row in self.checkpoints if row[0] == "OOM"), None)


_ENTRIES = pydantic.TypeAdapter(Annotated[list[_RecordedTrace], pydantic.Field(min_length=1)])


def load_recordings(folder: Path) -> list[Recording]:
    """The recordings of a folder. Raises ConfigError where files are missing, damaged or of another kind."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give one that holds {TRACES} and {EXPECTED}")
    entries = _read_entries(folder / EXPECTED)
    arrays = _read_arrays(folder / TRACES)
    out = []
    for index, entry in enumerate(entries):
        try:
            out.append(_recording(entry, arrays))
        except ValueError as error:
            raise ConfigError(f"{folder / EXPECTED}, entry {index}: {error}") from error
    return out


def _recording(entry: _RecordedTrace, arrays: Mapping[str, np.ndarray]) -> Recording:
    name = entry.trace
    if name not in arrays:
        raise ValueError(f"{TRACES} has no trace {name!r}")
    rows = arrays[name]
    if rows.ndim != 2 or rows.shape[1] != 2 or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"trace {name!r} must be integers of shape (events, 2), not {rows.dtype}{rows.shape}")
    AllocatorSettings.from_string(entry.settings)
    card = RecordedCard(entry.settings, entry.total_bytes, entry.context_bytes, entry.memory_fraction)
    events = [(op, number) for op, number in rows.tolist()]
    return Recording(
        name, card, events, tuple(entry.phases), entry.recorded(), entry.streams, oom_index=entry.oom_index()
    )


def _read_entries(path: Path) -> list[_RecordedTrace]:
    try:
        return _ENTRIES.validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error}); is it missing?") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = "".join(f", {'entry ' if i == 0 else ''}{part}" for i, part in enumerate(first["loc"][:3]))
        raise ConfigError(f"{path}{where}: {first['msg']}; cut short, or not a list of recordings?") from error


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    # A damaged archive fails in whatever layer meets the damage first: zipfile, zlib, struct, numpy, ast.
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(f"{path} cannot be read as an .npz archive ({reason}); missing or cut short?") from error
