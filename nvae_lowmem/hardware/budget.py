"""What is left of a card for the CUDA allocator, which precision it can train in, and which card is in this machine.

The figures live in cards.toml, each with its source (card_table.py reads them). "4 GB" means 3.62 to 4.00 GiB in torch:
totals are bytes as torch reports them. Nothing here allocates memory on a card except the fp16 self-test.
"""

from __future__ import annotations

import os as _os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nvae_lowmem.config.sections import Precision
from nvae_lowmem.errors import ConfigError, unknown_name
from nvae_lowmem.hardware.card import Capability, Card, Fp16, OsName, card_from_file, load_cards, torch_builds
from nvae_lowmem.units import GIB, MIB, format_bytes, parse_bytes

if TYPE_CHECKING:
    import torch

__all__ = [
    "Budget",
    "Card",
    "OsName",
    "card_from_file",
    "card_of_size",
    "chosen_card",
    "detect_card",
    "find_card",
    "fp16_convolution_selftest",
    "load_cards",
    "memory_fraction",
    "parse_gpu_mem",
    "precision_for",
    "this_os",
    "torch_install_line",
    "usable_bytes",
]

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
    raise ConfigError(
        unknown_name("card", typed, cards) + "; or describe your card in a TOML file, or give --gpu-mem 4G"
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
            "name the card to plan for (--card gtx-970, or --gpu-mem 4G), or run tools/doctor.py to see what is missing"
        )
    properties = torch.cuda.get_device_properties(index)
    return _as_seen(properties.name, (properties.major, properties.minor), properties.total_memory)


def card_of_size(total_bytes: int) -> Card:
    """The plain card of the size class nearest to `total_bytes`, for when only a size is known."""
    return _nearest(_size_classes(), total_bytes)


def chosen_card(name: str | None, gpu_mem: str | None, on: OsName) -> tuple[Card, Budget] | None:
    """The card and what is left of it for --card (a name, "auto", or a TOML file) and --gpu-mem; None without both.

    Raises ConfigError for a card or a size that there is not.
    """
    size = parse_gpu_mem(gpu_mem) if gpu_mem is not None else None
    if name is None:
        return None if size is None else (card_of_size(size), usable_bytes(None, on, size))
    if name == "auto":
        card = detect_card()
    else:
        card = card_from_file(name) if name.endswith(".toml") or Path(name).is_file() else find_card(name)
    return card, usable_bytes(card, on, size)


def this_os() -> OsName:
    """Which of the three memory regimes this machine is in; WSL counts as Windows, whose driver it uses."""
    if sys.platform == "win32" or "microsoft" in platform.release().lower():
        return "windows"
    return "desktop" if _os.environ.get("DISPLAY") or _os.environ.get("WAYLAND_DISPLAY") else "linux"


def parse_gpu_mem(text: str) -> int:
    """Bytes of a `--gpu-mem` value. Raises ConfigError for garbage, zero, negative, and sizes no card has."""
    try:
        size_bytes = parse_bytes(text, "--gpu-mem")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    _check_gpu_mem(size_bytes)
    return size_bytes


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
        card = _plain_card(gpu_mem_bytes)
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


def precision_for(card: Card) -> tuple[Precision, str]:
    """The precision to train in on this card and the reason. Where `card.needs_fp16_selftest`, fp16 is conditional."""
    if card.bf16:
        return "bf16", f"{card.name} computes in bf16: fp32's range, so no loss scaling"
    if card.fp16 == "tensor":
        return "fp16", f"{card.name} has fp16 tensor cores and no bf16"
    if card.fp16 == "double":
        return "fp16", f"{card.name} may give NaN in fp16 convolutions: fp16 once the self-test passes on it, else fp32"
    return "fp16", f"{card.name} stores activations in fp16, half the bytes; its arithmetic stays at the fp32 rate"


def memory_fraction(cap_bytes: int, context_bytes: int, total_bytes: int) -> float:
    """The argument of torch.cuda.set_per_process_memory_fraction that caps the allocator at exactly `cap_bytes`.

    torch multiplies it by the total and truncates; the context is outside the allocator and only has to fit beside it.
    Raises ConfigError when it does not.
    """
    if cap_bytes <= 0 or cap_bytes + context_bytes > total_bytes:
        raise ConfigError(
            f"a cap of {format_bytes(cap_bytes)} and {format_bytes(context_bytes)} outside torch do not fit into "
            f"{format_bytes(total_bytes)}: set plan.cap_bytes between 1 and {total_bytes - context_bytes}"
        )
    return min((cap_bytes + 0.5) / total_bytes, 1.0)


