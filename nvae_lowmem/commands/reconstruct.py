"""Reconstruct images with a trained model, and say how good the reconstructions are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.commands.flags import ImageFlags
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.progress import progress_bar


@dataclass(frozen=True, kw_only=True)
class ReconstructCommand(ImageFlags):
    """Send images through a trained model and back: a picture, and a table of errors and likelihoods.

    The picture has the originals, their reconstructions, and what the first groups alone say of them.

    Examples:
      nvae-lowmem reconstruct --run latest
      nvae-lowmem reconstruct a.png b.jpg --run 3 --first-groups 1,3,6
      nvae-lowmem reconstruct photo.jpg --box 40,10,148,148 --run celeba64-4g
    """

    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE ...")] = ()
    """Image files, treated as the run's data were; none: held-out images of the run's data."""
    count: int = 8
    """Held-out images, where no files are given."""
    first_groups: str = "auto"
    """Also reconstruct from this many first groups, counted from the lowest resolution: 1,3,6, or none. auto: one, a
    quarter and a half of them."""
    temperature: float = 0.3
    """What the prior's sigma is multiplied by in the groups that are not the image's."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, reconstruct, write, and return the exit code."""
    return run_command(ReconstructCommand, _reconstruct, argv)


def _reconstruct(command: ReconstructCommand) -> None:
    if not (math.isfinite(command.temperature) and command.temperature >= 0):
        raise ConfigError(f"--temperature {command.temperature}: must be a number from 0 up, for example 0.3")
    command.find()
    from nvae_lowmem.commands import image_inputs
    from nvae_lowmem.generation import grids
    from nvae_lowmem.generation.reconstruct import error_table, parse_first_groups, picture_of, reconstruct

    run = image_inputs.opened(command)
    first_groups = parse_first_groups(command.first_groups, run.model.config)
    out = image_inputs.output_folder(command.out, run)
    images, names = image_inputs.given_or_held_out(run, command.images, command.box, command.count)
    result = reconstruct(
        run.model, images, command.seed, run.micro_batch, command.posterior, first_groups, command.temperature,
        progress_bar("reconstructing"),
    )  # fmt: skip
    print(error_table(result, names, run.model.config.bits))
    picture = picture_of(result, run.model.config.total_groups, command.temperature, command.scale)
    print(grids.save_png(picture, out / "reconstructions.png"))
