"""From images, a machine and hours to a profile: the largest model that the time and the images are enough for.

    choice = choose(look, Wanted(data=DataConfig(source="photos"), hours=8), CardSpeed(card, budget, Wishes()))
    choice.profile, choice.reasons, choice.gave_up

The speed of a card is a range until it has been measured. Everything is planned with its slow end: that is where
published timings lie, and whoever turns out to be faster sees more images with a model that still suits them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import PurePath

from nvae_lowmem.budget.ladder import LADDER, Rung
from nvae_lowmem.budget.speed import Speed
from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import EMBEDDED_SETS, DataConfig, Profile, TrainConfig
from nvae_lowmem.data.look import Look
from nvae_lowmem.errors import ConfigError, NothingFits
from nvae_lowmem.memory.plan.duration import StepTime
from nvae_lowmem.training.learning_rate import suggest_learning_rate
from nvae_lowmem.units import format_seconds

LEAST_STEPS = 200
"""Fewer steps train no model worth having: the KL warm-up alone takes a third of them."""
ENOUGH_STEPS = 3000
"""The batch is halved until so many steps remain."""
MOST_PASSES = 400
"""Over the images: as often as the published recipes go over theirs at most (MNIST, CIFAR-10)."""
LEAST_IMAGES = 20
"""Of which one at least is held out; fewer say nothing about images that were not seen."""
FINE_BITS_RUNG = 4
"""From this rung on, and up to 64 pixels, all 8 bits are modelled, as published."""
_SMALL_MODELS = 3
"""Rungs below this one are trained at the demos' learning rates."""
_FEW_REPORTS_HOURS = 1.0
"""Below this, evaluations and pictures are rarer than ten of each, which would take a tenth of the time."""
_SMALL_SET, _SMALL_SET_TEST_FRACTION = 10_000, 0.1


def unchanged(profile: Profile) -> Profile:
    """No wishes of a person."""
    return profile


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a person asks for."""

    data: DataConfig
    hours: float
    size: int = 0
    """Pixels per side; 0: the images' own where they are small, else 64."""
    change: Callable[[Profile], Profile] = unchanged
    """What a person wants otherwise (--set), in every profile that is considered."""


@dataclass(frozen=True, kw_only=True)
class ChosenModel:
    """What was chosen, and why."""

    profile: Profile
    """Without a memory plan."""
    rung: Rung
    time: StepTime
    hours: float
    """As asked for."""
    steps: int
    """That the slow end of the step time leaves, or that the images are good for."""
    images: int
    """Different training images."""
    stopped: str
    """Why the next rung was not taken; empty on the highest one."""
    limited_by_images: bool
    """Whether training ends before the hours do, since more passes would only memorise the images."""

    @property
    def images_seen(self) -> int:
        """Of all steps, mirrored and repeated ones counted."""
        return self.steps * self.profile.training.total_batch

    @property
    def passes(self) -> float:
        """Over the training images."""
        return self.images_seen / self.images


def choose(look: Look, wanted: Wanted, speed: Speed, below: int = len(LADDER)) -> ChosenModel:
    """The largest rung that fits the machine, sees enough images in the hours, and has enough different ones.

    below: only rungs of lower numbers. Raises ConfigError for a size that there is no model for, for too few images,
    for hours that are not enough for the smallest model; NothingFits.
    """
    side = wanted.size or look.native_side
    data = _data(look, wanted.data)
    images = look.training_images(data)
    if images < LEAST_IMAGES:
        raise ConfigError(
            f"--data: {look.description} leaves {images} images to train on; at least {LEAST_IMAGES} are needed "
            "to learn anything but these images themselves: add images"
        )
    chosen: ChosenModel | None = None
    stopped = ""
    for rung in LADDER[:below]:
        if images < rung.training_images:
            stopped = (
                f"rung {rung.number} would learn these {images:,} images by heart: it is taken from "
                f"{rung.training_images:,} training images on"
            )
            break
        found = _on(rung, look, replace(wanted, data=data, size=side), speed)
        if found is None:
            stopped = f"rung {rung.number} has no memory plan that fits {speed.where}"
            break
        if chosen is None:
            _check_hours(found, speed)
        possible = wanted.hours * 3600 / found.time.most_seconds * found.profile.training.total_batch
        if possible < rung.images_seen:
            stopped = (
                f"rung {rung.number} would see {possible:,.0f} images in the time, and is better than a smaller model "
                f"from about {rung.images_seen:,} on"
            )
            break
        chosen = found
    if chosen is None:
        raise NothingFits(
            f"--size {side}: not even the smallest model has a memory plan that fits {speed.where}: lower --size"
        )
    return replace(chosen, stopped=stopped)


