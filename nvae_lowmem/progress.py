"""A long job says how far it is and how long it still takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from nvae_lowmem.units import format_seconds

Log = Callable[[str], object]
OnProgress = Callable[[int, int], None]
"""Called with (done, total) after each piece of long work."""
BAR_DELAY_SECONDS = 2.0
"""Work that is done sooner shows no progress bar."""


def say(line: str) -> None:
    """What a command is doing just now, on stderr: stdout is for answers."""
    print(f"... {line}", file=sys.stderr, flush=True)


class Progress:
    """Counts what is done and logs a line every `every_seconds`; a job shorter than that stays silent."""

    def __init__(self, what: str, total: int, log: Log, every_seconds: float = 5.0) -> None:
        self._what, self._total, self._log, self._every_seconds = what, total, log, every_seconds
        self._done = 0
        self._began = self._said = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """`count` more are done. The line gives the share and the time left at the mean speed so far."""
        self._done += count
        now = time.monotonic()
        if self._done >= self._total or now - self._said < self._every_seconds:
            return
        self._said = now
        left = (now - self._began) / self._done * (self._total - self._done)
        share = 100 * self._done / self._total
        self._log(f"{self._what}: {self._done:,} of {self._total:,} ({share:.0f} %), {format_seconds(left)} left")


def progress_bar(what: str) -> OnProgress:
    """Progress with ETA on stderr, once the work has taken two seconds; in a log, a line every ten seconds."""
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else 10.0
    bar = tqdm(desc=what, delay=BAR_DELAY_SECONDS, leave=False, dynamic_ncols=True, mininterval=interval)

    def report(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return report
