"""Restore images with a trained model: missing pixels, noise, low resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.commands.flags import ImageFlags, at_least
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from nvae_lowmem.generation.restore import Observation
    from nvae_lowmem.training.open_run import OpenRun

RestoreTask = Literal["inpaint", "denoise", "upscale"]


@dataclass(frozen=True, kw_only=True)
class RestoreCommand(ImageFlags):
    """Restore images: fill in missing pixels, take noise away, or enlarge.

    The model's reconstruction and what is known of the image take turns; nothing is trained, and no gradients are
    needed. Without images, held-out ones are damaged as the flags say, and the table tells how well they came back.

    Examples:
      nvae-lowmem restore inpaint --run latest --missing 0.5
      nvae-lowmem restore inpaint photo.png --mask mask.png --run 3
      nvae-lowmem restore inpaint photo.png --mask mask.png --guesses 4
      nvae-lowmem restore denoise photo.png --sigma 0.1
      nvae-lowmem restore upscale small.png --factor 2
    """

    task: Annotated[RestoreTask, tyro.conf.Positional]
    """inpaint: some pixels are missing; denoise: all have noise; upscale: only means of squares are known."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE ...")] = ()
    """Image files; none: held-out images of the run's data, damaged on purpose."""
    count: int = 8
    """Held-out images, where no files are given."""
    mask: str = ""
    """inpaint: an image file, white where pixels are missing, for all images."""
    missing: float = 0.5
    """inpaint without a mask: so large a share of the pixels is missing, at random."""
    sigma: float = 0.1
    """denoise: deviation of the noise, as a share of the range of values."""
    factor: Literal[2, 4] = 2
    """upscale: so many times as many pixels per side."""
    iterations: int = 32
    """Times that the model and the data take turns."""
    guesses: int = 1
    """Guesses whose mean is the result: 1 is sharp; 4 are softer, closer where much is missing, and take longer."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, restore, write, and return the exit code."""
    return run_command(RestoreCommand, _restore, argv)


def _restore(command: RestoreCommand) -> None:
    at_least(1, count=command.count)
    at_least(2, iterations=command.iterations)
    at_least(1, guesses=command.guesses)
    if not 0 < command.missing < 1:
        raise ConfigError(f"--missing {command.missing}: must lie between 0 and 1, for example 0.5")
    if not 0 < command.sigma <= 1:
        raise ConfigError(f"--sigma {command.sigma}: must be above 0 and at most 1, for example 0.1")
    if command.mask and command.task != "inpaint":
        raise ConfigError(f"--mask {command.mask} belongs to inpaint, not to {command.task}")
    command.find()
    from nvae_lowmem.commands import image_inputs
    from nvae_lowmem.generation import grids
    from nvae_lowmem.generation.restore import restore

    run = image_inputs.opened(command)
    originals, names, measured = _measured(command, run)
    out = image_inputs.output_folder(command.out, run)
    restored = restore(
        run.model, measured, command.iterations, command.seed, run.micro_batch, progress_bar("restoring"),
        command.guesses,
    )  # fmt: skip
    rows = {"original": originals, "what is known": measured.shown(), "restored": restored}
    if originals is not None:
        print(_table(names, originals, measured.first_guess(), restored))
    columns = grids.default_columns(restored.shape[-1], command.scale)
    picture = grids.stack(
        [
            grids.labelled(grids.grid(images, columns, scale=command.scale), text)
            for text, images in rows.items()
            if images is not None
        ]
    )
    print(grids.save_png(picture, out / f"restored-{command.task}.png"))
    for name, image in zip(_stems(names), grids.to_uint8(restored), strict=True):
        print(grids.save_png(image, out / f"restored-{command.task}-{name}.png"))


def _measured(command: RestoreCommand, run: OpenRun) -> tuple[Tensor | None, list[str], Observation]:
    """(originals (B, C, S, S) where they are known, names, what is known of the images)."""
    import torch
    from torch.nn import functional

    from nvae_lowmem.commands import image_inputs
    from nvae_lowmem.data.pipeline import without_padding
    from nvae_lowmem.generation.restore import KnownPixels, LowResolution, NoisyPixels

    size = run.profile.model.image_size
    if size % command.factor and command.task == "upscale":
        raise ConfigError(f"--factor {command.factor} does not divide the model's {size} pixels per side")
    batch, names = image_inputs.given_or_held_out(run, command.images, command.box, command.count)
    images = without_padding(batch, run.profile.model)
    generator = torch.Generator().manual_seed(command.seed)
    on_purpose = images if not command.images else None
    if command.task == "inpaint":
        known = torch.rand((len(images), 1, size, size), generator=generator) >= command.missing
        if command.mask:
            white = image_inputs.mask(command.mask, size)
            known = (~white)[None, None]
        return on_purpose, names, KnownPixels(images, known)
    if command.task == "denoise":
        noise = torch.randn(images.shape, generator=generator) * command.sigma
        return on_purpose, names, NoisyPixels(images + noise if on_purpose is not None else images, command.sigma)
    return on_purpose, names, LowResolution(functional.avg_pool2d(images, command.factor), command.factor)


def _stems(names: Sequence[str]) -> list[str]:
    """Names of files without their endings; those of one name, from different folders, are numbered from the second."""
    stems = [Path(name).stem.replace(" ", "-") for name in names]
    before = [stems[:i].count(stem) for i, stem in enumerate(stems)]
    return [f"{stem}-{seen + 1}" if seen else stem for stem, seen in zip(stems, before, strict=True)]


def _table(names: Sequence[str], originals: Tensor, known: Tensor, restored: Tensor) -> str:
    from nvae_lowmem.generation.restore import psnr
    from nvae_lowmem.text_table import text_table

    columns = [psnr(known, originals), psnr(restored, originals)]
    rows = [[name, *(f"{c[i]:.1f}" for c in columns)] for i, name in enumerate(names)]
    rows.append(["mean", *(f"{c.mean():.1f}" for c in columns)])
    return "\n".join(text_table("<>", [["image", "PSNR of a simple guess, dB", "restored, dB"], *rows], rule=False))
