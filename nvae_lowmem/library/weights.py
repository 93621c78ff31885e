"""Trained weights by whatever name a person gives them, for a training that starts from them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.paths import absolute_path
from nvae_lowmem.config.sections import LATEST, Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.interop import nvlabs
from nvae_lowmem.library.export import Unpacked, is_export, is_packed_export, read_export
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training import checkpoint, runs
from nvae_lowmem.training.checkpoint_files import MODEL, STATE, TRAINING, read_state, read_tensors
from nvae_lowmem.training.initial_weights import InitialWeights, take_over

_WEIGHT, _BUFFER = "weight.", "buffer."


@dataclass(frozen=True, kw_only=True)
class TrainedWeights:
    """Weights that were found: what was trained with what, and how to read them."""

    path: Path
    """Absolute; what `training.init_from` is to say."""
    profile: Profile
    read: Callable[[], InitialWeights]
    """From the disk, every time anew: nobody has to hold them. Raises ConfigError when they are damaged."""


def find_weights(source: str, runs_dir: str = "runs") -> TrainedWeights:
    """The weights of a run, a checkpoint of it, an export or a published checkpoint.

    source: a run by folder, number, name or "latest"; a checkpoint's folder, or in it training.safetensors for the
    weights without averaging; an export, as folder or ZIP; checkpoint.pt of the published code.
    Raises ConfigError for anything else.
    """
    path = Path(absolute_path(source, unless=LATEST))
    if path.is_file():
        if (path.parent / STATE).is_file() and path.name in (MODEL, TRAINING):
            return _checkpoint(path.parent, path.name, path)
        if zipfile.is_zipfile(path) and is_packed_export(path):
            with Unpacked(path) as folder:
                profile, _ = read_export(folder)
            return TrainedWeights(path=path, profile=profile, read=lambda: _of_zip(path))
        return TrainedWeights(path=path, profile=nvlabs.load_published(path)[0], read=lambda: _of_published(path))
    if path.is_dir() and is_export(path):
        profile, _ = read_export(path)
        return TrainedWeights(path=path, profile=profile, read=lambda: _of_export(path))
    if (path / STATE).is_file():
        return _checkpoint(path, MODEL, path)
    try:
        folder = runs.find_run(path if path.is_dir() else source, runs_dir).absolute()
    except ConfigError:
        raise ConfigError(
            f"--init-from {source}: is no run (by folder, number or name in {runs_dir}), no checkpoint of one, no "
            "export (folder or ZIP) and no published checkpoint.pt"
        ) from None
    return TrainedWeights(path=folder, profile=profiles.load(folder / "config.toml"), read=lambda: _of_run(folder))


def initial_weights(profile: Profile, runs_dir: str, begun: bool) -> tuple[Callable[[], InitialWeights] | None, str]:
    """(what reads the weights that a profile's training begins from, None: random ones; what is taken, in words).

    begun: the run goes on from its own checkpoints, and only a rewind to its beginning would need the weights: they are
    not looked for, and may be gone. Raises ConfigError where there are none, and where too little of them fits.
    """
    source = profile.training.init_from
    if not source:
        return None, ""

    def read() -> InitialWeights:
        return find_weights(source, runs_dir).read()

    if begun:
        return read, ""
    with torch.device("meta"):
        model = NVAE(profile.model)
    return read, take_over(model, read())


def _checkpoint(folder: Path, file: str, path: Path) -> TrainedWeights:
    config = folder.parent.parent / "config.toml"
    if not config.is_file():
        raise ConfigError(f"--init-from {path}: {config}, which says what model it is of, is missing: name a run's own")
    return TrainedWeights(path=path, profile=profiles.load(config), read=lambda: _of_checkpoint(folder, file))


def _of_checkpoint(folder: Path, file: str) -> InitialWeights:
    state = read_state(folder)
    if file not in state.files:
        raise ConfigError(f"checkpoint {folder} holds weights only, and no {file}: name the folder itself")
    tensors = read_tensors(folder, state, file)
    averaging = "averaged weights" if file == MODEL else "weights without averaging"
    if file == TRAINING:
        tensors = _by_model_names(tensors)
    return InitialWeights(origin=f"{folder}, {averaging}", tensors=tensors)


def _by_model_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An engine's state without its optimiser, by the names of a state_dict."""
    prefixes = (_WEIGHT, _BUFFER)
    return {name.split(".", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}


def _of_run(folder: Path) -> InitialWeights:
    _, model, path = checkpoint.load_run(folder)
    return InitialWeights(origin=f"{path}, averaged weights", tensors=model.state_dict())


def _of_export(folder: Path) -> InitialWeights:
    return InitialWeights(origin=f"the export {folder}", tensors=read_export(folder)[1].state_dict())


def _of_zip(path: Path) -> InitialWeights:
    with Unpacked(path) as folder:
        return InitialWeights(origin=f"the export {path}", tensors=read_export(folder)[1].state_dict())


def _of_published(path: Path) -> InitialWeights:
    model = nvlabs.load_published(path)[1]
    return InitialWeights(origin=f"the published checkpoint {path}", tensors=model.state_dict())
