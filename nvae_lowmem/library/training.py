"""Train, plan and predict from a program: the same as the commands train, fit-memory and predict-memory."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset as TorchDataset

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.choices import DeviceChoice
from nvae_lowmem.config.recipes import RECIPES, recipe
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.data.dataset import ArrayDataset
from nvae_lowmem.data.fingerprint import Fingerprint
from nvae_lowmem.data.labels import numbered_labels, renumbered
from nvae_lowmem.data.sources import Datasets, open_source
from nvae_lowmem.data.split import by_identity
from nvae_lowmem.data.stores import ArrayStore
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.generation.grids import training_pictures
from nvae_lowmem.hardware import cuda_memory
from nvae_lowmem.hardware.budget import chosen_card, this_os
from nvae_lowmem.library.images import as_pixels
from nvae_lowmem.library.model import Model, load
from nvae_lowmem.library.weights import initial_weights
from nvae_lowmem.memory.plan.candidates import Wishes
from nvae_lowmem.memory.plan.explain import planned
from nvae_lowmem.memory.plan.fit import Fit, fit
from nvae_lowmem.memory.predict.predict import Prediction, predictor_for
from nvae_lowmem.memory.predict.predict import predict as predict_profile
from nvae_lowmem.training import checkpoint, runs
from nvae_lowmem.training.engines.distributed import choose_engine, launched
from nvae_lowmem.training.open_run import choose_device
from nvae_lowmem.training.resolve import resolve_run
from nvae_lowmem.training.session import Session, check_changes

AnyProfile = Profile | str | os.PathLike[str]
"""A Profile, a profile's TOML file, the name of a shipped one, or of a recipe."""


def train(
    profile: AnyProfile,
    dataset: TorchDataset[Any] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    runs_dir: str | os.PathLike[str] = "runs",
    device: DeviceChoice = "auto",
    init_from: str | os.PathLike[str] | None = None,
) -> Model:
    """Train a model in this process, and return it as `load` would.

    dataset: images, or (image, anything) tuples, as tensors, arrays or PIL images, prepared as `as_batch` does; a share
    of data.test_fraction of them is held out by content; with model.classes they are (image, label). None: the
    profile's own data.source. All of it is read once into host memory. settings: other values by key,
    {"training.steps": 1000}. run_dir: this very folder, whose run goes on where it stopped; None: a new numbered one in
    runs_dir. init_from: trained weights to start from, as the command's --init-from takes them; the profile says the
    model, and what fits of the weights is taken. Ctrl-C
    saves, and ends as it does in the command.
    Raises ConfigError, Diverged and OutOfMemory as the command train says them.
    """
    if init_from is not None:
        settings = {**(settings or {}), "training.init_from": str(init_from)}
    resolved = _profile(profile, settings).with_absolute_paths()
    where = choose_device(device)
    cuda_memory.prepare_environment(resolved.plan)
    data = open_source(resolved.data, resolved.model) if dataset is None else datasets_of(dataset, resolved)
    engine, _ = choose_engine(resolved.plan, launched(), where)
    if engine == "deepspeed":
        raise ConfigError("plan.engine = 'deepspeed' is started by the command train; set plan.engine = 'torch' here")
    resolved = data.named_in(resolved)
    run = resolve_run(resolved, len(data.train), where, 1)
    cuda_memory.apply_memory_cap(resolved.plan, where)
    begun = run_dir is not None and bool(checkpoint.all_checkpoints(Path(run_dir)))
    initial, _ = initial_weights(run.profile, str(runs_dir), begun)
    folder = Path(run_dir) if run_dir is not None else runs.new_run(str(runs_dir), resolved.name)
    folder.mkdir(parents=True, exist_ok=True)
    check_changes(folder, run)
    Session(
        run=run,
        data=data,
        engine=engine,
        device=where,
        rank=0,
        run_dir=folder,
        pictures=training_pictures(run.profile),
        most_rewinds=run.profile.training.rewinds,
        initial=initial,
    ).train()
    return load(folder, device=device)


