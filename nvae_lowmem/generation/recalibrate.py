"""BatchNorm statistics for sampling, re-estimated from prior samples at the sampling temperature.

In training the decoder sees latents of the posterior; samples have theirs from the prior, at a temperature. The running
statistics of training do not fit them, and without this samples are poor (arXiv 2007.03898).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.files import write_atomically
from nvae_lowmem.generation.classes import labels_in_turn
from nvae_lowmem.generation.sample import (
    Temperature,
    group_temperatures,
    temperature_text,
)
from nvae_lowmem.model.latents import FromPrior, NoiseStep, SeededNoise
from nvae_lowmem.model.layers import NormLayer
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.progress import OnProgress

GPU_PASSES = 300
CPU_IMAGES, CPU_MIN_PASSES = 640, 20


def default_passes(device: torch.device, micro_batch: int) -> int:
    """Passes that are enough: a few hundred on a GPU, on a CPU as many as make 640 images, but at least 20."""
    if device.type == "cuda":
        return GPU_PASSES
    return max(CPU_MIN_PASSES, -(-CPU_IMAGES // images_per_estimate(micro_batch)))


def images_per_estimate(micro_batch: int) -> int:
    """Images of a pass: at least two, because a single value, at 1 x 1 pixels, has no variance."""
    return max(2, micro_batch)


@torch.no_grad()
def recalibrate(
    model: NVAE,
    temperature: Temperature,
    passes: int,
    micro_batch: int,
    seed: int,
    progress: OnProgress | None = None,
) -> None:
    """Set the decoder's running statistics to their mean over `passes` batches of prior samples.

    Of a model with labels all classes take turns, whichever are asked for later. Nothing else of the model changes; the
    encoder's statistics come from images and stay. Raises ConfigError for fewer
    than one pass and for temperatures that do not fit the model.
    """
    if passes < 1:
        raise ConfigError(f"--passes {passes}: must be at least 1, a few hundred for good samples")
    temperatures = group_temperatures(temperature, model.config)
    noise, images = SeededNoise(seed, step=NoiseStep.RECALIBRATION), images_per_estimate(micro_batch)
    layers, settings = list(_decoder_norms(model).values()), model.settings
    before, momentum = [(layer.training, layer.frozen) for layer in layers], settings.momentum
    try:
        for layer in layers:
            layer.training, layer.frozen = True, False  # the others' statistics stand still
        for i in range(passes):
            # statistics += (batch's - statistics) / (i + 1): the mean over passes; i = 0 forgets the old ones
            settings.momentum = 1 / (i + 1)
            labels = labels_in_turn(model, i * images, images)
            model.top_down(FromPrior(noise.at(i * images), temperatures), batch=images, labels=labels)
            if progress is not None:
                progress(i + 1, passes)
    finally:
        settings.momentum = momentum
        for layer, (training, frozen) in zip(layers, before, strict=True):
            layer.training, layer.frozen = training, frozen


@contextlib.contextmanager
def recalibrated(
    model: NVAE,
    temperature: Temperature,
    passes: int,
    micro_batch: int,
    seed: int,
    progress: OnProgress | None = None,
) -> Iterator[None]:
    """Inside, the model has statistics for sampling; afterwards its own again."""
    before = {name: value.clone() for name, value in recalibrated_statistics(model).items()}
    try:
        recalibrate(model, temperature, passes, micro_batch, seed, progress)
        yield
    finally:
        set_statistics(model, before)


# --- kept beside the checkpoint ---------------------------------------------------------------------------------------


def recalibrate_once(
    model: NVAE,
    checkpoint: Path,
    temperature: Temperature,
    passes: int,
    micro_batch: int,
    seed: int,
    progress: OnProgress | None = None,
) -> Path | None:
    """`recalibrate`, or the statistics that it left beside this checkpoint with the same settings.

    Returns the file that they were read from, or None if they had to be estimated.
    """
    path = statistics_path(checkpoint, temperature)
    device = next(model.parameters()).device.type
    numbers = (temperature_text(temperature), passes, images_per_estimate(micro_batch), seed, device)
    settings = dict(zip(("temperature", "passes", "images_per_pass", "seed", "device"), map(str, numbers), strict=True))
    with contextlib.suppress(ConfigError):  # missing, damaged or of another model: estimated anew
        if read_settings(path) == settings:
            load_statistics(model, path)
            return path
    recalibrate(model, temperature, passes, micro_batch, seed, progress)
    with contextlib.suppress(OSError):  # a folder that cannot be written to, or that training has just removed
        save_statistics(model, path, settings)
    return None


def statistics_path(checkpoint: Path, temperature: Temperature) -> Path:
    """`bn-t0.70.safetensors` in the checkpoint's folder."""
    return checkpoint / f"bn-t{temperature_text(temperature, decimals=2, separator='-')}.safetensors"


def save_statistics(model: NVAE, path: Path, settings: Mapping[str, str]) -> None:
    """Write the decoder's statistics, and the settings that they were estimated with."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in recalibrated_statistics(model).items()}
    write_atomically(path, safetensors.torch.save(tensors, dict(settings)))


def read_settings(path: Path) -> dict[str, str]:
    """The settings that a file's statistics were estimated with. Raises ConfigError if it cannot be read."""
    return _read(path)[1]


def load_statistics(model: NVAE, path: Path) -> None:
    """Give the model the statistics of a file. Raises ConfigError if it is damaged or belongs to another model."""
    tensors, _ = _read(path)
    expected = {name: value.shape for name, value in recalibrated_statistics(model).items()}
    if {name: value.shape for name, value in tensors.items()} != expected:
        raise ConfigError(f"{path}: these BatchNorm statistics belong to another model; delete the file")
    set_statistics(model, tensors)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; delete the file") from None


# --- where the statistics are -----------------------------------------------------------------------------------------


def _decoder_norms(model: NVAE) -> dict[str, NormLayer]:
    """Every BatchNorm that a pass from the prior runs, by its module's name."""
    order = model.block_names()
    decoder = set(order[order.index("top") + 1 :])
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, NormLayer) and layer.gamma is not None and name.split(".")[1] in decoder
    }


def recalibrated_statistics(model: NVAE) -> dict[str, Tensor]:
    """The decoder's running statistics themselves, named as in the state_dict."""
    return {
        f"{name}.{kind}": getattr(layer, kind)
        for name, layer in _decoder_norms(model).items()
        for kind in ("running_mean", "running_variance")
    }


@torch.no_grad()
def set_statistics(model: NVAE, values: Mapping[str, Tensor]) -> None:
    """Give the decoder these running statistics, named as `recalibrated_statistics` names them."""
    for name, own in recalibrated_statistics(model).items():
        own.copy_(values[name])


RECALIBRATION_SEED = 0  # not --seed: the statistics belong to the checkpoint and are estimated once
