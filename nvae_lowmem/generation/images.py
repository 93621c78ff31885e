"""What the picture commands share: their flags, the run they open, the images that go into it, lists and tables.

Legend: B images, C image channels, S pixels per side, S' = S + 2 padding pixels per side inside the network.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

import torch
import tyro
from PIL import Image
from torch import Tensor

from nvae_lowmem.config import ConfigError, Profile
from nvae_lowmem.data.picture import MAX_FILE_BYTES, Preparation, UnreadableImage, decode
from nvae_lowmem.data.pipeline import evaluation_batches, to_network
from nvae_lowmem.data.sources import open_source
from nvae_lowmem.training.commands import OpenRun, Progress, RunCommand, open_run, writable_folder

Posterior = Literal["sample", "mean"]
"""Which z an image has: a draw from q(z|x), or the mean of every group's q given the groups above it."""
Number = TypeVar("Number", int, float)


# --- the command and its run ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PictureCommand(RunCommand):
    """The flags of every command that sends images through a model and draws a picture."""

    box: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """x,y,w,h in pixels of the square to take from the images; once for all of them, or repeated for each."""
    posterior: Posterior = "sample"
    """z of an image: a draw from q(z|x), as in training, or each group's mean: smoother, and without a likelihood."""
    seed: int = 0
    """Seed of all draws."""
    out: str = ""
    """Folder to write to; empty: samples/ in the run's folder."""


def opened(command: PictureCommand) -> OpenRun:
    """The run of a command, which is told what was opened. Raises ConfigError as `open_run` does."""
    run = open_run(command.run, command.runs_dir, command.device, command.micro_batch)
    print(run.describe(), flush=True)
    return run


def output_folder(given: str, run: OpenRun) -> Path:
    """The folder that was asked for, or samples/ in the run's. Raises ConfigError where nothing can be written."""
    return writable_folder("--out", Path(given) if given else run.folder / "samples")


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
    """The first `count` held-out images of the run's data, (b, C, S', S') each, on the host; 0: all of them.

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
            yield x[: wanted - done]
            done = min(done + len(x), wanted)
            if progress is not None:
                progress(done, wanted)

    return batches()


def given_or_held_out(run: OpenRun, paths: Sequence[str], boxes: Sequence[str], count: int) -> tuple[Tensor, list[str]]:
    """Images (B, C, S', S') on the host, and their names: the given files, or the first `count` held-out images.

    Raises ConfigError: images that cannot be used, data that cannot be opened, a count below 1.
    """
    if paths:
        return load_images(paths, run.profile, boxes), [Path(path).name for path in paths]
    if count < 1:
        raise ConfigError(f"--count {count}: must be at least 1")
    if boxes:
        raise ConfigError("--box belongs to image files, and none is given")
    images = torch.cat(list(held_out_batches(run, count)))
    return images, [f"held-out {number}" for number in range(len(images))]


# --- words ------------------------------------------------------------------------------------------------------------


def numbers(text: str, flag: str, kind: Callable[[str], Number]) -> list[Number]:
    """The numbers of a comma-separated list. Raises ConfigError naming the flag."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} {text}: must be numbers with commas between them, for example 1,3,6") from None


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
