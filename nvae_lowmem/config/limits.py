"""The range of every number of a configuration, declared with its field: `bits: Annotated[int, Range(1, 8)]`.

Every number is finite and has an upper bound: beyond it a mistyped digit would fill the memory, or end in whatever
message the first library has that meets it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple, get_type_hints

LARGEST_STEPS = 10**12
"""Times a total batch, the number of a drawn image still fits 64 bits."""


class Range(NamedTuple):
    """What a number may be: from `least` to `most`, or above `least` and below `most` where these are excluded."""

    least: float
    most: float
    above_least: bool = False
    below_most: bool = False
    note: str = ""
    """What the least value means, if it is special."""

    def allows(self, value: float) -> bool:
        """Whether a number is in the range; nan is in none."""
        low = self.least < value if self.above_least else self.least <= value
        return low and (value < self.most if self.below_most else value <= self.most)

    def __str__(self) -> str:
        low = f"above {_short(self.least)}" if self.above_least else f"from {_short(self.least)}"
        note = f" ({self.note})" if self.note else ""
        high = f"to below {_short(self.most)}" if self.below_most else f"to {_short(self.most)}"
        return f"{low}{note} {high}"


def range_problems(section: Any, prefix: str) -> list[str]:
    """A problem for every number of a dataclass that is outside the range declared for its field."""
    out = []
    for name, allowed in _ranges(section.__class__).items():
        value = getattr(section, name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(allowed.allows(v) for v in values):
            each = "hold numbers" if isinstance(value, tuple) else "be"
            out.append(f"{prefix}.{name} = {shown(value)} must {each} {allowed}")
    return out


def shown(value: Any) -> str:
    """The value as a message quotes it: in at most about 100 characters, nothing in it that a terminal obeys."""
    try:
        text = repr(list(value) if isinstance(value, tuple) else value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text):,} characters)"


@functools.cache
def _ranges(kind: Any) -> dict[str, Range]:
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for field in dataclasses.fields(kind):
        for extra in getattr(hints[field.name], "__metadata__", ()):
            if isinstance(extra, Range):
                found[field.name] = extra
    return found


def _short(number: float) -> str:
    if isinstance(number, int):
        return f"{number:,}" if abs(number) < 10**9 else f"{number:.3g}"
    return f"{number:g}" if math.isfinite(number) else str(number)
