"""Finding a card by name, by size, and in this machine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.find_card import detect_card, find_card
from nvae_lowmem.hardware.precision import choose_precision
from nvae_lowmem.units import GIB

# ---- finding a card --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "card_id"),
    [
        ("gtx-970", "gtx-970"),
        ("GeForce GTX 970", "gtx-970"),
        ("NVIDIA GeForce GTX 1050 Ti", "gtx-1050-ti"),
        ("  gtx970 ", "gtx-970"),
        ("NVIDIA GeForce RTX 3050 Laptop GPU", "rtx-3050-laptop"),
        ("P1000", "quadro-p1000"),
        ("T1200 Laptop GPU", "t1000"),
        ("4G", "4g"),
        ("MX350 (2 GB)", "mx350-2g"),
    ],
)
def test_a_card_is_found_however_its_name_is_typed(name: str, card_id: str) -> None:
    assert find_card(name).id == card_id


def test_a_mistyped_card_is_answered_with_the_nearest_and_an_ambiguous_one_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'gtx-970'.*--gpu-mem 4G.*quadro-m2000"):
        find_card("GTX 972")
    with pytest.raises(ConfigError, match="mx350-2g, mx350-4g"):
        find_card("MX350")


@pytest.mark.parametrize("name", ["RTX 4090", "NVIDIA GeForce RTX 4070 Ti SUPER", "Radeon RX 580", "card"])
def test_a_card_that_nobody_has_entered_is_answered_with_the_ways_to_plan_for_it(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_card(name)
    said = str(caught.value)
    assert "did you mean" not in said and name in said
    assert all(way in said for way in ("--card auto", "--gpu-mem 4G", "--card FILE.toml"))


# ---- the card in this machine ----------------------------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], total_bytes: int) -> None:
    seen = SimpleNamespace(name=name, major=capability[0], minor=capability[1], total_memory=total_bytes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: seen)


def test_a_known_card_keeps_its_figures_and_takes_the_real_total(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "NVIDIA GeForce GTX 970", (5, 2), 4238999552)
    card = detect_card()
    assert (card.id, card.total_bytes("linux"), card.total_bytes("windows")) == ("gtx-970", 4238999552, 4238999552)
    assert card.cap_linux == find_card("gtx-970").cap_linux
    assert "this machine" in card.sources["total_bytes_linux"]


def test_of_two_cards_with_one_name_the_nearest_size_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "NVIDIA GeForce MX350", (6, 1), 2100000000)
    assert detect_card().id == "mx350-2g"
    pretend(monkeypatch, "NVIDIA GeForce MX350", (6, 1), 4238737408)
    assert detect_card().id == "mx350-4g"


@pytest.mark.parametrize(
    ("name", "capability", "fp16", "precision"),
    [
        ("NVIDIA GeForce GTX 960", (5, 2), "storage", "fp16"),
        ("NVIDIA GeForce GTX 1650 SUPER", (7, 5), "double", "fp16"),
        ("NVIDIA T600 Laptop GPU", (7, 5), "double", "fp16"),
        ("NVIDIA GeForce MX450", (7, 5), "double", "fp16"),
        ("Tesla T4", (7, 5), "tensor", "fp16"),
        ("NVIDIA RTX A500 Laptop GPU", (8, 6), "tensor", "bf16"),
    ],
)
def test_an_unknown_card_gets_its_class_and_says_so(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], fp16: str, precision: str
) -> None:
    pretend(monkeypatch, name, capability, int(3.8 * GIB))
    card = detect_card()
    assert (card.name, card.compute_capability, card.fp16, card.plain) == (name, capability, fp16, False)
    assert card.bandwidth_bytes_per_second == find_card("4g").bandwidth_bytes_per_second
    assert "not in the table" in card.sources["bandwidth_bytes_per_second"]
    assert choose_precision("auto", card)[0] == precision


def test_without_a_card_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"sees none; name the card to plan for \(--card gtx-970.*doctor"):
        detect_card()
