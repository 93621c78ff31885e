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

    With --data and --hours it chooses the model, too: for these images, this card and so much time.

    Exit status: 0 a plan fits; 3 nothing fits, and what would make it fit; 2 when the command line or a file is wrong.

    Examples:
      nvae-lowmem fit-memory --recipe celeba64 --gpu-mem 4G
      nvae-lowmem fit-memory --recipe ffhq256 --card gtx-970 --groups 8..16 --out mine.toml
      nvae-lowmem fit-memory --profile mine.toml --card auto --prefer batch --picture step.html
      nvae-lowmem fit-memory --card gtx-970 --hours 48 --data ~/pictures --size 64
    """

    data: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """With --hours: the images that a model is to be chosen for, in any form that training takes."""
    hours: float | None = None
    """Choose the model for --data as well: what this card can train in so many hours."""
    size: int = 0
    """With --hours: pixels per side to train at; 0: the images' own where they are small, else 64."""
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
    at_least(0, hours=command.hours, size=command.size)
    profile = None if command.hours else command.unplanned()
    _check_choice(command)
    host_mem_bytes = parse_memory(command.host_mem, "--host-mem") if command.host_mem else None
    groups = _range(command.groups) if command.groups else None
    out, table = output_file("--out", command.out), output_file("--json", command.json)
    picture = output_file("--picture", command.picture, PICTURE_SUFFIXES)
    from nvae_lowmem.memory.plan.candidates import Wishes
    from nvae_lowmem.memory.plan.explain import as_json, as_text, planned, reasons
    from nvae_lowmem.memory.plan.fit import fit
    from nvae_lowmem.memory.predict.predict import predictor_for
    from nvae_lowmem.memory.predict.untraced import load_calibration

    calibration = load_calibration(command.calibration) if command.calibration else None
    wishes = Wishes(
        prefer=command.prefer, min_micro_batch=command.min_micro_batch, groups=groups,
        host_mem_bytes=host_mem_bytes, engine=command.engine,
    )  # fmt: skip
    predictor, on = predictor_for(card, budget, calibration), command.os or this_os()
    typed, quiet = shlex.join(["tools/fit_memory.py", *given]), command.json == "-"
    if profile is None:
        from nvae_lowmem.budget.planned import for_card
        from nvae_lowmem.commands.choice import wanted

        assert command.data is not None
        asked = wanted(command.data, command.size, command.hours, command.set)
        chosen_plan = for_card(asked, card, budget, wishes, predictor, on=on, command=typed, say=say)
        assert chosen_plan.fit is not None
        found, plan, header = chosen_plan.fit, chosen_plan.profile, chosen_plan.header()
        table_of = as_json(found) | chosen_plan.as_json()
        text = f"{chosen_plan.text()}\n\n{as_text(found)}"
    else:
        found = fit(profile, card, budget, wishes, predictor, say=say)
        table_of, text, header = as_json(found), as_text(found), "\n".join(reasons(found))
        plan = planned(found, on, typed) if found.fits else profile
    answer = json.dumps(table_of, indent=2)
    print(answer if quiet else text)
    if found.fits:
        path = _write_plan(plan, header, out, quiet)
        if profile is None:
            _write_sheet(plan, path, quiet)
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


def _check_choice(command: FitCommand) -> None:
    """Raises ConfigError for flags that choose a model beside others that name one, or only half of them."""
    if not command.hours:
        for flag, given in (("--data", command.data), ("--size", command.size)):
            if given:
                raise ConfigError(f"{flag} {given} chooses a model only together with --hours: give --hours 8")
        return
    for flag, given in (
        ("--recipe", command.recipe),
        ("--profile", command.profile),
        ("--groups", command.groups),
        ("--total-batch", command.total_batch),
    ):
        if given:
            raise ConfigError(f"--hours chooses the model and its batch, and {flag} {given} names one: leave one out")
    if not command.data:
        raise ConfigError(f"--hours {command.hours:g} chooses a model for images: name them with --data")


def _write_plan(plan: Profile, header: str, out: Path | None, quiet: bool) -> Path:
    name = f"{plan.name}-{plan.provenance['card']}"
    path = out or Path(f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.toml")
    try:
        save(plan, path, header=header)
    except OSError as error:
        raise cannot_write("--out", path, error) from None
    if not quiet:
        print(f"\nwrote {path}: train with {command_line('train')} --profile {path}")
    return path


def _write_sheet(plan: Profile, beside: Path, quiet: bool) -> None:
    """The images as training will see them, beside the profile."""
    from nvae_lowmem.budget.planned import sheet
    from nvae_lowmem.generation.grids import png_bytes

    path = write_output("--out", beside.with_name(f"{beside.stem}-images.png"), png_bytes(sheet(plan)))
    if not quiet:
        print(f"wrote {path}: the images as training will see them")


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
