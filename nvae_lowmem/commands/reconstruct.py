"""Reconstruct images with a trained model: python launch/reconstruct.py --run latest [IMAGE ...]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from nvae_lowmem.commands import picture_inputs as pictures
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.generation import grids
from nvae_lowmem.generation.reconstruct import error_table, parse_first_groups, picture_of, reconstruct
from nvae_lowmem.training.open_run import exit_code, progress_bar


@dataclass(frozen=True, kw_only=True)
class ReconstructCommand(pictures.PictureCommand):
    """Send images through a trained model and back: a picture, and a table of errors and likelihoods.

    The picture has the originals, their reconstructions, and what the first groups alone say of them.

    Examples:
      python launch/reconstruct.py --run latest
      python launch/reconstruct.py a.png b.jpg --run 3 --first-groups 1,3,6
      python launch/reconstruct.py photo.jpg --box 40,10,148,148 --run celeba64-4g
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
    """Parse, reconstruct, write, and return the exit code: 0 done, 2 bad input, 5 out of memory."""
    command = tyro.cli(ReconstructCommand, args=argv, prog="reconstruct.py")
    return exit_code("reconstruct.py", lambda: _reconstruct(command))


def _reconstruct(command: ReconstructCommand) -> None:
    if not (math.isfinite(command.temperature) and command.temperature >= 0):
        raise ConfigError(f"--temperature {command.temperature}: must be a number from 0 up, for example 0.3")
    run = pictures.opened(command)
    first_groups = parse_first_groups(command.first_groups, run.model.config)
    out = pictures.output_folder(command.out, run)
    images, names = pictures.given_or_held_out(run, command.images, command.box, command.count)
    result = reconstruct(
        run.model, images, command.seed, run.micro_batch, command.posterior, first_groups, command.temperature,
        progress_bar("reconstructing"),
    )  # fmt: skip
    print(error_table(result, names, run.model.config.bits))
    picture = picture_of(result, run.model.config.total_groups, command.temperature)
    print(grids.save_png(picture, out / "reconstructions.png"))
