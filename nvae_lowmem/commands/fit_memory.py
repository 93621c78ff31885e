"""Find the best memory plan of a model for a card, and write the profile to train with."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.commands.flags import CardFlags, ModelFlags, at_least, overridden
from nvae_lowmem.config.choices import Prefer
from nvae_lowmem.config.profile_file import save
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError, ExitCode, command_line
from nvae_lowmem.files import cannot_write, output_file, write_output
from nvae_lowmem.hardware.budget import chosen_card, parse_memory, this_os
from nvae_lowmem.progress import say

if TYPE_CHECKING:
    from nvae_lowmem.memory.plan.fit import Fit

PICTURE_SUFFIXES = (".png", ".html")


@dataclass(frozen=True, kw_only=True)
class FitCommand(CardFlags, ModelFlags):
    """Find the best memory plan of a model for a card, say why, and write the profile to train with; needs no GPU.

    Exit status: 0 a plan fits; 3 nothing fits, and what would make it fit; 2 when the command line or a file is wrong.

    Examples:
      nvae-lowmem fit-memory --recipe celeba64 --gpu-mem 4G
      nvae-lowmem fit-memory --recipe ffhq256 --card gtx-970 --groups 8..16 --out mine.toml
      nvae-lowmem fit-memory --profile mine.toml --card auto --prefer batch --picture step.html
    """

    host_mem: str = ""
    """Host memory that training may take, such as 16G; without it: any."""
    prefer: Prefer = "speed"
    """What to gain with the memory: images per second, a larger micro-batch, or more groups."""
    min_micro_batch: int = 1
    """Fewest images per forward pass: BatchNorm wants some."""
    groups: str = ""
    """A..B: groups of the highest resolution; the other scales follow in proportion."""
    total_batch: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Images per optimiser step (the profile's)."""
    engine: Literal["auto", "torch", "deepspeed"] = "auto"
    """auto: the profile's, else torch."""
    calibration: str = ""
    """TOML or JSON with what was measured on the card."""
    out: str = ""
    """The profile to write; empty: NAME-CARD.toml in this folder."""
    json: str = ""
    """Write the answer as JSON, too; - prints JSON and nothing else."""
    picture: str = ""
    """The step's memory over time: a file that ends in .png or .html."""

    def unplanned(self) -> Profile:
        """The profile to plan for. Raises ConfigError."""
        base = self.base()
        # the plan is what is looked for: the profile's own micro-batch must not stand against another total batch
        profile = overridden(base.with_plan(micro_batch=0), self.set)
        at_least(1, total_batch=self.total_batch)
        if self.total_batch is None:
            return profile
        return replace(profile, training=replace(profile.training, total_batch=self.total_batch))


def main(argv: Sequence[str] | None = None) -> int:
    """Find a plan, print it and write the profile; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    return run_command(FitCommand, partial(_fit, given=given), argv)


def _fit(command: FitCommand, given: Sequence[str]) -> ExitCode:
    chosen = chosen_card(command.card or None, command.gpu_mem or None, command.os or this_os())
    if chosen is None:
        raise ConfigError("which card? Give --card NAME, --card auto, or --gpu-mem 4G")
    card, budget = chosen
    profile = command.unplanned()
    host_mem_bytes = parse_memory(command.host_mem, "--host-mem") if command.host_mem else None
    groups = _range(command.groups) if command.groups else None
    out, table = output_file("--out", command.out), output_file("--json", command.json)
    picture = output_file("--picture", command.picture, PICTURE_SUFFIXES)
    from nvae_lowmem.memory.plan.candidates import Wishes
    from nvae_lowmem.memory.plan.explain import as_json, as_text, planned
    from nvae_lowmem.memory.plan.fit import fit
    from nvae_lowmem.memory.predict.predict import predictor_for
    from nvae_lowmem.memory.predict.untraced import load_calibration

    calibration = load_calibration(command.calibration) if command.calibration else None
    wishes = Wishes(
        prefer=command.prefer, min_micro_batch=command.min_micro_batch, groups=groups,
        host_mem_bytes=host_mem_bytes, engine=command.engine,
    )  # fmt: skip
    found = fit(profile, card, budget, wishes, predictor_for(card, budget, calibration), say=say)
    answer = json.dumps(as_json(found), indent=2)
    print(answer if command.json == "-" else as_text(found))
    if found.fits:
        plan = planned(found, command.os or this_os(), shlex.join(["tools/fit_memory.py", *given]))
        _write_plan(plan, found, out, quiet=command.json == "-")
    if table is not None:
        write_output("--json", table, answer + "\n")
    if picture is not None and found.fits:
        write_output("--picture", picture, _picture(found, picture.suffix.lower()))
    return ExitCode.DONE if found.fits else ExitCode.DOES_NOT_FIT


def _range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)\s*(?:\.\.\s*(\d+)\s*)?", text)
    if match is None:
        raise ConfigError(f"--groups {text!r} is neither a number nor a range such as 8..20")
    return int(match[1]), int(match[2] or match[1])


def _write_plan(plan: Profile, found: Fit, out: Path | None, quiet: bool) -> None:
    from nvae_lowmem.memory.plan.explain import reasons

    name = f"{plan.name}-{plan.provenance['card']}"
    path = out or Path(f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.toml")
    try:
        save(plan, path, header="\n".join(reasons(found)))
    except OSError as error:
        raise cannot_write("--out", path, error) from None
    if not quiet:
        print(f"\nwrote {path}: train with {command_line('train')} --profile {path}")


def _picture(found: Fit, suffix: str) -> bytes:
    from nvae_lowmem.memory.plan.explain import FRONTIER_TITLE, frontier_table, reasons, refusals
    from nvae_lowmem.memory.predict.timeline import timeline_html, timeline_png

    c, p, cap = found.chosen, found.prediction, found.budget.cap_bytes
    assert p is not None
    model, card = found.planner.profile.name, found.planner.card.name
    title = f"{model} on {card}: micro-batch {c.micro_batch}, {c.profile.plan.precision}"
    if suffix == ".png":
        return timeline_png(p, title, cap)
    tables: list[tuple[str, Sequence[Sequence[str]]]] = [
        ("The plan", [(reason,) for reason in reasons(found)]),
        ("What does not fit", [(line,) for line in refusals(found)] or [("nothing larger was looked for",)]),
        (FRONTIER_TITLE, frontier_table(found)[1]),
    ]
    return timeline_html(p, title, cap, tables).encode()
