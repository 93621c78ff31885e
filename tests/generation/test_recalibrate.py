"""Recalibration moves the decoder's BatchNorm statistics and nothing else, and is done once per choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from generation_runs import GREY, RGB, SMALL, changed, seasoned, snapshot
from torch import Tensor

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.generation import recalibrate as recalibration
from nvae_lowmem.generation.recalibrate import load_statistics, recalibrate, recalibrate_once, recalibrated
from nvae_lowmem.model.freeze import freeze_blocks
from nvae_lowmem.model.hooks import BN_MOMENTUM
from nvae_lowmem.model.latents import FromPrior, NoiseStep, SeededNoise
from nvae_lowmem.model.layers import NormLayer
from nvae_lowmem.model.nvae import NVAE


@pytest.mark.parametrize("config", [GREY, RGB], ids=["grey", "rgb"])
def test_recalibration_moves_the_decoders_statistics_and_nothing_else(config: ModelConfig) -> None:
    model = seasoned(config)
    before, modes = snapshot(model), [m.training for m in model.modules()]
    recalibrate(model, 0.7, 2, 2, 0)
    decoder = tuple(f"blocks.{name}" for name in ("dec_", "post_"))
    expected = {n for n in before if n.startswith(decoder) and n.endswith(("running_mean", "running_variance"))}
    assert expected and changed(model, before) == expected
    assert [m.training for m in model.modules()] == modes and model.settings.momentum == BN_MOMENTUM


def test_layers_that_training_has_frozen_are_recalibrated_like_the_others() -> None:
    model, frozen = seasoned(GREY), seasoned(GREY)
    freeze_blocks(frozen, ["dec_*"])
    for one in (model, frozen):
        recalibrate(one, 0.7, 2, 2, 0)
    assert not changed(frozen, snapshot(model))
    assert all(layer.frozen for layer in frozen.blocks["dec_0_0"].modules() if isinstance(layer, NormLayer))


def test_recalibrated_statistics_are_the_mean_over_passes() -> None:
    model, passes, images = seasoned(GREY), 3, 4
    total: dict[str, Tensor] = {}
    for i in range(passes):  # the statistics of each batch alone: momentum 1 keeps nothing of the batch before
        alone = seasoned(GREY).train()
        for layer in alone.layers():
            layer.settings.momentum = 1.0
        noise = SeededNoise(5, NoiseStep.RECALIBRATION, first_slot=i * images)
        with torch.no_grad():
            alone.top_down(FromPrior(noise, 0.8), batch=images)
        total = {k: total.get(k, 0) + v for k, v in alone.state_dict().items() if "running" in k}
    recalibrate(model, 0.8, passes, images, 5)
    own = model.state_dict()
    for name, value in total.items():
        torch.testing.assert_close(own[name], value / passes)


def test_statistics_before_are_forgotten_and_the_temperature_is_felt() -> None:
    cold, cold_again, warm = seasoned(GREY), seasoned(GREY), seasoned(GREY)
    for layer in cold_again.layers():
        if layer.gamma is not None:
            layer.running_mean.fill_(7)
    recalibrate(cold, 0.2, 2, 4, 0)
    recalibrate(cold_again, 0.2, 2, 4, 0)
    recalibrate(warm, 1.0, 2, 4, 0)
    before = snapshot(cold)
    decoder = {name for name in before if name.startswith("blocks.dec_0_1.cells") and "running" in name}
    assert decoder and decoder.isdisjoint(changed(cold_again, before)) and decoder <= changed(warm, before)


def test_one_image_per_pass_at_one_pixel_gives_finite_statistics() -> None:
    tiny = ModelConfig(image_channels=1, image_size=8, bits=1, **SMALL | {"scales": 3, "groups_per_scale": (1, 1, 2)})
    model = seasoned(tiny)
    assert tiny.scale_sizes[-1] == 1
    recalibrate(model, 0.7, 2, 1, 0)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_recalibrated_gives_the_statistics_back_whatever_happens() -> None:
    model = seasoned(GREY)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="on purpose"), recalibrated(model, 0.7, 2, 2, 0):
        assert changed(model, before)
        raise RuntimeError("on purpose")
    assert not changed(model, before)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), recalibrated(model, 0.7, 2, 2, 0, stop):
        pass
    assert not changed(model, before) and not any(m.training for m in model.modules())


def test_statistics_are_estimated_once_per_checkpoint_temperature_and_settings(tmp_path: Path) -> None:
    def passes_run(temperature: float, passes: int, model: NVAE) -> int:
        ran: list[int] = []
        recalibrate_once(model, tmp_path, temperature, passes, 2, 0, lambda done, total: ran.append(done))
        return len(ran)

    first, second = seasoned(GREY), seasoned(GREY)
    assert passes_run(0.7, 3, first) == 3
    assert passes_run(0.7, 3, second) == 0
    assert not changed(second, snapshot(first))
    assert passes_run(0.8, 3, second) == 3
    assert passes_run(0.7, 2, second) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bn-t0.70.safetensors", "bn-t0.80.safetensors"]
    (tmp_path / "bn-t0.80.safetensors").write_bytes(b"broken")
    assert passes_run(0.8, 3, second) == 3
    assert passes_run(0.8, 3, second) == 0
    with pytest.raises(ConfigError, match="another model"):
        load_statistics(seasoned(replace(GREY, channels_decoder=8)), tmp_path / "bn-t0.80.safetensors")


@pytest.mark.parametrize(
    ("device", "micro_batch", "passes"), [("cuda", 1, 300), ("cuda", 32, 300), ("cpu", 1, 320), ("cpu", 100, 20)]
)
def test_default_passes_are_hundreds_on_a_gpu_and_hundreds_of_images_on_a_cpu(
    device: str, micro_batch: int, passes: int
) -> None:
    assert recalibration.default_passes(torch.device(device), micro_batch) == passes


def test_fewer_than_one_pass_is_refused() -> None:
    with pytest.raises(ConfigError, match="--passes 0"):
        recalibrate(seasoned(GREY), 0.7, 0, 2, 0)
