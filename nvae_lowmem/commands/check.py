"""Verifies the files of a run: its configuration, every checkpoint against its checksums, its figures.

Exit status: 0 all is whole; 1 something is damaged, which the report names; 2 there is no such run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.training import checkpoint, runs
from nvae_lowmem.training.open_run import EXIT_BAD_INPUT

EXIT_DAMAGED = 1


@dataclass(frozen=True, kw_only=True)
class CheckCommand:
    """Verify the files of a run: its configuration, every checkpoint against its checksums, its figures."""

    run: Annotated[str, tyro.conf.Positional] = "latest"
    """Run folder by path, number or name; latest: the newest one in --runs-dir."""
    runs_dir: str = "runs"
    """Where the numbered run folders are."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check and print a line per file; returns the exit status."""
    command = tyro.cli(CheckCommand, args=sys.argv[1:] if argv is None else list(argv), prog="check")
    try:
        run_dir = runs.find_run(command.run, command.runs_dir)
        lines, damaged = check_run(run_dir)
    except ConfigError as error:
        print(f"check: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print("\n".join([str(run_dir), *(f"  {line}" for line in lines)]))
    return EXIT_DAMAGED if damaged else 0


def check_run(run_dir: Path) -> tuple[list[str], int]:
    """(a line per file of the run, how many of them are damaged). Nothing is written."""
    lines, damaged = [], 0
    usable: Path | None = None
    checks = [("config.toml", _check_config), ("stats.jsonl", _check_figures)]
    for name, check in checks:
        try:
            lines.append(f"{name}: {check(run_dir / name)}")
        except ConfigError as error:
            lines.append(f"{name}: DAMAGED: {error}")
            damaged += 1
    for path in checkpoint.all_checkpoints(run_dir):
        try:
            lines.append(f"checkpoints/{path.name}: whole ({checkpoint.check_checkpoint(path)})")
            usable = path
        except ConfigError as error:
            lines.append(f"checkpoints/{path.name}: DAMAGED: {error}")
            damaged += 1
    lines.append(f"newest whole checkpoint: {usable.name if usable else 'none'}")
    return lines, damaged


def _check_config(path: Path) -> str:
    return f"whole, profile {profiles.load(path).name!r}"


def _check_figures(path: Path) -> str:
    if not path.exists():
        return "none yet"
    count = 0
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            json.loads(line)["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError(f"line {number} is no record of figures; the next training drops it") from None
        count += 1
    return f"whole, {count} records"
