"""Initialisation from the first batch, for cells without BatchNorm."""

from __future__ import annotations

import torch

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.model.cells import Cell
from nvae_lowmem.model.data_init import initialise_from_data
from nvae_lowmem.model.latents import SeededNoise
from nvae_lowmem.model.layers import ConvUnit
from nvae_lowmem.model.nvae import NVAE


def test_every_unit_of_a_cell_then_has_outputs_of_mean_zero_and_deviation_one_fifth() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        image_size=16, bits=1, channels_encoder=4, channels_decoder=4, scales=2, groups=2, latents=3,
        architecture="res_elu",
        preprocess_blocks=1, preprocess_cells=2, postprocess_blocks=1, postprocess_cells=2, data_init=True,
    )  # fmt: skip
    assert not config.problems()
    model, x = NVAE(config), torch.rand(6, 1, 16, 16)
    count = initialise_from_data(model, x, SeededNoise(1))
    units = [u for cell in model.modules() if isinstance(cell, Cell) for u in cell.units]
    assert count == len(units) > 10
    outputs: list[torch.Tensor] = []
    for unit in units:
        assert isinstance(unit, ConvUnit) and unit.pre_run_hook is None
        unit.pre_run_hook = lambda u, a: outputs.append(_output(u, a))
    model(x, SeededNoise(1))
    assert len(outputs) == len(units)
    for y in outputs:
        std, mean = torch.std_mean(y, dim=(0, 2, 3))
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-3, rtol=0)
        torch.testing.assert_close(std, torch.full_like(std, 0.2), atol=2e-3, rtol=0)


def _output(unit: ConvUnit, a: torch.Tensor) -> torch.Tensor:
    hook, unit.pre_run_hook = unit.pre_run_hook, None
    try:
        return unit(a).detach()
    finally:
        unit.pre_run_hook = hook
