"""How well launch/restore.py fills in missing pixels of held-out images, beside two simple ways.

    python benchmarks/restoration.py --run runs/mnist --run runs/faces --out benchmarks/results/restoration.json

Missing are single pixels at random, or one square at a random place. PSNR is over the missing pixels alone, its mean
over images. Mean fill: the mean known colour of an image; blur: the known pixels under a Gaussian, weights normalised,
with the deviation that is best for these very images.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from nvae_lowmem.data.pipeline import without_padding
from nvae_lowmem.generation.restore import KnownPixels, restore
from nvae_lowmem.training.open_run import held_out_batches, open_run

SHARES = (0.25, 0.5, 0.75)
SIGMAS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


def psnr_of_missing(images: Tensor, originals: Tensor, known: Tensor) -> float:
    """Of each image over its missing pixels, dB; the mean over images."""
    missing = (~known).expand_as(originals).double()
    error = ((images - originals).double().square() * missing).sum((1, 2, 3)) / missing.sum((1, 2, 3))
    return float((-10 * error.clamp(min=1e-10).log10()).mean())


def mean_fill(measured: KnownPixels) -> Tensor:
    """Missing pixels in each image's mean known colour."""
    count = measured.known.sum((2, 3), keepdim=True).clamp(min=1)
    return measured.put_in((measured.images * measured.known).sum((2, 3), keepdim=True) / count)


def blurred(measured: KnownPixels, sigma: float) -> Tensor:
    """Missing pixels from a Gaussian of the known ones around them."""
    radius = max(1, math.ceil(3 * sigma))
    steps = torch.arange(-radius, radius + 1).float()
    line = torch.exp(-0.5 * (steps / sigma) ** 2)
    known = measured.known.expand(len(measured.images), 1, *measured.images.shape[2:]).float()
    channels = measured.images.shape[1]

    def blur(x: Tensor) -> Tensor:
        kernel = line.expand(x.shape[1], 1, 1, -1)
        x = functional.conv2d(x, kernel, padding=(0, radius), groups=x.shape[1])
        return functional.conv2d(x, kernel.transpose(2, 3), padding=(radius, 0), groups=x.shape[1])

    weight = blur(known)
    guess = blur(measured.images * known) / weight.clamp(min=1e-6)
    return measured.put_in(torch.where(weight.expand(-1, channels, -1, -1) > 1e-6, guess, mean_fill(measured)))


def mask(kind: str, share: float, images: Tensor) -> Tensor:
    """Which pixels are known (B, 1, S, S): all but single ones at random, or all but one square at a random place."""
    generator = torch.Generator().manual_seed(0)
    count, size = len(images), images.shape[-1]
    if kind == "pixels":
        return torch.rand((count, 1, size, size), generator=generator) >= share
    known, side = torch.ones(count, 1, size, size, dtype=torch.bool), round(size * share**0.5)
    for i in range(count):
        top, left = torch.randint(0, size - side + 1, (2,), generator=generator).tolist()
        known[i, :, top : top + side, left : left + side] = False
    return known


def rows_of(run_folder: str, count: int, iterations: int, guesses: int) -> list[dict[str, object]]:
    """One row per share of missing pixels."""
    run = open_run(run_folder, "runs", "cpu")
    images = without_padding(torch.cat(list(held_out_batches(run, count))), run.profile.model)
    rows: list[dict[str, object]] = []
    for kind, share in itertools.product(("pixels", "square"), SHARES):
        known = mask(kind, share, images)
        measured = KnownPixels(images, known)
        blurs = {sigma: psnr_of_missing(blurred(measured, sigma), images, known) for sigma in SIGMAS}
        one, mean = (restore(run.model, measured, iterations, micro_batch=count, guesses=n) for n in (1, guesses))
        row = {
            "run": run.profile.name,
            "checkpoint": run.checkpoint.name,
            "images": len(images),
            "missing": kind,
            "share": share,
            "mean_fill_db": round(psnr_of_missing(mean_fill(measured), images, known), 2),
            "blur_db": round(max(blurs.values()), 2),
            "one_guess_db": round(psnr_of_missing(one, images, known), 2),
            "mean_of_guesses_db": round(psnr_of_missing(mean, images, known), 2),
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True, help="a trained run; may be repeated")
    parser.add_argument("--count", type=int, default=100, help="held-out images")
    parser.add_argument("--iterations", type=int, default=32)
    parser.add_argument("--guesses", type=int, default=4, help="whose mean is measured beside one guess")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    given = parser.parse_args()
    rows = [row for run in given.run for row in rows_of(run, given.count, given.iterations, given.guesses)]
    if given.out is not None:
        given.out.write_text(
            json.dumps({"iterations": given.iterations, "guesses": given.guesses, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
