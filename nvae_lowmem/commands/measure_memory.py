"""Measure what training takes of the card in this machine, and how far the prediction is off."""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.commands.flags import Overrides, Repeated, Switch, overridden, with_micro_batch
from nvae_lowmem.config.profile_file import load, override
from nvae_lowmem.config.recipes import recipe
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError, ExitCode, command_line
from nvae_lowmem.files import cannot_write, output_file, write_output
from nvae_lowmem.hardware.budget import parse_memory
from nvae_lowmem.progress import say

if TYPE_CHECKING:
    from nvae_lowmem.hardware.card import Card
    from nvae_lowmem.memory.allocator.recording import Recording
    from nvae_lowmem.memory.measure.assess import Assessment
    from nvae_lowmem.memory.measure.job import Job

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


@dataclass(frozen=True, kw_only=True)
class MeasureCommand:
    """Measure what training takes of the card in this machine, and how far the prediction is off.

    Each configuration runs some steps in a process of its own. `--matrix --cap 3.2G --out FOLDER` measures a set of
    configurations and writes their recordings (replay them with python -m nvae_lowmem.memory.allocator FOLDER) and a
    calibration file for predict-memory and fit-memory. Without a card, --device cpu checks the step's allocations
    against the prediction's.

    Exit status: 0 all as predicted; 1 a run failed; 2 when the command line, a file or the machine is at fault; 3 a run
    took more than predicted and its margin, or the replay of a recording differs.

    Examples:
      nvae-lowmem measure-memory --matrix --cap 3.2G --out measured
      nvae-lowmem measure-memory --profile gtx-970-celeba64 --steps 5
      nvae-lowmem measure-memory --recipe tiny --device cpu
    """

    recipe: Annotated[Repeated, tyro.conf.arg(metavar="NAME")] = ()
    """A published recipe, or tiny; may be repeated."""
    profile: Annotated[Repeated, tyro.conf.arg(metavar="FILE")] = ()
    """A TOML file or the name of a shipped profile; may be repeated."""
    matrix: Switch = False
    """Many configurations: recipes, policies, precisions, engines."""
    set: Overrides = ()
    """For all of them: for example plan.keep=all."""
    micro_batch: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Images per forward pass (the profile's)."""
    cap: str = ""
    """What the CUDA allocator may take, such as 3.2G (the profile's plan.cap_bytes)."""
    steps: int = 3
    """Optimiser steps, at least 3."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: check the step's allocations without a card."""
    timeout: float = 900.0
    """Seconds for each configuration."""
    no_compare: Switch = False
    """Measure only; compare later, on any machine, with --compare."""
    compare: str = ""
    """Measure nothing: compare what --out FOLDER has, recordings of a card."""
    out: str = ""
    """Folder for measurements.json; on a card also for recordings and calibration.toml."""
    json: str = ""
    """Write the report as JSON, too; - prints JSON and nothing else."""

    def wanted(self) -> list[tuple[str, Profile]]:
        """What to measure, by name and in order. Raises ConfigError for all that can be told from the flags alone."""
        if not self.timeout > 0:
            raise ConfigError(f"--timeout {self.timeout:g} must be a number of seconds above 0, such as 900")
        found = [(name, recipe(name)) for name in self.recipe]
        found += [(profile.name, profile) for profile in map(load, self.profile)]
        if self.matrix:
            found += matrix()
        if not found:
            raise ConfigError(
                "what to measure? Name --recipe NAME or --profile FILE, or give --matrix (or --compare FOLDER)"
            )
        return [(name, overridden(with_micro_batch(profile, self.micro_batch), self.set)) for name, profile in found]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write and return the exit code."""
    return run_command(MeasureCommand, _measure, argv)


def _measure(command: MeasureCommand) -> ExitCode:
    report, runs = _compared_again(command) if command.compare else _measured(command)
    from nvae_lowmem.memory.measure.report import as_table, as_text

    text = as_text(runs[0]) if len(runs) == 1 else as_table(runs)
    print(json.dumps(report, indent=2) if command.json == "-" else text)
    return exit_code_of(runs)


def exit_code_of(runs: Sequence[Assessment]) -> ExitCode:
    """The exit code of some runs: refused alone is bad input, refused among others a failure."""
    statuses = {run.outcome.status for run in runs}
    if statuses == {"refused"}:
        return ExitCode.BAD_INPUT
    if statuses & {"refused", "failed"}:
        return ExitCode.CHECK_FAILED
    return ExitCode.DONE if all(run.agrees is not False for run in runs) else ExitCode.DOES_NOT_FIT


def _measured(command: MeasureCommand) -> tuple[dict[str, Any], list[Assessment]]:
    """Measure all configurations; the report, which is written after each: what is done is not lost with the rest."""
    wanted, cap_bytes = command.wanted(), parse_memory(command.cap, "--cap") if command.cap else 0
    file = output_file("--json", command.json)
    from nvae_lowmem.memory.measure.assess import Assessment, assess_or_fail
    from nvae_lowmem.memory.measure.job import measure, require_steps

    require_steps(command.steps)
    jobs = _jobs(command, wanted, cap_bytes)
    card = card_to_measure(command.device)
    _require_writable(command)
    runs: list[Assessment] = []
    recordings: list[Recording] = []
    for number, job in enumerate(jobs, start=1):
        say(f"{number} of {len(jobs)}: {job.name} on {job.device}, {job.steps} steps")
        with tempfile.TemporaryDirectory(prefix="measure-memory-") as folder:
            outcome = measure(job, Path(folder))
        if outcome.detail:
            say(f"{outcome.status}: {outcome.detail}")
        if outcome.recording is not None and outcome.recording.checkpoints:
            recordings.append(outcome.recording)
        runs.append(Assessment(outcome=outcome) if command.no_compare else assess_or_fail(outcome, card))
        report = _about(runs, card)
        _write(command, file, report, runs, recordings)
    return report, runs


def _compared_again(command: MeasureCommand) -> tuple[dict[str, Any], list[Assessment]]:
    """The report of the named folder with every comparison made again."""
    file = output_file("--json", command.json)
    from nvae_lowmem.memory.measure.assess import assess_or_fail
    from nvae_lowmem.memory.measure.measured_files import load_measured

    outcomes, card, report = load_measured(Path(command.compare))
    _require_writable(command)
    runs = []
    for number, outcome in enumerate(outcomes, start=1):
        say(f"{number} of {len(outcomes)}: {outcome.job.name}")
        runs.append(assess_or_fail(outcome, card))
    report = {**report, "runs": [run.to_json() for run in runs]}
    _write(command, file, report, runs, [outcome.recording for outcome in outcomes if outcome.recording is not None])
    return report, runs


# ---- what to measure -------------------------------------------------------------------------------------------------


def _jobs(command: MeasureCommand, wanted: Sequence[tuple[str, Profile]], cap_bytes: int) -> list[Job]:
    from nvae_lowmem.memory.measure.job import Job, with_cap

    names: dict[str, int] = {}
    jobs = []
    for name, profile in wanted:
        names[name] = names.get(name, 0) + 1
        unique = name if names[name] == 1 else f"{name}-{names[name]}"
        job = Job(
            name=unique, profile=with_cap(profile, cap_bytes), device=command.device, steps=command.steps,
            timeout_seconds=command.timeout,
        )  # fmt: skip
        jobs.append(job)
    return jobs


def matrix() -> list[tuple[str, Profile]]:
    """The built-in configurations by name."""
    return [(name, override(recipe(name.partition("-")[0]), changes)) for name, changes in MATRIX.items()]


def card_to_measure(device: str) -> Card | None:
    """The card to measure on; None for the CPU. Raises ConfigError where torch sees none."""
    if device == "cpu":
        return None
    import torch

    from nvae_lowmem.hardware.find_card import detect_card

    if not torch.cuda.is_available():
        raise ConfigError(
            f"torch {torch.__version__} sees no CUDA GPU here (ask {command_line('doctor')} why), and measuring needs "
            f"one. --device cpu checks the step's allocations without a card, and {command_line('predict-memory')} "
            "predicts"
        )
    return detect_card()


# ---- what it writes --------------------------------------------------------------------------------------------------


def _about(runs: Sequence[Assessment], card: Card | None) -> dict[str, Any]:
    """The report: where and when, as the first run that came to its end saw it, and the runs."""
    import torch

    from nvae_lowmem.memory.measure.measured_files import card_as_table
    from nvae_lowmem.memory.measure.measurement import DeviceFacts

    seen = next((run.outcome.measured for run in runs if run.outcome.measured is not None), None)
    named = DeviceFacts(card.name if card is not None else "cpu")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": (seen.device if seen is not None else named)._asdict(),
        "versions": seen.versions if seen is not None else {"torch": str(torch.__version__)},
        "card": card_as_table(card),
        "runs": [run.to_json() for run in runs],
    }


def _require_writable(command: MeasureCommand) -> None:
    """Raises ConfigError for a folder that could not be written to at the end of it all."""
    from nvae_lowmem.memory.measure.measured_files import MEASUREMENTS

    if not command.out:
        return
    try:
        Path(command.out).mkdir(parents=True, exist_ok=True)
        (Path(command.out) / MEASUREMENTS).open("a").close()
    except OSError as error:
        raise cannot_write("--out", command.out, error) from None


def _write(
    command: MeasureCommand,
    file: Path | None,
    report: Mapping[str, Any],
    runs: Sequence[Assessment],
    recordings: Sequence[Recording],
) -> None:
    from nvae_lowmem.memory.allocator.recording import save_recordings
    from nvae_lowmem.memory.measure.calibration import calibrate, save_calibration
    from nvae_lowmem.memory.measure.measured_files import MEASUREMENTS

    text = json.dumps(report, indent=2) + "\n"
    if file is not None:
        write_output("--json", file, text)
    if not command.out:
        return
    folder = Path(command.out)
    write_output("--out", folder / MEASUREMENTS, text)
    if report["card"] is None or not recordings:
        return
    try:
        save_recordings(folder, recordings)
        source = f"measured on {report['device']['name']}, torch {report['versions']['torch']}, {report['date']}"
        header = (
            f"What memory no trace sees took: {source}.\nFor tools/predict_memory.py and fit_memory.py, --calibration."
        )
        save_calibration(folder / CALIBRATION, calibrate(runs, source), header)
    except OSError as error:
        raise cannot_write("--out", folder, error) from None
