"""What is left of a card for the allocator, and sizes as people give them."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware import budget
from nvae_lowmem.hardware.budget import memory_fraction, parse_gpu_mem, parse_memory, this_os, usable_bytes
from nvae_lowmem.hardware.card import Card, OsName, load_cards
from nvae_lowmem.hardware.find_card import find_card
from nvae_lowmem.units import GIB, MIB

SYSTEMS = ("linux", "desktop", "windows")
FOUR_GB_TOTALS = [int(gib * GIB) for gib in (3.62, 3.81, 3.94, 4.00)]
OVERHEADS = [int(gib * GIB) for gib in (0.12, 0.40, 0.65, 1.2)]


def with_total(card: Card, total_bytes: int) -> Card:
    return dataclasses.replace(card, total_bytes_linux=total_bytes, total_bytes_windows=total_bytes)


def test_the_memory_regime_follows_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(budget.sys, "platform", "linux")
    monkeypatch.setattr(budget.platform, "release", lambda: "6.1.0-generic")
    assert this_os() == "linux"
    monkeypatch.setenv("DISPLAY", ":0")
    assert this_os() == "desktop"
    monkeypatch.setattr(budget.platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    assert this_os() == "windows"


# ---- what is left ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("os", "gib"), [("linux", 3.2), ("desktop", 2.9), ("windows", 2.7)])
def test_default_caps_of_the_gtx_970_and_of_a_plain_4g(os: OsName, gib: float) -> None:
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
def test_the_cap_leaves_the_overhead_free_and_wastes_little(os: OsName, overhead: int, total: int) -> None:
    reserve = 0 if os == "windows" else 64 * MIB
    for name in ("gtx-970", "gtx-1050-ti", "gtx-1650", "rtx-3050-laptop", "4g"):
        cap = usable_bytes(with_total(find_card(name), total), os, overhead_bytes=overhead).cap_bytes
        assert cap + overhead + reserve <= total, name
        assert cap >= min(total - overhead - reserve, int(0.67 * total)), name


@pytest.mark.parametrize(("os", "share", "reserve"), [("linux", 0.92, 64 * MIB), ("windows", 0.85, 0)])
@pytest.mark.parametrize("overhead", OVERHEADS)
def test_the_general_rule_is_the_lesser_of_what_is_free_and_a_share(
    os: OsName, share: float, reserve: int, overhead: int
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
    card: Card, os: OsName, total: int, gpu_mem: int | None, overhead: int | None
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


@pytest.mark.parametrize(
    ("given", "meant"), [("4", "4G"), ("4096", "4096M"), ("24", "24G"), ("11264", "11264M"), ("3200K", None)]
)
def test_a_number_without_its_unit_is_asked_about(given: str, meant: str | None) -> None:
    for flag in ("--gpu-mem", "--host-mem"):
        if meant is None:
            assert parse_memory(given, flag) == 3200 << 10
        else:
            with pytest.raises(ConfigError, match=f"{flag} {given} is {given} bytes: did you mean {flag} {meant}\\?"):
                parse_memory(given, flag)


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
