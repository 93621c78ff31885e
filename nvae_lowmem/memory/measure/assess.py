"""What a measured run says of the prediction: rows of the report, and back from a report to the runs.

A row holds all that was measured, so that runs can be compared again, on a machine without a card, when the prediction
has changed: see `load_measured`.
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
from nvae_lowmem.hardware.budget import Budget
from nvae_lowmem.hardware.card import Card
from nvae_lowmem.memory.allocator.recording import OUT_OF_MEMORY, load_recordings
from nvae_lowmem.memory.measure.compare import compared, matched, replayed
from nvae_lowmem.memory.measure.job import Ended, Job, Outcome
from nvae_lowmem.memory.predict.predict import Prediction, predict
from nvae_lowmem.memory.trace.requests import from_trace
from nvae_lowmem.memory.trace.training import trace_training

MEASUREMENTS = "measurements.json"


def described(outcome: Outcome) -> dict[str, Any]:
    """A row of the report without any comparison: the configuration, and what was measured."""
    job, ended = outcome.job, outcome.ended
    row: dict[str, Any] = {
        "name": job.name,
        "status": outcome.status,
        "detail": outcome.detail,
        "job": {"device": job.device, "steps": job.steps},
        "ended": ended._asdict(),
    }
    if outcome.decided is None:
        return row
    profile, result = outcome.decided, outcome.result
    plan, seconds = profile.plan, result["seconds"]
    mean = sum(seconds[1:]) / len(seconds[1:]) if len(seconds) > 1 else None  # the first step loads kernels
    return row | {
        "profile": profiles.to_dict(profile),
        "measured": dict(result),
        "micro_batch": plan.micro_batch,
        "accumulation": result["accumulation"],
        "precision": plan.precision,
        "keep": plan.keep,
        "offload_optimizer": plan.offload_optimizer,
        "engine": plan.engine,
        "cap_bytes": plan.cap_bytes,
        "seconds_per_step": mean,
        "images_per_second": profile.training.total_batch / mean if mean else None,
    }


def assess(outcome: Outcome, card: Card | None = None) -> dict[str, Any]:
    """A row with the comparisons A ("replay"), B ("stream") and C ("peaks"), and whether all "agrees".

    card: the one it ran on; None: the CPU. Raises ConfigError where prediction or replay is impossible.
    """
    row = described(outcome)
    recording, profile, result = outcome.recording, outcome.decided, outcome.result
    if recording is None or profile is None:
        return row
    micro, accumulation = profile.plan.micro_batch, result["accumulation"]
    prediction = predict(profile, micro, accumulation, card, _budget(profile, result), result["settings"])
    row["prediction"] = {"oom": prediction.oom, "overlay": prediction.to_json()["overlay"]}
    if recording.checkpoints:
        row["replay"] = replayed(recording)
        workspace, kept = result["statistics"]["cublas_workspace_bytes"], recording.kept()
        phases = ("libraries", "forward", "backward")  # weights and states of that size are made in other phases
        row["cublas_kept_bytes"] = workspace * sum(kept[phase, workspace] for phase in phases)
    if outcome.status == "ok":
        fake = trace_training(profile, micro, accumulation, outcome.job.steps)
        row["stream"] = matched(recording, from_trace(outcome.job.name, fake), _known_sizes(result))
        row["peaks"] = compared(*_peaks(prediction, result), prediction.margin_bytes)
    row["agrees"] = _agrees(row, prediction)
    return row


def _agrees(row: Mapping[str, Any], prediction: Prediction) -> bool:
    """Whether the run did what was predicted: within the margin, or out of memory where that was foreseen."""
    if row["status"] == OUT_OF_MEMORY:
        return prediction.oom is not None
    replay = row.get("replay", {"equal": True})
    return bool(row["peaks"]["within_margin"] and (replay["equal"] or replay["streams"] > 1))


def _budget(profile: Profile, result: Mapping[str, Any]) -> Budget | None:
    """The cap that the run was under, on that card; None without one."""
    statistics, cap = result.get("statistics"), profile.plan.cap_bytes
    if statistics is None or not 0 < cap < statistics["total_bytes"]:
        return None
    total = statistics["total_bytes"]
    outside = min(statistics["outside_allocator_bytes"], total - cap)
    return Budget(cap_bytes=cap, total_bytes=total, context_bytes=outside, reason="the cap of the measured run")


def _known_sizes(result: Mapping[str, Any]) -> dict[int, str]:
    """What libraries ask the allocator for, as far as it was measured."""
    known: dict[int, str] = {}
    for row in result.get("workspaces", ()):
        known |= {nbytes: "convolution workspace" for key, nbytes in row.items() if key.endswith("_bytes") and nbytes}
    cublas = result.get("statistics", {}).get("cublas_workspace_bytes")
    return known | ({cublas: "cuBLAS workspace"} if cublas else {})


def _peaks(prediction: Prediction, result: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """(predicted, measured): on a card of the whole run, set-up included; host memory as the process grew."""
    predicted = {
        "allocated": prediction.allocated_peak_bytes,
        "reserved": prediction.reserved_peak_bytes,
        "host": prediction.host_bytes,
    }
    if "peaks" in result:
        return predicted, result["peaks"]
    for kind in ("allocated", "reserved"):
        predicted[kind] = max(predicted[kind], prediction.init_peak_bytes)
    peaks = {kind: result["statistics"][f"peak_{kind}_bytes"] for kind in ("allocated", "reserved")}
    return predicted, {**peaks, "host": max(result["host_bytes"])}


def load_measured(folder: Path) -> tuple[list[Outcome], Card | None, dict[str, Any]]:
    """(runs, the card, the report) of a folder that the command wrote; runs without a recording come without one.

    Raises ConfigError where a file is missing, damaged or of another kind.
    """
    path = folder / MEASUREMENTS
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        card = report["card"] and _card_of(report["card"])
        recordings = {r.name: r for r in load_recordings(folder)} if card else {}
        runs = [_outcome(row, recordings) for row in report["runs"]]
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{path} cannot be read as what tools/measure_memory.py --out writes ({reason}): is it missing, cut short "
            "or of another version?"
        ) from error
    return runs, card, report


def _card_of(table: Mapping[str, Any]) -> Card:
    sequences = {key: tuple(table[key]) for key in ("compute_capability", "aliases")}
    return Card(**{**table, **sequences})


def card_as_table(card: Card | None) -> dict[str, Any] | None:
    """What `load_measured` makes the card from."""
    return asdict(card) if card is not None else None


def _outcome(row: Mapping[str, Any], recordings: Mapping[str, Any]) -> Outcome:
    decided = profiles.from_dict(row["profile"], f"run {row['name']}") if "profile" in row else None
    ended = row["ended"]
    return Outcome(
        job=Job(name=row["name"], profile=decided or Profile(), **row["job"]),
        status=row["status"],
        detail=row["detail"],
        ended=Ended(ended["code"], ended["stage"], tuple(ended["stderr"])),
        result=row.get("measured", {}),
        recording=recordings.get(row["name"]),
        decided=decided,
    )
