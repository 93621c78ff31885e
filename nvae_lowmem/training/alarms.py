"""Alarms: a figure of a step that leaves its own running median, and what many of them in a row mean.

A figure raises an alarm where it lies above the running median m of its last quiet values both by a factor and, in
logarithms, by several robust standard deviations (Hampel's identifier; 1.4826 x the median absolute deviation is one):

    log x - log m > DEVIATIONS * 1.4826 * median|log x_i - log m|   and   x > factor * m

Hampel's own threshold is 3, and 2.5 to 3.5 are usual (Leys et al. 2013, doi 10.1016/j.jesp.2013.03.013); it is 6 here,
because a run has thousands of steps and not every one in a thousand is to raise an alarm. Logarithms, because losses
and gradient norms change by factors. Values that raise an alarm do not enter the median.

A loss that stays in alarm for BLOWN_UP_AFTER steps has blown up; training goes back to a state before it, as PaLM's
authors did by hand (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1). So has one that, with beta at its largest,
is for as long USELESS_FACTOR times worse than both the untrained model and the uniform code (bits * ln 2 nats for each
number of an image). That finds weights that blew up before there was a median, or while a small beta hid their KL. And
so has one that stays above the uniform code for a twentieth of the run: whoever knows nothing does better.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

WINDOW = 100
"""Steps of a running median: long against a spike, short against an epoch."""
ENOUGH = 20
"""Values before there is a median to speak of."""
DEVIATIONS = 6.0
MAD_TO_DEVIATION = 1.4826
FACTORS = {"loss": 2.0, "kl": 10.0, "gradient norm": 10.0}
"""How far above its median a figure is no noise. A group's KL starts near 0 and moves by factors as it is used."""
SMALLEST = {"loss": 1e-6, "kl": 10.0, "gradient norm": 1e-6}
"""Below it a figure raises no alarm: a group whose KL goes from 0.01 to 1 nat is a group that begins to be used."""
BLOWN_UP_AFTER = 10
"""Steps in a row with a loss in alarm. A spike is over sooner."""
USELESS_FACTOR = 1.25
LEAST_PATIENCE, PATIENCE_SHARE = 100, 0.05
"""Steps in a row above the uniform code, and share of the run, after which training does not learn."""
USEFUL = "median.useful"
QUIET_AFTER = 20
"""Steps without an alarm that end an episode; the next alarm is then a new one."""


@dataclass(frozen=True)
class Alarm:
    """A figure of step `step` (counted from 1) that left its running median."""

    step: int
    figure: str
    value: float
    median: float

    def __str__(self) -> str:
        times = self.value / self.median if self.median else math.inf
        return f"step {self.step}: {self.figure} {self.value:.4g} is {times:.3g} times its running median"


class RunningMedian:
    """The last quiet values of one figure, and whether a new one is an outlier among them."""

    def __init__(self, factor: float, smallest: float) -> None:
        self._factor, self._smallest = factor, smallest
        self.values: deque[float] = deque(maxlen=WINDOW)

    def outlier(self, value: float) -> float | None:
        """The median, where `value` is an outlier above it; else None, and the value is taken in."""
        value = max(value, 1e-30)
        if len(self.values) >= ENOUGH and value > self._smallest:
            middle = median(self.values)
            logs = [abs(math.log(v / middle)) for v in self.values]
            far = math.log(value / middle) > DEVIATIONS * MAD_TO_DEVIATION * median(logs)
            if far and value > self._factor * middle:
                return middle
        self.values.append(value)
        return None