def torch_install_line(compute_capability: Capability, windows: bool = False) -> tuple[str, str]:
    """The pip command for a torch with kernels for that compute capability, and the reason.

    windows: for Python under Windows itself (not WSL), where PyPI's own wheels are CPU-only.
    """
    build = next(build for build in torch_builds() if compute_capability < build.below)
    index = f" --index-url {build.windows_index}" if windows else ""
    return f'pip install "{build.requirement}"{index}', build.why


def fp16_convolution_selftest(device: torch.device | str) -> tuple[bool, str]:
    """(passed, what was found): fp16 convolutions forward and backward on `device` against fp32 on the CPU.

    Catches the cards whose fp16 convolutions give NaN: one dense 3x3 and one depthwise 5x5, as in NVAE's cells. The
    caller's random generators are left alone. A device that cannot convolve in fp16 at all has not passed.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for kernel, groups in ((3, 1), (5, 32)):
        fan_in = 32 // groups * kernel**2
        image, slope = torch.randn(2, 4, 32, 16, 16, generator=generator).half()  # slope: d loss / d output
        weight = (torch.randn(32, 32 // groups, kernel, kernel, generator=generator) / fan_in**0.5).half()
        try:
            found = _convolve((image, weight, slope), groups, device, torch.float16)
        except RuntimeError as error:
            return False, f"fp16 convolutions do not run on {device}: {str(error).strip().splitlines()[0]}"
        exact = _convolve((image, weight, slope), groups, "cpu", torch.float32)
        for part, got, true in zip(("output", "input gradient", "weight gradient"), found, exact, strict=True):
            if not torch.isfinite(got).all():
                return False, f"fp16 {kernel}x{kernel} convolution on {device} gives NaN or infinity in its {part}"
            worst = max(worst, float((got - true).norm() / true.norm()))
    if worst > 0.01:  # rounding to fp16 alone gives less than 0.001
        return False, f"fp16 convolutions on {device} are off by {worst:.1%} from fp32"
    return True, f"fp16 convolutions on {device} agree with fp32 within {worst:.1e}"


def _convolve(
    tensors: tuple[torch.Tensor, ...], groups: int, device: torch.device | str, dtype: torch.dtype
) -> list[torch.Tensor]:
    """[output, d/d image, d/d weight] of one convolution computed in `dtype` on `device`, brought back as fp32."""
    import torch

    image, weight, slope = (t.to(device, dtype).clone() for t in tensors)
    for leaf in (image, weight):
        leaf.requires_grad_()
    output = torch.nn.functional.conv2d(image, weight, padding=weight.shape[-1] // 2, groups=groups)
    gradients = torch.autograd.grad(output, (image, weight), slope)
    return [t.detach().float().cpu() for t in (output, *gradients)]


def _key(name: str) -> str:
    """A name without case, spaces, dashes and maker's words: "NVIDIA GeForce GTX 970" -> "gtx970"."""
    return re.sub(r"\b(nvidia|geforce|quadro|tesla|gpu)\b|[^a-z0-9]", "", name.lower())


def _named(name: str, cards: Mapping[str, Card]) -> list[Card]:
    return [card for card in cards.values() if _key(name) in map(_key, (card.name, *card.aliases))]


def _nearest(cards: Iterable[Card], total_bytes: int) -> Card:
    return min(cards, key=lambda card: abs(card.total_bytes_linux - total_bytes))


def _size_classes() -> list[Card]:
    return [card for card in load_cards().values() if card.plain]


def _plain_card(total_bytes: int) -> Card:
    """A card of which nothing but its size is known."""
    name = f"plain {format_bytes(total_bytes)} card"
    near = _nearest(_size_classes(), total_bytes)
    return replace(near, name=name, total_bytes_linux=total_bytes, total_bytes_windows=total_bytes)


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


def _check_gpu_mem(size_bytes: int) -> None:
    if not _SMALLEST_BYTES <= size_bytes <= _LARGEST_BYTES:
        raise ConfigError(
            f"--gpu-mem {format_bytes(size_bytes)}: no card has that; it must lie between "
            f"{format_bytes(_SMALLEST_BYTES)} and {format_bytes(_LARGEST_BYTES)}, for example 4G"
        )
