"""`launch/sample.py`: from the command line to pictures in a run's folder. Problems are found before the long work."""

from __future__ import annotations

import re
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from nvae_lowmem.commands.picture_inputs import output_folder
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.generation import grids
from nvae_lowmem.generation.recalibrate import RECALIBRATION_SEED, default_passes, images_per_pass, recalibrate_once
from nvae_lowmem.generation.sample import (
    Temperature,
    group_temperatures,
    parse_temperature,
    reconstruct_images,
    sample_chunks,
    temperature_text,
    without_padding,
)
from nvae_lowmem.training.open_run import OpenRun, RunCommand, exit_code, held_out_batches, open_run, progress_bar
from nvae_lowmem.units import format_seconds

OVERVIEW_ROWS = 2


@dataclass(frozen=True, kw_only=True)
class SampleCommand(RunCommand):
    """Draw images from a trained model, after fitting its BatchNorm statistics to the sampling temperature.

    By default: one grid for each of the temperatures 0.7, 0.8, 0.9 and 1.0, and overview.png with held-out images,
    their reconstructions and samples, all in the run's samples/ folder.

    Examples:
      python launch/sample.py
      python launch/sample.py --run 3 --temperatures 0.6 0.7 --seed 5
      python launch/sample.py --run celeba64-4g --temperature 0.7,0.8,1.0
      python launch/sample.py --run runs/00003-mnist --temperature 1.0 --count 10000 --format zip --likelihood sample
    """

    count: int = 64
    """Images per temperature."""
    temperatures: Annotated[
        tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(aliases=("--temperature",), metavar="T")
    ] = ()
    """What the prior's sigma is multiplied by, one or several numbers; lower: cleaner and more alike. 0.7,0.8,1.0 (with
    commas) is one temperature per scale, HIGHEST RESOLUTION FIRST. None given: 0.7 0.8 0.9 1.0."""
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
    out: str = ""
    """Folder to write to; empty: samples/ in the run's folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, sample, write, and return the exit code: 0 done, 2 bad input, 5 out of memory."""
    return run_sampling(sys.argv[1:] if argv is None else argv)


def run_sampling(argv: Sequence[str]) -> int:
    """Parse argv, draw, and return the exit code: 0 done, 2 bad input, 5 out of memory."""
    command = tyro.cli(SampleCommand, args=list(argv), prog="sample.py")
    return exit_code("sample.py", lambda: _sample(command))


def _sample(command: SampleCommand) -> None:
    temperatures = _temperatures(command)
    run = open_run(command.run, command.runs_dir, command.device, command.micro_batch, data=command.data)
    model = run.model
    for temperature in temperatures:
        group_temperatures(temperature, model.config)
    out = output_folder(command.out, run)
    print(run.describe(), flush=True)
    # before the statistics are fitted to samples: the posterior wants those of training
    sections = _held_out_sections(run) if command.format == "grid" else []
    for temperature in temperatures:
        if command.recalibrate:
            _recalibrate(command, run, temperature)
        text = temperature_text(temperature)
        chunks = sample_chunks(
            model, command.count, temperature, command.seed, run.micro_batch, command.likelihood == "sample",
            progress_bar(f"sampling at {text}"),
        )  # fmt: skip
        stem = out / f"generated-t{text.replace(',', '-')}"
        if command.format == "grid":
            images, columns = torch.cat(list(chunks)), grids.default_columns(model.config.image_size)
            print(grids.save_png(grids.grid(images, columns), stem.with_name(f"{stem.name}.png")), flush=True)
            shown = grids.grid(images[: OVERVIEW_ROWS * columns], columns)
            sections.append((f"samples at temperature {text}", shown))
        else:
            written = _write_zip(chunks, stem) if command.format == "zip" else _write_pngs(chunks, stem)
            print(f"{written}: {command.count} images", flush=True)
    if sections:
        overview = grids.stack([grids.labelled(picture, caption) for caption, picture in sections])
        print(grids.save_png(overview, out / "overview.png"))


# --- what is asked for ------------------------------------------------------------------------------------------------


def _temperatures(command: SampleCommand) -> list[Temperature]:
    """The temperatures of a command whose numbers make sense. Raises ConfigError otherwise."""
    for flag, value, lowest in (
        ("--count", command.count, 1),
        ("--passes", command.passes, 0),
        ("--micro-batch", command.micro_batch, 0),
    ):
        if value < lowest:
            raise ConfigError(f"{flag} {value}: must be at least {lowest}")
    given = [text for texts in command.temperatures for text in texts]
    return [parse_temperature(text) for text in given] or [*grids.TEMPERATURES]


# --- the work ---------------------------------------------------------------------------------------------------------


def _recalibrate(command: SampleCommand, run: OpenRun, temperature: Temperature) -> None:
    text, began, micro_batch = temperature_text(temperature), time.monotonic(), run.micro_batch
    passes = command.passes or default_passes(run.device, micro_batch)
    progress = progress_bar(f"BatchNorm statistics at {text}")
    kept = recalibrate_once(run.model, run.checkpoint, temperature, passes, micro_batch, RECALIBRATION_SEED, progress)
    took = format_seconds(time.monotonic() - began)
    source = f"kept in {kept}" if kept else f"{passes} x {images_per_pass(micro_batch)} prior samples, {took}"
    print(f"BatchNorm statistics at temperature {text}: {source}", flush=True)


def _held_out_sections(run: OpenRun) -> list[tuple[str, np.ndarray]]:
    """(caption, picture) of held-out images and their reconstructions, or of what training saw of them."""
    model, columns = run.model, grids.default_columns(run.model.config.image_size)
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
        ("held-out images", grids.grid(without_padding(images, model.config), columns)),
        ("their reconstructions", grids.grid(reconstructions, columns)),
    ]


def _files(chunks: Iterator[Tensor]) -> Iterator[tuple[str, bytes]]:
    """(name, PNG) of every image, in its own size."""
    pictures = (picture for chunk in chunks for picture in grids.to_uint8(chunk))
    for i, picture in enumerate(pictures):
        yield f"{i:05d}.png", grids.png_bytes(picture)


def _write_pngs(chunks: Iterator[Tensor], folder: Path) -> Path:
    """Images as folder/00000.png ...; those of an earlier, longer series go."""
    folder.mkdir(exist_ok=True)
    written = set()
    for name, content in _files(chunks):
        (folder / name).write_bytes(content)
        written.add(name)
    for old in folder.iterdir():
        if re.fullmatch(r"\d{5,}\.png", old.name) and old.name not in written:
            old.unlink()
    return folder


def _write_zip(chunks: Iterator[Tensor], stem: Path) -> Path:
    """Images as 00000.png ... in one archive, which appears when it is whole."""
    path, partial = (stem.with_name(stem.name + ending) for ending in (".zip", ".zip.partial"))
    try:
        with zipfile.ZipFile(partial, "w") as archive:  # stored: PNG is compressed already
            for name, content in _files(chunks):
                archive.writestr(name, content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
