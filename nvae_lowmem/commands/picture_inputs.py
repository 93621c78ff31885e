"""What the picture commands share: their flags, the run they open, the images that go into it, lists and tables.

Legend: B images, C image channels, S pixels per side, S' = S + 2 padding pixels per side inside the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from nvae_lowmem.data.image_files import load_images
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.generation.reconstruct import Posterior
from nvae_lowmem.training.open_run import OpenRun, RunCommand, held_out_batches, open_run, writable_folder

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
    run = open_run(command.run, command.runs_dir, command.device, command.micro_batch, data=command.data)
    print(run.describe(), flush=True)
    return run


def output_folder(given: str, run: OpenRun) -> Path:
    """The folder that was asked for, or samples/ in the run's. Raises ConfigError where nothing can be written."""
    return writable_folder("--out", Path(given) if given else run.folder / "samples")


# --- images -----------------------------------------------------------------------------------------------------------


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
