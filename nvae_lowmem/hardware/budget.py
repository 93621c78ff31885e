"""What is left of a card for the CUDA allocator, and the card and size that somebody asked for.

"4 GB" means 3.62 to 4.00 GiB in torch: totals are bytes as torch reports them. Nothing here allocates memory on a card.
"""

from __future__ import annotations

import os as _os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.card import Card, OsName, card_from_file
from nvae_lowmem.hardware.find_card import card_of_size, detect_card, find_card, plain_card
from nvae_lowmem.units import GIB, MIB, format_bytes, parse_bytes

# What is left of a card.
_DESKTOP_BYTES = 380 * MIB  # the most a Linux desktop was seen to hold
_LINUX_RESERVE_BYTES = 64 * MIB  # for what the driver allocates late: kernels, library handles
_TOTAL_SHARE: dict[OsName, float] = {"linux": 0.92, "desktop": 0.92, "windows": 0.85}
# A total without a card says nothing of what the driver hides: take the share that a GTX 970's caps are of 4 GiB.
_PLAIN_SHARE: dict[OsName, float] = {"linux": 0.8, "desktop": 0.725, "windows": 0.675}
_SMALLEST_BYTES, _LARGEST_BYTES = 512 * MIB, 288 * 10**9  # no card outside of this range is sold


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the CUDA caching allocator may take of a card, in bytes, and why."""

    cap_bytes: int
    """Upper bound of the allocator's reserved memory."""
    total_bytes: int
    """Total the cap was made from."""
    context_bytes: int
    """Kept free for the CUDA context and everything else outside the allocator."""
    reason: str
    """The rule that decided, for people."""


