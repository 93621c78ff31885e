"""What a run tells the world: a progress line, log.txt, stats.jsonl and TensorBoard, under the published names."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nvae_lowmem.files import write_atomically
from nvae_lowmem.units import format_seconds


class Monitor:
    """Writes one run's story; on every rank but 0 it is silent. Close it, or use it in a with statement."""

    def __init__(self, run_dir: Path | None, total_steps: int, first_step: int = 0) -> None:
        self.run_dir, self.total_steps = run_dir, total_steps
        self._began, self._first_step = time.monotonic(), first_step
        self._bar: Any = None
        if run_dir is None:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        again = _forget_after(first_step, run_dir / "stats.jsonl")
        self._events = SummaryWriter(str(run_dir), purge_step=first_step + 1 if again else None)
        self._stats = (run_dir / "stats.jsonl").open("a", encoding="utf-8")
        self._log = (run_dir / "log.txt").open("a", encoding="utf-8")
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
        self._log.write(text + "\n")
        self._log.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of optimiser step `step` (counted from 1) to TensorBoard and stats.jsonl."""
        if self.run_dir is None:
            return
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        record = {"step": step, "time_seconds": round(time.monotonic() - self._began, 3)}
        self._stats.write(json.dumps(record | {k: float(v) for k, v in values.items()}) + "\n")
        self._stats.flush()
        self._events.flush()

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture (H, W, 3) uint8 to TensorBoard."""
        if self.run_dir is not None:
            self._events.add_image(name, image, step, dataformats="HWC")

    def progress(self, step: int, line: str, show: bool) -> None:
        """Step `step` is done. A bar on a terminal; plain lines with ETA where `show`, in a log."""
        if self.run_dir is None:
            return
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(line, refresh=False)
        if show:
            done = max(1, step - self._first_step)
            left = (time.monotonic() - self._began) / done * (self.total_steps - step)
            text = f"step {step}/{self.total_steps}  {line}  ETA {format_seconds(left)}"
            self._log.write(text + "\n")
            self._log.flush()
            if self._bar is None:
                print(text, flush=True)

    def close(self) -> None:
        """Flush and close everything; safe to call twice."""
        if self.run_dir is None or self._stats.closed:
            return
        if self._bar is not None:
            self._bar.close()
        self._events.close()
        self._stats.close()
        self._log.close()


def _forget_after(step: int, stats: Path) -> bool:
    """Drop the records of later steps, which a run that goes on from `step` makes anew; whether there was a file.

    A last line that was cut off in the middle goes, too.
    """
    if not stats.exists():
        return False
    kept = []
    for line in stats.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(stats, "".join(kept))
    return True


def is_early(step: int, every: int) -> bool:
    """Whether step (from 1) is logged: 1, 2, 4, 8, 16, ... and every multiple of `every`."""
    return step % every == 0 or step & (step - 1) == 0
