"""Find the images that do not belong to what a model was trained on."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.commands.flags import RunFlags, at_least
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.files import writable_folder, write_output
from nvae_lowmem.progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from nvae_lowmem.config.model import ModelConfig
    from nvae_lowmem.data.stores import Store
    from nvae_lowmem.evaluation.anomaly import Usual
    from nvae_lowmem.training.open_run import OpenRun


_IMAGES_AT_A_TIME = 200


@dataclass(frozen=True, kw_only=True)
class AnomalyCommand(RunFlags):
    """Score images by how little they belong to what a model was trained on, and show where.

    The score adds up how far an image's likelihood is from that of held-out images of the run's data, either way, and
    how far its coarsest latents are from those of training images, in deviations of what held-out images have. An image
    above the 95th percentile of held-out ones is marked. Written: scores.csv, anomalies.png with a map under each of
    the worst images: what the latent groups nearest to the pixels have to say that the others did not foresee.

    Examples:
      nvae-lowmem anomaly ~/pictures --run latest
      nvae-lowmem anomaly parts.zip --run 3 --groups 4 --draws 5
    """

    images: Annotated[str, tyro.conf.Positional]
    """Images to score, in any form that training takes; of a form with two parts, those for training."""
    references: int = 2000
    """Training images whose latents are looked for near those of an image; 0: all."""
    compare: int = 200
    """Held-out images that say what is usual; 0: all."""
    groups: int = 0
    """For the map: how many of the last latent groups come from the prior; 0: half of them."""
    draws: int = 2
    """Draws of the latents per image."""
    shown: int = 16
    """Worst images in the picture."""
    seed: int = 0
    """Seed of the draws."""
    out: str = ""
    """Folder to write to; empty: anomalies/ in the run's folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, score, write, and return the exit code."""
    return run_command(AnomalyCommand, _anomaly, argv)


def _anomaly(command: AnomalyCommand) -> None:
    at_least(0, groups=command.groups, compare=command.compare, references=command.references)
    at_least(1, draws=command.draws, shown=command.shown)
    command.find()
    from nvae_lowmem.data.sources import open_store
    from nvae_lowmem.evaluation.anomaly import usual_of
    from nvae_lowmem.training.open_run import open_run

    # The run, the images, and what is usual.
    run = open_run(command.run, command.runs_dir, command.device, command.micro_batch, data=command.data)
    print(run.describe(), flush=True)
    groups = command.groups or max(1, run.model.config.total_groups // 2)
    out = writable_folder("--out", Path(command.out) if command.out else run.folder / "anomalies")
    store = open_store(command.images, run.profile.data, run.profile.model)
    print(f"{store.description}: {len(store):,} images", flush=True)
    usual, held_out = usual_of(
        run, groups, command.draws, command.seed, command.references, command.compare, progress_bar
    )
    scores = usual.score(held_out)
    limit, median = float(scores.quantile(0.95)), float(scores.median())
    print(
        f"usual, by {len(usual.references):,} training and {len(scores):,} held-out images: -ELBO "
        f"{-usual.elbo_mean:.1f} +- {usual.elbo_deviation:.1f} nats, score {median:.1f}, for 95 % up to {limit:.1f}",
        flush=True,
    )

    # The images, some at a time: of all of them only figures are kept, of the worst the pictures.
    rows, worst = _scored(command, run, store, groups, usual)
    if not rows:
        raise ConfigError(f"{command.images}: none of its images can be read")
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["image", "score", "elbo_nats", "distance", "later_groups_nats", "above_95_percent_of_held_out"])
    for name, score, *figures in rows:
        table.writerow([name, f"{score:.3f}", *(f"{value:.2f}" for value in figures), int(score > limit)])
    print(write_output("--out", out / "scores.csv", text.getvalue()))
    print(f"{sum(score > limit for _, score, *_ in rows):,} of {len(rows):,} images are above the 95th percentile")
    print(_picture(run.profile.model, worst, out))


def _scored(
    command: AnomalyCommand, run: OpenRun, store: Store, groups: int, usual: Usual
) -> tuple[list[tuple[str, float, float, float, float]], list[Shown]]:
    """(name, score, ELBO, distance, later groups) of every image that can be read, the worst first, and the worst."""
    from nvae_lowmem.evaluation.anomaly import anomaly_figures
    from nvae_lowmem.library.latent_files import read_store

    rows: list[tuple[str, float, float, float, float]] = []
    worst: list[Shown] = []
    bar, total = progress_bar("scoring"), len(store)
    for first in range(0, total, _IMAGES_AT_A_TIME):
        numbers = range(first, min(first + _IMAGES_AT_A_TIME, total))
        names, images, _ = read_store(run.profile, store, command.images, print, numbers)
        if names:
            found = anomaly_figures(
                run.model, images, groups, command.draws, command.seed, run.micro_batch, first_image=first
            )
            score, distance = usual.score(found), usual.distance(found)
            figures = zip(
                score.tolist(), found.elbo.tolist(), distance.tolist(), found.later_groups.tolist(), strict=True
            )
            rows += [(name, *values) for name, values in zip(names, figures, strict=True)]
            numbers_of_worst = score.topk(min(command.shown, len(names))).indices.tolist()
            # copies: views would keep all images
            here = [Shown(float(score[i]), images[i].clone(), found.map[i].clone()) for i in numbers_of_worst]
            worst = sorted([*worst, *here], key=lambda one: -one.score)[: command.shown]
        bar(numbers.stop, total)
    return sorted(rows, key=lambda row: -row[1]), worst


class Shown(NamedTuple):
    """An image in the picture: (C, S', S') as the network takes it, and its map (S, S)."""

    score: float
    image: Tensor
    map: Tensor


def _picture(model: ModelConfig, worst: Sequence[Shown], out: Path) -> Path:
    """The worst images above their maps: bright where the later groups had something to say."""
    import torch

    from nvae_lowmem.data.pipeline import without_padding
    from nvae_lowmem.generation import grids
    from nvae_lowmem.generation.traverse import heat_colours

    maps = torch.stack([one.map for one in worst])
    largest = maps.abs().amax((1, 2), keepdim=True).clamp(min=1e-9)
    heat = torch.stack([heat_colours(one) for one in (maps / largest).float()])
    columns = grids.default_columns(model.image_size)
    scores = [f"{one.score:.1f}" for one in worst]
    batch = without_padding(torch.stack([one.image for one in worst]), model)
    images = grids.labelled(grids.grid(batch, columns, under=scores), "the worst images, and their scores")
    where = grids.labelled(grids.grid(heat, columns), "where, each by its own scale")
    return grids.save_png(grids.stack([images, where]), out / "anomalies.png")