class Alarms:
    """Looks at every step's figures; says when an alarm begins and when the loss has blown up."""

    def __init__(self, groups: int, uniform_nats: float = math.inf, first_step: int = 0, total_steps: int = 0) -> None:
        """uniform_nats: -log p of an image under the uniform distribution. first_step: the state there is trusted."""
        self._uniform_nats, self._untrained_nats = uniform_nats, 0.0
        self._patience = max(LEAST_PATIENCE, int(PATIENCE_SHARE * total_steps))
        self._below_uniform_until, self._above_uniform_in_a_row = first_step, 0
        self._useful_until, self._useless_in_a_row, self._full_beta = first_step, 0, False
        names = ["loss", *(f"kl of group {i}" for i in range(groups)), "gradient norm"]
        self._medians = {name: RunningMedian(FACTORS[_kind(name)], SMALLEST[_kind(name)]) for name in names}
        self._last: dict[str, int] = {}
        self._in_a_row = 0
        self.episode_began: int | None = None
        """The step of the first alarm of an episode that is not over yet."""

    def look(
        self, step: int, loss: float, kl: Sequence[float], gradient_norm: float | None, nll: float = 0.0,
        full_beta: bool = False,
    ) -> list[Alarm]:  # fmt: skip
        """The alarms that begin with step `step` (from 1); one that goes on is not said again. Finite figures."""
        if step == 1:
            self._untrained_nats = nll + sum(kl)
        if nll + sum(kl) <= self._useless_nats:
            self._useful_until = step
        self._useless_in_a_row = self._useless_in_a_row + 1 if full_beta and loss > self._useless_nats else 0
        self._above_uniform_in_a_row = (
            self._above_uniform_in_a_row + 1 if full_beta and loss > self._uniform_nats else 0
        )
        if loss <= self._uniform_nats:
            self._below_uniform_until = step
        self._full_beta = full_beta
        figures = {"loss": loss, **{f"kl of group {i}": value for i, value in enumerate(kl)}}
        if gradient_norm is not None and math.isfinite(gradient_norm):
            figures["gradient norm"] = gradient_norm
        began, any_alarm = [], False
        for name, value in figures.items():
            middle = self._medians[name].outlier(value)
            if name == "loss":
                self._in_a_row = 0 if middle is None else self._in_a_row + 1
            if middle is None:
                continue
            any_alarm = True
            if step - self._last.get(name, -QUIET_AFTER) >= QUIET_AFTER:
                began.append(Alarm(step, name, value, middle))
            self._last[name] = step
        if any_alarm and self.episode_began is None:
            self.episode_began = step
        elif not any_alarm and step - max(self._last.values(), default=step) >= QUIET_AFTER:
            self.episode_began = None
        return began

    @property
    def blown_up(self) -> str:
        """What has lasted too long to be a spike, in words; "" where nothing has."""
        if self._in_a_row >= BLOWN_UP_AFTER:
            return f"the loss has been in alarm for {BLOWN_UP_AFTER} steps in a row, since step {self.episode_began}"
        if self._useless_in_a_row >= BLOWN_UP_AFTER:
            return (
                f"the loss has been above {self._useless_nats:.0f} nats for {BLOWN_UP_AFTER} steps in a row, with beta "
                "at its largest: far worse than a model that knows nothing"
            )
        if self._above_uniform_in_a_row >= self._patience:
            return (
                f"the loss has been above {self._uniform_nats:.0f} nats, what an image of random numbers takes, for "
                f"{self._patience} steps in a row, with beta at its largest"
            )
        return ""

    @property
    def _useless_nats(self) -> float:
        return USELESS_FACTOR * max(self._uniform_nats, self._untrained_nats)

    def good_until(self, step: int) -> int:
        """The last step before `step` whose state is not suspect."""
        quiet_until = (self.episode_began or step) - 1
        if self._above_uniform_in_a_row >= self._patience:
            quiet_until = min(quiet_until, self._below_uniform_until)
        return min(self._useful_until, quiet_until) if self._full_beta else quiet_until

    def state(self) -> dict[str, Tensor]:
        """The running medians' values, for a checkpoint: a resumed run is to notice what the other would have."""
        values = {_key(name): list(m.values) for name, m in self._medians.items()}
        state = {key: torch.tensor(v, dtype=torch.float64) for key, v in values.items() if v}
        useful = [self._useful_until, self._untrained_nats, self._below_uniform_until]
        return state | {USEFUL: torch.tensor(useful, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`; a figure without saved values starts afresh."""
        if USEFUL in state:
            self._useful_until, self._untrained_nats = int(state[USEFUL][0]), float(state[USEFUL][1])
            self._below_uniform_until = int(state[USEFUL][-1]) if len(state[USEFUL]) > 2 else self._useful_until
        for name, running in self._medians.items():
            running.values.clear()
            running.values.extend(state[_key(name)].flatten().tolist() if _key(name) in state else [])


def _kind(name: str) -> str:
    return "kl" if name.startswith("kl") else name


def _key(name: str) -> str:
    return f"median.{name.replace(' ', '_')}"
