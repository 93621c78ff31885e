"""`train --init-from`: the profile that a training from trained weights has before its other flags."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.paths import absolute_path
from nvae_lowmem.config.sections import LATEST, Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.library.weights import find_weights
from nvae_lowmem.training.initial_weights import differing_fields


def starting_profile(source: str, runs_dir: str, profile: str, run_dir: str) -> Profile:
    """The profile to train with, its init_from filled in.

    source, runs_dir, profile, run_dir: as the flags of these names (source: --init-from) say. A run that is there in
    run_dir goes on with its own configuration; else the weights' own one is taken where no profile is named.
    Raises ConfigError where the weights cannot be found, and where profile and weights are of different models.
    """
    own = Path(run_dir) / "config.toml"
    if run_dir and own.is_file():
        return _begun(profiles.load(profile or own), source, runs_dir)
    found = find_weights(source, runs_dir)
    base = profiles.load(profile) if profile else found.profile
    different = differing_fields(base.model, found.profile.model)
    if different:
        raise ConfigError(
            f"--profile {profile} and --init-from {source} are not of the same model, from the weights' to the "
            f"profile's: {', '.join(different)}. Leave --profile out, or change the weights' model on purpose: "
            "--set model.KEY=VALUE (what then fits is taken)"
        )
    return _from(base, str(found.path))


def _begun(base: Profile, source: str, runs_dir: str) -> Profile:
    """The run's profile; it need not find its weights again, which may be gone."""
    try:
        path = str(find_weights(source, runs_dir).path)
    except ConfigError:
        path = absolute_path(source, unless=LATEST)
    return _from(base, path)


def _from(base: Profile, path: str) -> Profile:
    """The profile, beginning from these weights; a learning rate for random weights becomes what the new one is of."""
    training = replace(base.training, init_from=path)
    if training.learning_rate and not base.training.init_from:
        training = replace(
            training,
            learning_rate=0.0,
            published_learning_rate=training.learning_rate,
            published_total_batch=training.total_batch,
        )
    return replace(base, training=training)
