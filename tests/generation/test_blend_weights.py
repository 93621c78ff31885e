"""Where a blend goes: weights per scale or group, splits, and the weights of strips and matrices."""

from __future__ import annotations

import pytest
import torch
from generation_runs import DEEP, PLAIN
from hypothesis import given
from hypothesis import strategies as st

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.generation.blend import matrix_weights, parse_split, parse_weights, path_weights


@pytest.mark.parametrize(
    ("text", "from_the_top"),
    [
        ("0.5", [0.5] * 7),
        ("0,0.5,1", [1, 0.5, 0.5, 0, 0, 0, 0]),  # per scale, the highest resolution (four groups) first
        ("0,.1,.2,.3,.4,.5,.6", [0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]),  # per group, the finest first
    ],
)
def test_weights_are_given_highest_resolution_first(text: str, from_the_top: list[float]) -> None:
    torch.testing.assert_close(parse_weights(text, DEEP), torch.tensor(from_the_top))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-0.1", "every weight must be from 0"),
        ("1.1", "every weight must be from 0"),
        ("nan", "every weight must be from 0"),
        ("0,1", "2 weights; give 1 for all, 3 for the scales or 7 for the groups"),
        ("much", "must be numbers with commas"),
        ("", "must be numbers with commas"),
    ],
)
def test_bad_weights_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--weights {text}: .*{message}"):
        parse_weights(text, DEEP)


def test_split_counts_scales_or_groups_from_the_lowest_resolution() -> None:
    assert [parse_split(f"scale:{n}", DEEP) for n in range(4)] == [0, 1, 3, 7]
    assert [parse_split(f"group:{n}", DEEP) for n in (0, 2, 7)] == [0, 2, 7]
    assert parse_split("", DEEP) == 1 and parse_split("", PLAIN) == 0
    for text in ("scale:4", "group:8", "group:-1", "scale", "2", "layer:1", "scale:x"):
        with pytest.raises(ConfigError, match=f"--split {text}: must be scale:N"):
            parse_split(text, DEEP)


@given(st.integers(1, 12))
def test_strips_go_from_a_to_b_in_even_steps(steps: int) -> None:
    strip = path_weights(DEEP, "linear", "0,0.5,1", "", steps)
    assert strip.shape == (steps, 7) and torch.equal(strip[-1], parse_weights("0,0.5,1", DEEP))
    if steps > 1:
        assert not strip[0].any()
        torch.testing.assert_close(strip.diff(dim=0), (strip[-1] / (steps - 1)).expand(steps - 1, -1))
    scales = path_weights(DEEP, "scales", "1", "", steps)
    assert set(scales.unique().tolist()) <= {0.0, 1.0} and len(scales) == min(steps, 8)
    assert (scales.diff(dim=1) >= 0).all()  # coarse groups from A, fine ones from B
    shares = scales.sum(1)
    assert (shares.diff() > 0).all() and (steps == 1 or (shares[0] == 0 and shares[-1] == 7))


def test_scales_take_the_coarse_from_a_and_the_fine_from_b() -> None:
    assert path_weights(DEEP, "scales", "1", "scale:2", 9).tolist() == [[0, 0, 0, 1, 1, 1, 1]]


def test_matrix_has_the_images_and_their_crosses_in_its_corners() -> None:
    matrix = matrix_weights(DEEP, "linear", "scale:1", 3).view(3, 3, 7)
    assert matrix[0, 0].tolist() == [0] * 7 and matrix[-1, -1].tolist() == [1] * 7
    assert matrix[-1, 0].tolist() == [1, 0, 0, 0, 0, 0, 0] and matrix[0, -1].tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert matrix[1, 2].tolist() == [0.5, 1, 1, 1, 1, 1, 1]
