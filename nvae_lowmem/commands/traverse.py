"""Show what each latent group of a trained model controls."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.commands.flags import ImageFlags
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from nvae_lowmem.training.open_run import OpenRun


@dataclass(frozen=True, kw_only=True)
class TraverseCommand(ImageFlags):
    """Move one latent group of an image at a time: a picture of what each controls, and a table of its KL.

    Examples:
      nvae-lowmem traverse --run latest
      nvae-lowmem traverse face.png --run 3 --groups 1,2,5 --sigmas 3
      nvae-lowmem traverse face.png --groups 3 --channels 6
    """

    image: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE")] = ()
    """One image file, treated as the run's data were; none: the first held-out image of the run's data."""
    groups: str = ""
    """Groups to move, counted from the lowest resolution: 1,3,6; empty: all, or twelve of them evenly spread."""
    channels: int = 0
    """A row for each of so many of a group's most active channels; 0: a row per group, all channels moved together."""
    sigmas: float = 2.0
    """How far to move, in standard deviations of the prior, either way."""
    steps: int = 7
    """Images per row."""
    count: int = 256
    """Held-out images that KL and active channels are measured on; 0: all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, traverse, write, and return the exit code."""
    return run_command(TraverseCommand, _traverse, argv)


def _traverse(command: TraverseCommand) -> None:
    command.find()
    from nvae_lowmem.commands import image_inputs
    from nvae_lowmem.generation import grids, traverse

    traverse.check_counts(len(command.image), command.count)
    run = image_inputs.opened(command)
    config = run.model.config
    groups, channels = traverse.parse_groups(command.groups, config), traverse.check_channels(command.channels, config)
    sigmas = traverse.sigma_steps(command.sigmas, command.steps)
    image, (name,) = image_inputs.given_or_held_out(run, command.image, command.box, 1)
    out = image_inputs.output_folder(command.out, run)
    kl = _activity(run, image, command.count)
    rows, bar = traverse.rows_of(groups, channels, kl, config), progress_bar("traversing")
    moves, size = traverse.moves_of(rows, sigmas), run.micro_batch
    images = traverse.traverse(run.model, image, moves, command.posterior, command.seed, size, bar)
    picture = traverse.traversal_picture(
        rows, images, f"{name}: from {-command.sigmas:g} to {command.sigmas:g} sigmas", sigmas, command.scale
    )
    print(grids.save_png(picture, out / f"traverse-{Path(name).stem.replace(' ', '-')}.png"))


def _activity(run: OpenRun, image: Tensor, count: int) -> Tensor:
    """KL per group and channel, (groups, L), also shown to the user."""
    from nvae_lowmem.generation import traverse
    from nvae_lowmem.training.open_run import held_out_batches

    try:
        batches = held_out_batches(run, count, progress_bar("measuring KL"))
    except ConfigError as error:
        print(f"KL is that of the given image, the data of this run cannot be opened: {error}", file=sys.stderr)
        batches = iter([image])
    kl, images = traverse.channel_kl(run.model, batches, run.profile.training.seed)
    print(f"over {images} image{'s' * (images != 1)}:\n{traverse.activity_table(kl, run.model.config)}", flush=True)
    for warning in traverse.collapse_warnings(kl, run.model.config):
        print(warning, file=sys.stderr)
    return kl
