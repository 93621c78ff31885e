"""How long training takes, as a person should read it: a range until a card has measured it, and days.

The roofline ranks plans; taken as a promise it is several times too fast. Beside the only published timings (six
recipes on a V100: benchmarks/speed_model.py) it says 3.7 to 5.0 times the images per second, and `PUBLISHED_RATIO` puts
all six within 20 %. So a person is shown what lies between the estimate and that much less.
"""

from __future__ import annotations

from dataclasses import dataclass

from nvae_lowmem.config.recipes import PUBLISHED_IMAGES
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.training.resolve import total_steps
from nvae_lowmem.units import format_seconds

_HOUR, _DAY, _YEAR = 3600.0, 86400.0, 365.25 * 86400.0
PUBLISHED_RATIO = 4.2
"""The roofline's images per second over the published code's, geometric mean of six recipes."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of an optimiser step, between two bounds or as measured."""

    least_seconds: float
    most_seconds: float
    images: int
    """Of one step."""
    measured_on: str = ""
    """The card that it was measured on; empty: estimated."""

    @property
    def images_per_second(self) -> tuple[float, float]:
        """The fewest and the most."""
        return self.images / self.most_seconds, self.images / self.least_seconds

    def speed(self) -> str:
        """For people: "1.4 to 6.0 images/s, estimated"."""
        how = f"measured on {self.measured_on}" if self.measured_on else "estimated, measured on no card"
        return f"{range_text(*self.images_per_second)} images/s ({how})"

    def training_seconds(self, profile: Profile, images: int) -> tuple[float, float]:
        """The least and the most for the profile's schedule over a set of so many training images; hours are kept."""
        if profile.training.hours:
            return profile.training.hours * _HOUR, profile.training.hours * _HOUR
        steps = total_steps(profile.training, images)
        return steps * self.least_seconds, steps * self.most_seconds


def estimated(seconds: float, images: int) -> StepTime:
    """The range of step times that an estimate of the speed model stands for."""
    return StepTime(least_seconds=seconds, most_seconds=seconds * PUBLISHED_RATIO, images=images)


def step_time(profile: Profile) -> StepTime | None:
    """Of a profile's plan, as its provenance says: what a card measured, else what was estimated; None without both."""
    made, images = profile.provenance, profile.training.total_batch
    measured, estimate = (float(made.get(f"{how}_seconds_per_step", 0)) for how in ("measured", "predicted"))
    if measured > 0:
        return StepTime(
            least_seconds=measured,
            most_seconds=measured,
            images=images,
            measured_on=str(made.get("measured_on", "a card")),
        )
    return estimated(estimate, images) if estimate > 0 else None


def published_images(profile: Profile) -> int:
    """Training images of the published data set of the profile's recipe; 0: it comes from none."""
    return PUBLISHED_IMAGES.get(str(profile.provenance.get("recipe", profile.name)), 0)


def schedule_text(profile: Profile, time: StepTime, images: int) -> str:
    """How long the profile's schedule takes: "39 to 163 days for 400 epochs of 50,000 images"."""
    training = profile.training
    if training.hours:
        steps = range_text(*sorted(training.hours * _HOUR / s for s in (time.least_seconds, time.most_seconds)))
        return f"{format_seconds(training.hours * _HOUR)}, in which {steps} steps are done"
    what = f"{training.steps:,} steps" if training.steps else f"{training.epochs:g} epochs of {images:,} images"
    return f"{format_days(*time.training_seconds(profile, images))} for {what}"


def expected(profile: Profile, images: int = 0) -> str:
    """One line on how long training the profile takes, for `train --dry-run`; empty where nobody has estimated it.

    images: of the training set at hand; 0: of the recipe's published one.
    """
    time = step_time(profile)
    if time is None:
        return ""
    where = "" if time.measured_on else f"on a {profile.provenance.get('card', 'card')}: "
    return where + described(time, profile, images)


def described(time: StepTime, profile: Profile, images: int = 0) -> str:
    """Images per second and, where the number of images or steps is known, how long the profile's schedule takes."""
    images = images or published_images(profile)
    if not images and not profile.training.steps and not profile.training.hours:
        return time.speed()
    return f"{time.speed()}; {schedule_text(profile, time, images)}"


def format_days(least_seconds: float, most_seconds: float) -> str:
    """A range of durations in one unit: "39 to 163 days", "7.0 to 29 hours", "12 to 50 minutes"."""
    units = (
        (_YEAR, 1000 * _DAY, "years"),
        (_DAY, 2 * _DAY, "days"),
        (_HOUR, 2 * _HOUR, "hours"),
        (60.0, 120.0, "minutes"),
    )
    factor, unit = next(((factor, unit) for factor, from_, unit in units if most_seconds >= from_), (0.0, ""))
    if not factor:
        return f"{format_seconds(least_seconds)} to {format_seconds(most_seconds)}"
    return f"{range_text(least_seconds / factor, most_seconds / factor)} {unit}"


def format_speed(number: float) -> str:
    """Two digits, which is more than an estimate is worth."""
    if number < 0.095:
        return f"{number:.2g}"
    return f"{number:.{0 if number >= 9.95 else 1 if number >= 0.95 else 2}f}"


def range_text(least: float, most: float) -> str:
    """A range as text, or one number where both ends read alike."""
    ends = format_speed(least), format_speed(most)
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)
