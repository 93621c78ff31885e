"""Weights that a training starts from: what is taken of them, what is scaled, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import build, images, tiny_rgb
from torch import Tensor

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.recipes import with_groups
from nvae_lowmem.config.sections import Profile, TrainConfig
from nvae_lowmem.data.dataset import ArrayDataset
from nvae_lowmem.data.fingerprint import Fingerprint
from nvae_lowmem.data.sources import Datasets
from nvae_lowmem.data.stores import ArrayStore
from nvae_lowmem.errors import ConfigError, Diverged
from nvae_lowmem.model.data_init import estimate_statistics
from nvae_lowmem.model.latents import SeededNoise
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.objective import Objective, beta_at
from nvae_lowmem.training.build import ESTIMATION_PASSES, build_training
from nvae_lowmem.training.initial_weights import InitialWeights, differing_fields, take_over
from nvae_lowmem.training.resolve import ResolvedRun, resolve_run, run_without_data
from nvae_lowmem.training.session import Session

CONFIG = tiny_rgb()
CPU = torch.device("cpu")


def weights_of(model: NVAE) -> InitialWeights:
    return InitialWeights(origin="run 3", tensors=model.state_dict())


def taken(into: ModelConfig, source: ModelConfig = CONFIG) -> tuple[NVAE, NVAE, str]:
    """(model with the weights, the model they are of, what was said)."""
    model, trained = build(into, seed=1), build(source, seed=2)
    return model, trained, take_over(model, weights_of(trained))


def test_of_the_same_model_everything_is_taken() -> None:
    model, trained, said = taken(CONFIG)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), trained.state_dict().values(), strict=True)
    )
    count, size = len(model.state_dict()), sum(p.numel() for p in model.parameters())
    assert said == f"weights from run 3: {count} of {count} tensors, {size:,} of {size:,} weights are taken"


def test_only_the_learned_start_depends_on_the_size_of_the_images_and_it_is_scaled() -> None:
    model, trained, said = taken(replace(CONFIG, image_size=32))
    different = [n for n, t in trained.state_dict().items() if not torch.equal(t, model.state_dict()[n])]
    assert different == ["blocks.start.h"]
    assert "the decoder's learned start is scaled from 4 x 4 to 8 x 8" in said and "random" not in said
    start, other = model.state_dict()["blocks.start.h"], trained.state_dict()["blocks.start.h"]
    torch.testing.assert_close(start.mean((1, 2)), other.mean((1, 2)), rtol=0.1, atol=0.05)
    assert torch.isfinite(model(images(model.config), SeededNoise(0)).nll).all()


def test_what_does_not_fit_keeps_its_random_values_and_is_named() -> None:
    model, trained, said = taken(replace(CONFIG, image_channels=1, bits=5))
    fresh = build(model.config, seed=1).state_dict()
    left = [n for n, t in model.state_dict().items() if trained.state_dict()[n].shape != t.shape]
    assert left and all(name.split(".")[1] in ("stem", "head") for name in left)
    assert all(torch.equal(model.state_dict()[name], fresh[name]) for name in left)
    assert f"{len(left)} tensors keep their initial values (first: {left[0]}" in said


def test_labels_begin_without_effect_on_weights_of_a_model_without_them() -> None:
    model, trained, said = taken(replace(CONFIG, classes=3))
    assert "keep their initial values" in said and "class" in said
    x, labels = images(CONFIG, 2), torch.eye(4)[:2]
    terms = (one.eval()(x, SeededNoise(0), *given).nll for one, given in ((model, (labels,)), (trained, ())))
    torch.testing.assert_close(next(terms), next(terms))


def test_a_model_with_fewer_groups_takes_those_it_has() -> None:
    model, _, said = taken(with_groups(CONFIG, (1, 2)))
    missing = len(build(CONFIG).state_dict()) - len(model.state_dict())
    assert f"{missing} tensors of the weights have no place here" in said and "random" not in said


def test_too_little_is_refused_and_changes_nothing() -> None:
    model, trained = build(replace(CONFIG, channels_encoder=16, channels_decoder=16)), build(CONFIG)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ConfigError, match=r"run 3 is too little like this model .* \[16, 3, 3, 3\], there \[8, 3, 3, 3\]"
    ):
        take_over(model, weights_of(trained))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_storage_gives_the_same_answer() -> None:
    _, trained, said = taken(replace(CONFIG, image_size=32, image_channels=1))
    with torch.device("meta"):
        model = NVAE(replace(CONFIG, image_size=32, image_channels=1))
    assert take_over(model, weights_of(trained)) == said


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"image_size": 32, "bits": 5, "image_channels": 1}, []),
        ({"adaptive": True, "groups_per_scale": (2, 2)}, []),
        ({"classes": 10}, []),
        ({"latents": 5}, ["model.latents 3 -> 5"]),
        ({"groups_per_scale": (1, 2), "flows": 0}, ["model.flows 1 -> 0", "groups per scale [2, 2] -> [1, 2]"]),
    ],
)
def test_models_are_the_same_network_or_their_fields_are_listed(change: dict[str, Any], found: list[str]) -> None:
    assert differing_fields(replace(CONFIG, **change), CONFIG) == found


# --- the training that begins from them -------------------------------------------------------------------------------


def test_training_begins_with_the_whole_kl_and_a_tenth_of_the_learning_rate() -> None:
    config = TrainConfig(init_from="somewhere", total_batch=64, steps=100)
    assert beta_at(0, 100, config) == 1.0 > beta_at(0, 100, replace(config, init_from=""))
    began, scratch = (resolve_run(Profile(training=c), 640, CPU, 1) for c in (config, replace(config, init_from="")))
    assert began.schedule.peak_rate == pytest.approx(0.1 * scratch.schedule.peak_rate)
    assert any("0.1 of the one for random weights" in reason for reason in began.reasons)
    given = resolve_run(Profile(training=replace(config, learning_rate=0.02)), 640, CPU, 1)
    assert given.schedule.peak_rate == 0.02


def statistics(model: NVAE) -> list[Tensor]:
    return [t.clone() for layer in model.layers() if layer.gamma is not None for t in layer.running()[:2]]  # type: ignore[index]


def test_estimated_statistics_are_the_mean_over_micro_batches_and_nothing_else_moves() -> None:
    model = build(CONFIG).train()
    layer = model.blocks["pre_0_0"].units[0]  # type: ignore[index,union-attr]
    weights = [p.clone() for p in model.parameters()]
    read: list[Tensor] = []
    stem = model.blocks["stem"]
    stem.register_forward_hook(lambda _, args, out: read.append(out))
    estimate_statistics(Objective(model, TrainConfig()), [images(CONFIG, 2, seed) for seed in range(3)], SeededNoise(0))
    means = torch.stack([x.mean((0, 2, 3)) for x in read])
    torch.testing.assert_close(layer.running_mean, means.mean(0))
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


@pytest.mark.parametrize("how", ["keep", "estimate"])
def test_statistics_are_kept_or_estimated_as_asked(how: str) -> None:
    training = TrainConfig(init_from="somewhere", init_statistics=how, ema_decay=0.5)  # type: ignore[arg-type]
    run = run_without_data(Profile(model=CONFIG, training=training).with_plan(precision="fp32"), 2)
    model = build(CONFIG)
    before = statistics(model)
    steps: list[int] = []

    def first_images(step: int) -> Tensor:
        steps.append(step)
        return images(CONFIG, 2, step)

    made = build_training(run, model, CPU, first_images=first_images)
    moved = [not torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True)]
    assert steps == (list(range(ESTIMATION_PASSES)) if how == "estimate" else [])
    assert all(moved) if how == "estimate" else not any(moved)
    assert made.ema is not None
    averaged = dict(made.ema.module.named_buffers())
    assert all(torch.equal(averaged[name], buffer) for name, buffer in model.named_buffers())


def test_going_back_to_the_beginning_goes_back_to_these_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []

    def blows_up_once(session: Session, run: ResolvedRun, model: NVAE, *_: Any) -> int:
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        with torch.no_grad():
            model.blocks["stem"].conv.weight.zero_()  # type: ignore[union-attr]
        if len(seen) == 1:
            raise Diverged("blown up", step=3, good_until=0)
        return 0

    monkeypatch.setattr(Session, "_train_from", blows_up_once)
    trained = build(CONFIG, seed=2)
    profile = Profile(model=CONFIG, training=TrainConfig(init_from="somewhere")).with_plan(precision="fp32")
    array = np.zeros((4, 3, 16, 16), np.uint8)
    session = Session(
        run=run_without_data(profile, 2),
        data=Datasets(ArrayDataset(array), ArrayDataset(array), "zeros", Fingerprint.of(*[two_parts(array)] * 2)),
        engine="torch",
        device=CPU,
        rank=0,
        run_dir=tmp_path,
        initial=lambda: weights_of(trained),
    )
    assert session.train() == 0 and len(seen) == 2
    for state in seen:
        assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in state.items())


def two_parts(array: np.ndarray) -> tuple[ArrayStore, np.ndarray, int]:
    return ArrayStore(array, "zeros"), np.arange(len(array)), len(array)
