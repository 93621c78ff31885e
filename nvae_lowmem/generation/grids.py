"""Pictures for people: grids of images, strips with a caption, and what a run shows of itself while it trains."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.data.pipeline import as_rgb, without_padding
from nvae_lowmem.files import write_atomically
from nvae_lowmem.generation.recalibrate import recalibrated
from nvae_lowmem.generation.sample import reconstruct_images, sample_images, temperature_text
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training.open_run import images_per_pass
from nvae_lowmem.training.validation import activations_in

if TYPE_CHECKING:  # the trainer brings TensorBoard and the data along
    from nvae_lowmem.training.trainer import Pictures

TEMPERATURES = (0.7, 0.8, 0.9, 1.0)
MIN_CELL_PIXELS = 56
"""Smaller images are magnified, so that a person can see them."""
GRID_WIDTH_PIXELS = 1000
BACKGROUND = 255
CAPTION_PIXELS, CAPTION_MARGIN_PIXELS = 14, 5
UNDER_PIXELS = 14

PREVIEW_IMAGES, PREVIEW_PASSES = 16, 10  # of a grid in training: cheap enough to be drawn ten times in a CPU demo


# --- arrays -----------------------------------------------------------------------------------------------------------


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, C, S, S) in [0, 1] -> (B, S, S, 3) uint8; images that are not RGB become grey, the mean over channels."""
    return (as_rgb(images).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def default_columns(image_pixels: int, scale: int = 0) -> int:
    """Columns of a grid that is about a thousand pixels wide, from 4 to 16."""
    return min(16, max(4, GRID_WIDTH_PIXELS // (image_pixels * _magnification(image_pixels, scale))))


def grid(images: Tensor, columns: int, padding: int = 2, under: Sequence[str] = (), scale: int = 0) -> np.ndarray:
    """(B, C, S, S) in [0, 1], at most `columns` in a row -> (H, W, 3) uint8.

    under: a few letters below each cell, none or one text per image. scale: screen pixels per pixel of an image and
    side; 0: as many as make cells of at least 56.
    """
    cells, columns = to_uint8(images), min(columns, len(images))
    factor = _magnification(cells.shape[1], scale)
    cells = cells.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, _ = cells.shape
    rows = -(-count // columns)
    step_y, step_x = height + padding + (UNDER_PIXELS if under else 0), width + padding
    canvas = np.full((rows * step_y + padding, columns * step_x + padding, 3), BACKGROUND, np.uint8)
    for i, cell in enumerate(cells):
        top, left = padding + i // columns * step_y, padding + i % columns * step_x
        canvas[top : top + height, left : left + width] = cell
        if under:
            canvas[top + height : top + height + UNDER_PIXELS, left : left + width] = _centred(under[i], width)
    return canvas


def _centred(text: str, width: int) -> np.ndarray:
    """A small text in the middle of a bar (UNDER_PIXELS, width, 3)."""
    bar = Image.new("RGB", (width, UNDER_PIXELS), (BACKGROUND,) * 3)
    font = ImageFont.load_default(size=UNDER_PIXELS - 3)
    ImageDraw.Draw(bar).text((width // 2, UNDER_PIXELS // 2), text, fill=(0, 0, 0), font=font, anchor="mm")
    return np.asarray(bar)


def labelled(picture: np.ndarray, caption: str) -> np.ndarray:
    """The picture (H, W, 3) with a line of text above it."""
    font = ImageFont.load_default(size=CAPTION_PIXELS)
    width = max(picture.shape[1], math.ceil(font.getlength(caption)) + 2 * CAPTION_MARGIN_PIXELS)
    bar = Image.new("RGB", (width, CAPTION_PIXELS + 2 * CAPTION_MARGIN_PIXELS), (BACKGROUND,) * 3)
    ImageDraw.Draw(bar).text((CAPTION_MARGIN_PIXELS, CAPTION_MARGIN_PIXELS // 2), caption, fill=(0, 0, 0), font=font)
    return stack([np.asarray(bar), picture])


def stack(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures (H_i, W_i, 3) one below the other, the narrower ones filled up with white."""
    width = max(picture.shape[1] for picture in pictures)
    missing = [width - picture.shape[1] for picture in pictures]
    sides = [((0, 0), (0, pixels), (0, 0)) for pixels in missing]
    return np.concatenate(
        [np.pad(p, side, constant_values=BACKGROUND) for p, side in zip(pictures, sides, strict=True)]
    )


def png_bytes(picture: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a PNG file."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, format="PNG")
    return out.getvalue()


def save_png(picture: np.ndarray, path: Path) -> Path:
    """Write (H, W, 3) uint8; whoever looks meanwhile sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_atomically(path, png_bytes(picture))


def _magnification(image_pixels: int, scale: int) -> int:
    return scale or max(1, -(-MIN_CELL_PIXELS // image_pixels))


# --- what a run shows while it trains ---------------------------------------------------------------------------------


def training_pictures(profile: Profile) -> Pictures:
    """What the trainer calls with its model in evaluation mode: draws, writes files, and returns the pictures.

    In the samples folder: `reals.png` once, then `reconstructions-STEP.png` (each image above its reconstruction) and
    `step-STEP-t0.7.png` ... at four temperatures, with BatchNorm statistics from a few passes; all drawn from the same
    noise in every call, so that the pictures of two steps can be compared.
    """

    def draw(model: NVAE, images: Tensor, folder: Path, step: int) -> dict[str, np.ndarray]:
        columns = default_columns(model.config.image_size)
        reconstructed, samples = preview(model, images, profile)
        pictures = {"reconstructed": pairs(images, reconstructed, model)}
        pictures |= {f"generated_{t}": grid(drawn, columns) for t, drawn in samples.items()}
        if not (folder / "reals.png").exists():
            save_png(grid(without_padding(images, model.config), columns), folder / "reals.png")
        save_png(pictures["reconstructed"], folder / f"reconstructions-{step}.png")
        for t in TEMPERATURES:
            save_png(pictures[f"generated_{t}"], folder / f"step-{step}-t{temperature_text(t)}.png")
        return pictures

    return draw


@torch.no_grad()
def preview(
    model: NVAE,
    images: Tensor,
    profile: Profile,
    temperatures: Sequence[float] = TEMPERATURES,
    passes: int = PREVIEW_PASSES,
) -> tuple[Tensor, dict[float, Tensor]]:
    """Reconstructions (B, C, S, S) of images (B, C, padded, padded), and 16 samples at each temperature, on the host.

    With as many images per pass as training takes, in its precision, from a model in evaluation mode. passes: over
    which BatchNorm statistics are taken.
    """
    seed, micro_batch = profile.training.seed, min(PREVIEW_IMAGES, images_per_pass(profile, profile.plan.precision))
    samples = {}
    with activations_in(profile.plan.precision, images.device):
        reconstructions = reconstruct_images(model, images, seed, micro_batch)
        for t in temperatures:
            with recalibrated(model, t, passes, micro_batch, seed):
                samples[t] = sample_images(model, PREVIEW_IMAGES, t, seed, micro_batch)
    return reconstructions, samples


def pairs(images: Tensor, reconstructions: Tensor, model: NVAE) -> np.ndarray:
    """Images (B, C, padded, padded) above their reconstructions (B, C, S, S), as (H, W, 3) uint8."""
    originals = without_padding(images, model.config).cpu()
    columns = default_columns(model.config.image_size)
    rows = [torch.cat(row) for row in zip(originals.split(columns), reconstructions.split(columns), strict=True)]
    return stack([grid(row, len(row) // 2) for row in rows])
