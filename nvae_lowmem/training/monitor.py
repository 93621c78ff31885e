"""What a run tells the world: a progress line, log.txt, stats.jsonl and TensorBoard, under the published names."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nvae_lowmem.config import profile_file
from nvae_lowmem.config.paths import storable
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.files import write_atomically
from nvae_lowmem.units import format_seconds

_OF_A_GROUP = re.compile(r"/(layer|active)_\d+$")


class Monitor:
    """Writes one run's story; on every rank but 0 it is silent. Close it, or use it in a with statement.

    A story that cannot be written (a full disk, a folder that is gone) never ends a training: it is said once, and what
    is told later is written as soon as that works again.
    """

    def __init__(self, run_dir: Path | None, total_steps: int, first_step: int = 0) -> None:
        self.run_dir, self.total_steps = run_dir, total_steps
        self._began, self._first_step = time.monotonic(), first_step
        self._bar: Any = None
        self._failing: set[str] = set()
        if run_dir is None:
            return
        self._purge_step: int | None = None
        self._events: Any = None
        with self._never_fatal("stats.jsonl"):
            self._purge_step = first_step + 1 if _forget_after(first_step, run_dir / "stats.jsonl") else None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, text: str) -> None:
        """A line for people, on the console and in log.txt."""
        if self.run_dir is None:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)
        self._append("log.txt", text)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of optimiser step `step` (counted from 1) to TensorBoard and stats.jsonl."""
        if self.run_dir is None:
            return
        self.record(step, {name: float(value) for name, value in values.items()})
        self._tensorboard(lambda e: [e.add_scalar(_chart(name), value, step) for name, value in values.items()])

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """A line of stats.jsonl: figures, or what happened at step `step`."""
        if self.run_dir is not None:
            record = {"step": step, "time_seconds": round(time.monotonic() - self._began, 3)}
            self._append("stats.jsonl", json.dumps(record | dict(values)))

    def event(self, step: int, kind: str, text: str) -> None:
        """Something people should know of: said, a record {"event": kind}, and a text in TensorBoard."""
        self.say(text)
        self.record(step, {"event": kind, "text": text})
        self._tensorboard(lambda events: events.add_text(f"events/{kind}", text, step))

    def configuration(self, step: int, profile: Profile) -> None:
        """The whole configuration as a text in TensorBoard, beside the charts that it led to."""
        text = f"```toml\n{profile_file.dumps(profile)}\n```"
        self._tensorboard(lambda events: events.add_text("configuration", text, step))

    def outcome(self, profile: Profile, figures: Mapping[str, float]) -> None:
        """A row of TensorBoard's table of runs: every setting of a finished run, and its final figures."""
        row = {k: float(v) for k, v in figures.items()}
        # run_name: the table's file lies in the run's own folder
        self._tensorboard(lambda events: events.add_hparams(_flat(profile), row, run_name="."))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture (H, W, 3) uint8 to TensorBoard."""
        self._tensorboard(lambda events: events.add_image(name, image, step, dataformats="HWC"))

    def progress(self, step: int, line: str, show: bool, left_seconds: float | None = None) -> None:
        """Step `step` is done. A bar on a terminal; plain lines with ETA where `show`, in a log.

        left_seconds: until the end; None: as many as the speed so far makes it.
        """
        if self.run_dir is None:
            return
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(line, refresh=False)
        if show:
            done = max(1, step - self._first_step)
            left = (time.monotonic() - self._began) / done * (self.total_steps - step)
            left = left if left_seconds is None else max(0.0, left_seconds)
            text = f"step {step}/{self.total_steps}  {line}  ETA {format_seconds(left)}"
            self._append("log.txt", text)
            if self._bar is None:
                print(text, flush=True)

    def planned_anew(self, step: int, total_steps: int) -> None:
        """From `step` on, the run has another number of steps."""
        self.total_steps = total_steps
        if self.run_dir is None:
            return
        self.scalars(step, {"schedule/total_steps": float(total_steps)})
        if self._bar is not None:
            self._bar.total = total_steps

    def close(self) -> None:
        """Flush and close everything; safe to call twice."""
        if self.run_dir is None:
            return
        if self._bar is not None:
            self._bar.close()
        self._close_tensorboard()

    def _append(self, name: str, line: str) -> None:
        """One line to a file of the run, opened anew each time: the folder may have been moved, the disk full."""
        assert self.run_dir is not None
        with self._never_fatal(name):
            append_line(self.run_dir / name, line)

    def _tensorboard(self, write: Callable[[Any], object]) -> None:
        if self.run_dir is None:
            return
        with self._never_fatal("TensorBoard"):
            try:
                if self._events is None:
                    from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

                    _quieten_tensorboard()
                    self._events = SummaryWriter(str(self.run_dir), purge_step=self._purge_step)
                    self._purge_step = None
                write(self._events)
                self._events.flush()
            except OSError:
                self._close_tensorboard()  # its thread is dead: the next figures go to a new file
                raise

    def _close_tensorboard(self) -> None:
        events, self._events = self._events, None
        if events is not None:
            with contextlib.suppress(OSError):
                events.close()

    @contextlib.contextmanager
    def _never_fatal(self, what: str) -> Iterator[None]:
        try:
            yield
            self._failing.discard(what)
        except OSError as error:
            if what not in self._failing:
                print(f"{self.run_dir}: lines for {what} are lost: {error}; training goes on", file=sys.stderr)
            self._failing.add(what)


def _quieten_tensorboard() -> None:
    """Let its writing thread die of a full disk without a traceback: the error is raised in the next call, too."""
    before = threading.excepthook
    if getattr(before, "quiet", False):
        return

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            before(args)

    hook.quiet = True  # type: ignore[attr-defined]
    threading.excepthook = hook


def _chart(name: str) -> str:
    """Where TensorBoard shows a figure: those of single groups, a hundred charts, below the losses of all of them."""
    return f"z_{name}" if _OF_A_GROUP.search(name) else name


def _flat(profile: Profile) -> dict[str, int | float | str | bool]:
    """The settings by section.key, as TensorBoard takes them."""
    table = profile_file.to_dict(profile)
    sections = {key: values for key, values in table.items() if isinstance(values, dict) and key != "provenance"}
    return {
        f"{section}.{name}": value if isinstance(value, (int, float, bool)) else storable(str(value))
        for section, values in sections.items()
        for name, value in values.items()
    }


def append_line(path: Path, line: str) -> None:
    """Append a line; a last line that was cut off in the middle is ended first. Raises OSError."""
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode("utf-8", "backslashreplace"))


def _forget_after(step: int, stats: Path) -> bool:
    """Drop the figures of later steps, which a run that goes on from `step` makes anew; whether there was a file.

    What happened stays: alarms, rewinds, changed settings. A last line that was cut off in the middle goes, too.
    """
    if not stats.exists():
        return False
    kept = []
    for line in stats.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= step or "event" in record:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    write_atomically(stats, "".join(kept))
    return True


def is_early(step: int, every: int) -> bool:
    """Whether step (from 1) is logged: 1, 2, 4, 8, 16, ... and every multiple of `every`."""
    return step % every == 0 or step & (step - 1) == 0
