"""Find the images that do not belong to what a model was trained on."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.commands.flags import RunFlags, at_least
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.files import writable_folder, write_output
from nvae_lowmem.progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from nvae_lowmem.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class AnomalyCommand(RunFlags):
    """Score images by how little they belong to what a model was trained on, and show where.

    The score is what the latent groups nearest to the pixels have to say that the groups above them did not foresee
    (arXiv 2102.08248), in nats. Held-out images of the run's data are scored, too, to compare with: an image above
    their 95th percentile is marked. Written: scores.csv, anomalies.png with a map under each of the worst images.

    Examples:
      nvae-lowmem anomaly ~/pictures --run latest
      nvae-lowmem anomaly parts.zip --run 3 --groups 4 --draws 5
    """

    images: Annotated[str, tyro.conf.Positional]
    """Images to score, in any form that training takes; of a form with two parts, those for training."""
    groups: int = 0
    """How many of the last latent groups come from the prior; 0: half of them."""
    draws: int = 2
    """Draws of the latents per image."""
    compare: int = 200
    """Held-out images to compare with; 0: none."""
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
    at_least(0, groups=command.groups, compare=command.compare)
    at_least(1, draws=command.draws, shown=command.shown)
    command.find()
    import torch

    from nvae_lowmem.data.sources import open_store
    from nvae_lowmem.evaluation.anomaly import anomaly_scores
    from nvae_lowmem.library.latent_files import read_store
    from nvae_lowmem.training.open_run import held_out_batches, open_run

    run = open_run(command.run, command.runs_dir, command.device, command.micro_batch, data=command.data)
    print(run.describe(), flush=True)
    groups = command.groups or max(1, run.model.config.total_groups // 2)
    out = writable_folder("--out", Path(command.out) if command.out else run.folder / "anomalies")
    store = open_store(command.images, run.profile.data, run.profile.model)
    names, batch, _ = read_store(run.profile, store, command.images, print)
    if not names:
        raise ConfigError(f"{command.images}: none of its images can be read")
    print(f"{store.description}: {len(names):,} images", flush=True)

    def scored(images: Tensor, what: str) -> tuple[Tensor, Tensor, Tensor]:
        bar = progress_bar(what)
        return anomaly_scores(run.model, images, groups, command.draws, command.seed, run.micro_batch, progress=bar)

    limit = None
    if command.compare:
        held_out, _, _ = scored(torch.cat(list(held_out_batches(run, command.compare))), "held-out images")
        limit = float(held_out.quantile(0.95))
        print(f"held-out images: median {float(held_out.median()):.1f} nats, 95th percentile {limit:.1f}")
    score, elbo, maps = scored(batch, "scoring")
    order = score.argsort(descending=True).tolist()
    rows = [
        (names[i], f"{float(score[i]):.2f}", f"{float(elbo[i]):.2f}", "" if limit is None else int(score[i] > limit))
        for i in order
    ]
    text = io.StringIO()
    csv.writer(text).writerows([("image", "score_nats", "elbo_nats", "above_95_percent_of_held_out"), *rows])
    print(write_output("--out", out / "scores.csv", text.getvalue()))
    if limit is not None:
        print(f"{int((score > limit).sum()):,} of {len(names):,} images are above it")
    worst = order[: command.shown]
    print(_picture(run.profile.model, batch[worst], maps[worst], [float(score[i]) for i in worst], out))


def _picture(model: ModelConfig, batch: Tensor, maps: Tensor, scores: Sequence[float], out: Path) -> Path:
    """The worst images above their maps: bright where the later groups had something to say."""
    import torch

    from nvae_lowmem.data.pipeline import without_padding
    from nvae_lowmem.generation import grids
    from nvae_lowmem.generation.traverse import heat_colours

    largest = maps.abs().amax((1, 2), keepdim=True).clamp(min=1e-9)
    heat = torch.stack([heat_colours(one) for one in (maps / largest).float()])
    columns = grids.default_columns(model.image_size)
    caption = f"the worst images, {scores[0]:.0f} to {scores[-1]:.0f} nats"
    images = grids.labelled(grids.grid(without_padding(batch, model), columns), caption)
    where = grids.labelled(grids.grid(heat, columns), "where, each by its own scale")
    return grids.save_png(grids.stack([images, where]), out / "anomalies.png")
