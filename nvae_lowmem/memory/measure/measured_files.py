"""The folder of a measurement: a report whose rows hold all that was measured, and the recordings beside it.

So runs can be compared again, on a machine without a card, when the prediction has changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.card import Card
from nvae_lowmem.memory.allocator.recording import EXPECTED, Recording, load_recordings
from nvae_lowmem.memory.measure.job import Ended, Job, Outcome
from nvae_lowmem.memory.measure.measurement import measurement_from_json

MEASUREMENTS = "measurements.json"


def load_measured(folder: Path) -> tuple[list[Outcome], Card | None, dict[str, Any]]:
    """(runs, the card, the report) of a folder that the command wrote; runs without a recording come without one.

    Raises ConfigError where a file is missing, damaged or of another kind.
    """
    path = folder / MEASUREMENTS
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        card = report["card"] and _card_of(report["card"])
        recordings = {r.name: r for r in load_recordings(folder)} if card else {}
        for recording in recordings.values():
            if not recording.phases:
                raise ConfigError(f"{folder / EXPECTED}: recording {recording.name!r} has no phases: measure it anew")
        runs = [_outcome(row, recordings) for row in report["runs"]]
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{path} cannot be read as what measure-memory --out writes ({reason}): is it missing, cut short "
            "or of another version?"
        ) from error
    return runs, card, report


def card_as_table(card: Card | None) -> dict[str, Any] | None:
    """The card as a JSON object, as `load_measured` reads it."""
    return asdict(card) if card is not None else None


def _card_of(table: Mapping[str, Any]) -> Card:
    sequences = {key: tuple(table[key]) for key in ("compute_capability", "aliases")}
    return Card(**{**table, **sequences})


def _outcome(row: Mapping[str, Any], recordings: Mapping[str, Recording]) -> Outcome:
    resolved = profiles.from_dict(row["profile"], f"run {row['name']}") if "profile" in row else None
    ended = row["ended"]
    return Outcome(
        job=Job(name=row["name"], profile=resolved or Profile(), **row["job"]),
        status=row["status"],
        detail=row["detail"],
        ended=Ended(ended["code"], ended["stage"], tuple(ended["stderr"])),
        measured=measurement_from_json(json.dumps(row["measured"])) if "measured" in row else None,
        recording=recordings.get(row["name"]),
        resolved=resolved,
    )
