"""How a training is asked to stop, by a signal or because whoever started it is gone, and what happens if it cannot.

The wish is looked at between steps, and all processes of a run agree on it there. A process that cannot get there,
because it waits in an exchange for one that has died, is ended by a thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from nvae_lowmem.training.engines import distributed

SIGNALS = tuple(
    number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None
)
ABANDONED = 1
"""The signal number of a run whose launcher is gone, and of a terminal that was closed: SIGHUP."""
LONGEST_WAIT_SECONDS = 45.0
"""How long a process that was asked to stop may be without a sign of life, if its own steps are not slower."""
_POLL_SECONDS = 2.0


class StopWish:
    """Whether this process was asked to stop. `number`: the signal that asked, 0 for none."""

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._alive = time.monotonic()
        self._slowest_seconds = 0.0
        self._listening = threading.Event()

    def alive(self) -> None:
        """A sign of life: a step, an evaluation, a save is done."""
        now = time.monotonic()
        self._slowest_seconds = max(self._slowest_seconds, now - self._alive)
        self._alive = now

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the first signal asks to stop; a second Ctrl-C raises KeyboardInterrupt. Ignored ones stay ignored.

        Each of several processes also checks whether its launcher lives, and none waits for a dead one without end.
        Outside the main thread nothing is done: whoever owns the signals decides.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        heeded = [number for number, handler in before.items() if handler is not signal.SIG_IGN]  # nohup ignores SIGHUP
        for number in heeded:
            signal.signal(number, self._on_signal)
        if distributed.launched():
            self._alive = time.monotonic()
            threading.Thread(target=self._guard, name="launcher watch", daemon=True).start()
        try:
            yield
        finally:
            self._listening.set()
            for number in heeded:
                signal.signal(number, before[number])

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._ask(number, f"{signal.Signals(number).name}: stopping after this step, with a checkpoint")

    def _ask(self, number: int, why: str) -> None:
        self.number, self._since = number, time.monotonic()
        text = f"{why}; Ctrl-C stops at once\n" if number == signal.SIGINT else f"{why}\n"
        with contextlib.suppress(OSError):  # not print: the signal may have come in the middle of one
            os.write(2, text.encode())

    def _guard(self) -> None:
        """In a thread of its own, because a process that waits in an exchange does not run its signal handlers."""
        launcher_lives = _launcher_watch()
        while not self._listening.wait(_POLL_SECONDS):
            if not self.number and not launcher_lives():
                self._ask(ABANDONED, "the launcher is gone: stopping after this step, with a checkpoint")
            quiet_seconds = time.monotonic() - max(self._alive, self._since)
            if self.number and quiet_seconds > max(LONGEST_WAIT_SECONDS, 3 * self._slowest_seconds):
                print(
                    f"process {distributed.launched_rank()} was asked to stop and has waited {quiet_seconds:.0f} s for "
                    "another process of this run: it ends without a checkpoint; the last one is whole",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(exit_status(self.number))


def exit_status(number: int) -> int:
    """What a shell reports for a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + number


def _launcher_watch() -> Callable[[], bool]:
    """A function that tells whether the launcher that started this process still lives, and its runner, if it has one.

    `deepspeed` is two processes: a runner, which people and schedulers see, and the launcher of each machine, which
    outlives a runner that was killed.
    """
    import psutil

    parent = os.getppid()
    runner: psutil.Process | None = None
    with contextlib.suppress(psutil.Error):
        above = psutil.Process(parent).parent()
        if above is not None and any(os.path.basename(word) == "deepspeed" for word in above.cmdline()[:3]):
            runner = above

    def lives() -> bool:
        if os.getppid() != parent:
            return False
        with contextlib.suppress(psutil.Error):
            return runner is None or (runner.is_running() and runner.status() != psutil.STATUS_ZOMBIE)
        return False

    return lives
