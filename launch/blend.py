"""Blend two images in a trained model's latent groups: python launch/blend.py A.png B.png --run latest."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed, too

from nvae_lowmem.generation import blend, grids
from nvae_lowmem.generation import images as pictures
from nvae_lowmem.generation.reconstruct import Posterior
from nvae_lowmem.generation.sample import without_padding


@dataclass(frozen=True, kw_only=True)
class BlendCommand:
    """Blend two images: a strip from one to the other, and if asked for a matrix and an animation.

    Examples:
      python launch/blend.py a.png b.png --run latest --steps 9
      python launch/blend.py a.png b.png --weights 0,1,1 --matrix 5
      python launch/blend.py a.png b.png --mode scales
      python launch/blend.py a.png b.png --animation morph.gif
    """

    images: Annotated[tyro.conf.Positional[tuple[str, str]], tyro.conf.arg(metavar="A B")]
    """The two image files, treated as the run's data were."""
    run: str = "latest"
    """Run folder by path, number or name; latest: the newest one in --runs-dir."""
    runs_dir: str = "runs"
    """Where the numbered run folders are."""
    box: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """x,y,w,h in pixels of the square to take from the images; once for both, or one for each."""
    mode: blend.Mode = "linear"
    """linear: both posteriors mixed group by group, given what the groups above became; scales: coarse groups from A,
    fine ones from B, given those; simple: the latents of two independent passes, mixed."""
    weights: str = "1"
    """How far the strip goes towards B, 0 to 1: one number, or one per scale or per group, HIGHEST RESOLUTION FIRST."""
    steps: int = 9
    """Pictures of the strip; 1: only the blend at --weights."""
    split: str = ""
    """Coarse are: scale:N, the N lowest resolutions, or group:N, the first N groups. Empty: mode scales shows --steps
    even splits, the matrix has half of the scales."""
    matrix: int = 0
    """Also a matrix of so many weights of the coarse groups by as many of the fine ones; 0: none."""
    animation: str = ""
    """Also the way there and back as a file that ends in .gif, .webp or .png."""
    frames: int = 32
    """Pictures of the animation, one way."""
    posterior: Posterior = "sample"
    """z of an image: a draw from q(z|x), or each group's mean, smoother."""
    seed: int = 0
    """Seed of the draws."""
    out: str = ""
    """Folder to write to; empty: samples/ in the run's folder."""
    micro_batch: int = 0
    """Images per forward pass; 0: that of the run's memory plan, or 16 if it has none."""
    device: pictures.DeviceChoice = "auto"
    """auto: the GPU where there is one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, blend, write, and return the exit code: 0 done, 2 bad input, 5 out of memory."""
    command = tyro.cli(BlendCommand, args=argv, prog="blend.py")
    return pictures.exit_code("blend.py", lambda: _blend(command))


def _blend(command: BlendCommand) -> None:
    run = pictures.open_run(command.run, command.runs_dir, command.device, command.micro_batch)
    config, mode, names = run.model.config, command.mode, [Path(path).stem for path in command.images]
    strip = blend.path_weights(config, mode, command.weights, command.split, command.steps)
    matrix = blend.matrix_weights(config, mode, command.split, command.matrix) if command.matrix else None
    frames = blend.animation_weights(config, mode, command.weights, command.frames, command.animation)
    pair = pictures.load_images(command.images, run.profile, command.box).to(run.device)
    out = pictures.output_folder(command.out, run)

    def blended(what: str, weights: Tensor) -> Tensor:
        bar, size = pictures.progress_bar(what), run.micro_batch
        return blend.blend_images(run.model, pair, weights, mode, command.posterior, command.seed, size, bar)

    path = out / f"blend-{mode}-{names[0]}-{names[1]}.png"
    picture = blend.strip_picture(without_padding(pair, config), blended("strip", strip), names)
    print(grids.save_png(picture, path))
    if matrix is not None:
        picture = blend.matrix_picture(blended("matrix", matrix), names)
        print(grids.save_png(picture, path.with_name(f"{path.stem}-matrix.png")), flush=True)
    if frames is not None:
        print(blend.save_animation(blended("animation", frames), Path(command.animation)))


if __name__ == "__main__":
    sys.exit(main())
