"""What a card is, and reading cards from TOML: every missing, unknown or bad field of a file at once."""

from __future__ import annotations

import os as _os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from nvae_lowmem.errors import ConfigError, raise_problems, unknown_name
from nvae_lowmem.units import MIB, parse_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OsName = Literal["linux", "windows", "desktop"]
"""linux: headless; desktop: Linux with a graphical session on the card; windows: also under WSL (both are WDDM)."""
Fp16 = Literal["storage", "double", "tensor"]
Capability = tuple[int, int]
CARDS_FILE = Path(__file__).with_name("cards.toml")
DEFAULT_CONTEXT_BYTES = 160 * MIB


@dataclass(frozen=True, kw_only=True)
class Card:
    """One graphics card. Sizes in bytes, rates per second; `sources` says where each number comes from."""

    id: str
    """Name in cards.toml, for example gtx-970."""
    name: str
    """Name as the driver reports it."""
    compute_capability: Capability
    """(major, minor), for example (5, 2)."""
    total_bytes_linux: int
    """Total memory as torch reports it under Linux."""
    total_bytes_windows: int
    """The same under Windows."""
    bandwidth_bytes_per_second: float
    """Data-sheet memory bandwidth (of the fast segment, where there is a slow one)."""
    fp32_flops_per_second: float
    """Data-sheet fp32 operations per second; a multiply-add is two."""
    fp16: Fp16
    """storage: fp32 arithmetic on half the bytes; double: twice the rate but NaN-prone; tensor: tensor cores."""
    fp16_flops_per_second: float
    """fp16 operations per second."""
    bf16: bool
    """bf16 in hardware (not emulated)."""
    pcie_pinned_bytes_per_second: float
    """Host to card from page-locked memory."""
    pcie_pageable_bytes_per_second: float
    """Host to card from ordinary memory."""
    context_bytes: int = DEFAULT_CONTEXT_BYTES
    """What the CUDA context takes outside the allocator (plan value)."""
    slow_segment_bytes: int = 0
    """Bytes at the end of the memory that are slow (GTX 970); 0: none."""
    slow_bandwidth_bytes_per_second: float = 0.0
    """Bandwidth of the slow segment, never together with the fast one."""
    cap_linux: int = 0
    """Default allocator cap on headless Linux; 0: by the general rule."""
    cap_desktop: int = 0
    """The same on a Linux desktop."""
    cap_windows: int = 0
    """The same under Windows."""
    plain: bool = False
    """A size class, not a card."""
    aliases: tuple[str, ...] = ()
    """Other names of the same card."""
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Field name -> where its number comes from."""

    @property
    def needs_fp16_selftest(self) -> bool:
        """True where fp16 may be used only after `fp16_convolution_selftest` passed on this very card."""
        return self.fp16 == "double"

    def total_bytes(self, os: OsName) -> int:
        """Total memory as torch reports it, in bytes."""
        return self.total_bytes_windows if os == "windows" else self.total_bytes_linux


@dataclass(frozen=True, kw_only=True)
class TorchBuild:
    """The torch to install for cards below a compute capability."""

    below: Capability
    requirement: str
    """For pip, for example torch==2.7.1."""
    windows_index: str
    """Wheel index for Windows, where PyPI's own wheels are CPU-only."""
    why: str


@cache
def _shipped() -> tuple[dict[str, Card], tuple[TorchBuild, ...]]:
    table = _read_toml(CARDS_FILE)
    builds = (TorchBuild(**{**row, "below": _capability("below", row["below"])}) for row in table["torch_builds"])
    return _parse_cards(table["cards"], CARDS_FILE.name), tuple(builds)


def torch_builds() -> tuple[TorchBuild, ...]:
    """Which torch runs on which compute capability, by rising capability; the first with `below` above it counts."""
    return _shipped()[1]


def load_cards(path: str | _os.PathLike[str] | None = None) -> dict[str, Card]:
    """All cards by id: the shipped ones, or those of a TOML file with [cards.NAME] tables.

    Raises ConfigError with every problem of the file.
    """
    if path is None:
        return dict(_shipped()[0])
    table = _read_toml(Path(path))
    if not isinstance(table.get("cards"), Mapping):
        raise ConfigError(f"card file {path} has no [cards.NAME] table: put each card's fields under one")
    return _parse_cards(table["cards"], f"card file {path}")


