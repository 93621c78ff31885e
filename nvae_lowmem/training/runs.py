"""Run folders: `runs/00003-celeba64-4g/` with config.toml, log.txt, stats.jsonl, events, samples/, checkpoints/."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nvae_lowmem.errors import ConfigError

_NUMBERED = re.compile(r"(\d{5,})-.+")


def numbered_runs(runs_dir: str | os.PathLike[str]) -> list[Path]:
    """The run folders under `runs_dir`, oldest first."""
    root = Path(runs_dir)
    found = [p for p in root.iterdir() if p.is_dir() and _NUMBERED.fullmatch(p.name)] if root.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.split("-")[0]))


def new_run(runs_dir: str | os.PathLike[str], name: str) -> Path:
    """Make and return the next numbered folder for a run called `name`."""
    root = Path(runs_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:
            runs = numbered_runs(root)
            number = int(runs[-1].name.split("-")[0]) + 1 if runs else 0
            folder = root / f"{number:05d}-{name}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue  # another process took this number in between
            return folder
    except OSError as error:
        raise ConfigError(f"--runs-dir {root}: cannot make a run folder there: {error.strerror or error}") from None


def find_run(run: str | os.PathLike[str], runs_dir: str | os.PathLike[str] = "runs") -> Path:
    """A run folder by path, by number, by name, or "latest". Raises ConfigError with what there is."""
    given = Path(run)
    if (given / "config.toml").is_file():
        return given
    runs = [p for p in numbered_runs(runs_dir) if (p / "config.toml").is_file()]
    text = str(run)
    if text == "latest":
        if runs:
            return runs[-1]
        raise ConfigError(
            f"--run latest: there is no run in {runs_dir!s}; train one first: python launch/train.py --help"
        )
    for folder in reversed(runs):
        number, _, name = folder.name.partition("-")
        if text in (folder.name, name) or (text.isdigit() and int(text) == int(number)):
            return folder
    known = ", ".join(p.name for p in runs[-5:]) or "none"
    raise ConfigError(f"--run {text}: no run folder of that path, number or name (newest in {runs_dir!s}: {known})")
