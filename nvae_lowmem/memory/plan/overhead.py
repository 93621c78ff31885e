"""What a prediction exceeds the table of block costs by: first a guess, then learnt from the predictor.

The table leaves out fragmentation, workspaces and margins. They grow with the plan's size in no simple way, so the
search leaves them free as far as they are known, asks the predictor about the plan it finds, and corrects itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from nvae_lowmem.memory.predict.predict import Prediction
from nvae_lowmem.units import MIB

Groups = tuple[int, ...]
"""Latent groups per scale, highest resolution first."""
_FIRST_SHARE, _FIRST_BYTES = 0.05, 24 * MIB  # of the cap: the guess before anything was predicted
_STEP_SHARE = 0.01  # of the cap: the least that an unsuitable prediction adds to the overhead


class Size(NamedTuple):
    """What the overhead of a plan depends on."""

    groups: Groups
    micro_batch: int


class Taken(NamedTuple):
    """Bytes on the card and in host memory."""

    card_bytes: int
    host_bytes: int


@dataclass
class OverheadModel:
    """Overhead per (groups, micro_batch): prediction minus table. An untried size is taken to be like the last one."""

    cap_bytes: int
    """What the allocator may take."""
    _tried: dict[Size, _Bracket] = field(default_factory=dict)
    _known: dict[Size, int] = field(default_factory=dict)
    _observations: int = 0
    _latest: Taken = field(init=False)

    def __post_init__(self) -> None:
        self._latest = Taken(int(_FIRST_SHARE * self.cap_bytes) + _FIRST_BYTES, 0)

    def estimate(self, size: Size) -> Taken:
        """What to leave free beside the table's figures."""
        return Taken(self._known.get(size, self._latest.card_bytes), self._latest.host_bytes)

    def observe(self, size: Size, table: Taken, prediction: Prediction) -> None:
        """Learn from the prediction of a plan of that size that takes `table` by the table.

        A plan that does not fit, or only where the allocator gives back its cache, had too little left free.
        """
        before = self.estimate(size).card_bytes
        suits = prediction.fits(self.cap_bytes) and not prediction.run_retries
        # how much more it would have needed is not known: ask for more and more, so that it comes to an end
        least = 0 if suits else before + (int(_STEP_SHARE * self.cap_bytes) << self._observations)
        needed = prediction.reserved_peak_bytes + prediction.margin_bytes
        wanted = max(least, needed - table.card_bytes, 0)
        card_bytes = self._tried.setdefault(size, _Bracket()).narrowed(before, suits, wanted)
        self._observations += 1
        self._known[size] = card_bytes
        self._latest = Taken(card_bytes, max(0, prediction.host_bytes - table.host_bytes))


@dataclass
class _Bracket:
    """The overheads of one size between which the right one lies."""

    too_little: int | None = None
    enough: int | None = None

    def narrowed(self, tried: int, suits: bool, wanted: int) -> int:
        """What to try next: `wanted`, but halfway between the two bounds where it lies outside of them."""
        if suits:
            self.enough = tried
        else:
            self.too_little = tried
        if self.too_little is None or self.enough is None or self.too_little < wanted < self.enough:
            return wanted
        return (self.too_little + self.enough) // 2
