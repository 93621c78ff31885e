"""Peak bytes of one training step of the six recipes at the published batch per GPU, counted on fake tensors.

Each recipe runs under its leanest plan (profiles/lean-RECIPE.toml): half precision, optimiser states on the host.
The baseline is what a determined user gets from the published model with one checkpoint per cell, half precision, fused
BN-swish, a head checkpointed per image, and gradients dropped as they appear, counted the same way.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time

import torch

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.recipes import PUBLISHED_RECIPES
from nvae_lowmem.memory.trace.events import Trace
from nvae_lowmem.memory.trace.training import trace_training
from nvae_lowmem.units import GIB

BASELINE_GIB = dict(zip(PUBLISHED_RECIPES, (1.79, 3.16, 3.55, 3.92, 9.74, 9.74), strict=True))


def block_peaks(trace: Trace) -> dict[str, int]:
    """For each block the most bytes that lay on the card, beside weights and block inputs, while it was at work."""
    peaks: dict[str, int] = {}
    live, block = 0, ""
    for a, is_alloc in trace.walk():
        if is_alloc:
            block = a.block
        if a.category not in ("host", "weight", "block input", "data"):
            live += a.nbytes if is_alloc else -a.nbytes
        peaks[block] = max(peaks.get(block, 0), live)
    return peaks


def measure(name: str, steps: int) -> dict[str, float | str]:
    """One recipe's row: sizes in GiB."""
    profile = profiles.load(f"lean-{name}")
    began = time.monotonic()
    trace = trace_training(profile, profile.plan.micro_batch, steps=steps)
    peak, blocks = trace.peak(), block_peaks(trace)
    worst = max((n for n in blocks if n not in ("", "optimizer")), key=lambda n: blocks[n])
    return {
        "recipe": name,
        "micro_batch": profile.plan.micro_batch,
        "peak_gib": peak.nbytes / GIB,
        "baseline_gib": BASELINE_GIB[name],
        "ratio": peak.nbytes / GIB / BASELINE_GIB[name],
        "weights_gib": peak.by_category["weight"] / GIB,
        "block_inputs_gib": peak.by_category["block input"] / GIB,
        "worst_block": worst,
        "worst_block_gib": blocks[worst] / GIB,
        "head_gib": blocks["head"] / GIB,
        "deepspeed_bucket_gib": 4 * profile.plan.bucket_elements / GIB,
        "trace_seconds": time.monotonic() - began,
    }


def main() -> None:
    """Print the table; write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(PUBLISHED_RECIPES), choices=PUBLISHED_RECIPES)
    parser.add_argument("--steps", type=int, default=1, help="optimiser steps to trace")
    parser.add_argument("--json", default="", help="file to write the rows to")
    arguments = parser.parse_args()
    rows = []
    print(f"{'recipe':12} batch   peak  baseline  ratio | weights  inputs  worst block        head  bucket   (GiB)")
    for name in arguments.recipes:
        r = measure(name, arguments.steps)
        rows.append(r)
        print(
            f"{name:12} {r['micro_batch']:5} {r['peak_gib']:6.2f} {r['baseline_gib']:9.2f} {r['ratio']:6.2f} | "
            f"{r['weights_gib']:7.2f} {r['block_inputs_gib']:7.2f}  {r['worst_block_gib']:5.2f} {r['worst_block']:10} "
            f"{r['head_gib']:6.2f} {r['deepspeed_bucket_gib']:7.2f}   traced in {r['trace_seconds']:.0f} s",
            flush=True,
        )
    if arguments.json:
        head = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "device": "fake tensors, no GPU"}
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(head | {"rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
