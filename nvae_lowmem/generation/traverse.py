"""What a latent group controls: an image with one group moved by some sigmas of the prior, and its activity.

The groups below the moved one keep their place relative to the prior, r_l = (z_l - mu_p) / sigma_p, while mu_p and
sigma_p follow the new state: the picture changes as the model thinks it must, and where nothing is moved it is the
reconstruction. Given the image, their posteriors would undo the move.
Legend: P pictures, L latent channels, groups counted from the top (lowest resolution) down.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nvae_lowmem.config.choices import Posterior
from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.data.pipeline import as_rgb
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.generation import grids
from nvae_lowmem.generation.reconstruct import posterior_noise
from nvae_lowmem.generation.sample import decoded_mean
from nvae_lowmem.model.latents import FlowFunction, FromPosterior, Latent, NoiseStep, Normal, SeededNoise, Source
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.progress import OnProgress
from nvae_lowmem.text_table import text_table
from nvae_lowmem.training.validation import ACTIVE_NATS
from nvae_lowmem.units import numbers

MOST_ROWS = 12
"""Groups of a picture where none are named: more would not be looked at."""
COLLAPSED_SHARE = 0.05
"""A scale of which a smaller share of the latent channels is active has collapsed."""


# --- moving a group ---------------------------------------------------------------------------------------------------


class Move(NamedTuple):
    """What is added to a group's r: `sigmas` in all of its channels, or in those named."""

    group: int
    channels: tuple[int, ...] | None
    sigmas: float


@dataclass(frozen=True)
class Recorded:
    """z from another source; r = (z - mu_p) / sigma_p of every group is appended to `relative`."""

    source: Source
    relative: list[Tensor] = field(default_factory=list)

    def latent(self, group: int, prior: Normal, posterior: Normal | None, flow: FlowFunction | None) -> Latent:
        """The source's latent of group `group`."""
        latent = self.source.latent(group, prior, posterior, flow)
        assert latent.z is not None and group == len(self.relative), (group, len(self.relative))
        self.relative.append((latent.z - prior.mu) / prior.sigma)
        return latent


@dataclass(frozen=True)
class Moved:
    """z = mu_p + sigma_p r, with r of one image, (1, L, h, w) per group, moved in picture i as moves[i] says."""

    relative: Sequence[Tensor]
    moves: Sequence[Move]

    def latent(self, group: int, prior: Normal, posterior: Normal | None, flow: FlowFunction | None) -> Latent:
        """The latent of group `group` of all pictures."""
        r = self.relative[group].repeat(len(self.moves), 1, 1, 1)
        for i, move in enumerate(self.moves):
            if move.group == group:
                r[i, slice(None) if move.channels is None else list(move.channels)] += move.sigmas
        return Latent(prior.draw(r))


@torch.no_grad()
def traverse(
    model: NVAE,
    image: Tensor,
    moves: Sequence[Move],
    posterior: Posterior = "sample",
    seed: int = 0,
    micro_batch: int = 16,
    progress: OnProgress | None = None,
) -> Tensor:
    """The image (1, C, S', S') in [0, 1] with each of the moves: (P, C, S, S) in [0, 1] on the host."""
    assert len(image) == 1 and not model.training, (image.shape, model.training)
    recorded = Recorded(FromPosterior(posterior_noise(posterior, seed, [0])))
    model.top_down(recorded, model.encode(image.to(next(model.parameters()).device)))
    out = []
    for first in range(0, len(moves), micro_batch):
        chunk = moves[first : first + micro_batch]
        out.append(decoded_mean(model, Moved(recorded.relative, chunk), None, len(chunk)))
        if progress is not None:
            progress(first + len(chunk), len(moves))
    return torch.cat(out)


# --- which groups live ------------------------------------------------------------------------------------------------


@torch.no_grad()
def channel_kl(model: NVAE, batches: Iterable[Tensor], seed: int) -> tuple[Tensor, int]:
    """(mean KL per group and latent channel (groups, L), nats; number of images) over batches (b, C, S', S') each."""
    total, images = torch.zeros(model.config.total_groups, model.config.latents, dtype=torch.float64), 0
    for x in batches:
        maps = model.encode(x.to(next(model.parameters()).device))
        latents = model.top_down(FromPosterior(SeededNoise(seed, NoiseStep.ACTIVITY, images)), maps)[1]
        total += torch.stack([latent.kl.double().sum(0) for latent in latents if latent.kl is not None]).cpu()
        del maps, latents  # before the next ones are made
        images += len(x)
    assert images, "there is no mean over no images"
    return total / images, images


def group_sizes(config: ModelConfig) -> list[int]:
    """Pixels per side of every group, from the top."""
    scales = zip(config.scale_groups[::-1], config.scale_sizes[::-1], strict=True)
    return [size for groups, size in scales for _ in range(groups)]


def activity_table(kl: Tensor, config: ModelConfig) -> str:
    """One line per group: its KL and its active channels, those of more than 0.1 nats; kl (groups, L)."""
    rows = [
        [str(group + 1), f"{size} x {size}", f"{float(values.sum()):.3f}", f"{_active(values)} of {config.latents}"]
        for group, (size, values) in enumerate(zip(group_sizes(config), kl, strict=True))
    ]
    total = ["all", "", f"{float(kl.sum()):.3f}", f"{_active(kl)} of {kl.numel()}"]
    header = ("group", "pixels", "KL nats", "active channels")
    return "\n".join(text_table("<>", [header, *rows, total], rule=False))


