"""What steps, evaluations, pictures and saves take in this process, by a clock that nobody sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PERIODIC = ("evaluate", "sample", "save")
"""What is done now and then between steps, by the names of the settings evaluate_every, sample_every, save_every."""
IN_WORDS = {"evaluate": "evaluations", "sample": "pictures", "save": "saves"}
WARM_STEPS = 2
"""First steps of a process, slower than all others: kernels are chosen, memory is taken, caches are cold."""
ENOUGH_STEPS = 4
"""Steps after those that say something about the speed."""
SETTLED_SECONDS = 10.0
"""How long to look before an end is promised for which nobody asked."""


class Pace:
    """Measures. Of several processes each has its own."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.clock = clock or time.monotonic
        self.seconds: dict[str, float] = {}
        """Of one step ("step"), and of each of PERIODIC; what was never measured is not there."""
        self.steps = 0
        """Done by this process."""
        self._began = self.clock()
        self._done_at = dict.fromkeys(PERIODIC, self._began)
        self._window_steps, self._window_began, self._apart_seconds = 0, self._began, 0.0
        self._step_seconds = 0.0  # of the windows before, with their steps
        self._measured_steps = 0

    def step_done(self) -> None:
        """A step is done, with everything around it that belongs to steps."""
        self.steps += 1
        if self.steps <= WARM_STEPS:
            self._open_window()
        else:
            self._window_steps += 1

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Inside, one of PERIODIC is done."""
        began = self.clock()
        yield
        self._done_at[what] = self.clock()
        took = self._done_at[what] - began
        self._apart_seconds += took
        self.seconds[what] = (self.seconds.get(what, took) + took) / 2

    def since(self, what: str) -> float:
        """Seconds since one of PERIODIC was done, or since the process began."""
        return self.clock() - self._done_at[what]

    @property
    def is_measurable(self) -> bool:
        """Whether a step was done since the last `measure` that says something."""
        return self._window_steps > 0

    @property
    def is_settled(self) -> bool:
        """Whether what was measured so far is worth a promise."""
        return self.steps >= WARM_STEPS + ENOUGH_STEPS and self.clock() - self._began >= SETTLED_SECONDS

    def measure(self) -> float:
        """Seconds of a step, the mean since the last call; as before where no step was done. 0: never measured."""
        if self._window_steps:
            took = self._window_seconds()
            self.seconds["step"] = took / self._window_steps
            self._step_seconds, self._measured_steps = (
                self._step_seconds + took,
                self._measured_steps + self._window_steps,
            )
            self._open_window()
        return self.seconds.get("step", 0.0)

    def mean(self) -> float:
        """Seconds of a step, the mean over this process without its first steps; 0: there were no others."""
        steps = self._measured_steps + self._window_steps
        now = self._window_seconds() if self._window_steps else 0.0
        return (self._step_seconds + now) / steps if steps else 0.0

    def _window_seconds(self) -> float:
        return self.clock() - self._window_began - self._apart_seconds

    def _open_window(self) -> None:
        self._window_steps, self._window_began, self._apart_seconds = 0, self.clock(), 0.0
