"""Blend two images in a trained model's latent groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.commands.flags import ImageFlags
from nvae_lowmem.config.choices import BlendMode
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BlendCommand(ImageFlags):
    """Blend two images: a strip from one to the other, and if asked for a matrix and an animation.

    Examples:
      nvae-lowmem blend --run latest
      nvae-lowmem blend a.png b.png --run latest --steps 9
      nvae-lowmem blend a.png b.png --weights 0,1,1 --matrix 5
      nvae-lowmem blend a.png b.png --mode scales
      nvae-lowmem blend a.png b.png --animation morph.gif
    """

    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="A B")] = ()
    """The two image files, treated as the run's data were; none: two held-out images of the run's data."""
    mode: BlendMode = "linear"
    """linear: both posteriors mixed group by group, given what the groups above became; scales: coarse groups from A,
    fine ones from B, given those; simple: the latents of two independent passes, mixed."""
    weights: str = "1"
    """How far the strip goes towards B, 0 to 1: one number, or one per scale or per group, HIGHEST RESOLUTION FIRST."""
    steps: int = 9
    """Images of the strip; 1: only the blend at --weights."""
    split: str = ""
    """Coarse are: scale:N, the N lowest resolutions, or group:N, the first N groups. Empty: mode scales shows --steps
    even splits, the matrix has half of the scales."""
    matrix: int = 0
    """Also a matrix of so many weights of the coarse groups by as many of the fine ones; 0: none."""
    animation: str = ""
    """Also the way there and back as a file that ends in .gif, .webp or .png."""
    frames: int = 32
    """Images of the animation, one way."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, blend, write, and return the exit code."""
    return run_command(BlendCommand, _blend, argv)


def _blend(command: BlendCommand) -> None:
    if len(command.images) not in (0, 2):
        raise ConfigError(f"two images are blended, not {len(command.images)}: name two, or none for two held-out ones")
    if command.split and command.mode != "scales" and not command.matrix:
        raise ConfigError(f"--split {command.split} belongs to --mode scales and to --matrix: add one of them")
    command.find()
    from nvae_lowmem.commands import image_inputs
    from nvae_lowmem.data.pipeline import without_padding
    from nvae_lowmem.generation import blend, grids

    run = image_inputs.opened(command)
    config, mode = run.model.config, command.mode
    strip = blend.path_weights(config, mode, command.weights, command.split, command.steps)
    matrix = blend.matrix_weights(config, mode, command.split, command.matrix) if command.matrix else None
    frames = blend.animation_weights(config, mode, command.weights, command.frames, command.animation)
    pair, files = image_inputs.given_or_held_out(run, command.images, command.box, 2)
    if len(pair) < 2:
        raise ConfigError(f"the run's data {run.profile.data.source} hold out one image alone: name two files to blend")
    names = [Path(name).stem.replace(" ", "-") for name in files]
    out = image_inputs.output_folder(command.out, run)

    def blended(what: str, weights: Tensor) -> Tensor:
        bar, size = progress_bar(what), run.micro_batch
        return blend.blend_images(run.model, pair, weights, mode, command.posterior, command.seed, size, bar)

    path = out / f"blend-{mode}-{names[0]}-{names[1]}.png"
    picture = blend.strip_picture(without_padding(pair, config), blended("strip", strip), names, strip, command.scale)
    print(grids.save_png(picture, path))
    if matrix is not None:
        picture = blend.matrix_picture(blended("matrix", matrix), names, command.scale)
        print(grids.save_png(picture, path.with_name(f"{path.stem}-matrix.png")), flush=True)
    if frames is not None:
        print(blend.save_animation(blended("animation", frames), Path(command.animation), scale=command.scale))