def card_from_file(path: str | _os.PathLike[str]) -> Card:
    """One card from a user's own TOML file: the keys of a table in cards.toml, at the top level.

    Raises ConfigError that names every missing, unknown or bad field.
    """
    card, problems = _parse_card(Path(path).stem, _read_toml(Path(path)))
    raise_problems(problems, f"card file {path}")
    assert card is not None  # no card without a problem
    return card


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"card file {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"card file {path} is not valid TOML: {error}") from None


def _parse_cards(tables: Mapping[str, Any], where: str) -> dict[str, Card]:
    parsed = {card_id: _parse_card(card_id, table) for card_id, table in tables.items()}
    raise_problems((f"{name}: {problem}" for name, (_, problems) in parsed.items() for problem in problems), where)
    return {name: card for name, (card, _) in parsed.items() if card is not None}


def _parse_card(card_id: str, table: Any) -> tuple[Card | None, list[str]]:
    """One card from its table, or None with every problem. An entry is a value, or { value, source }."""
    if not isinstance(table, Mapping):
        return None, [f"must be a table, not {table!r}"]
    values: dict[str, Any] = {"id": card_id}
    sources: dict[str, str] = {}
    problems = []
    for key, entry in table.items():
        value = entry.get("value") if isinstance(entry, Mapping) else entry
        reader = _READERS.get(key)
        if reader is None:
            problems.append(unknown_name("field", key, _READERS))
            continue
        try:
            values[key] = reader(key, value)
        except ValueError as error:
            problems.append(str(error))
        if reader in (_rate, _size):
            sources[key] = str(entry.get("source", "own file")) if isinstance(entry, Mapping) else "own file"
    problems += [f"{name} is missing" for name in _REQUIRED if name not in table]
    if table.get("fp16") == "tensor" and "fp16_flops_per_second" not in table:
        problems.append("fp16_flops_per_second is missing: it cannot be derived for fp16 = 'tensor'")
    if problems:
        return None, problems
    fp32, pinned = values["fp32_flops_per_second"], values["pcie_pinned_bytes_per_second"]
    derived = {
        "fp16_flops_per_second": (
            fp32 * (2 if values["fp16"] == "double" else 1),
            "derived from fp32 and the kind of fp16",
        ),
        "pcie_pageable_bytes_per_second": (pinned / 2, "estimated: half the pinned rate"),
        "context_bytes": (DEFAULT_CONTEXT_BYTES, "plan value: 68 to 117 MiB seen on 4 GB cards, plus reserve"),
    }
    values = {key: value for key, (value, _) in derived.items()} | values
    sources = {key: source for key, (_, source) in derived.items()} | sources
    return Card(**{"bf16": values["compute_capability"] >= (8, 0), **values}, sources=sources), []


def _capability(key: str, value: Any) -> Capability:
    match = re.fullmatch(r"(\d+)\.(\d)", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'{key} = {value!r} must be a text such as "5.2"')
    return int(match[1]), int(match[2])


def _size(key: str, value: Any) -> int:
    return parse_bytes(value, key)


def _rate(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{key} = {value!r} must be a number larger than 0, per second")
    return float(value)


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} = {value!r} must be a text")
    return value


def _fp16(key: str, value: Any) -> str:
    if value not in get_args(Fp16):
        raise ValueError(f"{key} = {value!r} must be one of {', '.join(map(repr, get_args(Fp16)))}")
    return value


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{key} = {value!r} must be true or false")
    return value


def _aliases(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{key} = {value!r} must be a list of names")
    return tuple(_text(key, name) for name in value)


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "name": _text,
    "compute_capability": _capability,
    "fp16": _fp16,
    "total_bytes_linux": _size,
    "total_bytes_windows": _size,
    "bandwidth_bytes_per_second": _rate,
    "fp32_flops_per_second": _rate,
    "pcie_pinned_bytes_per_second": _rate,
    "fp16_flops_per_second": _rate,
    "pcie_pageable_bytes_per_second": _rate,
    "context_bytes": _size,
    "slow_segment_bytes": _size,
    "slow_bandwidth_bytes_per_second": _rate,
    "cap_linux": _size,
    "cap_desktop": _size,
    "cap_windows": _size,
    "bf16": _flag,
    "plain": _flag,
    "aliases": _aliases,
}
_REQUIRED = tuple(_READERS)[:8]
