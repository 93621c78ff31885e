"""Measures configurations, each in a process of its own.

outcome = measure(Job(name="mnist", profile=recipe("mnist"), device="cuda"), folder)
assess(outcome, detect_card()).to_json()
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.memory.allocator.recording import Recording, load_recordings
from nvae_lowmem.memory.measure.measurement import Measurement, measurement_from_json
from nvae_lowmem.memory.measure.worker import DECIDED, JOB, PROFILE, RESULT, STAGE

_ROOT = Path(__file__).resolve().parents[3]
_STDERR_LINES = 12
EXIT_REFUSED = 2

RunStatus = Literal["ok", "out of memory", "refused", "failed"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One configuration to measure."""

    name: str
    profile: Profile
    device: Literal["cuda", "cpu"]
    steps: int = 3
    timeout_seconds: float = 900.0


class Ended(NamedTuple):
    """How a process ended."""

    code: int | None
    """Exit status, negative for a signal; None: it ran past the timeout and was ended."""
    stage: str
    """What it last said it was at."""
    stderr: tuple[str, ...]
    """Its last lines."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended, and what it measured."""

    job: Job
    status: RunStatus
    detail: str = ""
    """Why it did not end well, in words; empty where it did."""
    ended: Ended
    measured: Measurement | None = None
    """What the process saw; None where it did not come to its end."""
    recording: Recording | None = None
    """What it asked of the allocator."""
    resolved: Profile | None = None
    """The profile with everything decided."""


def measure(job: Job, folder: Path) -> Outcome:
    """Run the job in a process of its own; its files stay in `folder`, which is there and empty.

    Whatever becomes of the process is an Outcome: refused, failed, out of memory, or ok.
    """
    profiles.save(job.profile, folder / PROFILE)
    (folder / JOB).write_text(json.dumps({"name": job.name, "device": job.device, "steps": job.steps}), "utf-8")
    ended = run_process(child_command(folder), job.timeout_seconds, folder)
    if ended.code != 0:
        status: RunStatus = "refused" if ended.code == EXIT_REFUSED else "failed"
        return Outcome(job=job, status=status, detail=_why(ended, job.timeout_seconds), ended=ended)
    try:
        measured = measurement_from_json((folder / RESULT).read_bytes())
        resolved, (recording,) = profiles.load(folder / DECIDED), load_recordings(folder)
    except (OSError, ValueError) as error:
        return Outcome(job=job, status="failed", detail=f"left no result that can be read: {error}", ended=ended)
    return Outcome(
        job=job, status=measured.status, detail=measured.detail, ended=ended, measured=measured, recording=recording,
        resolved=resolved,
    )  # fmt: skip


def child_command(folder: Path) -> list[str]:
    """The command line that measures the job in that folder."""
    return [sys.executable, "-m", "nvae_lowmem.memory.measure.worker", str(folder)]


def run_process(command: Sequence[str], timeout_seconds: float, folder: Path) -> Ended:
    """Run a command to its end, or end it and what it started after the timeout; its output stays in `folder`."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # also from a checkout that is not installed
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    out, err = folder / "stdout", folder / "stderr"
    with out.open("wb") as said, err.open("wb") as complained:
        process = subprocess.Popen(
            command, stdout=said, stderr=complained, stdin=subprocess.DEVNULL, env=environment,
            start_new_session=os.name == "posix",
        )  # fmt: skip
        code: int | None = None
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                _end(process)
    lines = err.read_text(encoding="utf-8", errors="replace").splitlines()
    stages = [line for line in out.read_text(encoding="utf-8", errors="replace").splitlines() if line[:1] == STAGE]
    return Ended(code, stages[-1].removeprefix(STAGE) if stages else "the start", tuple(lines[-_STDERR_LINES:]))


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and, where there are process groups, all that it started."""
    if os.name == "posix":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _why(ended: Ended, timeout_seconds: float) -> str:
    if ended.code is None:
        return f"ran past the timeout of {timeout_seconds:g} s in {ended.stage}"
    if ended.code == EXIT_REFUSED:
        return "\n".join(ended.stderr)
    if ended.code > 0:
        return f"ended with exit code {ended.code} in {ended.stage}"
    name = signal.Signals(-ended.code).name
    hint = ", which is how Linux ends what takes too much host memory" if name == "SIGKILL" else ""
    return f"was killed by {name} in {ended.stage}{hint}"


def with_cap(profile: Profile, cap_bytes: int) -> Profile:
    """The profile with that cap; 0: with its own."""
    return profile.with_plan(cap_bytes=cap_bytes) if cap_bytes else profile


def require_steps(steps: int) -> None:
    """Raises ConfigError for fewer steps than a measurement takes."""
    if steps < 3:
        raise ConfigError(
            f"--steps {steps} must be at least 3: states appear in the first, and later ones meet their fragments"
        )
