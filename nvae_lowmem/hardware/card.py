"""What a card is, and reading cards from TOML: every missing, unknown or bad field of a file at once."""

from __future__ import annotations

import os as _os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic_core import ErrorDetails

from nvae_lowmem.config.limits import shown
from nvae_lowmem.config.tables import read_table
from nvae_lowmem.errors import ConfigError, raise_problems, unknown_name
from nvae_lowmem.units import MIB, parse_bytes

OsName = Literal["linux", "windows", "desktop"]
"""linux: headless; desktop: Linux with a graphical session on the card; windows: also under WSL (both are WDDM)."""
Fp16 = Literal["storage", "double", "tensor"]
Capability = tuple[int, int]
CARDS_FILE = Path(__file__).with_name("cards.toml")
DEFAULT_CONTEXT_BYTES = 160 * MIB
# no numbers that somebody measured
_WITHOUT_SOURCE = ("name", "aliases", "compute_capability", "fp16", "bf16", "plain")


def _capability(value: Any) -> Capability:
    match = re.fullmatch(r"(\d+)\.(\d)", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError('must be a text such as "5.2"')
    return int(match[1]), int(match[2])


def _size(value: Any) -> int:
    try:
        return parse_bytes(value)
    except ValueError:
        raise ValueError("must be a size above zero, such as 4G, 3800M or a number of bytes") from None


# how a field is written in a file: strict, so that 1 is no flag and "3" no number
_Text = Annotated[str, pydantic.StringConstraints(strict=True, min_length=1)]
_Flag = Annotated[bool, pydantic.Strict()]
_Rate = Annotated[float, pydantic.Field(strict=True, gt=0, le=1e21)]
_Size = Annotated[int, pydantic.BeforeValidator(_size)]
_Capability = Annotated[Capability, pydantic.BeforeValidator(_capability)]


@dataclass(frozen=True, kw_only=True)
class Card:
    """One graphics card. Sizes in bytes, rates per second; `sources` says where each number comes from."""

    __pydantic_config__: ClassVar = pydantic.ConfigDict(extra="forbid")

    id: str
    """Name in cards.toml, for example gtx-970."""
    name: _Text
    """Name as the driver reports it."""
    compute_capability: _Capability
    """(major, minor), for example (5, 2)."""
    total_bytes_linux: _Size
    """Total memory as torch reports it under Linux."""
    total_bytes_windows: _Size
    """The same under Windows."""
    bandwidth_bytes_per_second: _Rate
    """Data-sheet memory bandwidth (of the fast segment, where there is a slow one)."""
    fp32_flops_per_second: _Rate
    """Data-sheet fp32 operations per second; a multiply-add is two."""
    fp16: Fp16
    """storage: fp32 arithmetic on half the bytes; double: twice the rate but NaN-prone; tensor: tensor cores."""
    fp16_flops_per_second: _Rate = 0.0
    """fp16 operations per second."""
    bf16: _Flag = False
    """bf16 in hardware (not emulated)."""
    pcie_pinned_bytes_per_second: _Rate
    """Host to card from page-locked memory."""
    pcie_pageable_bytes_per_second: _Rate = 0.0
    """Host to card from ordinary memory."""
    context_bytes: _Size = DEFAULT_CONTEXT_BYTES
    """What the CUDA context takes outside the allocator (plan value)."""
    slow_segment_bytes: _Size = 0
    """Bytes at the end of the memory that are slow (GTX 970); 0: none."""
    slow_bandwidth_bytes_per_second: _Rate = 0.0
    """Bandwidth of the slow segment, never together with the fast one."""
    cap_linux: _Size = 0
    """Default allocator cap on headless Linux; 0: by the general rule."""
    cap_desktop: _Size = 0
    """The same on a Linux desktop."""
    cap_windows: _Size = 0
    """The same under Windows."""
    plain: _Flag = False
    """A size class, not a card."""
    aliases: tuple[_Text, ...] = ()
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

    below: _Capability
    requirement: str
    """For pip, for example torch==2.7.1."""
    windows_index: str
    """Wheel index for Windows, where PyPI's own wheels are CPU-only."""
    why: str


@cache
def _shipped() -> tuple[dict[str, Card], tuple[TorchBuild, ...]]:
    table = read_table(CARDS_FILE, f"card file {CARDS_FILE}")
    builds = pydantic.TypeAdapter(tuple[TorchBuild, ...]).validate_python(table["torch_builds"])
    return _parse_cards(table["cards"], CARDS_FILE.name), builds


def torch_builds() -> tuple[TorchBuild, ...]:
    """Which torch runs on which compute capability, by rising capability; the first with `below` above it counts."""
    return _shipped()[1]


def torch_install_line(compute_capability: Capability, windows: bool = False) -> tuple[str, str]:
    """The pip command for a torch with kernels for that compute capability, and the reason.

    windows: for Python under Windows itself (not WSL), where PyPI's own wheels are CPU-only.
    """
    build = next(build for build in torch_builds() if compute_capability < build.below)
    index = f" --index-url {build.windows_index}" if windows else ""
    return f'pip install "{build.requirement}"{index}', build.why


def load_cards(path: str | _os.PathLike[str] | None = None) -> dict[str, Card]:
    """All cards by id: the shipped ones, or those of a TOML file with [cards.NAME] tables.

    Raises ConfigError with every problem of the file.
    """
    if path is None:
        return dict(_shipped()[0])
    table = read_table(path, f"card file {path}")
    if not isinstance(table.get("cards"), Mapping):
        raise ConfigError(f"card file {path} has no [cards.NAME] table: put each card's fields under one")
    return _parse_cards(table["cards"], f"card file {path}")


def card_from_file(path: str | _os.PathLike[str]) -> Card:
    """One card from a user's own TOML file: the keys of a table in cards.toml, at the top level.

    Raises ConfigError that names every missing, unknown or bad field.
    """
    card, problems = _parse_card(Path(path).stem, read_table(path, f"card file {path}"))
    raise_problems(problems, f"card file {path}")
    assert card is not None  # no card without a problem
    return card


def _parse_cards(tables: Mapping[str, Any], where: str) -> dict[str, Card]:
    parsed = {card_id: _parse_card(card_id, table) for card_id, table in tables.items()}
    raise_problems((f"{name}: {problem}" for name, (_, problems) in parsed.items() for problem in problems), where)
    return {name: card for name, (card, _) in parsed.items() if card is not None}


def _parse_card(card_id: str, table: Any) -> tuple[Card | None, list[str]]:
    """One card from its table, or None with every problem. An entry is a value, or { value, source }."""
    if not isinstance(table, Mapping):
        return None, [f"must be a table, not {shown(table)}"]
    values = {key: entry.get("value") if isinstance(entry, Mapping) else entry for key, entry in table.items()}
    sources = {
        key: str(entry.get("source", "own file")) if isinstance(entry, Mapping) else "own file"
        for key, entry in table.items()
        if key not in _WITHOUT_SOURCE
    }
    known = [f.name for f in fields(Card) if f.name not in ("id", "sources")]
    problems = [unknown_name("field", key, known) for key in values if key not in known]
    if values.get("fp16") == "tensor" and "fp16_flops_per_second" not in values:
        problems.append("fp16_flops_per_second is missing: it cannot be derived for fp16 = 'tensor'")
    given = {key: value for key, value in values.items() if key in known}
    try:
        card = _adapter().validate_python(given | {"id": card_id, "sources": sources})
    except pydantic.ValidationError as error:
        return None, problems + [_in_words(detail) for detail in error.errors()]
    return (None, problems) if problems else (_completed(card, given), [])


def _completed(card: Card, given: Mapping[str, Any]) -> Card:
    """The card with what its table left out and follows from the rest."""
    derived = {
        "fp16_flops_per_second": (
            card.fp32_flops_per_second * (2 if card.fp16 == "double" else 1),
            "derived from fp32 and the kind of fp16",
        ),
        "pcie_pageable_bytes_per_second": (card.pcie_pinned_bytes_per_second / 2, "estimated: half the pinned rate"),
        "context_bytes": (DEFAULT_CONTEXT_BYTES, "plan value: 68 to 117 MiB seen on 4 GB cards, plus reserve"),
    }
    left_out = {key: found for key, found in derived.items() if key not in given}
    values: dict[str, Any] = {key: value for key, (value, _) in left_out.items()}
    if "bf16" not in given:
        values["bf16"] = card.compute_capability >= (8, 0)
    return replace(card, **values, sources={key: source for key, (_, source) in left_out.items()} | dict(card.sources))


@cache
def _adapter() -> pydantic.TypeAdapter[Card]:
    return pydantic.TypeAdapter(Card)


def _in_words(detail: ErrorDetails) -> str:
    """One of pydantic's findings as a sentence that names the field, its value and what is allowed."""
    name, given = ".".join(map(str, detail["loc"])), detail["input"]
    if detail["type"] == "missing":
        return f"{name} is missing"
    said = detail["msg"].removeprefix("Value error, ")
    return f"{name} = {shown(given)}: {said[0].lower()}{said[1:]}"
