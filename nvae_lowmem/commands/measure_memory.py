"""Measures what training takes of the card in this machine, and how far the prediction is off.

Each configuration runs some steps in a process of its own. `--matrix --cap 3.2G --out FOLDER` measures a set of
configurations and writes their recordings (replay them with python -m nvae_lowmem.memory.allocator FOLDER) and a
calibration file for tools/predict_memory.py and fit_memory.py. Without a card, --device cpu checks the step's
allocations against the prediction's.

Exit status: 0 all as predicted; 1 a run failed; 2 when the command line, a file or the machine is at fault; 3 a run
took more than predicted and its margin, or the replay of a recording differs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nvae_lowmem.config.profile_file import load, override
from nvae_lowmem.config.recipes import RECIPES, recipe
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.card import Card
from nvae_lowmem.hardware.find_card import detect_card
from nvae_lowmem.memory.allocator.recording import Recording, save_recordings
from nvae_lowmem.memory.measure.assess import Assessment, assess_or_fail
from nvae_lowmem.memory.measure.calibration import calibrate, save_calibration
from nvae_lowmem.memory.measure.job import Job, measure, require_steps, with_cap
from nvae_lowmem.memory.measure.measured_files import MEASUREMENTS, card_as_table, load_measured
from nvae_lowmem.memory.measure.measurement import DeviceFacts
from nvae_lowmem.memory.measure.report import as_table, as_text
from nvae_lowmem.units import parse_bytes

DONE, FAILED, BAD_INPUT, BEYOND_MARGIN = 0, 1, 2, 3
CALIBRATION = "calibration.toml"

_LEAN = ("plan.keep=input", "plan.offload_optimizer=true", "plan.precision=fp16")
_ZERO = ("plan.engine=deepspeed", "plan.zero_stage=2")
MATRIX: dict[str, tuple[str, ...]] = {
    "tiny": ("plan.precision=fp32", "plan.engine=torch"),
    "tiny-auto": ("plan.precision=auto", "plan.keep=cheap", "plan.engine=torch"),
    "tiny-fp16-clipped": ("plan.precision=fp16", "training.clip_norm=200.0", "plan.engine=torch"),
    "tiny-zero2": ("plan.precision=fp32", *_ZERO),
    "mnist-100": ("plan.precision=fp32", "plan.micro_batch=100", "plan.keep=input"),
    "mnist-200": _LEAN,
    "mnist-zero2": (*_LEAN, *_ZERO),
    "cifar10-8": (*_LEAN, "plan.micro_batch=8", "plan.keep=cheap"),
    "cifar10-32": _LEAN,
    "celeba64-4-host": (*_LEAN, "plan.micro_batch=4", "plan.keep=host"),
    "celeba64-8-fp32": (*_LEAN, "plan.micro_batch=8", "plan.precision=fp32"),
    "celeba64-16": _LEAN,
    "celeba64-8-on-card": (*_LEAN, "plan.offload_optimizer=false", "plan.micro_batch=8"),
    "imagenet32-24": _LEAN,
    "celebahq256-1": (*_LEAN, "plan.micro_batch=1"),
    "ffhq256-4": _LEAN,
}
"""Recipe, and a name for what is changed in it -> the changes: recipes x policies x precisions x sizes x engines."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write and return the exit status."""
    return run_measure(sys.argv[1:] if argv is None else argv, description=__doc__)


def run_measure(argv: Sequence[str], description: str | None = None) -> int:
    """Run the command; returns the exit status."""
    arguments = _parser(description).parse_args(list(argv))
    try:
        report, runs = _compared_again(arguments) if arguments.compare is not None else _measured(arguments)
    except ConfigError as error:
        print(f"measure_memory: {error}", file=sys.stderr)
        return BAD_INPUT
    text = as_text(runs[0]) if len(runs) == 1 else as_table(runs)
    print(json.dumps(report, indent=2) if arguments.json == "-" else text)
    return _exit_status(runs)


