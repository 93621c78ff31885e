"""Predict what training takes of a card's memory and of the host's, and what owns the peak."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.commands.flags import CardFlags, ModelFlags, Switch, overridden, with_micro_batch
from nvae_lowmem.errors import ExitCode, command_line
from nvae_lowmem.files import output_file, write_output
from nvae_lowmem.hardware.budget import chosen_card, this_os
from nvae_lowmem.progress import say
from nvae_lowmem.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class PredictCommand(CardFlags, ModelFlags):
    """Predict what training takes of a card's memory and of the host's, and what owns the peak; needs no GPU.

    Nothing is planned: the model trains as the recipe or profile says. What a card has room for: nvae-lowmem
    fit-memory.

    Exit status: 0 it fits, or no card was named; 3 it does not fit; 2 when the command line or a file is wrong.

    Examples:
      nvae-lowmem predict-memory --profile gtx-970-celeba64
      nvae-lowmem predict-memory --recipe celeba64 --micro-batch 4 --card gtx-970
      nvae-lowmem predict-memory --recipe cifar10 --set plan.keep=input plan.precision=fp16 --gpu-mem 4G
    """

    micro_batch: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Images per forward pass (the profile's)."""
    settings: str = ""
    """Of PyTorch's allocator: expandable_segments:True, ..."""
    calibration: str = ""
    """TOML or JSON with what was measured on a card."""
    generation: Switch = False
    """Also sampling, evaluation and pictures (half a minute more)."""
    json: str = ""
    """Write the prediction as JSON, too; - prints JSON and nothing else."""


def main(argv: Sequence[str] | None = None) -> int:
    """Predict, print and return the exit code."""
    return run_command(PredictCommand, _predict, argv)


def _predict(command: PredictCommand) -> ExitCode:
    profile = overridden(with_micro_batch(command.base(), command.micro_batch), command.set)
    file = output_file("--json", command.json)
    chosen = chosen_card(command.card or None, command.gpu_mem or None, command.os or this_os())
    card, budget = chosen or (None, None)
    from nvae_lowmem.memory.predict.predict import as_text, predict, resolve_plan
    from nvae_lowmem.memory.predict.untraced import load_calibration
    from nvae_lowmem.training.batch_split import split_batch

    calibration = load_calibration(command.calibration) if command.calibration else None
    split = split_batch(profile, processes=1)
    profile = resolve_plan(profile, card, budget)
    began = time.monotonic()
    say(f"tracing {split} of {profile.name}, {profile.plan.precision}")
    prediction = predict(
        profile, split.micro, split.accumulation, card, budget, command.settings, calibration=calibration
    )
    say(f"done in {time.monotonic() - began:.1f} s")
    found = prediction.to_json()
    if command.generation:
        from nvae_lowmem.memory.trace.inference import generation_peaks

        say("tracing sampling, evaluation and pictures")
        peaks = generation_peaks(profile, split.micro)
        found["generation_peak_bytes"] = {work: peak.nbytes for work, peak in peaks.items()}
    text = json.dumps(found, indent=2)
    if file is not None:
        write_output("--json", file, text + "\n")
    cap_bytes = profile.plan.cap_bytes
    print(text if command.json == "-" else as_text(prediction, cap_bytes))
    if command.recipe and command.json != "-":
        print(
            "\nThis is the recipe as published, under no plan but what --set says. What makes it fit a card: "
            f"{command_line('fit-memory')} --recipe {command.recipe} --gpu-mem 4G"
        )
    if command.generation and command.json != "-":
        print("\nAllocated peaks of work without gradients, in a process of its own or while training")
        for work, nbytes in found["generation_peak_bytes"].items():
            print(f"  {work:<26}{format_bytes(nbytes)}")
    return ExitCode.DONE if not cap_bytes or prediction.fits(cap_bytes) else ExitCode.DOES_NOT_FIT
