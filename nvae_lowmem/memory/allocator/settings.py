"""The settings string of PyTorch's CUDA caching allocator (PYTORCH_CUDA_ALLOC_CONF), and the sizes that it governs.

settings = AllocatorSettings.from_string("max_split_size_mb:64,roundup_power2_divisions:[256:2,>:4]")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.units import MIB

MIN_BLOCK_BYTES = 512
"""Every block is a multiple of this."""
SMALL_LIMIT_BYTES = 1 * MIB
"""Requests up to this come from the small pool, larger ones from the large pool."""
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
"""What a request of 1 to 10 MiB takes from the device, so that several can share it."""
OWN_SEGMENT_FROM_BYTES = 10 * MIB
"""A request from this size up gets a segment of its own, rounded up to SEGMENT_ROUNDING_BYTES."""
SEGMENT_ROUNDING_BYTES = 2 * MIB
UNLIMITED_BYTES = (1 << 64) - 1
"""max_split_size_mb when it is not set."""

_ROUNDUP_INTERVALS = 16  # one entry per power of two from 1 MiB to 32 GiB; smaller and larger sizes use the end entries
_LARGE_SEGMENT_MIB = LARGE_SEGMENT_BYTES // MIB
# Keys that PyTorch accepts and that do not change which block an allocation gets.
_WITHOUT_EFFECT = (
    "release_lock_on_cudamalloc",
    "graph_capture_record_stream_reuse",
    "pinned_use_cuda_host_register",
    "pinned_use_background_threads",
    "pinned_num_register_threads",
    "pinned_reserve_segment_size_mb",
    "pinned_free_catch_all",
    "pinned_max_round_threshold_mb",
    "pinned_max_cached_size_mb",
)


@dataclass(frozen=True)
class AllocatorSettings:
    """What the settings string says. The defaults are PyTorch's own; sizes in bytes."""

    max_split_bytes: int = UNLIMITED_BYTES
    """Blocks from this size up are never split, nor given to a smaller request."""
    max_non_split_rounding_bytes: int = LARGE_SEGMENT_BYTES
    """A request of max_split_bytes or more takes no free block that is larger than it by this much."""
    roundup_power2_divisions: tuple[int, ...] = (0,) * _ROUNDUP_INTERVALS
    """Sizes round up to one of this many steps between two powers of two. Entry i: for 2^i MiB and up; 0 and 1: off."""
    garbage_collection_threshold: float = 0.0
    """Above this share of the cap, a miss first frees the segments that lay idle longest; 0 is off."""
    expandable_segments: bool = False
    """One growing segment per pool instead of many of fixed size."""

    @classmethod
    def from_string(cls, text: str) -> AllocatorSettings:
        """The settings that `text` ("key:value,key:[a:b,c:d]", or "" for the defaults) stands for.

        Raises ConfigError for a key that is unknown or not simulated, and for a value PyTorch refuses.
        """
        values: dict[str, object] = {}
        for item in _split_outside_brackets(text):
            key, colon, value = (part.strip() for part in item.partition(":"))
            if key in _PARSERS and colon:
                field, parse = _PARSERS[key]
                values[field] = parse(key, value)
            elif key == "backend" and value == "native":
                pass
            elif key not in _WITHOUT_EFFECT or not colon:
                raise ConfigError(
                    f"allocator settings {text!r}: {item.strip()!r} is not something this simulator knows; write "
                    f"key:value with a key among {', '.join(_PARSERS)} (or leave that part out)"
                )
        return cls(**values)  # type: ignore[arg-type]

    def round_size(self, nbytes: int) -> int:
        """Bytes of the block that a request of `nbytes` asks for: PyTorch's round_size()."""
        if nbytes < MIN_BLOCK_BYTES:
            return MIN_BLOCK_BYTES
        exponent = nbytes.bit_length() - 1
        interval = min(max(exponent - 20, 0), _ROUNDUP_INTERVALS - 1)
        divisions = self.roundup_power2_divisions[interval]
        if divisions > 1 and nbytes > MIN_BLOCK_BYTES * divisions:
            step = (1 << exponent) // divisions
            return -(-nbytes // step) * step
        return round_to_block(nbytes)


def round_to_block(nbytes: int) -> int:
    """`nbytes` rounded up to a multiple of MIN_BLOCK_BYTES, as the allocator rounds without further settings."""
    return (nbytes + MIN_BLOCK_BYTES - 1) & -MIN_BLOCK_BYTES


def segment_size(block_bytes: int) -> int:
    """Bytes that a block of `block_bytes` (rounded) asks of the device when no free block fits it."""
    if block_bytes <= SMALL_LIMIT_BYTES:
        return SMALL_SEGMENT_BYTES
    if block_bytes < OWN_SEGMENT_FROM_BYTES:
        return LARGE_SEGMENT_BYTES
    return (block_bytes + SEGMENT_ROUNDING_BYTES - 1) & -SEGMENT_ROUNDING_BYTES


def _split_outside_brackets(text: str) -> list[str]:
    """The comma-separated parts of `text` that are not blank; commas within [...] do not separate."""
    parts, depth = [""], 0
    for char in text:
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part for part in parts if part.strip()]


