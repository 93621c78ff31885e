"""Draw images from a trained model."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.commands.flags import PictureScale, RunFlags, at_least, check_scale
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.progress import progress_bar
from nvae_lowmem.units import format_seconds

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from nvae_lowmem.config.sections import Profile
    from nvae_lowmem.generation.sample import Temperature
    from nvae_lowmem.training.open_run import OpenRun

OVERVIEW_ROWS = 2


@dataclass(frozen=True, kw_only=True)
class SampleCommand(RunFlags):
    """Draw images from a trained model, after fitting its BatchNorm statistics to the sampling temperature.

    By default: one grid for each of the temperatures 0.7, 0.8, 0.9 and 1.0, and overview.png with held-out images,
    their reconstructions and samples, all in the run's samples/ folder.

    Examples:
      nvae-lowmem sample
      nvae-lowmem sample --run 3 --temperatures 0.6 0.7 --seed 5
      nvae-lowmem sample --run celeba64-4g --temperature 0.7,0.8,1.0
      nvae-lowmem sample --run mnist-labels --class 3 5 --guidance 1.5
      nvae-lowmem sample --run mnist-labels --class all --count 80
      nvae-lowmem sample --run runs/00003-mnist --temperature 1.0 --count 10000 --format zip --likelihood sample
    """

    count: int = 64
    """Images per temperature; with several classes as many of each, and so many at least."""
    temperatures: Annotated[
        tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(aliases=("--temperature",), metavar="T")
    ] = ()
    """What the prior's sigma is multiplied by, one or several numbers; lower: cleaner and more alike. 0.7,0.8,1.0 (with
    commas) is one temperature per scale, HIGHEST RESOLUTION FIRST. None given: 0.7 0.8 0.9 1.0."""
    classes: Annotated[tuple[str, ...], tyro.conf.arg(name="class", metavar="NAME")] = ()
    """Of a model trained with labels: classes to draw, by name or number; all: each of them; none: no class. None
    given: the classes take turns. With several, a grid has rows for each."""
    guidance: float = 1.0
    """How far to go towards the class: 1 as learned, 1.5 to 3 clearer and more alike, 0 not at all."""
    seed: int = 0
    """The same seed gives the same images, however they are split into chunks."""
    recalibrate: bool = True
    """Fit BatchNorm statistics to each temperature first (kept beside the checkpoint); without it samples are poor."""
    passes: int = 0
    """Batches of prior samples that the statistics are taken over; 0: 300 on a GPU, on a CPU as many as make 640
    images, but at least 20."""
    likelihood: Literal["mean", "sample"] = "mean"
    """Pixels of p(x|z): its mean (smooth, for people) or a draw from it (the data's grid of bits, with its noise)."""
    format: Literal["grid", "png", "zip"] = "grid"
    """grid: one picture per temperature and overview.png; png: a folder of single images per temperature; zip: the same
    in one file per temperature."""
    scale: PictureScale = 0
    """How many times as large as in their files images are shown in grids; 0: at least 56 pixels wide."""
    out: str = ""
    """Folder to write to; empty: samples/ in the run's folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, sample, write, and return the exit code."""
    return run_command(SampleCommand, _sample, argv)


def _sample(command: SampleCommand) -> None:
    at_least(1, count=command.count)
    at_least(0, passes=command.passes)
    check_scale(command.scale)
    command.find()
    import torch

    from nvae_lowmem.commands import image_inputs
    from nvae_lowmem.generation import grids, series
    from nvae_lowmem.generation.classes import check_guidance, parse_classes
    from nvae_lowmem.generation.sample import group_temperatures, parse_temperature, sample_chunks, temperature_text
    from nvae_lowmem.training.open_run import open_run

    given = [text for texts in command.temperatures for text in texts]
    temperatures: list[Temperature] = [parse_temperature(text) for text in given] or [*grids.TEMPERATURES]
    run = open_run(command.run, command.runs_dir, command.device, command.micro_batch, data=command.data)
    model = run.model
    for temperature in temperatures:
        group_temperatures(temperature, model.config)
    classes = parse_classes(command.classes, run.profile)
    check_guidance(command.guidance, model.config)
    count = -(-command.count // len(classes)) * len(classes) if classes else command.count
    out = image_inputs.output_folder(command.out, run)
    print(run.describe(), flush=True)
    # before the statistics are fitted to samples: the posterior wants those of training
    sections = _held_out_sections(run, command.scale) if command.format == "grid" else []
    for temperature in temperatures:
        if command.recalibrate:
            _recalibrate(command, run, temperature)
        text = temperature_text(temperature)
        chunks = sample_chunks(
            model, count, temperature, command.seed, run.micro_batch, command.likelihood == "sample",
            progress_bar(f"sampling at {text}"), classes, command.guidance,
        )  # fmt: skip
        name = f"generated-t{text.replace(',', '-')}{_asked_in_name(command, classes)}"
        if command.format == "grid":
            images, columns = torch.cat(list(chunks)), grids.default_columns(model.config.image_size, command.scale)
            picture = _by_class(images, classes, run.profile, columns, command.scale)
            print(grids.save_png(picture, out / f"{name}.png"), flush=True)
            shown = grids.grid(images[: OVERVIEW_ROWS * columns], columns, scale=command.scale)
            sections.append((f"samples at temperature {text}", picture if len(classes) > 1 else shown))
        elif command.format == "zip":
            print(f"{series.write_zip(chunks, out / f'{name}.zip')}: {count} images", flush=True)
        else:
            print(f"{series.write_pngs(chunks, out / name)}: {count} images", flush=True)
    if sections:
        overview = grids.stack([grids.labelled(picture, caption) for caption, picture in sections])
        print(grids.save_png(overview, out / "overview.png"))


def _asked_in_name(command: SampleCommand, classes: Sequence[int]) -> str:
    """What tells the files of these classes and this guidance from those of others: "-class-3-5-g1.5"."""
    shown = "-".join("none" if number < 0 else str(number) for number in classes)
    shown = "all" if command.classes == ("all",) else shown
    return (f"-class-{shown[:60]}" if classes else "") + (f"-g{command.guidance:g}" if command.guidance != 1 else "")


def _by_class(images: Tensor, classes: Sequence[int], profile: Profile, columns: int, scale: int) -> np.ndarray:
    """A grid; of several classes, which the images take in turn, one below the other, each with its name."""
    from nvae_lowmem.generation import grids
    from nvae_lowmem.generation.classes import class_name

    if len(classes) <= 1:
        return grids.grid(images, columns, scale=scale)
    columns = min(columns, len(images) // len(classes))
    return grids.stack(
        [
            grids.labelled(grids.grid(images[i :: len(classes)], columns, scale=scale), class_name(number, profile))
            for i, number in enumerate(classes)
        ]
    )


def _recalibrate(command: SampleCommand, run: OpenRun, temperature: Temperature) -> None:
    from nvae_lowmem.generation.recalibrate import (
        RECALIBRATION_SEED,
        default_passes,
        images_per_estimate,
        recalibrate_once,
    )
    from nvae_lowmem.generation.sample import temperature_text

    text, began, micro_batch = temperature_text(temperature), time.monotonic(), run.micro_batch
    passes = command.passes or default_passes(run.device, micro_batch)
    progress = progress_bar(f"BatchNorm statistics at {text}")
    kept = recalibrate_once(run.model, run.checkpoint, temperature, passes, micro_batch, RECALIBRATION_SEED, progress)
    took = format_seconds(time.monotonic() - began)
    source = f"kept in {kept}" if kept else f"{passes} x {images_per_estimate(micro_batch)} prior samples, {took}"
    print(f"BatchNorm statistics at temperature {text}: {source}", flush=True)


def _held_out_sections(run: OpenRun, scale: int) -> list[tuple[str, np.ndarray]]:
    """(caption, picture) of held-out images and their reconstructions, or of what training saw of them."""
    import numpy as np
    import torch
    from PIL import Image

    from nvae_lowmem.data.pipeline import without_padding
    from nvae_lowmem.generation import grids
    from nvae_lowmem.generation.sample import reconstruct_images
    from nvae_lowmem.training.open_run import held_out_batches

    model, columns = run.model, grids.default_columns(run.model.config.image_size, scale)
    try:
        images = torch.cat(list(held_out_batches(run, columns)))
    except ConfigError as error:
        print(f"no reconstructions, the data of this run cannot be opened: {error}", file=sys.stderr)
        reals = run.folder / "samples" / "reals.png"
        if not reals.is_file():
            return []
        with Image.open(reals) as picture:
            return [("held-out images", np.asarray(picture.convert("RGB")))]
    reconstructions = reconstruct_images(model, images, run.profile.training.seed, run.micro_batch)
    return [
        ("held-out images", grids.grid(without_padding(images, model.config), columns, scale=scale)),
        ("their reconstructions", grids.grid(reconstructions, columns, scale=scale)),
    ]
