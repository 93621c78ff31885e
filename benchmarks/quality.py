"""Are samples closer to held-out images than what one should beat? KID of a run's samples and of three baselines.

    python launch/train.py --profile demo-mnist --run-dir runs/mnist
    python launch/train.py --profile demo-mnist --run-dir runs/mnist-seed --set model.likelihood=squared_error \\
        --set model.residual_posterior=false --set training.kl_beta_max=1e-4
    python benchmarks/quality.py --run runs/mnist --autoencoder runs/mnist-seed --picture quality.png

The baselines: noise with the mean and deviation of every pixel; the same weights without recalibrated BatchNorm
statistics; and a model of the same size trained as an autoencoder with a little noise (squared error, no residual
posterior, KL weight 1e-4), drawn from its prior. All are compared by one fixed, seeded feature network with the same
held-out images; pictures are means of p(x|z), which is what people look at. Lower is closer. "Half of them" is the
distance between two halves of the held-out images: about as low as it gets.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import headline, machine, write_json
from torch import Tensor

from nvae_lowmem.data.pipeline import evaluation_batches, without_padding
from nvae_lowmem.data.sources import open_source
from nvae_lowmem.evaluation.distances import OTHER_HALF, PIXEL_NOISE, Comparison, RandomConvFeatures
from nvae_lowmem.generation.grids import grid, labelled, save_png, stack
from nvae_lowmem.generation.recalibrate import recalibrated
from nvae_lowmem.generation.sample import reconstruct_images, sample_images
from nvae_lowmem.training.open_run import OpenRun, open_run

CPU = torch.device("cpu")
SHOWN = 12


def held_out(run: OpenRun) -> Tensor:
    """All held-out images of the run's data, padded as the network takes them: (B, C, T, T)."""
    profile = run.profile
    data = open_source(profile.data, profile.model, log=print)
    return torch.cat(list(evaluation_batches(data.test, profile.model, profile.data, 64, profile.training.seed)))


def samples(run: OpenRun, count: int, temperature: float, passes: int, seed: int) -> Tensor:
    """Means of p(x|z) at a temperature, with BatchNorm statistics of so many passes; 0: those of training."""
    if not passes:
        return sample_images(run.model, count, temperature, seed, run.micro_batch)
    with recalibrated(run.model, temperature, passes, run.micro_batch, seed=0):
        return sample_images(run.model, count, temperature, seed, run.micro_batch)


def image_sets(run: OpenRun, autoencoder: OpenRun, real: Tensor, options: argparse.Namespace) -> dict[str, Tensor]:
    """What is compared with the held-out images, by name: (B, C, S, S) each."""
    count, seed, passes = len(real), options.seed, options.passes
    sets = {f"samples at temperature {t:g}": samples(run, count, t, passes, seed) for t in options.temperatures}
    for t in options.temperatures:
        sets[f"the same at {t:g} without recalibration"] = samples(run, count, t, 0, seed)
    for t in options.temperatures:
        sets[f"autoencoder's samples at {t:g}"] = samples(autoencoder, count, t, passes, seed)
    sets["reconstructions"] = reconstruct_images(run.model, real, seed, run.micro_batch)
    sets["autoencoder's reconstructions"] = reconstruct_images(autoencoder.model, real, seed, autoencoder.micro_batch)
    return sets


def picture(real: Tensor, sets: dict[str, Tensor]) -> np.ndarray:
    """One captioned row for each set."""
    rows = {"held-out images": real, **sets}
    return stack([labelled(grid(images[:SHOWN].clamp(0, 1), SHOWN), name) for name, images in rows.items()])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run folder of the model")
    parser.add_argument("--autoencoder", required=True, help="run folder of the baseline, trained on the same data")
    parser.add_argument("--runs-dir", default="runs", help="where the numbered run folders are")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 0.85, 1.0])
    parser.add_argument("--passes", type=int, default=40, help="passes of the recalibration")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and of KID's subsets")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, settings and every figure to FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write a PNG with a row of each set of images")
    options = parser.parse_args(arguments)

    run, autoencoder = (open_run(name, options.runs_dir, "cpu") for name in (options.run, options.autoencoder))
    real = held_out(run)
    sets = image_sets(run, autoencoder, real, options)
    comparison = Comparison(RandomConvFeatures(), CPU)
    shown = without_padding(real, run.model.config)
    comparison.add_real(shown)
    for name, images in sets.items():
        comparison.add(name, images)
    about = machine(torch.get_num_threads())
    print(headline(about))
    found: dict[str, Any] = {}
    for d in comparison.distances(options.seed):
        found[d.other] = {"kid": d.value, "deviation": d.standard_deviation, "images": d.images}
        print(f"{d.name}  {d.other:<60} {d.value:>10.5f} +- {d.standard_deviation:.5f}")
    assert {OTHER_HALF, PIXEL_NOISE} <= found.keys()
    settings = {"run": run.profile.name, "temperatures": options.temperatures, "passes": options.passes}
    write_json(options.json, {**about, **settings, "features": RandomConvFeatures.name, "distances": found})
    if options.picture is not None:
        save_png(picture(shown, sets), options.picture)


if __name__ == "__main__":
    main()
