"""The figures of a run (stats.jsonl), read while its training may still be writing them."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

_RATE_RECORDS = 12
"""Newest records that the time of a step is taken from."""


class Event(NamedTuple):
    """Something that happened at a step: an alarm, a rewind, a changed setting."""

    step: int
    kind: str
    text: str


class Figures:
    """What stats.jsonl holds. `refresh` reads what has been added; the file is never locked or written to.

    A last line without its end is left for the next time, since somebody is writing it; lines that are no records are
    passed over. A file that was replaced, as by a run that goes on from an earlier step, is read anew.
    """

    def __init__(self, path: Path, series: Collection[str] = ()) -> None:
        """series: names of figures to keep every value of, not only the last one."""
        self.path = path
        self._names = frozenset(series)
        self._file: tuple[int, int] = (0, 0)
        self._forget()

    def _forget(self) -> None:
        self.step = 0
        """The newest step that has figures."""
        self.latest: dict[str, float] = {}
        """The last finite value of every figure."""
        self.series: dict[str, list[tuple[int, float]]] = {name: [] for name in self._names}
        """(step, value), in the order of the file; finite values only."""
        self.events: list[Event] = []
        self._clock: list[tuple[int, float]] = []  # (step, seconds since its process began), newest last
        self._read_bytes = 0

    def refresh(self) -> Figures:
        """Read what is new. A file that is not there, or cannot be read now, changes nothing."""
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            status = self.path.stat()
            if (status.st_dev, status.st_ino) != self._file or status.st_size < self._read_bytes:
                self._forget()
                self._file = (status.st_dev, status.st_ino)
            file.seek(self._read_bytes)
            whole, end, _ = file.read().rpartition(b"\n")
            self._read_bytes += len(whole) + len(end)
            for line in whole.split(b"\n"):
                with contextlib.suppress(ValueError, RecursionError):
                    self._take(json.loads(line))
        return self

    def seconds_per_step(self) -> float | None:
        """Mean over the newest records, evaluations and saves included; None where nothing is known of it."""
        if self._clock and self._clock[-1][0] > self._clock[0][0]:
            (first, began), (last, now) = self._clock[0], self._clock[-1]
            return (now - began) / (last - first)
        return self.latest.get("timing/sec_per_step")

    def _take(self, record: Any) -> None:
        if not isinstance(record, dict) or type(step := record.get("step")) is not int:
            return
        if "event" in record:  # kept when the figures of later steps are forgotten, so no measure of progress
            self.events.append(Event(step, str(record["event"]), str(record.get("text", ""))))
            return
        self.step = step
        values = {str(name): float(value) for name, value in record.items() if _is_finite(value)}
        self.latest |= values
        for name in self._names & values.keys():
            self.series[name].append((step, values[name]))
        if "time_seconds" in values:
            if self._clock and (values["time_seconds"] < self._clock[-1][1] or step < self._clock[-1][0]):
                self._clock.clear()  # another process, or an earlier step: its clock began anew
            self._clock = [*self._clock[1 - _RATE_RECORDS :], (step, values["time_seconds"])]


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
