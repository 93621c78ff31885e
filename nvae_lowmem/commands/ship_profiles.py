"""Fits every published recipe to small cards: writes profiles/CARD-RECIPE.toml and the table of what trains on what.

Exit status: 0 done; 1 with --check: a file is not what the predictor says; 2 when the command line or a file is wrong.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.memory.catalogue.catalogue import CardRecipe, cells, check, make
from nvae_lowmem.memory.catalogue.table import documents, load_rows, overview, save_rows
from nvae_lowmem.units import format_seconds

DONE, FOUND_WRONG, BAD_INPUT = 0, 1, 2
T = TypeVar("T")
Task = tuple[Any, ...]
"""The cell, and what else the work is told."""


def main(argv: Sequence[str] | None = None) -> int:
    """Make or check the shipped profiles; returns the exit status: 0 done, 1 a file is wrong, 2 bad input."""
    return run_ship(sys.argv[1:] if argv is None else argv, description=__doc__)


def run_ship(argv: Sequence[str], description: str | None = None) -> int:
    """Run the command; returns the exit status."""
    arguments = _parser(description).parse_args(argv)
    try:
        if arguments.jobs < 1:
            raise ConfigError(f"--jobs {arguments.jobs} must be at least 1")
        wanted = cells(arguments.only)
        if arguments.check:
            return _check(wanted, arguments.jobs)
        if not arguments.table:
            _make(wanted, arguments.jobs)
        for path, text in documents().items():
            path.write_text(text, encoding="utf-8")
        print(overview(load_rows()))
    except ConfigError as error:
        print(f"ship_profiles: {error}", file=sys.stderr)
        return BAD_INPUT
    return DONE


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", metavar="NAME", nargs="+", default=[], help="cards (gtx-970-windows, 4g, ...) and recipes")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="predict every file anew, change nothing; 1: one is wrong")
    what.add_argument("--table", action="store_true", help="only write the tables of the documents, and print it")
    add("--jobs", metavar="N", type=int, default=1, help="processes (%(default)s)")
    return parser


def _make(wanted: Sequence[CardRecipe], jobs: int) -> None:
    rows = load_rows()
    for cell, row in _each(make, [(cell,) for cell in wanted], jobs):
        rows[cell.name] = row
        save_rows(rows)  # a run that is broken off leaves what it has made


def _check(wanted: Sequence[CardRecipe], jobs: int) -> int:
    rows = load_rows()
    problems = [p for _, found in _each(check, [(cell, rows.get(cell.name)) for cell in wanted], jobs) for p in found]
    problems += [f"{path} does not show the table" for path, text in documents().items() if path.read_text() != text]
    print("\n".join(problems) or f"{len(wanted)} profiles are what the predictor says, and fit")
    return FOUND_WRONG if problems else DONE


def _each(work: Callable[..., T], tasks: Sequence[Task], jobs: int) -> Iterator[tuple[CardRecipe, T]]:
    """(cell, what `work` says of the task that begins with it) as they are done, and lines of progress."""
    began = time.monotonic()
    for done, (task, answer) in enumerate(_answers(work, tasks, jobs), start=1):
        left = (time.monotonic() - began) / done * (len(tasks) - done)
        name = f"{task[0].name} ({done} of {len(tasks)})"
        print(f"... {name}, about {format_seconds(left)} left", file=sys.stderr, flush=True)
        yield task[0], answer


def _answers(work: Callable[..., T], tasks: Sequence[Task], jobs: int) -> Iterator[tuple[tuple[Any, ...], T]]:
    if jobs == 1 or len(tasks) == 1:
        yield from ((task, work(*task)) for task in tasks)
        return
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
