"""Can a model tell what does not belong to its data? AUROC of the score of launch/anomaly.py, of its parts, and of the
plain ELBO.

    python benchmarks/anomalies.py --digits runs/mnist --faces runs/faces --left-out runs/no-fours:4

--digits RUN: a run of mnist5k; its held-out digits against cartoon faces in grey.
--faces RUN: a run of faces; its held-out faces against digits.
--left-out RUN:CLASS (may be repeated): a run on what --make-left-out FOLDER:CLASS writes, mnist5k without one class;
digits of the other classes that it has not seen against those of that class.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nvae_lowmem.data.cache import cache_folder
from nvae_lowmem.data.digits import mnist5k, read_digits
from nvae_lowmem.data.faces import faces
from nvae_lowmem.evaluation.anomaly import anomaly_figures, auroc, usual_of
from nvae_lowmem.library.images import as_batch
from nvae_lowmem.training.open_run import OpenRun, open_run, plain_batches


def measure(run: OpenRun, normal: Tensor, anomalous: Tensor, what: str, draws: int) -> dict[str, object]:
    """AUROC of the score and its parts, of minus the ELBO, of what half of the groups say, of the nearest image."""
    groups = run.model.config.total_groups // 2
    usual, _ = usual_of(run, groups, draws)
    pixels = torch.cat(list(plain_batches(run, "train", len(usual.references))[0])).flatten(1)
    a, b = (anomaly_figures(run.model, x, groups, draws, micro_batch=50) for x in (normal, anomalous))
    row = {
        "what": what,
        "run": run.profile.name,
        "checkpoint": run.checkpoint.name,
        "references": len(usual.references),
        "normal": len(normal),
        "anomalous": len(anomalous),
        "auroc_score": auroc(usual.score(a), usual.score(b)),
        "auroc_elbo": auroc(-a.elbo, -b.elbo),
        "auroc_typicality": auroc((a.elbo - usual.elbo_mean).abs(), (b.elbo - usual.elbo_mean).abs()),
        "auroc_distance": auroc(usual.distance(a), usual.distance(b)),
        "auroc_later_groups": auroc(a.later_groups, b.later_groups),
        "auroc_pixel_distance": auroc(*(torch.cdist(x.flatten(1), pixels).amin(1) for x in (normal, anomalous))),
    }
    row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
    print(row, flush=True)
    return row


def held_out(run: OpenRun, count: int, usual: int = 200) -> Tensor:
    """Images that were not trained on, as files are taken, without those that say what is usual."""
    images = torch.cat(list(plain_batches(run, "test", 0)[0])).numpy()
    taken = set(np.linspace(0, len(images) - 1, min(usual, len(images))).round().astype(int).tolist())
    return torch.from_numpy(spread(images[[i for i in range(len(images)) if i not in taken]], count))


def spread(images: np.ndarray, count: int) -> np.ndarray:
    """At most so many of the images, evenly spread: sets come class by class."""
    return images[np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)]


def grey_faces(size: int, count: int) -> Tensor:
    """(count, 1, S, S) uint8."""
    colours = faces(4000, 64, cache_folder(""), print)[:count]  # the set that demo-faces keeps in the cache
    grey = [Image.fromarray(face.transpose(1, 2, 0)).convert("L").resize((size, size)) for face in colours]
    return torch.from_numpy(np.stack([np.asarray(image) for image in grey]))[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits")
    parser.add_argument("--faces")
    parser.add_argument("--left-out", action="append", default=[])
    parser.add_argument("--make-left-out", metavar="FOLDER:CLASS")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, object]] = []
    if given.make_left_out:
        folder, _, left_out = given.make_left_out.rpartition(":")
        write_without(Path(folder), int(left_out))
    if given.digits:
        run = open_run(given.digits, "runs", "cpu")
        normal = held_out(run, given.count)
        drawn = as_batch(grey_faces(run.profile.model.image_size, given.count), run.profile)
        rows.append(measure(run, normal, drawn, "digits against grey faces", given.draws))
    if given.faces:
        run = open_run(given.faces, "runs", "cpu")
        normal = held_out(run, given.count)
        digits = [Image.fromarray(d[0]) for d in spread(mnist5k()[1].pixels, given.count)]
        rows.append(measure(run, normal, as_batch(digits, run.profile), "faces against digits", given.draws))
    for one in given.left_out:
        folder, _, left_out = one.rpartition(":")
        run = open_run(folder, "runs", "cpu")
        pixels, labels = read_digits()
        test = np.arange(len(pixels)) % 10 == 9
        of_class = labels == int(left_out)
        parts = (torch.from_numpy(spread(pixels[which], given.count)) for which in (test & ~of_class, of_class))
        normal, anomalous = (as_batch(part, run.profile) for part in parts)
        rows.append(measure(run, normal, anomalous, f"digits without {left_out} against {left_out}", given.draws))
    if given.out is not None:
        given.out.write_text(json.dumps({"draws": given.draws, "rows": rows}, indent=1) + "\n")


def write_without(folder: Path, left_out: int) -> None:
    """The digits of mnist5k that are not every tenth and not of one class, as PNGs to train on."""
    pixels, labels = read_digits()
    folder.mkdir(parents=True, exist_ok=True)
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        if label != left_out and i % 10 != 9:
            Image.fromarray(image[0]).save(folder / f"{i:04d}-{label}.png")


if __name__ == "__main__":
    main()
