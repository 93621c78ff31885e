"""What people read of speed: a range until a card has measured it, and days for the schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvae_lowmem.config.recipes import PUBLISHED_IMAGES, PUBLISHED_RECIPES, recipe
from nvae_lowmem.config.sections import Profile, TrainConfig
from nvae_lowmem.memory.plan.duration import (
    PUBLISHED_RATIO,
    described,
    estimated,
    expected,
    format_days,
    published_images,
    step_time,
)
from nvae_lowmem.training.resolve import resolve_run

MADE = {"recipe": "cifar10", "card": "gtx-970", "predicted_seconds_per_step": 5.318}
CIFAR10 = replace(recipe("cifar10"), provenance=MADE)


def test_an_estimate_is_a_range_with_days_for_the_published_data_set() -> None:
    assert expected(CIFAR10) == (
        "on a gtx-970: 1.4 to 6.0 images/s (estimated, measured on no card); "
        "38 to 162 days for 400 epochs of 50,000 images"
    )
    few = replace(CIFAR10, training=replace(CIFAR10.training, epochs=2))
    assert "for 2 epochs of 4,500 images" in expected(few, images=4500)


def test_what_a_card_has_measured_stands_instead_with_the_cards_name() -> None:
    made = {**CIFAR10.provenance, "measured_seconds_per_step": 16.0, "measured_on": "NVIDIA GeForce GTX 970"}
    measured = replace(CIFAR10, provenance=made)
    assert expected(measured) == (
        "2.0 images/s (measured on NVIDIA GeForce GTX 970); 116 days for 400 epochs of 50,000 images"
    )


def test_nothing_is_promised_where_nothing_is_known() -> None:
    assert expected(Profile()) == "" and step_time(Profile()) is None
    own = Profile(name="own", provenance={"predicted_seconds_per_step": 1.0})
    assert published_images(own) == 0 and "days" not in expected(own) and "images/s" in expected(own)
    counted = replace(own, training=TrainConfig(steps=172800))
    assert expected(counted).endswith("2.0 to 8.4 days for 172,800 steps")


@pytest.mark.parametrize("name", PUBLISHED_RECIPES)
def test_every_recipe_knows_its_images_and_its_schedule_is_the_trainers(name: str) -> None:
    import torch

    profile, images = recipe(name), published_images(recipe(name))
    assert images == PUBLISHED_IMAGES[name]
    steps = resolve_run(profile, images, torch.device("cpu"), 1).schedule.total_steps
    assert estimated(1.0, 1).training_seconds(profile, images) == (steps, pytest.approx(PUBLISHED_RATIO * steps))


@given(seconds=st.floats(1e-3, 1e4), images=st.integers(1, 10**7), batch=st.integers(1, 512))
def test_a_range_has_its_ends_in_order_and_the_ratio_between_them(seconds: float, images: int, batch: int) -> None:
    time = estimated(seconds, batch)
    fewest, most = time.images_per_second
    assert most == pytest.approx(PUBLISHED_RATIO * fewest) and most == pytest.approx(batch / seconds)
    profile = Profile(training=TrainConfig(total_batch=batch))
    least, longest = time.training_seconds(profile, images)
    assert longest == pytest.approx(PUBLISHED_RATIO * least)
    assert described(time, profile, images).count(" to ") == 2 or most < 1e-3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        ((40 * 86400, 163 * 86400), "40 to 163 days"),
        ((891 * 86400, 3740 * 86400), "2.4 to 10 years"),
        ((7 * 3600, 29 * 3600), "7.0 to 29 hours"),
        ((12 * 60, 50 * 60), "12 to 50 minutes"),
        ((5, 21), "5.0 s to 21.0 s"),
        ((86400 * 3, 86400 * 3), "3.0 days"),
    ],
)
def test_days_hours_and_minutes_are_chosen_by_the_longer_end(seconds: tuple[float, float], text: str) -> None:
    assert format_days(*seconds) == text


def test_hours_are_kept_and_say_how_many_steps_they_are_good_for() -> None:
    limited = replace(CIFAR10, training=replace(CIFAR10.training, hours=48.0))
    time = step_time(limited)
    assert time is not None and time.training_seconds(limited, 50_000) == (48 * 3600, 48 * 3600)
    least, most = (48 * 3600 / seconds for seconds in (time.most_seconds, time.least_seconds))
    assert f"2 d 0 h, in which {least:.0f} to {most:.0f} steps are done" in expected(limited)
