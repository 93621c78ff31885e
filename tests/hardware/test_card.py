"""The shipped table of cards, and card files of users."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.card import Card, card_from_file, load_cards, torch_install_line
from nvae_lowmem.units import GIB, MIB

OWN_CARD = """
name = "Bench card"
compute_capability = "6.1"
fp16 = "storage"
total_bytes_linux = "3.9G"
total_bytes_windows = 4294967296
bandwidth_bytes_per_second = 100e9
fp32_flops_per_second = { value = 2e12, source = "own measurement" }
pcie_pinned_bytes_per_second = 6e9
"""


@pytest.mark.parametrize("card", load_cards().values(), ids=lambda card: card.id)
def test_every_number_of_every_card_has_a_source(card: Card) -> None:
    numbers = {
        f.name: getattr(card, f.name)
        for f in dataclasses.fields(card)
        if isinstance(getattr(card, f.name), (int, float)) and not isinstance(getattr(card, f.name), bool)
    }
    assert {name for name, value in numbers.items() if value and not card.sources.get(name)} == set()


@pytest.mark.parametrize("card", load_cards().values(), ids=lambda card: card.id)
def test_every_card_is_physically_plausible(card: Card) -> None:
    assert card.total_bytes_linux <= card.total_bytes_windows  # Windows drivers hide less
    assert -card.total_bytes_windows % GIB <= 4 * MIB or card.total_bytes_windows > 16 * GIB  # hardly anything
    assert 1e9 < card.pcie_pageable_bytes_per_second < card.pcie_pinned_bytes_per_second < 64e9
    assert 40e9 < card.bandwidth_bytes_per_second < 5e12
    assert card.bf16 == (card.compute_capability >= (8, 0))
    assert card.fp16_flops_per_second / card.fp32_flops_per_second >= (1 if card.fp16 == "storage" else 2)


def test_a_users_own_card_is_read_and_what_it_leaves_out_is_derived(tmp_path: Path) -> None:
    path = tmp_path / "bench.toml"
    path.write_text(OWN_CARD)
    card = card_from_file(path)
    assert (card.id, card.compute_capability, card.total_bytes_linux) == ("bench", (6, 1), int(3.9 * GIB))
    assert card.pcie_pageable_bytes_per_second == 3e9
    assert card.fp16_flops_per_second == 2e12
    assert card.sources["fp32_flops_per_second"] == "own measurement"
    path.write_text("[cards.bench]" + OWN_CARD)
    assert load_cards(path) == {"bench": card}


def test_every_problem_of_a_users_own_card_is_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('name = ""\ncompute_capability = 5\nfp16 = "half"\ncap_linux = "much"\nbandwith = 1\nbf16 = 1')
    with pytest.raises(ConfigError) as caught:
        card_from_file(path)
    message = str(caught.value)
    missing = ("total_bytes_linux", "total_bytes_windows", "bandwidth_bytes_per_second", "fp32_flops_per_second")
    for part in (*missing, "pcie_pinned_bytes_per_second"):
        assert f"{part} is missing" in message
    wrong = ("name = ''", "compute_capability = 5", "fp16 = 'half'", "cap_linux = 'much'", "'bandwith'", "bf16 = 1")
    for part in wrong:
        assert part in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "not valid TOML"),
        (OWN_CARD.replace('"storage"', '"tensor"'), "fp16_flops_per_second is missing"),
        (OWN_CARD.replace("100e9", "-1"), "bandwidth_bytes_per_second = -1: input should be greater than 0"),
        (
            OWN_CARD.replace("100e9", "9" * 400),
            r"bandwidth_bytes_per_second = 9+\.\.\. \(400 char",
        ),
        (OWN_CARD.replace('"3.9G"', "9" * 400), r"total_bytes_linux = 9+\.\.\. \(400 characters\): must be"),
        (OWN_CARD.replace('"3.9G"', "0"), "total_bytes_linux = 0: must be a size above zero"),
    ],
)
def test_a_bad_card_file_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        card_from_file(path)


def test_a_missing_card_file_and_one_without_tables_are_messages(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read"):
        card_from_file(tmp_path / "none.toml")
    (tmp_path / "flat.toml").write_text(OWN_CARD)
    with pytest.raises(ConfigError, match=r"has no \[cards\.NAME\] table"):
        load_cards(tmp_path / "flat.toml")


@pytest.mark.parametrize(
    ("capability", "line"),
    [
        ((5, 2), 'pip install "torch==2.7.1"'),
        ((6, 1), 'pip install "torch==2.7.1"'),
        ((7, 0), 'pip install "torch==2.10.0"'),
        ((7, 5), 'pip install "torch>=2.8,<2.16"'),
        ((9, 0), 'pip install "torch>=2.8,<2.16"'),
    ],
)
def test_the_torch_to_install_has_kernels_for_the_card(capability: tuple[int, int], line: str) -> None:
    assert torch_install_line(capability)[0] == line
    assert torch_install_line(capability, windows=True)[0].startswith(
        f"{line} --index-url https://download.pytorch.org"
    )
