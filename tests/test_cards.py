"""Finding a card, what is left of it, and which precision it trains in."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware import budget as cards
from nvae_lowmem.hardware.budget import (
    Card,
    detect_card,
    find_card,
    fp16_convolution_selftest,
    load_cards,
    memory_fraction,
    parse_gpu_mem,
    precision_for,
    this_os,
    torch_install_line,
    usable_bytes,
)
from nvae_lowmem.units import GIB, MIB

SYSTEMS = ("linux", "desktop", "windows")
FOUR_GB_TOTALS = [int(gib * GIB) for gib in (3.62, 3.81, 3.94, 4.00)]
OVERHEADS = [int(gib * GIB) for gib in (0.12, 0.40, 0.65, 1.2)]


def with_total(card: Card, total_bytes: int) -> Card:
    return dataclasses.replace(card, total_bytes_linux=total_bytes, total_bytes_windows=total_bytes)


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


def test_an_unknown_card_is_answered_with_the_nearest_and_an_ambiguous_one_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'gtx-970'.*quadro-m2000.*--gpu-mem 4G"):
        find_card("GTX 972")
    with pytest.raises(ConfigError, match="mx350-2g, mx350-4g"):
        find_card("MX350")


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
    assert precision_for(card)[0] == precision


def test_without_a_card_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"sees none; name the card to plan for \(--card gtx-970.*doctor"):
        detect_card()


def test_the_memory_regime_follows_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cards.sys, "platform", "linux")
    monkeypatch.setattr(cards.platform, "release", lambda: "6.1.0-generic")
    assert this_os() == "linux"
    monkeypatch.setenv("DISPLAY", ":0")
    assert this_os() == "desktop"
    monkeypatch.setattr(cards.platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    assert this_os() == "windows"


# ---- what is left ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("os", "gib"), [("linux", 3.2), ("desktop", 2.9), ("windows", 2.7)])
def test_default_caps_of_the_gtx_970_and_of_a_plain_4g(os: cards.OsName, gib: float) -> None:
    assert usable_bytes(find_card("gtx-970"), os).cap_bytes == int(gib * GIB)
    assert usable_bytes(None, os, gpu_mem_bytes=4 * GIB).cap_bytes == pytest.approx(gib * GIB, abs=1)


def test_the_gtx_970_has_a_slow_segment_that_a_headless_cap_keeps_out_of() -> None:
    card = find_card("gtx-970")
    fast_bytes = card.total_bytes_windows - card.slow_segment_bytes
    assert card.slow_bandwidth_bytes_per_second < card.bandwidth_bytes_per_second / 5
    assert usable_bytes(card, "linux").cap_bytes + card.context_bytes < fast_bytes


def test_a_plain_total_states_its_rule() -> None:
    budget = usable_bytes(None, "linux", gpu_mem_bytes=4 * GIB)
    assert budget == dataclasses.replace(usable_bytes(find_card("4g"), "linux"), reason=budget.reason)
    assert "3.20 GiB of 4.00 GiB" in budget.reason
    assert "0.8 of a plain total" in budget.reason


@pytest.mark.parametrize("total", FOUR_GB_TOTALS)
@pytest.mark.parametrize("overhead", OVERHEADS)
@pytest.mark.parametrize("os", SYSTEMS)
def test_the_cap_leaves_the_overhead_free_and_wastes_little(os: cards.OsName, overhead: int, total: int) -> None:
    reserve = 0 if os == "windows" else 64 * MIB
    for name in ("gtx-970", "gtx-1050-ti", "gtx-1650", "rtx-3050-laptop", "4g"):
        cap = usable_bytes(with_total(find_card(name), total), os, overhead_bytes=overhead).cap_bytes
        assert cap + overhead + reserve <= total, name
        assert cap >= min(total - overhead - reserve, int(0.67 * total)), name


@pytest.mark.parametrize(("os", "share", "reserve"), [("linux", 0.92, 64 * MIB), ("windows", 0.85, 0)])
@pytest.mark.parametrize("overhead", OVERHEADS)
def test_the_general_rule_is_the_lesser_of_what_is_free_and_a_share(
    os: cards.OsName, share: float, reserve: int, overhead: int
) -> None:
    card = find_card("gtx-1050-ti")
    total = card.total_bytes(os)
    outside = max(overhead, card.context_bytes)
    assert usable_bytes(card, os, overhead_bytes=overhead).cap_bytes == min(
        total - outside - reserve, int(share * total)
    )


@given(
    card=st.sampled_from(list(load_cards().values())),
    os=st.sampled_from(SYSTEMS),
    total=st.integers(GIB, 24 * GIB),
    gpu_mem=st.none() | st.integers(GIB, 24 * GIB),
    overhead=st.none() | st.integers(0, GIB // 2),
)
def test_the_cap_is_never_above_what_context_and_overhead_leave(
    card: Card, os: cards.OsName, total: int, gpu_mem: int | None, overhead: int | None
) -> None:
    card = with_total(card, total)
    gpu_mem = None if gpu_mem is None else min(gpu_mem, total)
    budget = usable_bytes(card, os, gpu_mem_bytes=gpu_mem, overhead_bytes=overhead)
    assert budget.total_bytes == (gpu_mem or total)
    assert budget.context_bytes >= max(card.context_bytes, overhead or 0)
    assert 0 < budget.cap_bytes <= budget.total_bytes - budget.context_bytes
    fraction = memory_fraction(budget.cap_bytes, budget.context_bytes, total)
    assert 0 < fraction <= 1
    assert int(fraction * total) == budget.cap_bytes  # torch truncates the product


def test_a_large_card_can_stand_in_for_a_small_one() -> None:
    assert usable_bytes(find_card("h200"), "linux", gpu_mem_bytes=4 * GIB).cap_bytes == int(3.2 * GIB)


def test_the_size_printed_on_the_box_means_the_whole_card_and_more_is_an_error() -> None:
    card = find_card("gtx-1650")
    assert usable_bytes(card, "linux", gpu_mem_bytes=4 * GIB) == usable_bytes(card, "linux")
    with pytest.raises(ConfigError, match=r"--gpu-mem 6\.00 GiB is more than a NVIDIA GeForce GTX 1650 has"):
        usable_bytes(card, "linux", gpu_mem_bytes=6 * GIB)


@pytest.mark.parametrize("text", ["", "four", "4X", "-4G", "0", "0G", "4", "100M", "1000G", "nan", "1e9G"])
def test_sizes_that_no_card_has_are_messages_about_the_flag(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--gpu-mem .*(4G|is not a size)"):
        parse_gpu_mem(text)
    assert parse_gpu_mem("3800M") == 3800 * MIB


@pytest.mark.parametrize("size", [0, -1, 4, 300 * GIB])
def test_impossible_sizes_in_bytes_are_messages_too(size: int) -> None:
    with pytest.raises(ConfigError, match="--gpu-mem"):
        usable_bytes(None, "linux", gpu_mem_bytes=size)


def test_no_card_and_no_size_and_a_full_card_are_messages() -> None:
    with pytest.raises(ConfigError, match=r"--card NAME or --gpu-mem 4G"):
        usable_bytes(None, "linux")
    with pytest.raises(ConfigError, match="close other programs"):
        usable_bytes(find_card("gtx-970"), "linux", overhead_bytes=4 * GIB)


def test_a_cap_that_does_not_fit_beside_the_context_is_refused() -> None:
    assert memory_fraction(GIB, 0, GIB) == 1
    for cap in (0, -1, 4 * GIB):
        with pytest.raises(ConfigError, match=r"plan\.cap_bytes"):
            memory_fraction(cap, 160 * MIB, 4 * GIB)


# ---- what it can do --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "precision", "why", "conditional"),
    [
        ("gtx-970", "fp16", "half the bytes", False),
        ("gtx-1650", "fp16", "self-test", True),
        ("t400", "fp16", "self-test", True),
        ("rtx-3050-laptop", "bf16", "no loss scaling", False),
        ("h200", "bf16", "no loss scaling", False),
    ],
)
def test_the_precision_follows_the_card_with_its_reason(name: str, precision: str, why: str, conditional: bool) -> None:
    card = find_card(name)
    found, reason = precision_for(card)
    assert found == precision
    assert why in reason
    assert card.needs_fp16_selftest is conditional


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


def test_the_fp16_selftest_passes_on_the_cpu_and_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    passed, text = fp16_convolution_selftest("cpu")
    assert passed or "do not run on cpu" in text  # some CPUs and older torch have no half convolution
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(float("nan"), "gives NaN or infinity in its output"), (1.2, "are off by 20"), (None, "do not run")],
)
def test_the_fp16_selftest_fails_where_half_convolutions_are_wrong(
    monkeypatch: pytest.MonkeyPatch, damage: float | None, message: str
) -> None:
    honest = torch.nn.functional.conv2d

    def broken(image: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        if image.dtype == torch.float32:
            return honest(image, weight, **options)
        if damage is None:
            raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'\nsecond line")
        return (honest(image.float(), weight.float(), **options) * damage).half()

    monkeypatch.setattr(torch.nn.functional, "conv2d", broken)
    passed, text = fp16_convolution_selftest("cpu")
    assert not passed
    assert message in text
    assert "\n" not in text