def usable_bytes(
    card: Card | None, os: OsName, gpu_mem_bytes: int | None = None, overhead_bytes: int | None = None
) -> Budget:
    """What of a card the CUDA caching allocator may take.

    card: None means a plain card of `gpu_mem_bytes`. gpu_mem_bytes: use no more than a card of this total would give.
    overhead_bytes: what is in use outside torch, context included, when measured; else the plan value for this OS.

    The cap is the least of: the card's own default, if it has one; Linux: total - overhead - 64 MiB and 0.92 total;
    Windows: total - overhead and 0.85 total, since WDDM never gives the last ~0.5 GiB and spills to host memory instead
    of failing; and for plain totals 0.8 of it (Linux desktop 0.725, Windows 0.675).
    Raises ConfigError when no card or size is given, the size is impossible, or nothing is left.
    """
    if gpu_mem_bytes is not None:
        _check_gpu_mem(gpu_mem_bytes)
    if card is None:
        if gpu_mem_bytes is None:
            raise ConfigError("neither a card nor a size is given: use --card NAME or --gpu-mem 4G")
        card = plain_card(gpu_mem_bytes)
    total = card.total_bytes(os)
    plain = card.plain
    if gpu_mem_bytes is not None and gpu_mem_bytes < total:
        total, plain = gpu_mem_bytes, True
    elif gpu_mem_bytes is not None and gpu_mem_bytes > -(-total // GIB) * GIB:  # "4G" on a 3.94 GiB card is its label
        raise ConfigError(
            f"--gpu-mem {format_bytes(gpu_mem_bytes)} is more than a {card.name} has ({format_bytes(total)}): "
            "give less, or leave it out to use the whole card"
        )
    planned = card.context_bytes + (_DESKTOP_BYTES if os == "desktop" else 0)
    outside = planned if overhead_bytes is None else max(overhead_bytes, card.context_bytes)
    cap_bytes, rule = min(_limits(card, os, total, outside, plain))
    if cap_bytes <= 0:
        raise ConfigError(
            f"{format_bytes(outside)} of {format_bytes(total)} on the {card.name} are in use outside torch: nothing is "
            "left to train in; close other programs that use the card, or use a larger one"
        )
    reason = f"{format_bytes(cap_bytes)} of {format_bytes(total)} ({card.name}, {os}): {rule}"
    return Budget(cap_bytes=cap_bytes, total_bytes=total, context_bytes=outside, reason=reason)


def _limits(card: Card, os: OsName, total: int, outside: int, plain: bool) -> list[tuple[int, str]]:
    """Every upper bound of the cap in bytes, with its reason."""
    reserve = 0 if os == "windows" else _LINUX_RESERVE_BYTES
    left = f"what {format_bytes(outside)} outside torch" + (f" and {format_bytes(reserve)} reserve" if reserve else "")
    share = _TOTAL_SHARE[os]
    limits = [(total - outside - reserve, left + " leave"), (int(share * total), f"{share} of the total on {os}")]
    if plain:
        share = _PLAIN_SHARE[os]
        limits.append((int(share * total), f"{share} of a plain total, since real cards of that size show less of it"))
    own = {"linux": card.cap_linux, "desktop": card.cap_desktop, "windows": card.cap_windows}[os]
    if own:
        limits.append((own, f"this card's default: {card.sources.get(f'cap_{os}', 'own file')}"))
    return limits


def allocator_fraction(cap_bytes: int, total_bytes: int) -> float:
    """The share of the card's total that makes torch cap its allocator at exactly `cap_bytes`.

    torch.cuda.set_per_process_memory_fraction multiplies and truncates; half a byte more gives back exactly the cap.
    """
    return min((cap_bytes + 0.5) / total_bytes, 1.0)


def memory_fraction(cap_bytes: int, context_bytes: int, total_bytes: int) -> float:
    """`allocator_fraction`, once it is certain that the context fits beside the cap.

    Raises ConfigError when it does not.
    """
    if cap_bytes <= 0 or cap_bytes + context_bytes > total_bytes:
        raise ConfigError(
            f"a cap of {format_bytes(cap_bytes)} and {format_bytes(context_bytes)} outside torch do not fit into "
            f"{format_bytes(total_bytes)}: set plan.cap_bytes between 1 and {total_bytes - context_bytes}"
        )
    return allocator_fraction(cap_bytes, total_bytes)


def this_os() -> OsName:
    """Which of the three memory regimes this machine is in; WSL counts as Windows, whose driver it uses."""
    if sys.platform == "win32" or "microsoft" in platform.release().lower():
        return "windows"
    return "desktop" if _os.environ.get("DISPLAY") or _os.environ.get("WAYLAND_DISPLAY") else "linux"


def chosen_card(name: str | None, gpu_mem: str | None, on: OsName) -> tuple[Card, Budget] | None:
    """The card and what is left of it for --card (a name, "auto", or a TOML file) and --gpu-mem; None without both.

    Raises ConfigError for an unknown card or an impossible size.
    """
    size = parse_gpu_mem(gpu_mem) if gpu_mem is not None else None
    if name is None:
        return None if size is None else (card_of_size(size), usable_bytes(None, on, size))
    if name == "auto":
        card = detect_card()
    else:
        card = card_from_file(name) if name.endswith(".toml") or Path(name).is_file() else find_card(name)
    return card, usable_bytes(card, on, size)


def parse_gpu_mem(text: str) -> int:
    """Bytes of a `--gpu-mem` value. Raises ConfigError for garbage, zero, negative, and sizes no card has."""
    size_bytes = parse_memory(text, "--gpu-mem")
    _check_gpu_mem(size_bytes)
    return size_bytes


def parse_memory(text: str, flag: str) -> int:
    """Bytes of a flag's value, such as 4G. Raises ConfigError for garbage and for a number without its unit."""
    try:
        size_bytes = parse_bytes(text, flag)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if size_bytes < MIB:  # nobody means so little: a unit was left out
        unit = "G" if size_bytes < _SMALLEST_BYTES // MIB else "M"
        raise ConfigError(f"{flag} {text} is {size_bytes} bytes: did you mean {flag} {size_bytes}{unit}?")
    return size_bytes


def _check_gpu_mem(size_bytes: int) -> None:
    if not _SMALLEST_BYTES <= size_bytes <= _LARGEST_BYTES:
        raise ConfigError(
            f"--gpu-mem {format_bytes(size_bytes)}: no card has that; it must lie between "
            f"{format_bytes(_SMALLEST_BYTES)} and {format_bytes(_LARGEST_BYTES)}, for example 4G"
        )
