"""The speed model beside the only published timings: six recipes on a V100. Needs no GPU: the roofline is traced.

    python benchmarks/speed_model.py --json benchmarks/results/speed_model.json

The published recipes give hours, GPUs, epochs and the size of the training set (arXiv 2007.03898, table 6 and the
commands beside the published code), so images per second and GPU follow. Ours is the estimate of the same step: the
batch per GPU in one piece, fp16 on the tensor cores, every activation kept, states on the card. The published code
averages gradients over its GPUs, which ours does not pay for.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import headline, machine, write_json

from nvae_lowmem.config.recipes import PUBLISHED_IMAGES, PUBLISHED_RECIPES, recipe
from nvae_lowmem.hardware.card import card_from_file
from nvae_lowmem.hardware.precision import choose_precision
from nvae_lowmem.memory.plan.block_costs import record_blocks
from nvae_lowmem.memory.plan.roofline import rates_of, step_seconds

V100 = Path(__file__).with_name("v100.toml")
PUBLISHED_GPU_HOURS = {
    "mnist": 2 * 21, "cifar10": 8 * 55, "celeba64": 8 * 92, "imagenet32": 24 * 70, "celebahq256": 24 * 94,
    "ffhq256": 24 * 160,
}  # fmt: skip
"""V100s times hours of the whole training."""


def published(name: str) -> float:
    """Images per second of one V100."""
    return recipe(name).training.epochs * PUBLISHED_IMAGES[name] / (PUBLISHED_GPU_HOURS[name] * 3600)


def estimate(name: str) -> float:
    """Images per second that the speed model expects of a V100 for a recipe."""
    card, profile = card_from_file(V100), recipe(name)
    precision, _ = choose_precision("auto", card)
    profile = profile.with_plan(precision=precision, engine="torch")
    groups, batch = profile.model.scale_groups, profile.training.total_batch
    rates, table = rates_of(card), record_blocks(profile, ("all",))
    blocks = sum(row[0].seconds for _, row in table.choices(groups, batch, rates, gradients_stay=True))
    parameters = sum(table.parameter_elements(groups))
    convolutions = table.count(table.convolutions, groups)
    return batch / step_seconds(profile, blocks, 1, parameters, convolutions, rates).total


def measure(names: Sequence[str]) -> dict[str, Any]:
    """Per recipe what was published, what is estimated and their ratio; over all the geometric mean and the spread."""
    rows = {}
    for name in names:
        theirs, ours = published(name), estimate(name)
        rows[name] = {
            "images": PUBLISHED_IMAGES[name],
            "gpu_hours": PUBLISHED_GPU_HOURS[name],
            "published_images_per_second": round(theirs, 3),
            "estimated_images_per_second": round(ours, 3),
            "estimated_over_published": round(ours / theirs, 3),
        }
    ratios = [row["estimated_over_published"] for row in rows.values()]
    mean = statistics.geometric_mean(ratios)
    return {
        "recipes": rows,
        "geometric_mean": round(mean, 3),
        "largest_over_mean": round(max(ratios) / mean, 3),
        "smallest_over_mean": round(min(ratios) / mean, 3),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the results where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", metavar="NAME", nargs="+", choices=PUBLISHED_RECIPES, default=PUBLISHED_RECIPES)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results as JSON, too")
    arguments = parser.parse_args(argv)
    found = {**machine(1), **measure(arguments.recipes)}
    print(headline(found))
    print(f"{'recipe':<12}{'published':>12}{'estimated':>12}{'ratio':>8}   (images/s of one V100)")
    for name, row in found["recipes"].items():
        print(
            f"{name:<12}{row['published_images_per_second']:>12.3g}{row['estimated_images_per_second']:>12.3g}"
            f"{row['estimated_over_published']:>8.2f}"
        )
    spread = f"{found['smallest_over_mean']:.2f} to {found['largest_over_mean']:.2f} of it"
    print(f"{'geometric mean':<36}{found['geometric_mean']:>8.2f}   ({spread})")
    if arguments.json is not None:
        write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
