"""Bytes for the machine, GiB for people: "4G", "3800M" <-> bytes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TypeVar

from nvae_lowmem.errors import ConfigError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
LARGEST_BYTES = 1 << 50
_FACTORS = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B?)\s*", re.IGNORECASE)


def parse_bytes(text: str | int | float, flag: str = "size") -> int:
    """Bytes from "4G", "4GiB", "3800M", "512" (binary units: 1G = 1 GiB = 2^30 bytes).

    Raises ValueError naming `flag` when the text is not a positive size.
    """
    match = _SIZE.fullmatch(str(text))
    if match is None:
        raise ValueError(f"{flag} {text!r} is not a size: write a number with K, M or G, for example 4G, 4GiB or 3800M")
    exact = float(match[1]) * _FACTORS[match[2].upper()]
    if exact > LARGEST_BYTES:
        raise ValueError(f"{flag} {str(text)[:40]!r} is more than 1,024 TiB: give the memory that there is, such as 4G")
    size = int(exact)
    if size <= 0:
        raise ValueError(f"{flag} {text!r} must be larger than zero, for example 4G")
    return size


def format_bytes(size_bytes: float) -> str:
    """A size for people: "3.20 GiB", "64.0 MiB", "512 B"."""
    sign, size = ("-" if size_bytes < 0 else ""), abs(size_bytes)
    if size >= GIB:
        return f"{sign}{size / GIB:.2f} GiB"
    if size >= MIB:
        return f"{sign}{size / MIB:.1f} MiB"
    if size >= KIB:
        return f"{sign}{size / KIB:.1f} KiB"
    return f"{sign}{size:.0f} B"


def format_seconds(seconds: float) -> str:
    """A duration for people: "0.8 s", "3 min 12 s", "2 h 05 min", "4 d 3 h"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def clock_time(seconds: float) -> str:
    """The time of day in so many seconds, with the day where it is more than half a day away: "about 18:42"."""
    form = "%H:%M:%S" if seconds < 600 else "%H:%M" if seconds < 43_200 else "%a %d %b, %H:%M"
    return f"about {time.strftime(form, time.localtime(time.time() + max(0.0, seconds)))}"


Number = TypeVar("Number", int, float)


def numbers(text: str, flag: str, kind: Callable[[str], Number]) -> list[Number]:
    """The numbers of a comma-separated list. Raises ConfigError naming the flag."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} {text}: must be numbers with commas between them, for example 1,3,6") from None