def _check_hours(smallest: ChosenModel, speed: Speed) -> None:
    seconds = smallest.time.most_seconds
    if smallest.hours * 3600 < LEAST_STEPS * seconds:
        least = LEAST_STEPS * seconds / 60
        raise ConfigError(
            f"{format_seconds(smallest.hours * 3600)} are {smallest.hours * 3600 / seconds:.0f} steps of even the "
            f"smallest model on {speed.where}, and fewer than {LEAST_STEPS} train nothing worth having: give at least "
            f"--minutes {math.ceil(least)}, or a smaller --size"
        )


def _on(rung: Rung, look: Look, wanted: Wanted, speed: Speed) -> ChosenModel | None:
    """The choice at one rung, whether it sees enough images or not; None where no plan fits."""
    images = look.training_images(wanted.data)
    model = rung.model(wanted.size, look.channels, _bits(rung, look, wanted.size))
    batch = _most_batch(model)
    while True:
        profile = wanted.change(_profile(rung, model, wanted.data, batch))
        time = speed.step_time(profile)
        steps = int(wanted.hours * 3600 / time.most_seconds) if time is not None else 0
        if batch <= _least_batch(model) or (time is not None and steps >= ENOUGH_STEPS):
            break
        batch //= 2
    if time is None:
        return None
    batch = profile.training.total_batch
    most_steps = math.ceil(MOST_PASSES * images / batch)
    limited = steps > most_steps
    steps = max(1, min(steps, most_steps))
    return ChosenModel(
        profile=wanted.change(_scheduled(profile, images, steps, 0.0 if limited else wanted.hours)),
        rung=rung,
        time=time,
        hours=wanted.hours,
        steps=steps,
        images=images,
        stopped="",
        limited_by_images=limited,
    )


def _most_batch(model: ModelConfig) -> int:
    """The batch of the published recipe at that size, as a power of two: 128 at 32 pixels, 32 at 64, 8 at 256."""
    return max(_least_batch(model), min(128, (1 << 17) // model.network_size**2))


def _least_batch(model: ModelConfig) -> int:
    """Fewer images leave most of a processor idle, and BatchNorm too few to go by."""
    return 16 if model.network_size <= 32 else 8


def _bits(rung: Rung, look: Look, side: int) -> int:
    if look.binary_like:
        return 1
    return 8 if rung.number >= FINE_BITS_RUNG and side <= 64 else 5


def _data(look: Look, asked: DataConfig) -> DataConfig:
    """What is done to these images: the published crop of CelebA, mirroring, and a larger held-out part of few."""
    standard = DataConfig()
    celeba = look.is_aligned_celeba and asked.crop == standard.crop and not asked.crop_pixels
    few = look.images < _SMALL_SET and asked.test_fraction == standard.test_fraction
    return replace(
        asked,
        crop="celeba" if celeba else asked.crop,
        flip=look.channels == 3,
        test_fraction=_SMALL_SET_TEST_FRACTION if few else asked.test_fraction,
    )


def _profile(rung: Rung, model: ModelConfig, data: DataConfig, batch: int) -> Profile:
    """The profile but for what follows from the number of steps."""
    rate = 5e-3 if model.network_size <= 32 else 1e-2
    if rung.number >= _SMALL_MODELS:
        published = TrainConfig()
        rate, _ = suggest_learning_rate(batch, published.published_total_batch, published.published_learning_rate)
    training = TrainConfig(total_batch=batch, learning_rate=rate, cosine="step")
    return Profile(name=_name(data.source, model.image_size), model=model, data=data, training=training)


def _scheduled(profile: Profile, images: int, steps: int, hours: float) -> Profile:
    """With a warm-up and an average that suit so many steps; hours 0: end after the steps."""
    per_epoch = images / profile.training.total_batch
    few_reports = 0 < hours < _FEW_REPORTS_HOURS
    training = replace(
        profile.training,
        steps=steps,
        hours=hours,
        warmup_epochs=float(f"{0.05 * steps / per_epoch:.3g}"),
        evaluate_every=max(1, steps // 5) if few_reports else 0,
        sample_every=max(1, steps // 3) if few_reports else 0,
        ema_decay=float(f"{min(0.9999, max(0.9, 1 - 30 / steps)):.4g}"),
    )
    return replace(profile, training=training)


def _name(source: str, size: int) -> str:
    """ "photos-64" of /data/photos.zip."""
    stem = source if source in EMBEDDED_SETS else PurePath(source.rstrip("/\\")).stem
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', stem).strip('-')[:40] or 'images'}-{size}"
