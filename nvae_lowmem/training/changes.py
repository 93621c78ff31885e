"""What of its configuration a run may change half-way, what each change does from there on, and the record of it.

The weights belong to the model, so nothing of [model] can change. Everything else can: how memory is used and what is
reported at any time, and without a word; the rest is said, key by key, and written down in the run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.files import write_atomically
from nvae_lowmem.training.resolve import ResolvedRun

HISTORY = "config-history"
CONFIG = "config.toml"
_UNSAID = {
    "log_every",
    "sample_every",
    "evaluate_every",
    "evaluate_images",
    "save_every",
    "save_minutes",
    "keep_last",
    "ema_on_host",
    "rewinds",
    "init_statistics",
}
"""Keys of [training] that do not influence the trained weights."""
_EFFECTS = {
    "total_batch": "an optimiser step has another number of images, and an epoch another number of steps",
    "epochs": "the schedules of learning rate and beta stretch to the new end",
    "steps": "the schedules of learning rate and beta stretch to the new end",
    "hours": "the schedules of learning rate and beta stretch to the new end",
    "weight_decay": "acts from the next step on; the optimiser's states stay",
    "adamax_eps": "acts from the next step on; the optimiser's states stay",
    "clip_norm": "acts from the next step on",
    "label_dropout": "acts from the next step on",
    "skip_gradient_norm": "acts from the next step on",
    "skip_gradient_quantile": "acts from the next step on",
    "kl_balance": "another objective from the next step on",
    "regulariser": "another objective from the next step on",
    "regulariser_start": "another objective from the next step on",
    "ema_decay": "the average goes on from where it is; without one so far, from the present weights",
    "freeze": "other blocks learn from the next step on; the optimiser's states of newly frozen ones are gone",
    "seed": "another order of the images and other noise; the weights stay",
}
_CLASSES = ("data", "class_names")
"""The weights know the classes by their numbers, so that the names belong to them."""
_SCHEDULES = ("learning_rate", "cosine", "warmup_epochs", "published_", "kl_")
_DATA = (
    "other training data from the next step on; figures on held-out images can no longer be compared with earlier ones"
)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One key whose value is another than when the run was last trained."""

    key: str
    before: Any
    now: Any
    effect: str

    def __str__(self) -> str:
        return f"{self.key} {self.before!r} -> {self.now!r}: {self.effect}"


def changes(before: Profile, now: Profile) -> list[Change]:
    """Every key that differs and matters to the weights. Raises ConfigError for those that cannot change."""
    old, new = (profiles.to_dict(p.with_absolute_paths()) for p in (before, now))
    differing = [
        (section, key)
        for section in ("model", "data", "training", "plan")
        for key in sorted(old[section])
        if old[section][key] != new[section][key] and not (section == "training" and key in _UNSAID)
    ]
    fixed = [
        f"{s}.{k} ({old[s][k]!r} -> {new[s][k]!r})"
        for s, k in differing
        if s == "model" or ((s, k) == _CLASSES and old[s][k])
    ]
    if fixed:
        raise ConfigError(
            f"these differ and cannot change, because the run's weights belong to its model: {', '.join(fixed)}. "
            "Set them back, or train a new run in another folder"
        )
    if ("training", "init_from") in differing:
        begun, asked = (table["training"]["init_from"] or "random weights" for table in (old, new))
        raise ConfigError(
            f"the run began from {begun}, and goes on from its own checkpoints: it cannot begin from {asked}. Leave "
            "--profile and --init-from out, or train a new run in another folder"
        )
    return [
        Change(key=f"{section}.{key}", before=old[section][key], now=new[section][key], effect=_effect(section, key))
        for section, key in differing
        if (section != "plan" or key == "precision") and (section, key) != _CLASSES
    ]


def differ(before: Profile, now: Profile) -> bool:
    """Whether the profiles differ in anything but their provenance, keys that `changes` leaves out included."""
    old, new = (profiles.to_dict(replace(p.with_absolute_paths(), name="", provenance={})) for p in (before, now))
    return old != new


def next_step(run: ResolvedRun, step: int) -> str:
    """What the schedules say of optimiser step `step` (counted from 0), for people."""
    total = run.schedule.total_steps
    return f"step {step + 1} of {total}: learning rate {run.learning_rate(step):.3g}, beta {run.beta(step):.3g}"


def keep_history(run_dir: Path, step: int) -> None:
    """Put the configuration under which the run was trained up to `step` aside, before a new one is written."""
    folder = run_dir / HISTORY
    folder.mkdir(exist_ok=True)
    target = folder / f"until-step-{step:08d}.toml"
    number = 2
    while target.exists():
        target = folder / f"until-step-{step:08d}-{number}.toml"
        number += 1
    write_atomically(target, (run_dir / CONFIG).read_bytes())


def _effect(section: str, key: str) -> str:
    if key in ("source", "test_source"):
        return "images are read from there; a warning says so if they are others"
    if section == "data":
        return _DATA
    if section == "plan":
        return "activations are computed in another precision from the next step on"
    if key.startswith(_SCHEDULES):
        return "the schedule is another one from the next step on"
    return _EFFECTS.get(key, "acts from the next step on")
