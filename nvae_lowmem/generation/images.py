"""What the picture commands share: a run opened for pictures, the images that go into it, and how a command ends.

Legend: B images, C image channels, S pixels per side, S' = S + 2 padding pixels per side inside the network.
"""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nvae_lowmem.config import ConfigError, Profile
from nvae_lowmem.data.picture import MAX_FILE_BYTES, Preparation, UnreadableImage, decode
from nvae_lowmem.data.pipeline import evaluation_batches, to_network
from nvae_lowmem.data.sources import open_source
from nvae_lowmem.generation.sample import Progress
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training import checkpoint, runs

EXIT_BAD_INPUT, EXIT_OUT_OF_MEMORY = 2, 5
DEFAULT_MICRO_BATCH = 16
PROGRESS_DELAY_SECONDS = 2.0
"""Work that is done sooner shows no progress bar."""

DeviceChoice = Literal["auto", "cpu", "cuda"]
Number = TypeVar("Number", int, float)


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A trained model in evaluation mode, and what pictures of it need to know."""

    folder: Path
    profile: Profile
    model: NVAE
    device: torch.device
    micro_batch: int
    """Images per forward pass."""


def open_run(run: str, runs_dir: str, device: DeviceChoice = "auto", micro_batch: int = 0) -> OpenRun:
    """The newest checkpoint of a run. micro_batch 0: the one of the run's memory plan, or 16 if it has none.

    Raises ConfigError: no such run, no whole checkpoint, one of another version, no GPU though asked for.
    """
    if micro_batch < 0:
        raise ConfigError(f"--micro-batch {micro_batch}: must be at least 1, or 0 for the one of the run's memory plan")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA GPU here; use --device cpu, or ask tools/doctor.py why")
    where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    folder = runs.find_run(run, runs_dir)
    profile, model, saved = checkpoint.load_run(folder, where)
    images_per_pass = micro_batch or profile.plan.micro_batch or DEFAULT_MICRO_BATCH
    groups = model.config.total_groups
    print(f"{saved}: {groups} latent groups, on {where}, {images_per_pass} images per pass", flush=True)
    return OpenRun(folder=folder, profile=profile, model=model, device=where, micro_batch=images_per_pass)


# --- images -----------------------------------------------------------------------------------------------------------


class Box(NamedTuple):
    """A square of a picture, in its pixels: left and upper edge, and the side."""

    left: int
    top: int
    side: int


def parse_box(text: str) -> Box:
    """The square "x,y,w,h" with w = h. Raises ConfigError for anything else."""
    try:
        x, y, width, height = (int(part) for part in text.split(","))
    except ValueError:
        x = y = width = height = -1
    if min(x, y) < 0 or width < 1 or width != height:
        raise ConfigError(
            f"--box {text}: must be x,y,w,h in pixels: the upper left corner and two equal sides, as in 40,10,148,148"
        )
    return Box(x, y, width)


def load_images(paths: Sequence[str], profile: Profile, boxes: Sequence[str] = ()) -> Tensor:
    """Image files as a run's own data: squared, resized, its colours and bits, padded; (B, C, S', S') fp32 in [0, 1].

    boxes: `x,y,w,h` of the square to take, none, one for all images, or one for each. Without one the square is that
    of the run's data settings. Binary models get pixels on either side of 1/2, not random ones.
    Raises ConfigError: a file that is missing or no image, a box that does not fit, more or fewer boxes than images.
    """
    if len(boxes) not in (0, 1, len(paths)):
        raise ConfigError(f"--box is given {len(boxes)} times for {len(paths)} images: give it once, or once per image")
    per_image: list[str | None] = [*boxes] * len(paths) if len(boxes) == 1 else [*boxes] or [None] * len(paths)
    prepare = Preparation.of(profile.data, profile.model)
    images = []
    for path, box in zip(paths, per_image, strict=True):
        picture = _read(path)
        if box is None:
            pixels = prepare(picture, path)
        else:
            pixels = replace(prepare, crop="centre", crop_pixels=0)(_cut(picture, parse_box(box), path), path)
        images.append(torch.tensor(pixels))
    return to_network(torch.stack(images), profile.model, None)


def _read(path: str) -> Image.Image:
    try:
        if os.path.getsize(path) > MAX_FILE_BYTES:
            raise ConfigError(f"image {path}: larger than {MAX_FILE_BYTES >> 20} MiB; make it smaller")
        with warnings.catch_warnings():  # pillow warns at the number of pixels that `decode` refuses with a message
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return decode(Path(path).read_bytes(), path)
    except OSError as error:
        raise ConfigError(f"image {path}: cannot be read: {error.strerror or error}") from None
    except UnreadableImage as error:
        raise ConfigError(f"image {error}; give a PNG, JPEG or WebP file") from None


def _cut(picture: Image.Image, box: Box, path: str) -> Image.Image:
    right, bottom = box.left + box.side, box.top + box.side
    if right > picture.width or bottom > picture.height:
        raise ConfigError(
            f"--box {box.left},{box.top},{box.side},{box.side} reaches beyond image {path}, which is "
            f"{picture.width} x {picture.height} pixels (width x height)"
        )
    return picture.crop((box.left, box.top, right, bottom))


def held_out_batches(run: OpenRun, count: int, progress: Progress | None = None) -> Iterator[Tensor]:
    """The first `count` held-out images of the run's data, (b, C, S', S') each, on the run's device; 0: all of them.

    Raises ConfigError when the data cannot be opened, at once and not with the first batch.
    """
    profile = run.profile
    held_out = open_source(profile.data, profile.model).test
    wanted = min(count, len(held_out)) if count else len(held_out)

    def batches() -> Iterator[Tensor]:
        done = 0
        for x in evaluation_batches(held_out, profile.model, profile.data, run.micro_batch, profile.training.seed):
            if done >= wanted:
                return
            x = x[: wanted - done].to(run.device)
            yield x
            done += len(x)
            if progress is not None:
                progress(done, wanted)

    return batches()


def given_or_held_out(run: OpenRun, paths: Sequence[str], boxes: Sequence[str], count: int) -> tuple[Tensor, list[str]]:
    """Images (B, C, S', S') and their names: the given files, or without any the first `count` held-out images.

    Raises ConfigError: images that cannot be used, data that cannot be opened, a count below 1.
    """
    if paths:
        return load_images(paths, run.profile, boxes).to(run.device), [Path(path).name for path in paths]
    if count < 1:
        raise ConfigError(f"--count {count}: must be at least 1")
    if boxes:
        raise ConfigError("--box belongs to image files, and none is given")
    images = torch.cat(list(held_out_batches(run, count)))
    return images, [f"held-out {number}" for number in range(len(images))]


# --- how a command speaks and ends ------------------------------------------------------------------------------------


def numbers(text: str, flag: str, kind: Callable[[str], Number]) -> list[Number]:
    """The numbers of a comma-separated list. Raises ConfigError naming the flag."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} {text}: must be numbers with commas between them, for example 1,3,6") from None