def _refuse(key: str, value: str, allowed: str) -> ConfigError:
    return ConfigError(f"allocator settings: {key} is {value!r}; it must be {allowed}")


def _whole_number(text: str) -> int | None:
    return int(text) if text.strip().isdecimal() else None


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _parse_mib(key: str, value: str) -> int:
    mib = _whole_number(value)
    if mib is None or mib < _LARGE_SEGMENT_MIB:
        raise _refuse(key, value, f"a whole number of MiB, {_LARGE_SEGMENT_MIB} or more")
    return min(mib * MIB, UNLIMITED_BYTES)


def _parse_threshold(key: str, value: str) -> float:
    try:
        threshold = float(value)
    except ValueError:
        threshold = 0.0
    if not 0.0 < threshold < 1.0:
        raise _refuse(key, value, "a number between 0 and 1, both excluded")
    return threshold


def _parse_bool(key: str, value: str) -> bool:
    if value not in ("True", "False"):
        raise _refuse(key, value, "True or False, spelt so")
    return value == "True"


def _parse_divisions(key: str, value: str) -> tuple[int, ...]:
    """A number for all sizes, or "[64:8,256:4,>:1]": size in MiB : divisions; the first also holds for all below it."""
    if not value.startswith("["):
        divisions = _whole_number(value)
        if divisions is None or not _is_power_of_two(divisions):
            raise _refuse(key, value, "a power of two")
        return (divisions,) * _ROUNDUP_INTERVALS
    if not value.endswith("]"):
        raise _refuse(key, value, "closed with ]")
    table, last, first = [0] * _ROUNDUP_INTERVALS, 0, True
    for item in _split_outside_brackets(value[1:-1]):
        size_text, _, divisions_text = (part.strip() for part in item.partition(":"))
        divisions, mib = _whole_number(divisions_text), _whole_number(size_text)
        if divisions is None or not (divisions == 0 or _is_power_of_two(divisions)):
            raise _refuse(key, value, "a list of size:divisions, with each divisions a power of two or 0")
        if size_text == ">":
            table[last + 1 :] = [divisions] * (_ROUNDUP_INTERVALS - last - 1)
            continue
        if mib is None or not _is_power_of_two(mib):
            raise _refuse(key, value, "a list of size:divisions, with each size a power of two in MiB, or > at the end")
        last = min(mib.bit_length() - 1, _ROUNDUP_INTERVALS - 1)
        if first:
            table[:last] = [divisions] * last
            first = False
        table[last] = divisions
    return tuple(table)


_PARSERS: dict[str, tuple[str, Callable[[str, str], object]]] = {
    "max_split_size_mb": ("max_split_bytes", _parse_mib),
    "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", _parse_mib),
    "roundup_power2_divisions": ("roundup_power2_divisions", _parse_divisions),
    "garbage_collection_threshold": ("garbage_collection_threshold", _parse_threshold),
    "expandable_segments": ("expandable_segments", _parse_bool),
}
