"""Finds the best memory plan of a model for a card, says why, and writes the profile to train with; needs no GPU.

Exit status: 0 a plan fits; 3 nothing fits, and what would make it fit; 2 when the command line or a file is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from nvae_lowmem.config.profile_file import load, override, save
from nvae_lowmem.config.recipes import RECIPES, recipe
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.budget import Budget, chosen_card, parse_memory, this_os
from nvae_lowmem.hardware.card import Card, OsName
from nvae_lowmem.memory.plan.candidates import Prefer, Wishes
from nvae_lowmem.memory.plan.explain import FRONTIER_TITLE, as_json, as_text, frontier_table, planned, reasons, refusals
from nvae_lowmem.memory.plan.fit import Fit, Predictor, fit
from nvae_lowmem.memory.predict.predict import predictor_for
from nvae_lowmem.memory.predict.timeline import PICTURE_SUFFIXES, timeline_html, timeline_png
from nvae_lowmem.memory.predict.untraced import Entry, load_calibration

FITS, BAD_INPUT, NOTHING_FITS = 0, 2, 3
Calibration = Mapping[str, Entry]
Bind = Callable[[Card, Budget, "Calibration | None"], Predictor]


def main(argv: Sequence[str] | None = None) -> int:
    """Find a plan, print it and write the profile; returns the exit status: 0 fits, 3 nothing fits, 2 bad input."""
    return run_fit(sys.argv[1:] if argv is None else argv, description=__doc__)


def run_fit(argv: Sequence[str], description: str | None = None, bind: Bind = predictor_for) -> int:
    """Run the command; returns the exit status. bind: makes the predictor for the card that was asked for."""
    arguments = _parser(description).parse_args(_joined(argv))
    try:
        on: OsName = arguments.os or this_os()
        chosen = chosen_card(arguments.card, arguments.gpu_mem, on)
        if chosen is None:
            raise ConfigError("which card? Give --card NAME, --card auto, or --gpu-mem 4G")
        card, budget = chosen
        profile = _profile(arguments)
        calibration = load_calibration(arguments.calibration) if arguments.calibration is not None else None
        outputs = [
            _output("--out", arguments.out),
            _output("--json", arguments.json if arguments.json != "-" else None),
            _output("--picture", arguments.picture, PICTURE_SUFFIXES),
        ]
        predictor = bind(card, budget, calibration)
        found = fit(profile, card, budget, _wishes(arguments), predictor, say=_say)
        if arguments.json == "-":
            print(json.dumps(as_json(found), indent=2))
        else:
            print(as_text(found))
        if found.fits:
            command = shlex.join(["tools/fit_memory.py", *argv])
            _write_plan(planned(found, on, command), found, outputs[0], quiet=arguments.json == "-")
        _write_reports(found, outputs[1:])
    except ConfigError as error:
        print(f"fit_memory: {error}", file=sys.stderr)
        return BAD_INPUT
    return FITS if found.fits else NOTHING_FITS


def _say(line: str) -> None:
    print(f"... {line}", file=sys.stderr, flush=True)


# ---- the command line ------------------------------------------------------------------------------------------------


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", metavar="NAME", help=f"one of {', '.join(RECIPES)}")
    what.add_argument("--profile", metavar="FILE", help="a profile's TOML file, or the name of a shipped profile")
    add = parser.add_argument
    add("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="for example model.flows=0")
    add("--card", metavar="NAME", help="gtx-970, ...; auto: the one in this machine; or a TOML file that describes it")
    add("--gpu-mem", metavar="SIZE", help="plan for a card of this size, such as 4G (with --card: use no more of it)")
    add(
        "--os", choices=get_args(OsName), help="linux (headless), desktop (Linux with a screen), windows; else this one"
    )
    add("--host-mem", metavar="SIZE", help="host memory that training may take, such as 16G; without it: any")
    add("--prefer", choices=get_args(Prefer), default="speed", help="what to gain with the memory (%(default)s)")
    add("--min-micro-batch", metavar="N", type=int, default=1, help="BatchNorm wants some images (%(default)s)")
    add("--groups", metavar="A..B", help="groups of the highest resolution; the other scales follow in proportion")
    add("--total-batch", metavar="N", type=int, help="images per optimiser step (the profile's)")
    add("--engine", choices=("auto", "torch", "deepspeed"), default="auto", help="auto: the profile's, else torch")
    add("--calibration", metavar="FILE", help="TOML or JSON with what was measured on the card")
    add("--out", metavar="FILE", help="the profile to write (NAME-CARD.toml in this folder)")
    add("--json", metavar="FILE", help="write the answer as JSON, too; - prints JSON and nothing else")
    add("--picture", metavar="FILE", help="the step's memory over time: a file that ends in .png or .html")
    return parser


def _joined(argv: Sequence[str]) -> list[str]:
    """`--gpu-mem -3G` as `--gpu-mem=-3G`, so that a negative size is refused as one and not taken for a flag."""
    out: list[str] = []
    for word in argv:
        if out and out[-1] in ("--gpu-mem", "--host-mem", "--groups") and re.match(r"-\d", word):
            out[-1] += f"={word}"
        else:
            out.append(word)
    return out


def _profile(arguments: argparse.Namespace) -> Profile:
    profile = load(arguments.profile) if arguments.profile is not None else recipe(arguments.recipe)
    # the plan is what is looked for: the profile's own micro-batch must not stand against another total batch
    profile = override(profile.with_plan(micro_batch=0), arguments.set)
    if arguments.total_batch is not None:
        if arguments.total_batch < 1:
            raise ConfigError(f"--total-batch {arguments.total_batch} must be at least 1")
        profile = replace(profile, training=replace(profile.training, total_batch=arguments.total_batch))
    return profile


def _wishes(arguments: argparse.Namespace) -> Wishes:
    host = None
    if arguments.host_mem is not None:
        host = parse_memory(arguments.host_mem, "--host-mem")
    return Wishes(
        prefer=arguments.prefer,
        min_micro_batch=arguments.min_micro_batch,
        groups=_range(arguments.groups) if arguments.groups is not None else None,
        host_mem_bytes=host,
        engine=arguments.engine,
    )


def _range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)\s*(?:\.\.\s*(\d+)\s*)?", text)
    if match is None:
        raise ConfigError(f"--groups {text!r} is neither a number nor a range such as 8..20")
    return int(match[1]), int(match[2] or match[1])


def _output(flag: str, name: str | None, suffixes: Sequence[str] = ()) -> Path | None:
    """The file to write, checked before the work begins."""
    if name is None:
        return None
    path = Path(name)
    if suffixes and path.suffix.lower() not in suffixes:
        raise ConfigError(f"{flag} {name}: the name must end in {' or '.join(suffixes)}")
    if path.is_dir() or not path.parent.is_dir():
        why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ConfigError(f"{flag} {name}: {why}; name a file in a folder that exists")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{flag} {name} cannot be written: no permission; name a file in a folder of your own")
    return path


# ---- the answer ------------------------------------------------------------------------------------------------------


# ---- files -----------------------------------------------------------------------------------------------------------


def _write_plan(plan: Profile, found: Fit, out: Path | None, quiet: bool) -> None:
    name = f"{plan.name}-{plan.provenance['card']}"
    path = out or Path(f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.toml")
    try:
        save(plan, path, header="\n".join(reasons(found)))
    except OSError as error:
        raise _unwritable("--out", path, error) from None
    if not quiet:
        print(f"\nwrote {path}: train with launch/train.py --profile {path}")


def _write_reports(found: Fit, outputs: Sequence[Path | None]) -> None:
    table_file, picture = outputs
    if table_file is not None:
        _write("--json", table_file, json.dumps(as_json(found), indent=2).encode() + b"\n")
    if picture is not None and found.fits:
        _write("--picture", picture, _picture(found, picture.suffix.lower()))


def _picture(found: Fit, suffix: str) -> bytes:
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


def _write(flag: str, path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise _unwritable(flag, path, error) from None


def _unwritable(flag: str, path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{flag} {path} cannot be written: {error.strerror}; name a file in a folder that is")
