"""Fit every published recipe to small cards, for the files of profiles/."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.commands.flags import Switch, at_least
from nvae_lowmem.errors import ConfigError, ExitCode
from nvae_lowmem.progress import say
from nvae_lowmem.units import format_seconds

if TYPE_CHECKING:
    from nvae_lowmem.memory.catalogue.catalogue import CardRecipe

T = TypeVar("T")
CellTask = tuple[Any, ...]
"""The cell, and the other arguments of the work."""


@dataclass(frozen=True, kw_only=True)
class ShipCommand:
    """Fit every published recipe to small cards: profiles/CARD-RECIPE.toml, and the table of what trains on what.

    Exit status: 0 done; 1 with --check: a file is not what the predictor says; 2 when the command line or a file is
    wrong.

    Examples:
      nvae-lowmem ship-profiles --jobs 2
      nvae-lowmem ship-profiles --check --only gtx-970 celeba64
    """

    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ()
    """Cards (gtx-970-windows, 4g, ...) and recipes; none: all."""
    check: Switch = False
    """Predict every file again, change nothing; exit status 1: one is wrong."""
    refresh: Switch = False
    """Keep every plan that still fits and needs no retry, and make only its figures anew."""
    table: Switch = False
    """Only write the tables of the documents, and print it."""
    jobs: int = 1
    """Processes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Make or check the shipped profiles; returns the exit code."""
    return run_command(ShipCommand, _ship, argv)


def _ship(command: ShipCommand) -> ExitCode:
    at_least(1, jobs=command.jobs)
    if command.check + command.refresh + command.table > 1:
        raise ConfigError("--check changes nothing, --refresh and --table write: give one of them")
    from nvae_lowmem.memory.catalogue.catalogue import cells
    from nvae_lowmem.memory.catalogue.table import documents, load_rows, overview

    wanted = cells(command.only)
    if command.check:
        return _check(wanted, command.jobs)
    if not command.table:
        _make(wanted, command.jobs, command.refresh)
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")
    print(overview(load_rows()))
    return ExitCode.DONE


def _make(wanted: Sequence[CardRecipe], jobs: int, refresh: bool) -> None:
    from nvae_lowmem.memory.catalogue.catalogue import make
    from nvae_lowmem.memory.catalogue.table import load_rows, save_rows

    rows = load_rows()
    for cell, row in _each(make, [(cell, refresh) for cell in wanted], jobs):
        rows[cell.name] = row
        save_rows(rows)  # a run that is broken off leaves what it has made


def _check(wanted: Sequence[CardRecipe], jobs: int) -> ExitCode:
    from nvae_lowmem.memory.catalogue.catalogue import check_cell
    from nvae_lowmem.memory.catalogue.table import documents, load_rows

    rows = load_rows()
    tasks = [(cell, rows.get(cell.name)) for cell in wanted]
    problems = [problem for _, found in _each(check_cell, tasks, jobs) for problem in found]
    problems += [f"{path} does not show the table" for path, text in documents().items() if path.read_text() != text]
    print("\n".join(problems) or f"{len(wanted)} profiles are what the predictor says, and fit")
    return ExitCode.CHECK_FAILED if problems else ExitCode.DONE


def _each(work: Callable[..., T], tasks: Sequence[CellTask], jobs: int) -> Iterator[tuple[CardRecipe, T]]:
    """(cell, what `work` says of the task that begins with it) as they are done, and lines of progress."""
    began = time.monotonic()
    for done, (task, answer) in enumerate(_answers(work, tasks, jobs), start=1):
        left = (time.monotonic() - began) / done * (len(tasks) - done)
        say(f"{task[0].name} ({done} of {len(tasks)}), about {format_seconds(left)} left")
        yield task[0], answer


def _answers(work: Callable[..., T], tasks: Sequence[CellTask], jobs: int) -> Iterator[tuple[CellTask, T]]:
    if jobs == 1 or len(tasks) == 1:
        yield from ((task, work(*task)) for task in tasks)
        return
    import concurrent.futures
    import multiprocessing

    import torch

    context = multiprocessing.get_context("spawn")  # a fork after torch has started threads may hang
    with concurrent.futures.ProcessPoolExecutor(
        min(jobs, len(tasks)), context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        waiting = {pool.submit(work, *task): task for task in tasks}
        try:
            for future in concurrent.futures.as_completed(waiting):
                yield waiting[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