def _exit_status(runs: Sequence[Assessment]) -> int:
    statuses = {run.outcome.status for run in runs}
    if statuses == {"refused"}:
        return BAD_INPUT
    if statuses & {"refused", "failed"}:
        return FAILED
    return DONE if all(run.agrees is not False for run in runs) else BEYOND_MARGIN


def _measured(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Assessment]]:
    """Measure all configurations; the report, which is written after each: what is done is not lost with the rest."""
    jobs = list(_jobs(arguments))
    card = _card(arguments.device)
    _require_writable(arguments)
    runs: list[Assessment] = []
    recordings: list[Recording] = []
    for number, job in enumerate(jobs, start=1):
        _say(f"{number} of {len(jobs)}: {job.name} on {job.device}, {job.steps} steps")
        with tempfile.TemporaryDirectory(prefix="measure-memory-") as folder:
            outcome = measure(job, Path(folder))
        if outcome.detail:
            _say(f"{outcome.status}: {outcome.detail}")
        if outcome.recording is not None and outcome.recording.checkpoints:
            recordings.append(outcome.recording)
        runs.append(Assessment(outcome=outcome) if arguments.no_compare else assess_or_fail(outcome, card))
        report = _about(runs, card)
        _write(arguments, report, runs, recordings)
    return report, runs


def _compared_again(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Assessment]]:
    """The report of the named folder with every comparison made anew."""
    outcomes, card, report = load_measured(Path(arguments.compare))
    _require_writable(arguments)
    runs = []
    for number, outcome in enumerate(outcomes, start=1):
        _say(f"{number} of {len(outcomes)}: {outcome.job.name}")
        runs.append(assess_or_fail(outcome, card))
    report = {**report, "runs": [run.to_json() for run in runs]}
    _write(arguments, report, runs, [outcome.recording for outcome in outcomes if outcome.recording is not None])
    return report, runs


def _say(line: str) -> None:
    print(f"... {line}", file=sys.stderr, flush=True)


