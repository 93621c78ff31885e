"""Images from the prior, and held-out images through the posterior: the top-down pass with pixels at its end.

An image is a function of (weights, BatchNorm statistics, seed, number of the image, temperature): how the images are
split into chunks does not matter. The noise is drawn on the model's device, and CPU and GPU generators differ.
Legend: B images of a chunk, C image channels, S x S pixels without padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.data.labels import label_rows
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.generation.classes import NO_CLASS, check_guidance, labels_in_turn
from nvae_lowmem.model.latents import FromPosterior, FromPrior, Guided, NoiseStep, SeededNoise, Source
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.progress import OnProgress

Temperature = float | Sequence[float]
"""What sigma of the prior is multiplied by: one number, or one per scale, highest resolution first."""


# --- temperatures -----------------------------------------------------------------------------------------------------


def parse_temperature(text: str) -> Temperature:
    """0.7 from "0.7", (0.7, 0.9) from "0.7,0.9". Raises ConfigError for anything but finite numbers from 0 up."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise ConfigError(
            f"--temperature {text}: must be a number from 0 up, for example 0.7, or one per scale with commas between "
            "them, highest resolution first, for example 0.7,0.9"
        )
    return values if len(values) > 1 else values[0]


def group_temperatures(temperature: Temperature, config: ModelConfig) -> tuple[float, ...]:
    """One temperature per latent group, counted from the top. Raises ConfigError where it does not fit the model."""
    if isinstance(temperature, (int, float)):
        return (float(temperature),) * config.total_groups
    if len(temperature) != config.scales:
        raise ConfigError(
            f"--temperature {temperature_text(temperature)}: {len(temperature)} temperatures for a model of "
            f"{config.scales} scales: give one for all scales, or one for each of them, highest resolution first"
        )
    from_the_top = zip(reversed(temperature), reversed(config.scale_groups), strict=True)
    return tuple(float(t) for t, groups in from_the_top for _ in range(groups))


def temperature_text(temperature: Temperature, decimals: int = 1, separator: str = ",") -> str:
    """ "0.7" or "0.7,0.9": at least so many decimals, and as many more as the number has."""
    values = (temperature,) if isinstance(temperature, (int, float)) else temperature
    return separator.join(f"{t:.{decimals}f}" if round(t, decimals) == t else repr(float(t)) for t in values)


# --- images -----------------------------------------------------------------------------------------------------------


def sample_images(
    model: NVAE,
    count: int,
    temperature: Temperature,
    seed: int,
    micro_batch: int,
    likelihood_sample: bool = False,
    progress: OnProgress | None = None,
    classes: Sequence[int] = (),
    guidance: float = 1.0,
) -> Tensor:
    """`count` images from the prior, (count, C, S, S) fp32 in [0, 1] on the host.

    likelihood_sample: draw the pixels from p(x|z), on the data's grid of bits; otherwise its mean.
    classes: of a model with labels, those that the images take in turn; none: all. guidance: how far to go towards
    the class, see `Guided`; 1: as learned.
    Raises ConfigError for a count below 1, for temperatures that do not fit the model, and for a wrong guidance.
    """
    chunks = sample_chunks(model, count, temperature, seed, micro_batch, likelihood_sample, progress, classes, guidance)
    return torch.cat(list(chunks))


@torch.no_grad()
def sample_chunks(
    model: NVAE,
    count: int,
    temperature: Temperature,
    seed: int,
    micro_batch: int,
    likelihood_sample: bool = False,
    progress: OnProgress | None = None,
    classes: Sequence[int] = (),
    guidance: float = 1.0,
) -> Iterator[Tensor]:
    """The images of `sample_images`, up to micro_batch of them at a time: for more images than memory holds.

    With guidance each image takes two rows of a pass, so half as many at a time.
    """
    assert not model.training, "images must not lean on each other: put the model into evaluation mode"
    if count < 1:
        raise ConfigError(f"--count {count}: must be at least 1")
    temperatures = group_temperatures(temperature, model.config)
    check_guidance(guidance, model.config)
    noise = SeededNoise(seed, step=NoiseStep.SAMPLING)
    together = micro_batch if guidance == 1 else max(1, micro_batch // 2)
    for first in range(0, count, together):
        batch = min(together, count - first)
        source, labels = FromPrior(noise.at(first), temperatures), labels_in_turn(model, first, batch, classes)
        yield _sampled(model, source, batch, labels, guidance, (seed, first) if likelihood_sample else None)
        if progress is not None:
            progress(first + batch, count)


@torch.no_grad()
def reconstruct_images(model: NVAE, images: Tensor, seed: int, micro_batch: int) -> Tensor:
    """Mean images of p(x|z), z drawn from q(z|images): (B, C, padded, padded) in [0,1] -> (B, C, S, S) on the host."""
    assert not model.training, "images must not lean on each other: put the model into evaluation mode"
    device = next(model.parameters()).device
    noise = SeededNoise(seed, step=NoiseStep.PREVIEW)
    out = []
    for first in range(0, len(images), micro_batch):
        maps = model.encode(images[first : first + micro_batch].to(device))
        out.append(decoded_mean(model, FromPosterior(noise.at(first)), maps))
        del maps  # before the next ones are made
    return torch.cat(out)


# What a pass has on the device ends with these functions, so that the next one begins with none of it.


def decoded_mean(model: NVAE, source: Source, maps: list[Tensor] | None, batch: int = 1) -> Tensor:
    """The mean of p(x|z), (B, C, S, S) on the host, with z from the source; arguments as `NVAE.decode` takes them."""
    parameters, _ = model.decode(source, maps, batch)
    return model.likelihood.mean(parameters).cpu()


def _sampled(
    model: NVAE, source: Source, batch: int, labels: Tensor | None, guidance: float, draw: tuple[int, int] | None
) -> Tensor:
    """Images of a pass, (B, C, S, S) on the host: means of p(x|z), or with draw = (seed, first slot) draws from it."""
    if guidance == 1:
        parameters, _ = model.decode(source, batch=batch, labels=labels)
    else:
        assert labels is not None
        none = label_rows([NO_CLASS] * batch, model.config.classes).to(labels.device)
        both, _ = model.decode(Guided(source, guidance), batch=2 * batch, labels=torch.cat([labels, none]))
        parameters = both[:batch]
    if draw is None:
        return model.likelihood.mean(parameters).cpu()
    seed, first_slot = draw
    return drawn_pixels(model, parameters, seed, range(first_slot, first_slot + batch))


def drawn_pixels(model: NVAE, parameters: Tensor, seed: int, slots: Sequence[int]) -> Tensor:
    """A draw from p(x|z) given its parameters, (B, C, S, S) on the host; row i is a function of (seed, slots[i])."""
    # one image at a time, each with a generator of its own: so its draws do not depend on the chunk it is in
    rows = zip(parameters, slots, strict=True)
    return torch.cat([model.likelihood.sample(row[None], _pixel_generator(seed, slot)).cpu() for row, slot in rows])


def _pixel_generator(seed: int, slot: int) -> torch.Generator:
    entropy = np.random.SeedSequence([seed % 2**64, slot]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(entropy[0]))
