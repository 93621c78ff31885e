"""Output that never ends a training: a closed pipe or a terminal that is gone turns into silence."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class PatientStream:
    """A text stream whose failures are swallowed; from the first on, its file goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As the stream's own, but it cannot fail for a reader that is gone."""
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """As the stream's own, but it cannot fail for a reader that is gone."""
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self) -> None:
        # Python flushes the stream once more as it ends, and would complain then
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def patient_output() -> Iterator[None]:
    """Inside, printing to stdout and stderr never raises OSError."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = PatientStream(sys.stdout), PatientStream(sys.stderr)  # type: ignore[assignment]
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before