# ---- the command line ------------------------------------------------------------------------------------------------


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipe", metavar="NAME", action="append", default=[], help=f"one of {', '.join(RECIPES)}; may be repeated")
    add("--profile", metavar="FILE", action="append", default=[], help="a TOML file or a shipped name; may be repeated")
    add("--matrix", action="store_true", help=f"{len(MATRIX)} configurations: recipes, policies, precisions, engines")
    add("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="for all: for example plan.keep=all")
    add("--micro-batch", metavar="N", type=int, help="images per forward pass (the profile's)")
    add("--cap", metavar="SIZE", help="what the CUDA allocator may take, such as 3.2G (the profile's plan.cap_bytes)")
    add("--steps", metavar="N", type=int, default=3, help="optimiser steps, at least 3 (%(default)s)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: check the step's allocations without a card")
    add("--timeout", metavar="SECONDS", type=float, default=900.0, help="for each configuration (%(default)g)")
    add("--no-compare", action="store_true", help="measure only; compare later, on any machine, with --compare")
    add("--compare", metavar="FOLDER", help="measure nothing: compare what --out FOLDER has, recordings of a card")
    add("--out", metavar="FOLDER", help=f"write {MEASUREMENTS}; on a card also recordings and {CALIBRATION}")
    add("--json", metavar="FILE", help="write the report as JSON, too; - prints JSON and nothing else")
    return parser


def _jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """What to measure, in order. Raises ConfigError for all that can be told before anything runs."""
    require_steps(arguments.steps)
    if not arguments.timeout > 0:
        raise ConfigError(f"--timeout {arguments.timeout:g} must be a number of seconds above 0, such as 900")
    if arguments.micro_batch is not None and arguments.micro_batch < 1:
        raise ConfigError(f"--micro-batch {arguments.micro_batch} must be at least 1")
    cap_bytes = _size(arguments.cap) if arguments.cap is not None else 0
    wanted = [(name, recipe(name)) for name in arguments.recipe]
    wanted += [(profile.name, profile) for profile in map(load, arguments.profile)]
    if arguments.matrix:
        wanted += matrix()
    if not wanted:
        raise ConfigError(
            "what to measure? Name --recipe NAME or --profile FILE, or give --matrix (or --compare FOLDER)"
        )
    names: dict[str, int] = {}
    for name, profile in wanted:
        names[name] = names.get(name, 0) + 1
        unique = name if names[name] == 1 else f"{name}-{names[name]}"
        if arguments.micro_batch is not None:
            profile = profile.with_plan(micro_batch=arguments.micro_batch)
        profile = with_cap(override(profile, arguments.set), cap_bytes)
        yield Job(
            name=unique, profile=profile, device=arguments.device, steps=arguments.steps,
            timeout_seconds=arguments.timeout,
        )  # fmt: skip


def matrix() -> list[tuple[str, Profile]]:
    """The built-in configurations by name."""
    return [(name, override(recipe(name.partition("-")[0]), changes)) for name, changes in MATRIX.items()]


def _size(text: str) -> int:
    try:
        return parse_bytes(text, "--cap")
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _card(device: str) -> Card | None:
    """The card to measure on; None for the CPU. Raises ConfigError where torch sees none."""
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        raise ConfigError(
            f"torch {torch.__version__} sees no CUDA GPU here (ask tools/doctor.py why), and measuring needs one. "
            "--device cpu checks the step's allocations without a card, and tools/predict_memory.py predicts"
        )
    return detect_card()


# ---- what it writes --------------------------------------------------------------------------------------------------


def _about(runs: Sequence[Assessment], card: Card | None) -> dict[str, Any]:
    """The report: where and when, as the first run that came to its end saw it, and the runs."""
    seen = next((run.outcome.measured for run in runs if run.outcome.measured is not None), None)
    named = DeviceFacts(card.name if card is not None else "cpu")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": (seen.device if seen is not None else named)._asdict(),
        "versions": seen.versions if seen is not None else {"torch": str(torch.__version__)},
        "card": card_as_table(card),
        "runs": [run.to_json() for run in runs],
    }


def _require_writable(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for files that could not be written at the end of it all."""
    try:
        if arguments.out is not None:
            Path(arguments.out).mkdir(parents=True, exist_ok=True)
            (Path(arguments.out) / MEASUREMENTS).open("a").close()
    except OSError as error:
        raise _unwritable("--out", arguments.out, error) from None
    if arguments.json not in (None, "-") and not Path(arguments.json).parent.is_dir():
        raise ConfigError(f"--json {arguments.json} cannot be written: there is no such folder; name one that exists")


def _unwritable(flag: str, path: Any, error: OSError) -> ConfigError:
    return ConfigError(f"{flag} {path} cannot be written: {error.strerror or error}; name another place")


def _write(
    arguments: argparse.Namespace,
    report: Mapping[str, Any],
    runs: Sequence[Assessment],
    recordings: Sequence[Recording],
) -> None:
    text = json.dumps(report, indent=2) + "\n"
    try:
        if arguments.json not in (None, "-"):
            Path(arguments.json).write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable("--json", arguments.json, error) from None
    if arguments.out is None:
        return
    folder = Path(arguments.out)
    try:
        (folder / MEASUREMENTS).write_text(text, encoding="utf-8")
        if report["card"] is None or not recordings:
            return
        save_recordings(folder, recordings)
        source = f"measured on {report['device']['name']}, torch {report['versions']['torch']}, {report['date']}"
        header = (
            f"What memory no trace sees took: {source}.\nFor tools/predict_memory.py and fit_memory.py, --calibration."
        )
        save_calibration(folder / CALIBRATION, calibrate(runs, source), header)
    except OSError as error:
        raise _unwritable("--out", folder, error) from None
