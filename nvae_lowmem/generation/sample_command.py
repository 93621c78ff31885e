"""`launch/sample.py`: from the command line to pictures in a run's folder. Problems are found before the long work."""

from __future__ import annotations

import re
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from nvae_lowmem.config import ConfigError, Profile
from nvae_lowmem.data.pipeline import evaluation_batches
from nvae_lowmem.data.sources import open_source
from nvae_lowmem.generation import grids
from nvae_lowmem.generation.recalibrate import default_passes, images_per_pass, recalibrate_once
from nvae_lowmem.generation.sample import (
    Temperature,
    group_temperatures,
    parse_temperature,
    reconstruct_images,
    sample_chunks,
    temperature_text,
    without_padding,
)
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training import checkpoint, runs
from nvae_lowmem.units import format_seconds

EXIT_BAD_INPUT, EXIT_OUT_OF_MEMORY = 2, 5
DEFAULT_MICRO_BATCH = 16
RECALIBRATION_SEED = 0  # not --seed: the statistics belong to the checkpoint and are estimated once
OVERVIEW_ROWS = 2


@dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """Draw images from a trained model, after fitting its BatchNorm statistics to the sampling temperature.

    By default: one grid for each of the temperatures 0.7, 0.8, 0.9 and 1.0, and overview.png with held-out images,
    their reconstructions and samples, all in the run's samples/ folder.

    Examples:
      python launch/sample.py
      python launch/sample.py --run 3 --temperatures 0.6 0.7 --seed 5
      python launch/sample.py --run celeba64-4g --temperature 0.7,0.8,1.0
      python launch/sample.py --run runs/00003-mnist --temperature 1.0 --count 10000 --format zip --likelihood sample
    """

    run: str = "latest"
    """Run folder by path, number or name; latest: the newest one in --runs-dir."""
    runs_dir: str = "runs"
    """Where the numbered run folders are."""
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
    micro_batch: int = 0
    """Images per forward pass; 0: that of the run's memory plan, or 16 if it has none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""


def run_sampling(argv: Sequence[str]) -> int:
    """Parse argv, draw, and return the exit code: 0 done, 2 bad input, 5 out of memory."""
    command = tyro.cli(SampleCommand, args=list(argv), prog="sample.py")
    try:
        _sample(command)
    except ConfigError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except torch.OutOfMemoryError as error:
        print(f"sample.py: out of GPU memory: {str(error).splitlines()[0]}", file=sys.stderr)
        print("Halve --micro-batch, or use --device cpu.", file=sys.stderr)
        return EXIT_OUT_OF_MEMORY
    return 0


def _sample(command: SampleCommand) -> None:
    temperatures = _temperatures(command)
    device = _device(command.device)
    run_dir = runs.find_run(command.run, command.runs_dir)
    profile, model, where = checkpoint.load_run(run_dir, device)
    for temperature in temperatures:
        group_temperatures(temperature, model.config)
    micro_batch = command.micro_batch or profile.plan.micro_batch or DEFAULT_MICRO_BATCH
    out = _writable(Path(command.out) if command.out else run_dir / "samples")
    print(f"{where}: {model.config.total_groups} latent groups, on {device}, {micro_batch} images per pass", flush=True)
    # before the statistics are fitted to samples: the posterior wants those of training
    sections = _held_out_sections(profile, model, run_dir, micro_batch) if command.format == "grid" else []
    for temperature in temperatures:
        if command.recalibrate:
            _recalibrate(command, model, where, temperature, micro_batch)
        text = temperature_text(temperature)
        chunks = sample_chunks(
            model, command.count, temperature, command.seed, micro_batch, command.likelihood == "sample",
            _ProgressReport(f"sampling at {text}"),
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


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA GPU here; use --device cpu, or ask tools/doctor.py why")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"--out {folder}: cannot write there: {error.strerror or error}; name another folder"
        ) from None
    return folder


# --- the work ---------------------------------------------------------------------------------------------------------


def _recalibrate(command: SampleCommand, model: NVAE, where: Path, temperature: Temperature, micro_batch: int) -> None:
    text, began = temperature_text(temperature), time.monotonic()
    passes = command.passes or default_passes(next(model.parameters()).device, micro_batch)
    progress = _ProgressReport(f"BatchNorm statistics at {text}")
    kept = recalibrate_once(model, where, temperature, passes, micro_batch, RECALIBRATION_SEED, progress)
    took = format_seconds(time.monotonic() - began)
    source = f"kept in {kept}" if kept else f"{passes} x {images_per_pass(micro_batch)} prior samples, {took}"
    print(f"BatchNorm statistics at temperature {text}: {source}", flush=True)


def _held_out_sections(profile: Profile, model: NVAE, run_dir: Path, micro_batch: int) -> list[tuple[str, np.ndarray]]:
    """(caption, picture) of held-out images and their reconstructions, or of what training saw of them."""
    columns = grids.default_columns(model.config.image_size)
    try:
        held_out = open_source(profile.data, profile.model).test
    except ConfigError as error:
        print(f"no reconstructions, the data of this run cannot be opened: {error}", file=sys.stderr)
        reals = run_dir / "samples" / "reals.png"
        if not reals.is_file():
            return []
        with Image.open(reals) as picture:
            return [("held-out images", np.asarray(picture.convert("RGB")))]
    batches = evaluation_batches(held_out, profile.model, profile.data, columns, profile.training.seed)
    images = next(iter(batches))
    reconstructions = reconstruct_images(model, images, profile.training.seed, micro_batch)
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


class _ProgressReport:
    """Progress of one piece of work on stderr, with ETA: a bar on a terminal, a line every ten seconds in a log."""

    EVERY_SECONDS = 10.0

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: Any = None
        self._began = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            self._show_bar(done, total)
            return
        now = time.monotonic()
        if now - self._last >= self.EVERY_SECONDS and done < total:
            left = (now - self._began) / done * (total - done)
            print(f"{self._what}: {done}/{total}  ETA {format_seconds(left)}", file=sys.stderr, flush=True)
            self._last = now

    def _show_bar(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=total, desc=self._what, leave=False, dynamic_ncols=True, file=sys.stderr)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()
