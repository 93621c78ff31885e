"""What the tests on a card run: a small profile, and the commands as a user calls them, here or in another process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from training_runs import PROFILE, Finished

from nvae_lowmem.commands.train import main as train_main
from nvae_lowmem.units import GIB

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PHANTOM_RUN = REPOSITORY / "tests" / "phantom" / "phantom-run"
ON_PHANTOM = "PHANTOM_HOME" in os.environ
needs_phantom = pytest.mark.skipif(not ON_PHANTOM, reason="needs a card made to measure: the phantom")
CAP_BYTES = GIB


def write_profile(folder: Path, *lines: str) -> Path:
    """The quick profile of the training tests, with lines such as `plan.keep = "input"` added or put in place."""
    sections: dict[str, dict[str, str]] = {}
    section = ""
    for line in PROFILE.splitlines():
        if line.startswith("["):
            section = line.strip("[]") + "."
        elif line:
            key, _, value = line.partition(" = ")
            sections.setdefault(section, {})[key] = value
    for line in lines:
        key, _, value = line.partition(" = ")
        section, _, name = key.rpartition(".")
        sections[f"{section}."][name] = value
    text = [f"{key} = {value}" for key, value in sections.pop("").items()]
    for section, values in sections.items():
        text += [f"[{section[:-1]}]", *(f"{key} = {value}" for key, value in values.items())]
    path = folder / "quick.toml"
    path.write_text("\n".join(text))
    return path


def run(main: Callable[[Sequence[str]], int], *arguments: str | Path) -> Finished:
    """A command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Finished(code, out.getvalue(), err.getvalue())


def train(profile: Path, *arguments: str | Path) -> Finished:
    """The training command in this process, its run folder beside the profile."""
    return run(train_main, "--profile", profile, "--runs-dir", profile.parent / "runs", *arguments)


def run_folder(profile: Path) -> Path:
    """The newest run folder of `train`."""
    return sorted((profile.parent / "runs").iterdir())[-1]


def logged(profile: Path) -> list[dict[str, Any]]:
    """The lines of the newest run's statistics."""
    return [json.loads(line) for line in (run_folder(profile) / "stats.jsonl").read_text().splitlines()]


def process(*arguments: str | Path, card: Sequence[str] = (), timeout: float = 280, **environment: str) -> Finished:
    """A Python program in a process of its own; card: flags of phantom-run, such as ("--cc", "8.6")."""
    command = [sys.executable, *map(str, arguments)]
    if card:
        command = [str(PHANTOM_RUN), *card, "--", *command]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout
    )
    return Finished(done.returncode, done.stdout, done.stderr)