def collapse_warnings(kl: Tensor, config: ModelConfig) -> list[str]:
    """A line for every scale whose latents carry next to nothing; kl (groups, L)."""
    out = []
    per_scale = kl.split(config.scale_groups[::-1])
    for size, values in zip(config.scale_sizes[::-1], per_scale, strict=True):
        if _active(values) < COLLAPSED_SHARE * values.numel():
            out.append(
                f"warning: the scale of {size} x {size} pixels has collapsed: {_active(values)} of {values.numel()} "
                f"channels carry more than {ACTIVE_NATS} nats. It was trained too briefly, or needs a longer "
                "training.kl_warmup_fraction, training.kl_balance = true, or fewer groups"
            )
    return out


def _active(kl: Tensor) -> int:
    return int((kl > ACTIVE_NATS).sum())


# --- the picture ------------------------------------------------------------------------------------------------------


class TraversalRow(NamedTuple):
    """One row of the picture: what is moved in it, and what it is called."""

    group: int
    channels: tuple[int, ...] | None
    caption: str


def parse_groups(text: str, config: ModelConfig) -> list[int]:
    """Group numbers from 0 of "1,3,6"; empty: all groups, of more than twelve as many, evenly spread.

    Raises ConfigError for numbers below 1 or above the model's number of groups.
    """
    total = config.total_groups
    if not text:
        count = min(total, MOST_ROWS)
        return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]
    groups = numbers(text, "--groups", int)
    if not all(1 <= group <= total for group in groups):
        raise ConfigError(f"--groups {text}: every number must be from 1 to {total}, the groups of this model")
    return [group - 1 for group in groups]


def check_counts(images: int, held_out: int) -> None:
    """Raise ConfigError for more than one image, and for fewer than no held-out images."""
    if images > 1:
        raise ConfigError(f"{images} images are given: a traversal is around one")
    if held_out < 0:
        raise ConfigError(f"--count {held_out}: must be at least 1, or 0 for all held-out images")


def check_channels(count: int, config: ModelConfig) -> int:
    """The count itself. Raises ConfigError unless it is from 0 to the latent channels of a group."""
    if not 0 <= count <= config.latents:
        raise ConfigError(
            f"--channels {count}: must be from 1 to {config.latents}, the latent channels of a group, or 0 to move all "
            "of them together"
        )
    return count


def sigma_steps(sigmas: float, steps: int) -> list[float]:
    """From -sigmas to +sigmas in `steps` steps. Raises ConfigError for sigmas not above 0, or fewer than two steps."""
    if not 0 < sigmas < float("inf"):
        raise ConfigError(f"--sigmas {sigmas}: must be larger than 0, for example 2")
    if steps < 2:
        raise ConfigError(f"--steps {steps}: must be at least 2")
    return torch.linspace(-sigmas, sigmas, steps).tolist()


def rows_of(groups: Sequence[int], channels: int, kl: Tensor, config: ModelConfig) -> list[TraversalRow]:
    """A row per group with all of its channels, or with `channels` > 0 a row for each of its most active ones."""
    sizes, rows = group_sizes(config), []
    for group in groups:
        where = f"group {group + 1} of {len(sizes)}, {sizes[group]} x {sizes[group]}"
        if channels == 0:
            about = f"KL {float(kl[group].sum()):.2f} nats, {_active(kl[group])} of {config.latents} channels active"
            rows.append(TraversalRow(group, None, f"{where}: {about}"))
        for channel in kl[group].argsort(descending=True, stable=True)[:channels].tolist():
            about = f"channel {channel + 1}, KL {float(kl[group, channel]):.2f} nats"
            rows.append(TraversalRow(group, (channel,), f"{where}: {about}"))
    return rows


def moves_of(rows: Sequence[TraversalRow], sigmas: Sequence[float]) -> list[Move]:
    """The moves of the whole picture: first none, then row by row."""
    return [Move(0, None, 0.0), *(Move(row.group, row.channels, sigma) for row in rows for sigma in sigmas)]


def traversal_picture(
    rows: Sequence[TraversalRow], images: Tensor, caption: str, sigmas: Sequence[float], scale: int = 0
) -> np.ndarray:
    """The picture of the images (1 + rows * steps, C, S, S) of `moves_of`: unmoved, moved, and where they differ.

    A row ends in a map of every pixel's largest difference in that row, averaged over colours and as bright as it can
    be; the row's caption says how much the brightest is. Below each image: by how many sigmas it was moved.
    """
    under = [*(f"{sigma:+.2g}" if sigma else "0" for sigma in sigmas), "differs"]
    unmoved, moved = images[:1], images[1:]
    parts = [grids.labelled(grids.grid(unmoved, 1, scale=scale), caption)]
    for row, pictures in zip(rows, moved.chunk(len(rows)), strict=True):
        difference = (pictures - unmoved).abs().mean(1).amax(0)  # (S, S)
        largest = float(difference.max())
        heat = heat_colours(difference / largest if largest else difference)
        cells = torch.cat([as_rgb(pictures), heat[None]])
        pictures_of_row = grids.grid(cells, len(cells), under=under, scale=scale)
        parts.append(grids.labelled(pictures_of_row, f"{row.caption}; differs by up to {largest:.2f}"))
    return grids.stack(parts)


def heat_colours(values: Tensor) -> Tensor:
    """(S, S) in [0, 1] -> (3, S, S): black, red, yellow, white."""
    return torch.stack([(3 * values - channel).clamp(0, 1) for channel in range(3)])
