"""No two kinds of passes see the same noise."""

from __future__ import annotations

import ast
from pathlib import Path

import torch

import nvae_lowmem
from nvae_lowmem.evaluation import bounds
from nvae_lowmem.generation.reconstruct import RowNoise
from nvae_lowmem.model.latents import NoiseStep

CPU = torch.device("cpu")


def test_reconstructions_and_importance_weights_draw_different_noise() -> None:
    rows = RowNoise(7, (0,)).normal(0, (1, 2, 3, 3), CPU)
    draws = bounds._DrawNoise(7, (0,), range(1)).normal(0, (1, 2, 3, 3), CPU)
    assert not torch.equal(rows, draws)


def test_training_counts_from_zero_and_everything_else_below() -> None:
    assert max(NoiseStep) < 0


def test_no_pass_names_a_step_of_its_own() -> None:
    guilty = []
    for path in Path(nvae_lowmem.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "step" and isinstance(node.value, ast.UnaryOp):
                guilty.append(f"{path.name}:{node.value.lineno}")
    assert guilty == []
