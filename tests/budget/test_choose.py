"""What is chosen for images and hours: rules that hold for any speed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvae_lowmem.budget import words
from nvae_lowmem.budget.choose import ENOUGH_STEPS, LEAST_STEPS, MOST_PASSES, ChosenModel, Wanted, choose
from nvae_lowmem.budget.ladder import LADDER, LARGEST_SIDE, SMALLEST_SIDE, padding_of
from nvae_lowmem.config.sections import DataConfig, Profile
from nvae_lowmem.data.look import Look
from nvae_lowmem.errors import ConfigError, NothingFits
from nvae_lowmem.memory.plan.duration import StepTime, estimated

PHOTOGRAPHS = Look(
    description="photographs", images=5000, has_test_part=False, looked_at=200, unreadable=0, grey=0, levels=256,
    least_size=(300, 200), most_size=(400, 400), same_size=False, lost_share=0.2, most_lost_share=0.4,
    middle_share=0.5,
)  # fmt: skip
DIGITS = replace(
    PHOTOGRAPHS, description="digits", has_test_part=True, grey=200, least_size=(28, 28), most_size=(28, 28),
    same_size=True, lost_share=0.0, most_lost_share=0.0, middle_share=0.05,
)  # fmt: skip


@dataclass(frozen=True)
class PlainSpeed:
    """Seconds that grow with channels, groups and batch, and a model that is too large for the memory."""

    seconds: float = 1e-4
    too_wide: int = 1 << 14
    where: str = "a plain card"

    def step_time(self, profile: Profile) -> StepTime | None:
        m, images = profile.model, profile.training.total_batch
        if m.channels_encoder >= self.too_wide:
            return None
        return estimated(self.seconds * m.channels_encoder * m.total_groups * (1 + 0.1 * images), images)


def chosen(
    look: Look = PHOTOGRAPHS, hours: float = 8.0, speed: PlainSpeed | None = None, size: int = 64
) -> ChosenModel:
    wanted = Wanted(data=DataConfig(source="photos"), hours=hours, size=size)
    return choose(look, wanted, speed or PlainSpeed())


@pytest.mark.parametrize("rung", LADDER, ids=lambda rung: str(rung.number))
def test_every_rung_has_a_model_for_every_even_size(rung) -> None:  # type: ignore[no-untyped-def]
    for size in range(SMALLEST_SIDE, LARGEST_SIDE + 1, 2):
        model = rung.model(size, 3, 8)
        assert model.problems() == [] and model.scale_sizes[-1] >= 4 and not model.vanilla, (size, model)


@pytest.mark.parametrize(("size", "padding"), [(28, 2), (32, 0), (64, 0), (100, 6), (256, 0)])
def test_padding_makes_a_size_that_can_be_halved_four_times(size: int, padding: int) -> None:
    assert padding_of(size) == padding


@pytest.mark.parametrize("size", [-2, 6, 27, 65, 514, 100_000])
def test_a_size_without_a_model_is_refused_with_the_nearest_one(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"--size {size}: .*the nearest is --size \d+"):
        padding_of(size)


def test_the_top_rung_is_of_the_published_size_at_64_pixels() -> None:
    model = LADDER[-1].model(64, 3, 8)
    assert (model.channels_encoder, model.scale_groups, model.scale_sizes) == (64, (20, 10, 5), (32, 16, 8))


def test_every_rung_needs_more_than_the_one_before() -> None:
    for lower, upper in itertools.pairwise(LADDER):
        assert lower.images_seen < upper.images_seen and lower.training_images < upper.training_images


@given(st.floats(0.5, 500), st.floats(1.0, 20.0))
def test_more_hours_never_choose_a_smaller_model(hours: float, times: float) -> None:
    assert chosen(hours=hours).rung.number <= chosen(hours=hours * times).rung.number


@given(st.integers(25, 300_000), st.integers(1, 50))
def test_fewer_images_never_choose_a_larger_model(images: int, times: int) -> None:
    few, many = (chosen(replace(PHOTOGRAPHS, images=n), hours=200.0) for n in (images, images * times))
    assert few.rung.number <= many.rung.number


@given(st.floats(0.5, 500), st.integers(25, 300_000), st.sampled_from((16, 28, 64, 128, 256)))
def test_a_choice_keeps_to_the_hours_and_to_what_the_images_are_good_for(hours: float, images: int, size: int) -> None:
    c = chosen(replace(PHOTOGRAPHS, images=images), hours=hours, size=size)
    training = c.profile.check().training
    assert c.steps * c.time.most_seconds <= hours * 3600 or c.steps == 1
    assert c.images <= images and c.images_seen <= MOST_PASSES * c.images + training.total_batch
    assert c.images >= c.rung.training_images
    assert training.hours == (0.0 if c.limited_by_images else hours) and training.steps == c.steps
    assert c.steps >= min(ENOUGH_STEPS, LEAST_STEPS) or c.limited_by_images
    text = words.described(c, PHOTOGRAPHS)
    assert all(head in text for head in ("images\n", "chosen\n", "given up\n"))


def test_a_small_set_ends_before_the_hours_and_says_so() -> None:
    c = chosen(replace(PHOTOGRAPHS, images=100), hours=500.0)
    assert c.limited_by_images and c.rung.number == 0 and c.passes == pytest.approx(MOST_PASSES, rel=0.05)
    assert "by heart" in c.stopped and any("more images would use the time" in line for line in words.gave_up(c))


def test_passes_that_only_a_fast_card_makes_are_warned_of() -> None:
    few, many = (chosen(replace(PHOTOGRAPHS, images=n), hours=0.1) for n in (600, 200_000))
    said = [words.described(c, PHOTOGRAPHS) for c in (few, many)]
    assert not few.limited_by_images and "watch the held-out figure" in said[0]
    assert "watch the held-out figure" not in said[1]


def test_a_model_that_does_not_fit_is_named_as_the_reason() -> None:
    c = chosen(replace(PHOTOGRAPHS, images=200_000), hours=5000.0, speed=PlainSpeed(seconds=1e-6, too_wide=32))
    assert c.rung.number == 3 and c.stopped == "rung 4 has no memory plan that fits a plain card"
    with pytest.raises(NothingFits, match="not even the smallest model has a memory plan"):
        chosen(speed=PlainSpeed(too_wide=1))


def test_the_largest_model_gives_nothing_up() -> None:
    c = chosen(replace(PHOTOGRAPHS, images=200_000), hours=10.0, speed=PlainSpeed(seconds=1e-6))
    assert c.rung.number == LADDER[-1].number and words.gave_up(c)[0].startswith("nothing")


def test_hours_that_are_too_few_are_refused_with_what_would_be_enough() -> None:
    with pytest.raises(ConfigError, match=r"give at least --minutes (\d+)") as error:
        chosen(hours=0.001)
    minutes = int(str(error.value).partition("--minutes ")[2].partition(",")[0])
    assert chosen(hours=minutes / 60).steps >= LEAST_STEPS


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="leaves 1[0-9] images to train on; at least 20"):
        chosen(replace(PHOTOGRAPHS, images=20))


def test_digits_are_binary_padded_and_not_mirrored() -> None:
    p = chosen(DIGITS, size=0).profile
    assert (p.model.bits, p.model.image_channels, p.model.padding, p.data.flip) == (1, 1, 2, False)


def test_photographs_have_five_bits_in_small_models_and_are_mirrored() -> None:
    p = chosen().profile
    assert (p.model.bits, p.model.image_channels, p.model.padding, p.data.flip) == (5, 3, 0, True)
    assert chosen(replace(PHOTOGRAPHS, images=200_000), 5000.0, PlainSpeed(1e-6)).profile.model.bits == 8


def test_what_a_person_sets_stands_in_the_profile() -> None:
    def change(profile: Profile) -> Profile:
        return replace(profile, training=replace(profile.training, total_batch=12, evaluate_every=7))

    wanted = Wanted(data=DataConfig(source="photos"), hours=0.5, change=change)
    training = choose(PHOTOGRAPHS, wanted, PlainSpeed()).profile.training
    assert (training.total_batch, training.evaluate_every) == (12, 7)
