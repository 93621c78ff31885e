"""The walk of a batch through the rooms of the package: downwards only, and from data to loss in one go."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import nvae_lowmem
from nvae_lowmem.data.dataset import ArrayDataset
from nvae_lowmem.data.pipeline import Batches, MicroBatch
from nvae_lowmem.model.objective import LossTerms
from nvae_lowmem.training.build import build_model, build_training
from nvae_lowmem.training.engines.torch_engine import TorchEngine
from nvae_lowmem.training.resolve import run_without_data
from nvae_lowmem.training.step import training_step
from profiles import profile_of

PACKAGE = Path(nvae_lowmem.__file__).parent
COUNT = 4


def room_of(frame: FrameType | None) -> str | None:
    """The folder of the package that a frame's code is in; None outside the package."""
    path = Path(frame.f_code.co_filename) if frame is not None else Path()
    return str(path.parent.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else None


def test_a_batch_goes_from_data_to_loss_and_no_room_calls_one_above_it() -> None:
    profile = profile_of(keep="input")
    run = run_without_data(profile, COUNT)
    entered: list[tuple[str | None, str]] = []  # (from which room, into which), in order
    losses: list[LossTerms] = []

    class Walked(TorchEngine):
        def forward(self, *args: Any) -> LossTerms:
            losses.append(super().forward(*args))
            sys.setprofile(None)  # the loss is there
            return losses[-1]

    def images() -> Iterator[MicroBatch]:
        pixels = torch.randint(0, 256, (COUNT, 3, 8, 8), dtype=torch.uint8).numpy()
        batches = Batches(ArrayDataset(pixels), run.profile.model, run.profile.data, COUNT, seed=1)
        sys.setprofile(note)
        yield MicroBatch(0, batches.batch(0, slice(0, COUNT)))

    def note(frame: FrameType, event: str, _: Any) -> None:
        here, back = room_of(frame), frame.f_back
        while back is not None and room_of(back) is None:
            back = back.f_back
        if event == "call" and here not in (None, ".", "config") and here != room_of(back):
            entered.append((room_of(back), str(here)))

    training = build_training(run, build_model(run.profile), torch.device("cpu"), Walked)
    try:
        training_step(training, images(), 0)
    finally:
        sys.setprofile(None)
    assert losses[0].loss.isfinite()
    # the step asks for the images, tells the engine, and sets the layers; the engine runs the model; nobody calls back
    assert list(dict.fromkeys(entered)) == [
        ("training", "data"), ("training", "training/engines"), ("training", "model"), ("training/engines", "model"),
    ]  # fmt: skip
