"""Predicts what training takes of a card's memory and of the host's, and what owns the peak; needs no GPU.

Exit status: 0 it fits, or no card was named; 3 it does not fit; 2 when the command line or a file is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from nvae_lowmem.config.profile_file import load, override
from nvae_lowmem.config.recipes import RECIPES, recipe
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.budget import chosen_card, this_os
from nvae_lowmem.hardware.card import OsName
from nvae_lowmem.memory.predict.predict import as_text, decided, predict
from nvae_lowmem.memory.predict.untraced import load_calibration
from nvae_lowmem.memory.trace.inference import generation_peaks
from nvae_lowmem.training.batch_split import split_batch
from nvae_lowmem.units import format_bytes


def main(argv: Sequence[str] | None = None) -> int:
    """Predict, print and return the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        profile = _profile(arguments)
        split = split_batch(profile, processes=1)
        chosen = chosen_card(arguments.card, arguments.gpu_mem, arguments.os or this_os())
        card, budget = chosen or (None, None)
        calibration = load_calibration(arguments.calibration) if arguments.calibration else None
        profile = decided(profile, card, budget)
        began = time.monotonic()
        print(f"... tracing {split} of {profile.name}, {profile.plan.precision}", file=sys.stderr, flush=True)
        prediction = predict(
            profile, split.micro, split.accumulation, card, budget, arguments.settings, calibration=calibration
        )
        print(f"... done in {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        found = prediction.to_json()
        if arguments.generation:
            print("... tracing sampling, evaluation and pictures", file=sys.stderr, flush=True)
            peaks = generation_peaks(profile, split.micro)
            found["generation_peak_bytes"] = {work: peak.nbytes for work, peak in peaks.items()}
        text = json.dumps(found, indent=2)
        if arguments.json and arguments.json != "-":
            _write(Path(arguments.json), text)
    except ConfigError as error:
        print(f"predict_memory: {error}", file=sys.stderr)
        return 2
    cap_bytes = profile.plan.cap_bytes
    print(text if arguments.json == "-" else as_text(prediction, cap_bytes))
    if arguments.generation and arguments.json != "-":
        print("\nAllocated peaks of work without gradients, in a process of its own or while training")
        for work, nbytes in found["generation_peak_bytes"].items():
            print(f"  {work:<26}{format_bytes(nbytes)}")
    return 0 if not cap_bytes or prediction.fits(cap_bytes) else 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--recipe", metavar="NAME", help=f"one of {', '.join(RECIPES)}")
    which.add_argument("--profile", metavar="FILE", help="a profile's TOML file, or the name of a shipped profile")
    add = parser.add_argument
    add("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="for example plan.keep=input")
    add("--micro-batch", metavar="N", type=int, help="images per forward pass (the profile's)")
    add("--card", metavar="NAME", help="gtx-970, ...; auto: the one in this machine; or a TOML file that describes it")
    add("--gpu-mem", metavar="SIZE", help="a card of this size, such as 4G (with --card: use no more of it)")
    add(
        "--os", choices=get_args(OsName), help="linux (headless), desktop (Linux with a screen), windows; else this one"
    )
    add("--settings", metavar="TEXT", default="", help="of PyTorch's allocator: expandable_segments:True, ...")
    add("--calibration", metavar="FILE", help="TOML or JSON with what was measured on a card")
    add("--generation", action="store_true", help="also sampling, evaluation and pictures (half a minute more)")
    add("--json", metavar="FILE", help="write the prediction as JSON, too; - prints JSON and nothing else")
    return parser


def _profile(arguments: argparse.Namespace) -> Profile:
    profile = load(arguments.profile) if arguments.profile is not None else recipe(arguments.recipe)
    if arguments.micro_batch is not None:
        if arguments.micro_batch < 1:
            raise ConfigError(f"--micro-batch {arguments.micro_batch} must be at least 1")
        profile = profile.with_plan(micro_batch=arguments.micro_batch)
    return override(profile, arguments.set)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--json {path} cannot be written: {error.strerror}; name a file in a folder that is"
        ) from None
