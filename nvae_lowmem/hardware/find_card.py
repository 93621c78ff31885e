"""Finding a card: by the name somebody types, by its size, or the one in this machine."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from nvae_lowmem.errors import ConfigError, command_line
from nvae_lowmem.hardware.card import Capability, Card, Fp16, load_cards
from nvae_lowmem.units import format_bytes

if TYPE_CHECKING:
    import torch

_A_TYPING_ERROR = 0.8  # of difflib's ratio: "gtx-97" is near "gtx-970"; "rtx-4090" is another card than any we know


def find_card(name: str) -> Card:
    """The shipped card of that id or name; case, spaces, dashes and maker's words do not matter.

    Raises ConfigError with the nearest name for an unknown one, or the choices for an ambiguous one.
    """
    cards = load_cards()
    by_id = [card for card in cards.values() if _key(card.id) == _key(name)]
    found = by_id or _named(name, cards)
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"card {name!r} exists in several sizes: say which of {', '.join(c.id for c in found)}")
    typed = re.sub(r"[\s_]+", "-", name.strip().lower())  # as ids are written, so that the nearest one is found
    near = difflib.get_close_matches(typed, cards, n=1, cutoff=_A_TYPING_ERROR)
    hint = f": did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"card {name!r} is not in the table{hint}. Any other card: --card auto "
        "on the machine that has it, --gpu-mem 4G for one of that size, or --card FILE.toml with its figures "
        f"(docs/cards.md). In the table: {', '.join(cards)}"
    )


def detect_card(index: int = 0) -> Card:
    """The card that torch sees in this machine, with its real total and compute capability. Allocates nothing.

    A card that is not in cards.toml gets the rates of its size class, and its `sources` say so.
    Raises ConfigError, naming what to do, when torch sees no such card.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA (a CPU-only build)"
        raise ConfigError(
            f"CUDA card {index} cannot be read: torch {torch.__version__}, built for {built}, sees {count or 'none'}; "
            "name the card to plan for (--card gtx-970, or --gpu-mem 4G), or see what is missing: "
            f"{command_line('doctor')}"
        )
    properties = torch.cuda.get_device_properties(index)
    return _as_seen(properties.name, (properties.major, properties.minor), properties.total_memory)


def device_name(device: torch.device) -> str:
    """What a torch device is called, for people and records: "NVIDIA GeForce GTX 970", "the CPU (2 threads)"."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"the CPU ({threads} thread{'s' if threads > 1 else ''})"


def card_of_size(total_bytes: int) -> Card:
    """The plain card of the size class nearest to `total_bytes`, for when only a size is known."""
    return _nearest(_size_classes(), total_bytes)


def plain_card(total_bytes: int) -> Card:
    """A card of which nothing but its size is known."""
    name = f"plain {format_bytes(total_bytes)} card"
    near = _nearest(_size_classes(), total_bytes)
    return replace(near, name=name, total_bytes_linux=total_bytes, total_bytes_windows=total_bytes)


def _key(name: str) -> str:
    """A name without case, spaces, dashes and maker's words: "NVIDIA GeForce GTX 970" -> "gtx970"."""
    return re.sub(r"\b(nvidia|geforce|quadro|tesla|gpu)\b|[^a-z0-9]", "", name.lower())


def _named(name: str, cards: Mapping[str, Card]) -> list[Card]:
    return [card for card in cards.values() if _key(name) in map(_key, (card.name, *card.aliases))]


def _nearest(cards: Iterable[Card], total_bytes: int) -> Card:
    return min(cards, key=lambda card: abs(card.total_bytes_linux - total_bytes))


def _size_classes() -> list[Card]:
    return [card for card in load_cards().values() if card.plain]


def _as_seen(name: str, compute_capability: Capability, total_bytes: int) -> Card:
    """The card of that name with what torch reports of it; an unknown one with the rates of its size class."""
    seen = dict.fromkeys(("total_bytes_linux", "total_bytes_windows"), total_bytes)
    sources = dict.fromkeys(seen, "reported by torch on this machine")
    known = _named(name, load_cards())
    if known:
        card = _nearest(known, total_bytes)
        return replace(card, name=name, sources={**card.sources, **sources}, **seen)  # type: ignore[arg-type]
    near = _nearest(_size_classes(), total_bytes)
    guess = f"not in the table of cards: figure of the {near.name}"
    if compute_capability < (7, 0):
        fp16: Fp16 = "storage"
    else:  # Turing without tensor cores: GTX 16xx, T400 to T2000, MX450, MX550
        small = compute_capability == (7, 5) and re.search(r"\b(GTX 16\d\d|T\d{3,4}|MX[45]50)\b", name)
        fp16 = "double" if small else "tensor"
    return replace(
        near,
        id=re.sub(r"\W+", "-", name.lower()),
        name=name,
        compute_capability=compute_capability,
        fp16=fp16,
        fp16_flops_per_second=near.fp32_flops_per_second * (1 if fp16 == "storage" else 2),
        bf16=compute_capability >= (8, 0),
        plain=False,
        sources={**dict.fromkeys(near.sources, guess), **sources},
        total_bytes_linux=total_bytes,
        total_bytes_windows=total_bytes,
    )