def datasets_of(dataset: TorchDataset[Any], profile: Profile) -> Datasets:
    """The two parts of a torch Dataset that has a length. Raises ConfigError for fewer than two images and bad ones."""
    count = len(dataset)  # type: ignore[arg-type]
    if count < 2:
        raise ConfigError(f"dataset: {count} images; at least two are needed, since one is held out")
    pixels = np.concatenate([as_pixels(_image_of(dataset[i]), profile, f"dataset[{i}]").numpy() for i in range(count)])
    store = ArrayStore(pixels, f"a dataset of {count:,} images")
    ranked, held_out = by_identity(store, profile.data.test_fraction)
    held_out = min(max(1, held_out), count - 1)
    test, training = np.sort(ranked[:held_out]), np.sort(ranked[held_out:])
    fingerprint = Fingerprint.of((store, training, len(training)), (store, test, len(test)))
    text = f"{store.description}: {len(training):,} for training, {len(test):,} held out"
    if not profile.model.classes:
        return Datasets(ArrayDataset(pixels[training]), ArrayDataset(pixels[test]), text, fingerprint)
    labels = numbered_labels([_label_of(dataset[i], i) for i in range(count)], "dataset", profile.data.class_names)
    names = profile.data.class_names or tuple(map(str, range(profile.model.classes)))
    numbers = renumbered(labels, names, "dataset")
    train, held = (ArrayDataset(pixels[part], numbers[part]) for part in (training, test))
    return Datasets(train, held, text, fingerprint, names)


def _image_of(item: Any) -> Any:
    """The image of a dataset's item, which may be (image, label, ...)."""
    return item[0] if isinstance(item, tuple) else item


def _label_of(item: Any, index: int) -> int:
    """The label of a dataset's item, (image, label, ...)."""
    label = item[1] if isinstance(item, tuple) and len(item) > 1 else None
    try:
        return operator.index(label)  # type: ignore[arg-type]  # what is no whole number raises
    except TypeError:
        raise ConfigError(
            f"dataset[{index}]: model.classes is set, so items must be (image, whole number), not {label!r:.40}"
        ) from None


def plan(
    profile: AnyProfile,
    *,
    card: str | None = None,
    gpu_mem: str | None = None,
    settings: Mapping[str, Any] | None = None,
    wishes: Wishes | None = None,
) -> tuple[Profile, Fit]:
    """The profile under the best memory plan for a card, and how it was found; needs no GPU.

    card, gpu_mem: as --card and --gpu-mem take them; one of both must be given. wishes: what to gain with the memory.
    Where nothing fits, `Fit.fits` is false and the profile is as given. Raises ConfigError for an unknown card.
    """
    asked, on = _profile(profile, settings), this_os()
    chosen = chosen_card(card, gpu_mem, on)
    if chosen is None:
        raise ConfigError("plan() needs a card to plan for: card='gtx-970', or gpu_mem='4G'")
    found = fit(asked, *chosen, wishes or Wishes(), predictor_for(*chosen))
    return (planned(found, on, "nvae_lowmem.plan()") if found.fits else asked), found


def predict(
    profile: AnyProfile,
    *,
    card: str | None = None,
    gpu_mem: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Prediction:
    """What training of a profile under its plan takes of a card's memory and of the host's; needs no GPU.

    With a card or a size the steps run under its cap. Raises ConfigError for an unknown card.
    """
    asked = _profile(profile, settings)
    card_and_budget = chosen_card(card, gpu_mem, this_os()) or (None, None)
    micro_batch = asked.micro_batch()
    return predict_profile(asked, micro_batch, asked.training.total_batch // micro_batch, *card_and_budget)


def _profile(profile: AnyProfile, settings: Mapping[str, Any] | None) -> Profile:
    """The named profile or recipe with other values. Raises ConfigError with every problem."""
    if isinstance(profile, Profile):
        found = replace(profile)
    elif str(profile) in RECIPES:
        found = recipe(str(profile))
    else:
        found = profiles.load(profile)
    return profiles.override(found, [], dict(settings or {}))
