"""Replays recorded allocation traces through the simulated allocator and lists every figure that differs.

    python -m nvae_lowmem.memory.allocator DIR

DIR holds traces.npz, integer arrays (events, 2) of rows (op, id): op > 0 allocates op bytes as id, -1 frees id, 0 is a
checkpoint, -3 empties the cache; and expected.json, a list with, per trace: trace (its name in traces.npz), settings
(the allocator's settings string), total_bytes, context_bytes, memory_fraction (0: none), and checkpoints: [name,
allocated, peak allocated, reserved, peak reserved, retries] for each checkpoint and for the end, all bytes but the
last, with ["OOM", index of the event] before the end where the trace stops for lack of memory.

Exit status: 0 all equal, 1 something differs, 2 DIR cannot be read as described.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.memory.allocator.allocator import AllocatorSettings, CachingAllocator, Replay

_FIELDS: dict[str, tuple[type, ...]] = {
    "trace": (str,),
    "settings": (str,),
    "total_bytes": (int,),
    "context_bytes": (int,),
    "memory_fraction": (int, float),
    "checkpoints": (list,),
}


class Mismatch(NamedTuple):
    """One checkpoint that the simulator got wrong; None where one side has no such checkpoint."""

    trace: str
    checkpoint: int
    expected: list[Any] | None
    got: list[Any] | None


@dataclass(frozen=True)
class RecordedTrace:
    """A trace, the card that it was recorded on, and what the recorded allocator said."""

    name: str
    events: list[tuple[int, int]]
    settings: AllocatorSettings
    total_bytes: int
    context_bytes: int
    memory_fraction: float
    checkpoints: list[list[Any]]

    def replay(self) -> list[list[Any]]:
        """The checkpoints that the simulator gives; raises ConfigError when the card or the events make no sense."""
        try:
            card = (self.total_bytes, self.context_bytes, self.memory_fraction)
            return _as_checkpoints(CachingAllocator(self.settings, *card).replay(self.events))
        except ValueError as error:
            raise ConfigError(f"trace {self.name!r}: {error}") from error

    def mismatches(self) -> list[Mismatch]:
        """Where the simulator's figures differ from the recorded ones, in order."""
        pairs = zip_longest(self.checkpoints, self.replay())
        return [
            Mismatch(self.name, index, expected, got)
            for index, (expected, got) in enumerate(pairs)
            if expected is None or got is None or _figures(expected) != _figures(got)
        ]


def _as_checkpoints(replay: Replay) -> list[list[Any]]:
    """A replay in the form of expected.json."""
    rows: list[list[Any]] = [
        [
            "mark",
            stats.allocated_bytes,
            stats.peak_allocated_bytes,
            stats.reserved_bytes,
            stats.peak_reserved_bytes,
            stats.retries,
        ]
        for stats in replay.checkpoints
    ]
    rows[-1][0] = "end"
    if replay.oom_index is not None:
        rows.insert(-1, ["OOM", replay.oom_index])
    return rows


def _figures(checkpoint: Sequence[Any]) -> tuple[bool, list[Any]]:
    """What must be equal: whether it is a failure, and the numbers; other names are the recorder's own."""
    return checkpoint[0] == "OOM", list(checkpoint[1:])


def load_traces(folder: Path) -> list[RecordedTrace]:
    """The traces of a folder as described above. Raises ConfigError when it is missing, damaged or of another kind."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give one that holds traces.npz and expected.json")
    entries = _read_json(folder / "expected.json")
    arrays = _read_npz(folder / "traces.npz")
    return [_recorded_trace(entry, arrays, f"{folder / 'expected.json'}, entry {i}") for i, entry in enumerate(entries)]


def _read_json(path: Path) -> list[Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); is it missing, or cut short?") from error
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path} must hold a list of at least one trace")
    return entries


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    # A damaged archive fails in whatever layer meets the damage first: zipfile, zlib, struct, numpy, ast.
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(f"{path} cannot be read as an .npz archive ({reason}); missing or cut short?") from error


def _recorded_trace(entry: Any, arrays: dict[str, np.ndarray], where: str) -> RecordedTrace:
    """One entry of expected.json with its events; raises ConfigError that begins with `where`."""
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} must be an object with the keys {', '.join(_FIELDS)}, not {entry!r}")
    for key, types in _FIELDS.items():
        value = entry.get(key)
        if not isinstance(value, types) or isinstance(value, bool):
            wanted = " or ".join(kind.__name__ for kind in types)
            raise ConfigError(f"{where}: {key} must be of type {wanted}, not {value!r}")
    for checkpoint in entry["checkpoints"]:
        if not isinstance(checkpoint, list) or len(checkpoint) != (2 if checkpoint[:1] == ["OOM"] else 6):
            raise ConfigError(f'{where}: checkpoint {checkpoint!r} is neither [name and 5 numbers] nor ["OOM", index]')
    name = entry["trace"]
    if name not in arrays:
        raise ConfigError(f"{where}: traces.npz has no trace {name!r}")
    rows = arrays[name]
    if rows.ndim != 2 or rows.shape[1] != 2 or not np.issubdtype(rows.dtype, np.integer):
        raise ConfigError(
            f"{where}: trace {name!r} must be integers of shape (events, 2), not {rows.dtype}{rows.shape}"
        )
    try:
        settings = AllocatorSettings.from_string(entry["settings"])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    card = entry["total_bytes"], entry["context_bytes"], float(entry["memory_fraction"])
    return RecordedTrace(name, rows.tolist(), settings, *card, entry["checkpoints"])


def main(argv: Sequence[str] | None = None) -> int:
    """Replay the folder named on the command line, print what differs, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m nvae_lowmem.memory.allocator",
        description="Replay recorded allocation traces through the simulated CUDA caching allocator and compare.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder that holds traces.npz and expected.json")
    folder = parser.parse_args(argv).folder
    try:
        traces = load_traces(folder)
        mismatches = [mismatch for trace in traces for mismatch in trace.mismatches()]
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    for name, index, expected, got in mismatches:
        print(f"{name}, checkpoint {index}: expected {expected}, got {got}")
    checkpoints = sum(len(trace.checkpoints) for trace in traces)
    print(f"{len(traces)} traces, {checkpoints} checkpoints, mismatches: {len(mismatches)}")
    return 1 if mismatches else 0
