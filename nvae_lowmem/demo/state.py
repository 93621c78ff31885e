"""What the demo page shows, without the page: a run, its held-out pictures, and the pictures that sliders ask for.

Legend: C image channels, S pixels per side, S' = S + 2 padding pixels per side inside the network. Values per scale are
given highest resolution first, as on the command lines.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nvae_lowmem.config.choices import BlendMode
from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.data.decode import decode, looks_grey
from nvae_lowmem.data.image_files import load_images
from nvae_lowmem.data.pipeline import without_padding
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.generation import grids, traverse
from nvae_lowmem.generation.blend import blend_images, parse_weights
from nvae_lowmem.generation.recalibrate import RECALIBRATION_SEED, default_passes, recalibrate_once
from nvae_lowmem.generation.sample import Temperature, sample_images, temperature_text
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.progress import OnProgress
from nvae_lowmem.training.open_run import OpenRun, held_out_batches
from nvae_lowmem.training.runs import trained_by

Report = Callable[[str], OnProgress]
"""Given what the work is called, where to report its progress."""

EXAMPLES = 10
KL_IMAGES = 256
"""Held-out images that the KL of a group is measured on, as launch/traverse.py does by default."""
PICTURE_PIXELS, ROW_PIXELS = 280, 1000
"""Sizes on the page: of a picture that stands alone, and of a row of them."""


class DemoState:
    """A run opened for the page. Calls must not overlap: sampling changes the model's statistics while it lasts."""

    def __init__(self, run: OpenRun, folder: Path) -> None:
        """folder: for held-out pictures and BatchNorm statistics; it must exist, and outlive this object."""
        self.run = run
        self.examples: list[str] = []
        """Files of held-out pictures; none where the run's data cannot be opened."""
        self.data_problem = ""
        """Why there are none."""
        self._folder = folder
        self._held_out: dict[bytes, Tensor] = {}  # by the bytes of their files, which come back from the browser
        self._kl: Tensor | None = None
        self._noted: set[str] = set()
        try:
            images = torch.cat(list(held_out_batches(run, EXAMPLES)))
        except ConfigError as error:
            self.data_problem = str(error)
            return
        for number, image in enumerate(images.split(1), start=1):
            shown = picture(without_padding(image, run.model.config))
            path = grids.save_png(shown, folder / f"held-out-{number}.png")
            self.examples.append(str(path))
            self._held_out[path.read_bytes()] = image

    # --- pictures in --------------------------------------------------------------------------------------------------

    def image(self, path: str) -> Tensor:
        """(1, C, S', S') of a file, treated as the run's data were; of an example the held-out image itself.

        An example's pixels are the model's already: a second crop or resizing would not leave them as they are.
        Raises ConfigError naming the file, without its folder, which is not the one that the user knows.
        """
        with contextlib.suppress(OSError):
            held_out = self._held_out.get(Path(path).read_bytes())
            if held_out is not None:
                return held_out
        try:
            return load_images([path], self.run.profile)
        except ConfigError as error:
            raise ConfigError(str(error).replace(path, Path(path).name)) from None

    def new_notes(self, paths: Sequence[str]) -> list[str]:
        """What is done to pictures of the user's own before the model sees them, each said once."""
        new = [path for path in dict.fromkeys(paths) if path not in self._noted]
        self._noted.update(new)
        return [note for path in new if (note := self._note(path))]

    def _note(self, path: str) -> str:
        """What is done to a picture; "" for a held-out one, to which nothing is done, and where nothing is lost."""
        content = Path(path).read_bytes()
        if content in self._held_out:
            return ""
        model, own = self.run.model.config, decode(content, path)
        done = []
        if own.width != own.height:
            done.append(f"a square is cut out of its {own.width} x {own.height} pixels")
        if own.size != (model.image_size, model.image_size):
            done.append(f"it is resized to {model.image_size} x {model.image_size}")
        if model.image_channels == 1 and not looks_grey(own):
            done.append("its colours become grey")
        if model.image_channels == 3 and looks_grey(own):
            done.append("it is grey, and red, green and blue get the same values, which this model may never have seen")
        if model.bits == 1:
            done.append("every pixel becomes black or white, because this model knows no others (model.bits = 1)")
        elif model.bits < 8:
            done.append(f"every value is rounded to {2**model.bits} steps (model.bits = {model.bits})")
        return f"image {Path(path).name}: {'; '.join(done)}" if done else ""

    # --- pictures out -------------------------------------------------------------------------------------------------

    def sample(
        self,
        temperatures: Sequence[float],
        seed: int,
        count: int,
        report: Report,
        classes: Sequence[int] = (),
        guidance: float = 1.0,
    ) -> np.ndarray:
        """A grid of images from the prior, with BatchNorm statistics of these temperatures, one per scale.

        Statistics are estimated once for each choice of temperatures. classes, guidance: as `sample_images` takes them.
        Raises ConfigError for what does not fit.
        """
        model, size = self.run.model, self.run.micro_batch
        temperature = _same_or_each([round(t, 2) for t in temperatures])
        text, passes = temperature_text(temperature, decimals=2), default_passes(self.run.device, size)
        with _own_buffers_afterwards(model):
            # one number for all scales: launch/sample.py keeps those, too; the other choices are too many to keep
            shared = isinstance(temperature, float) and not trained_by(self.run.folder)
            kept = self.run.checkpoint if shared else self._folder  # nothing is written where others train
            statistics = report(f"BatchNorm statistics at temperature {text}")
            recalibrate_once(model, kept, temperature, passes, size, RECALIBRATION_SEED, statistics)
            images = sample_images(
                model, count, temperature, seed, size,
                progress=report("sampling"), classes=classes, guidance=guidance,
            )  # fmt: skip
        columns = min(grids.default_columns(model.config.image_size), math.ceil((2 * count) ** 0.5))  # a wide rectangle
        return grids.grid(enlarged(images, ROW_PIXELS // max(columns, 4)), columns)

    def blend(
        self, paths: Sequence[str], weights: Sequence[float], mode: BlendMode, report: Report
    ) -> list[np.ndarray]:
        """[A's reconstruction, the blend, B's reconstruction]; weights: of B, one per scale. Raises ConfigError."""
        pair = torch.cat([self.image(path) for path in paths])
        config = self.run.model.config
        between = parse_weights(",".join(map(str, weights)), config)
        points = torch.stack([torch.zeros_like(between), between, torch.ones_like(between)])
        images = blend_images(
            self.run.model, pair, points, mode, micro_batch=self.run.micro_batch, progress=report("blending")
        )
        return [picture(image) for image in images.split(1)]

    def traverse(self, path: str, group: int, channels: int, sigmas: float, steps: int, report: Report) -> np.ndarray:
        """The picture with latent group `group`, from 0, moved by -sigmas to sigmas in `steps` steps.

        channels 0: all of the group's together; otherwise a row for each of so many of its most active ones.
        Raises ConfigError.
        """
        image, config = self.image(path), self.run.model.config
        groups = traverse.parse_groups(str(group + 1), config)
        channels = traverse.check_channels(channels, config)
        rows = traverse.rows_of(groups, channels, self._activity(image, report), config)
        points = traverse.sigma_steps(sigmas, steps)
        moves = traverse.moves_of(rows, points)
        images = traverse.traverse(
            self.run.model, image, moves, micro_batch=self.run.micro_batch, progress=report("traversing")
        )
        caption = f"unmoved; below from {-sigmas:g} to {sigmas:g} sigmas of the prior, and where the pictures differ"
        return traverse.traversal_picture(rows, enlarged(images, ROW_PIXELS // (steps + 1)), caption, points)

    def _activity(self, image: Tensor, report: Report) -> Tensor:
        """KL per group and channel (groups, L), nats: of held-out images, measured once, or else of this image."""
        seed = self.run.profile.training.seed
        if not self.examples:
            return traverse.channel_kl(self.run.model, [image], seed)[0]
        if self._kl is None:
            batches = held_out_batches(self.run, KL_IMAGES, report("measuring KL"))
            self._kl = traverse.channel_kl(self.run.model, batches, seed)[0]
        return self._kl


# --- what the page needs to know of a model ---------------------------------------------------------------------------


def scale_names(config: ModelConfig) -> list[str]:
    """A name for every scale, highest resolution first: "8 x 8 pixels, 3 groups (finest)"."""
    names = [
        f"{size} x {size} pixels, {groups} group{'s' * (groups != 1)}"
        for size, groups in zip(config.scale_sizes, config.scale_groups, strict=True)
    ]
    if len(names) > 1:
        names[0] += " (finest)"
        names[-1] += " (coarsest)"
    return names


def group_names(config: ModelConfig) -> list[str]:
    """A name for every latent group, counted from the lowest resolution."""
    sizes = traverse.group_sizes(config)
    return [f"group {number} of {len(sizes)}, {size} x {size} pixels" for number, size in enumerate(sizes, start=1)]


# --- pixels -----------------------------------------------------------------------------------------------------------


def enlarged(images: Tensor, pixels: int) -> Tensor:
    """(B, C, S, S) with every pixel made a square, as large as fits `pixels` per side; never smaller than it was."""
    factor = max(1, pixels // images.shape[-1])
    return images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)


def picture(image: Tensor) -> np.ndarray:
    """One image (1, C, S, S) in [0, 1] as (H, W, 3) uint8, large enough to be looked at."""
    return grids.grid(enlarged(image, PICTURE_PIXELS), 1, padding=0)


def _same_or_each(values: Sequence[float]) -> Temperature:
    """One number where all are the same: those statistics are the same, too."""
    return values[0] if len(set(values)) == 1 else tuple(values)


@contextlib.contextmanager
def _own_buffers_afterwards(model: NVAE) -> Iterator[None]:
    """Whatever happens inside, the model has its own statistics again afterwards: posteriors want those of training."""
    before = {name: value.clone() for name, value in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in model.named_buffers():
                value.copy_(before[name])
