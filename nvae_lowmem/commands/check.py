"""Verify the files of a run: its configuration, every checkpoint, its figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.errors import ConfigError, ExitCode
from nvae_lowmem.training import runs


@dataclass(frozen=True, kw_only=True)
class CheckCommand:
    """Verify the files of a run: its configuration, every checkpoint against its checksums, its figures.

    Exit status: 0 all is whole; 1 something is damaged, which the report names; 2 there is no such run.

    Examples:
      nvae-lowmem check
      nvae-lowmem check runs/00003-celeba64-4g
    """

    run: Annotated[str, tyro.conf.Positional] = "latest"
    """Run folder by path, number or name; latest: the newest one in --runs-dir."""
    runs_dir: str = "runs"
    """Where the numbered run folders are."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check and print a line per file; returns the exit code."""
    return run_command(CheckCommand, _check, argv)


def _check(command: CheckCommand) -> ExitCode:
    run_dir = runs.find_run(command.run, command.runs_dir)
    lines, damaged = check_run(run_dir)
    print("\n".join([str(run_dir), *(f"  {line}" for line in lines)]))
    return ExitCode.CHECK_FAILED if damaged else ExitCode.DONE


def check_run(run_dir: Path) -> tuple[list[str], int]:
    """(a line per file of the run, how many of them are damaged). Nothing is written."""
    from nvae_lowmem.training import checkpoint

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
