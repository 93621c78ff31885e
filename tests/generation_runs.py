"""What the tests of sampling, pictures, evaluation and the demo work on: small models, run folders, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import write_folder
from PIL import Image
from torch import Tensor

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import DataConfig, MemoryPlan, Profile
from nvae_lowmem.evaluation.distances import available
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training.checkpoint import export_weights

needs_torchmetrics = pytest.mark.skipif(not available(), reason="the extra [metrics] is not installed")

# --- models -----------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "channels_encoder": 4, "channels_decoder": 4, "scales": 2, "groups_per_scale": (2, 1), "latents": 2,
    "cells_encoder": 1, "cells_decoder": 1, "preprocess_blocks": 1, "preprocess_cells": 1, "postprocess_blocks": 1,
    "postprocess_cells": 1,
}  # fmt: skip
GREY = ModelConfig(image_channels=1, image_size=12, padding=2, bits=1, **SMALL)
RGB = ModelConfig(image_channels=3, image_size=16, bits=5, mixtures=2, flows=1, **SMALL)
DIGITS = ModelConfig(image_channels=1, image_size=28, padding=2, bits=1, **SMALL)
PLAIN = ModelConfig(image_channels=1, image_size=8, bits=1, **SMALL | {"scales": 1, "groups_per_scale": (1,)})
DEEP = ModelConfig(image_channels=1, image_size=16, bits=1, **SMALL | {"scales": 3, "groups_per_scale": (4, 2, 1)})
TINY = ModelConfig(
    image_channels=1, image_size=6, padding=1, bits=1, channels_encoder=8, channels_decoder=8, scales=2, groups=2,
    adaptive=False, latents=2, cells_encoder=1, cells_decoder=1, preprocess_blocks=1, preprocess_cells=1,
    postprocess_blocks=1, postprocess_cells=1, flows=1,
)  # fmt: skip


def untrained(config: ModelConfig) -> NVAE:
    """A model as it starts, in evaluation mode, as are all of these."""
    assert not config.problems()
    torch.manual_seed(0)
    return NVAE(config).eval()


def seasoned(config: ModelConfig) -> NVAE:
    """A model whose BatchNorms have all been somewhere."""
    model = untrained(config)
    with torch.no_grad():
        for name, value in model.named_buffers():
            if name.endswith("running_mean"):
                value.normal_(std=0.1)
            elif name.endswith("running_variance"):
                value.uniform_(0.5, 2)
        for name, parameter in model.named_parameters():
            if name.startswith("blocks.head") and "log_norm" in name:
                parameter.add_(2)  # pictures with contrast: near 1/2 everywhere a difference would hide
    return model


def responsive(config: ModelConfig) -> NVAE:
    """A random model whose latents matter: the posteriors of two images are far apart."""
    model = untrained(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "log_norm" in name and (".posterior." in name or ".combiner." in name or ".head." in name):
                value += 0.5
    return model


def perturbed(config: ModelConfig) -> NVAE:
    """A model whose parameters are all away from the tidy values of the start."""
    model = untrained(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def snapshot(model: NVAE) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: NVAE, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


# --- images -----------------------------------------------------------------------------------------------------------


def images_for(config: ModelConfig, count: int) -> Tensor:
    """(B, C, padded, padded) of zeros and ones."""
    side = config.network_size
    return torch.rand(count, config.image_channels, side, side, generator=torch.Generator().manual_seed(1)).round()


def blobs(count: int, seed: int, size: int = 16, channels: int = 1) -> Tensor:
    """Images with something to see: a bright disc at a random place, (B, channels, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centre = torch.rand(count, 2, 1, 1, generator=generator) * size
    disc = ((y - centre[:, 0]).square() + (x - centre[:, 1]).square() < (size / 4) ** 2).float()
    return disc[:, None].expand(-1, channels, -1, -1)


def picture_file(path: Path, seed: int = 0) -> str:
    """A file of 40 x 24 random RGB pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


# --- runs -------------------------------------------------------------------------------------------------------------


def write_run(folder: Path, model: NVAE, source: str = "mnist5k", micro_batch: int = 4, **data: Any) -> Path:
    """A run folder with the weights of the model; its data need not be there where nothing asks for them."""
    profile = Profile(
        name="t",
        model=model.config,
        data=DataConfig(source=source, **data),
        plan=MemoryPlan(micro_batch=micro_batch),
    )
    export_weights(folder, profile, model.state_dict())
    return folder


DEMO_MICRO_BATCH = 40


def demo_run(folder: Path, config: ModelConfig = RGB, with_data: bool = True, **data: Any) -> Path:
    """A run of a model whose latents matter, in folder/run; with data, of 40 pictures of which 10 are held out."""
    if with_data:
        write_folder(folder / "pictures", 40)
    settings: dict[str, Any] = {"source": str(folder / "pictures"), "test_fraction": 0.25} | data
    return write_run(folder / "run", responsive(config), micro_batch=DEMO_MICRO_BATCH, **settings)
