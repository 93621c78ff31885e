"""Does a model trained with labels draw the class that it is asked for? A classifier of the real images says so.

    python launch/train.py --profile demo-mnist --labels --run-dir runs/labels
    python benchmarks/labels.py --run runs/labels --picture labels.png --json labels.json

A small convolutional network learns the classes of the run's training images. Its accuracy on the held-out ones is what
it can be trusted to; then it looks at as many samples of each class, at several guidances and temperatures. A share p
of n samples has a standard error of sqrt(p (1 - p) / n).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae_lowmem.data.dataset import Dataset
from nvae_lowmem.data.sources import open_source
from nvae_lowmem.generation import grids
from nvae_lowmem.generation.recalibrate import RECALIBRATION_SEED, default_passes, recalibrated
from nvae_lowmem.generation.sample import sample_images
from nvae_lowmem.text_table import text_table
from nvae_lowmem.training.open_run import OpenRun, open_run

EPOCHS, BATCH, LEARNING_RATE = 8, 64, 2e-3
PICTURE_COLUMNS = 12


def network(channels: int, size: int, classes: int) -> nn.Module:
    """Three convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * (size // 4) ** 2, classes),
    )  # fmt: skip


def pixels_and_labels(part: Dataset) -> tuple[Tensor, Tensor]:
    """(N, C, S, S) in [0, 1] and (N,) of one part of the data."""
    assert part.labels is not None
    return part.images(range(len(part))).float() / 255, torch.from_numpy(part.labels)


def classifier(images: Tensor, labels: Tensor, classes: int, seed: int = 0) -> nn.Module:
    """Trained on images moved by up to two pixels."""
    torch.manual_seed(seed)
    model = network(images.shape[1], images.shape[2], classes)
    steps = EPOCHS * -(-len(images) // BATCH)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH):
            down, right = (int(n) for n in torch.randint(-2, 3, (2,)))
            found = model(images[rows].roll((down, right), (2, 3)))
            optimizer.zero_grad()
            F.cross_entropy(found, labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def correct(model: nn.Module, images: Tensor, labels: Tensor) -> np.ndarray:
    """(N,) bool: where the classifier says what the label says."""
    chunks = images.split(250), labels.split(250)
    return np.concatenate([model(x).argmax(1).eq(y).numpy() for x, y in zip(*chunks, strict=True)])


def samples(run: OpenRun, count: int, temperature: float, guidance: float) -> tuple[Tensor, Tensor]:
    """`count` images whose classes take turns, under statistics of this temperature, and their classes."""
    images = sample_images(run.model, count, temperature, 0, run.micro_batch, guidance=guidance)
    return images, torch.arange(count) % run.profile.model.classes


def main() -> None:
    """Train the classifier, draw, and print the share of samples that are of the class they were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a run that was trained with labels")
    parser.add_argument("--count", type=int, default=500, help="samples for each guidance and temperature")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 0.85, 1.0])
    parser.add_argument("--picture", default="", help="write a row of samples per class to this file")
    parser.add_argument("--json", default="", help="write the figures to this file")
    given = parser.parse_args()

    # 1. the classifier
    run = open_run(given.run, "runs", "cpu")
    profile = run.profile
    data = open_source(profile.data, profile.model, log=lambda text: print(text, file=sys.stderr))
    judge = classifier(*pixels_and_labels(data.train), profile.model.classes)
    accuracy = float(correct(judge, *pixels_and_labels(data.test)).mean())
    print(f"classifier: {accuracy:.1%} of {len(data.test)} held-out images", flush=True)

    # 2. the samples, with BatchNorm statistics that are taken once for each temperature
    figures: dict[str, dict[str, float]] = {}
    pictures: list[np.ndarray] = []
    passes = default_passes(run.device, run.micro_batch)
    for temperature in given.temperatures:
        with recalibrated(run.model, temperature, passes, run.micro_batch, RECALIBRATION_SEED):
            for guidance in given.guidance:
                images, classes = samples(run, given.count, temperature, guidance)
                good = correct(judge, images, classes)
                worst = min(float(good[classes == c].mean()) for c in range(profile.model.classes))
                row = {"agreement": float(good.mean()), "worst_class": worst}
                figures[f"temperature {temperature:g}, guidance {guidance:g}"] = row
                print(f"temperature {temperature:g}, guidance {guidance:g}: {row}", flush=True)
                if temperature == given.temperatures[0] and guidance in (given.guidance[0], given.guidance[-1]):
                    pictures.append(picture(images, profile.model.classes, f"{temperature:g}, guidance {guidance:g}"))

    # 3. what is kept of it
    rows = [
        [f"{g:g}", *(f"{figures[f'temperature {t:g}, guidance {g:g}']['agreement']:.1%}" for t in given.temperatures)]
        for g in given.guidance
    ]
    print("\n".join(text_table("<>", [["guidance", *(f"temperature {t:g}" for t in given.temperatures)], *rows])))
    if given.picture:
        grids.save_png(grids.stack(pictures), Path(given.picture))
    if given.json:
        about = {"held_out_accuracy": accuracy, "held_out_images": len(data.test), "samples": given.count}
        Path(given.json).write_text(json.dumps({**about, "agreement": figures}, indent=1) + "\n")


def picture(images: Tensor, classes: int, caption: str) -> np.ndarray:
    """A row for each class."""
    rows = torch.cat([images[number::classes][:PICTURE_COLUMNS] for number in range(classes)])
    return grids.labelled(grids.grid(rows, PICTURE_COLUMNS, scale=1), f"a row per class, temperature {caption}")


if __name__ == "__main__":
    main()
