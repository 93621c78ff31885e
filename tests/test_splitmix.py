"""The seeds that every run's noise comes of: they can never change. (The finaliser: tests/data/test_pipeline.py.)"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nvae_lowmem.splitmix import seed_of


def test_seeds_of_noise_are_what_they_were() -> None:
    seeds = [seed_of(), seed_of(1, 0, 0, 0), seed_of(1, -3, 15, 29)]
    assert seeds == [5700357409661599242, 2229476220265581728, 3221805522866417846]


@given(st.lists(st.integers(), max_size=4))
def test_a_seed_is_one_that_generators_take(numbers: list[int]) -> None:
    assert 0 <= seed_of(*numbers) < 1 << 63
    assert seed_of(*numbers) == seed_of(*(number % (1 << 64) for number in numbers))
