"""Going back after a blow-up: which state, how often, and what is done otherwise from there on.

The weights of the last good checkpoint, half the learning rate (less, where no rate near it has ever worked), other
noise and another order of the images: the same steps again would end the same way. Each rewind is a line of the run's
`rewinds.jsonl`, so that a run that is killed and started again goes on as it was.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nvae_lowmem.errors import Diverged
from nvae_lowmem.training import checkpoint
from nvae_lowmem.training.checkpoint_files import sync
from nvae_lowmem.training.learning_rate import suggest_learning_rate
from nvae_lowmem.training.monitor import append_line
from nvae_lowmem.training.resolve import ResolvedRun

RECORD = "rewinds.jsonl"
FACTOR = 0.5
"""What each rewind multiplies the learning rate by."""
SEED_STRIDE = 1_000_003
"""Between the seeds of a run's noise before and after a rewind; a prime, so that seeds 1, 2, 3, ... stay apart."""


@dataclass(frozen=True, kw_only=True)
class Rewind:
    """One rewind: training went from `step` back to `back_to` finished steps."""

    step: int
    back_to: int
    peak_rate: float
    """The run's peak learning rate without any rewind."""
    why: str


def rewinds(run_dir: Path) -> list[Rewind]:
    """The rewinds of a run, oldest first; lines that are no record are passed over."""
    found = []
    with contextlib.suppress(OSError):
        for line in (run_dir / RECORD).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                entry = Rewind(**json.loads(line))
                if math.isfinite(entry.peak_rate):
                    found.append(entry)
    return found


def after_rewinds(run: ResolvedRun, made: Sequence[Rewind]) -> ResolvedRun:
    """The run as it is trained after these rewinds: a lower learning rate, another seed for order and noise.

    Rewinds at another peak learning rate count for the seed alone: whoever set a new rate meant that one.
    """
    if not made:
        return run
    here = [rewind for rewind in made if rewind.peak_rate == run.schedule.peak_rate]
    factor, profile = FACTOR ** len(here), run.profile
    seed = (profile.training.seed + SEED_STRIDE * len(made) + 2**63) % 2**64 - 2**63
    training = replace(profile.training, seed=seed, learning_rate_min=profile.training.learning_rate_min * factor)
    schedule = run.schedule._replace(peak_rate=_rate(run, here))
    return replace(run, profile=replace(profile, training=training), schedule=schedule)


def _rate(run: ResolvedRun, made: Sequence[Rewind]) -> float:
    """The peak learning rate after these rewinds at the run's own one: half of it each time.

    Where one went back to the initial weights, nothing good was ever reached at that rate, so it may be too high by
    orders of magnitude: from there on it is at most the one advised for the run's batch.
    """
    halved = run.schedule.peak_rate * FACTOR ** len(made)
    first = next((n for n, rewind in enumerate(made) if rewind.back_to == 0), None)
    if first is None:
        return halved
    return min(halved, _advised(run) * FACTOR ** (len(made) - 1 - first))


def _advised(run: ResolvedRun) -> float:
    training = run.profile.training
    batch, published = training.total_batch, training.published_total_batch
    return suggest_learning_rate(batch, published, training.published_learning_rate)[0]


def go_back(run_dir: Path, run: ResolvedRun, error: Diverged, most: int) -> Rewind:
    """Choose the state to go back to and write it down; run: as it was before any rewind.

    The state is the newest whole checkpoint before the first alarm, or the initial weights where there is none. Raises
    the error, with what was tried added, when there were `most` rewinds at this learning rate already.
    """
    peak = run.schedule.peak_rate
    before = [rewind for rewind in rewinds(run_dir) if rewind.peak_rate == peak]
    made = len(before)
    if made >= most or not error.curable:
        tried = f" Training went back {made} times, the last time with a learning rate of {_rate(run, before):g}."
        raise Diverged(f"{error}{tried if made else ''}", error.step, error.good_until, error.curable)
    usable = [p for p in checkpoint.all_checkpoints(run_dir) if checkpoint.step_of(p) <= error.good_until]
    good = next((p for p in reversed(usable) if checkpoint.is_undamaged(p)), None)
    back_to = checkpoint.step_of(good) if good is not None else 0
    rewind = Rewind(step=error.step, back_to=back_to, peak_rate=peak, why=str(error))
    checkpoint.replace_after(run_dir, back_to)  # first: a kill in between then goes back without a note, at worst
    append_line(run_dir / RECORD, json.dumps(asdict(rewind)))
    sync(run_dir / RECORD)
    return rewind


def rewind_text(rewind: Rewind, run: ResolvedRun) -> str:
    """A sentence for people; run: as it is trained from here on."""
    start = f"the checkpoint of step {rewind.back_to}" if rewind.back_to else "the initial weights"
    rate = f"{run.schedule.peak_rate:g}"
    if run.schedule.peak_rate == _advised(run):
        rate += f" (the one advised for this batch: nothing good was reached with {rewind.peak_rate:g})"
    return f"step {rewind.step}: going back to {start}, with a peak learning rate of {rate} and other noise"
