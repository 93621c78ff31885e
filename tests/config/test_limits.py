"""Every number of a configuration is finite and bounded, and one message says how."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.limits import Range, range_problems, shown
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError

SECTIONS = {name: getattr(Profile(), name) for name in ("model", "data", "training", "plan")}
NUMBERS = [
    (section, field.name)
    for section, value in SECTIONS.items()
    for field in dataclasses.fields(value)
    if any(kind in str(get_type_hints(type(value))[field.name]) for kind in ("int", "float"))
]


def problems(section: str, **values: Any) -> list[str]:
    return dataclasses.replace(SECTIONS[section], **values).problems()


@pytest.mark.parametrize(("section", "name"), NUMBERS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 10**23, -(10**23), 1e300])
def test_every_number_has_bounds(section: str, name: str, value: float) -> None:
    given = (value,) if name == "groups_per_scale" else value
    found = [p for p in problems(section, **{name: given}) if p.startswith(f"{section}.{name} = ")]
    assert found and " must " in found[0] and " to " in found[0]


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("training.seed=100000000000000000000000", "training.seed = 100000000000000000000000 must be from"),
        ("training.epochs=inf", "training.epochs = inf must be from 0 to 1e+09"),
        ("training.warmup_epochs=inf", "training.warmup_epochs = inf must be from 0"),
        ("training.learning_rate=1e38", "training.learning_rate = 1e+38 must be from 0 to 1,000"),
        ("training.learning_rate=1e400", "training.learning_rate = inf must be from 0"),
        ("training.clip_norm=nan", "training.clip_norm = nan must be from 0"),
        ("training.adamax_eps=0", "training.adamax_eps = 0.0 must be above 0 to 1,000"),
        ("model.channels_encoder=99999999999", "model.channels_encoder = 99999999999 must be from 1 to 16,384"),
        ("model.channels_encoder=16384", "is 65,536 channels; at most 16,384 are built"),
        ("model.image_size=1000000", "model.image_size = 1000000 must be from 1 to 8,192"),
        ("model.groups=1000", "latent groups over all scales"),
        ("model.groups_per_scale=[1,0]", "model.groups_per_scale = [1, 0] must hold numbers from 1 to 1,000"),
        ("plan.micro_batch=1000000", "plan.micro_batch = 1000000 must be from 0 to 65,536"),
        ("data.faces_count=1000000000000", "data.faces_count = 1000000000000 must be from 1"),
        ("data.test_fraction=1", "data.test_fraction = 1.0 must be above 0 to below 1"),
        ("model.bits=9", "model.bits = 9 must be from 1 (binary) to 8"),
        ("model.bits=" + "9" * 4000, "characters) must be from 1"),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_refused_with_its_range(assignment: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        profiles.override(profiles.load("demo-mnist"), [assignment, "model.adaptive=false"])
    assert told in str(caught.value) and len(str(caught.value)) < 1000


@given(least=st.integers(-9, 9), width=st.integers(1, 9), value=st.floats(), above=st.booleans(), below=st.booleans())
def test_a_range_allows_what_lies_between(least: int, width: int, value: float, above: bool, below: bool) -> None:
    allowed = Range(least, least + width, above_least=above, below_most=below)
    most = least + width
    inside = least <= value <= most and not (above and value == least) and not (below and value == most)
    assert allowed.allows(value) == inside


def test_shipped_profiles_are_in_range() -> None:
    files = sorted(profiles.PROFILES_DIR.rglob("*.toml"))
    assert len(files) > 60
    for file in files:
        profile = profiles.load(file)
        assert not [p for s in SECTIONS for p in range_problems(getattr(profile, s), s)]


def test_what_is_shown_is_short_and_harmless() -> None:
    assert shown("a\x1b[31m\udcff") == r"'a\x1b[31m\udcff'"
    assert len(shown("x" * 10**6)) < 100 and len(shown(10**5000)) < 100
