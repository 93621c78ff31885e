"""nl.train, nl.plan and nl.predict: the commands for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

import nvae_lowmem as nl
from nvae_lowmem.config.profile_file import load as load_profile
from nvae_lowmem.library.training import datasets_of

SHORT = {
    "training.steps": 2, "training.total_batch": 4, "model.channels_encoder": 4, "model.channels_decoder": 4,
    "training.evaluate_images": 4,
}  # fmt: skip


class Pictures(Dataset[Any]):
    """PIL images of several sizes with labels, as torchvision's datasets give them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index >= self.count:
            raise IndexError
        values = np.random.default_rng(index).integers(0, 256, (30 + index, 30 + index), dtype=np.uint8)
        return Image.fromarray(values), index


def test_any_torch_dataset_can_be_trained_on(tmp_path: Path) -> None:
    model = nl.train("demo-mnist", Pictures(12), settings=SHORT, runs_dir=tmp_path)
    assert model.name == "00000-demo-mnist"
    assert model.sample(2, passes=1).shape == (2, 1, 28, 28)
    assert (tmp_path / "00000-demo-mnist" / "data.json").exists()


def test_a_run_goes_on_in_its_folder(tmp_path: Path) -> None:
    digits = TensorDataset(torch.randint(0, 256, (9, 1, 28, 28), dtype=torch.uint8))
    nl.train("demo-mnist", digits, settings=SHORT, run_dir=tmp_path / "run")
    nl.train("demo-mnist", digits, settings={**SHORT, "training.steps": 4}, run_dir=tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").is_dir()


def test_held_out_images_follow_their_content() -> None:
    profile = load_profile("demo-mnist")
    images = torch.randint(0, 256, (60, 1, 28, 28), dtype=torch.uint8)
    parts = [datasets_of(TensorDataset(x), profile) for x in (images, images.flip(0))]
    held_out = [{row.numpy().tobytes() for row in part.test.images(range(len(part.test)))} for part in parts]
    assert held_out[0] == held_out[1] and len(parts[0].train) + len(parts[0].test) == 60


@pytest.mark.parametrize(
    ("images", "message"),
    [(torch.zeros(1, 1, 28, 28), "at least two"), (torch.zeros(3, 1, 9, 9), r"dataset\[0\].*28 x 28")],
)
def test_what_cannot_be_trained_on_is_refused(images: torch.Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(nl.ConfigError, match=message):
        nl.train("demo-mnist", TensorDataset(images), runs_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_plan_fits_the_card_that_was_asked_for() -> None:
    profile, found = nl.plan("tiny", gpu_mem="4G")
    assert found.fits and profile.plan.cap_bytes == found.budget.cap_bytes
    prediction = nl.predict(profile)
    assert prediction.fits(profile.plan.cap_bytes)
    with pytest.raises(nl.ConfigError, match="needs a card"):
        nl.plan("tiny")
    with pytest.raises(nl.ConfigError, match="nosuch"):
        nl.predict("nosuch")