def output_folder(given: str, run: OpenRun) -> Path:
    """The folder that was asked for, or samples/ in the run's. Raises ConfigError where nothing can be written."""
    folder = Path(given) if given else run.folder / "samples"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be made: {error.strerror or error}; name another folder") from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--out {folder}: cannot write there; name another folder")
    return folder


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be, the first one flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in itertools.chain([header], rows):
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def progress_bar(what: str) -> Progress:
    """Progress with ETA on stderr, once the work has taken two seconds; in a log, a line every ten seconds."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    bar = tqdm(desc=what, delay=PROGRESS_DELAY_SECONDS, leave=False, dynamic_ncols=True, mininterval=interval)

    def report(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return report


def exit_code(program: str, work: Callable[[], None]) -> int:
    """Do the work of a command: 0 done, 2 what the user gave is at fault, 5 out of GPU memory; no tracebacks."""
    try:
        work()
    except ConfigError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except torch.OutOfMemoryError as error:
        print(f"{program}: out of GPU memory: {str(error).splitlines()[0]}", file=sys.stderr)
        print("Halve --micro-batch, or use --device cpu.", file=sys.stderr)
        return EXIT_OUT_OF_MEMORY
    except OSError as error:  # a full disk, a folder that went away: everything else was checked before
        print(f"{program}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0
