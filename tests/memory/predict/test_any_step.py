"""predict_step: the memory of any PyTorch training step. The oracle is the same step, really run on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.memory.predict.any_step import Build, predict_step, trace_step
from nvae_lowmem.memory.trace.events import Trace
from nvae_lowmem.units import MIB


class SmallCnn(nn.Sequential):
    """Convolutions, BatchNorm, pooling, a linear head."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Dropout(0.1), nn.Linear(16, 10),
        )  # fmt: skip


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels * stride, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels * stride)
        self.second = nn.Conv2d(channels * stride, channels * stride, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(channels, channels * stride, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.second(functional.relu(self.norm(self.first(x)))) + self.skip(x))


class SmallResNet(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, 2, 3)
        self.blocks = nn.ModuleList([ResidualBlock(8, 1), ResidualBlock(8, 2), ResidualBlock(16, 2)])
        self.head = nn.Linear(32, 10)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x.mean((2, 3)))


class SmallTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens))).flatten(0, 1)


def training(
    network: Callable[[], nn.Module], optimizer: Callable[..., torch.optim.Optimizer], half: bool = False
) -> Build:
    """A plain training loop's step: forward (in bfloat16 by autocast where `half`), backward, update."""

    def build(device: torch.device) -> Callable[[], object]:
        torch.manual_seed(0)
        model = network().to(device).train()
        update = optimizer(model.parameters())
        if isinstance(model, SmallTransformer):
            x = torch.randint(0, 50, (4, 16), device=device)
            y = torch.randint(0, 50, (64,), device=device)
        else:
            x, y = torch.randn(4, 3, 32, 32, device=device), torch.randint(0, 10, (4,), device=device)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = functional.cross_entropy(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
            update.step()
            update.zero_grad()

        return step

    return build


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


CASES = {
    "cnn-sgd": training(SmallCnn, sgd),
    "cnn-adamw": training(SmallCnn, adamw),
    "cnn-sgd-amp": training(SmallCnn, sgd, half=True),
    "resnet-adamw": training(SmallResNet, adamw),
    "resnet-sgd-amp": training(SmallResNet, sgd, half=True),
    "resnet-adamw-checkpoint": training(lambda: SmallResNet(recompute=True), adamw),
    "resnet-adamw-checkpoint-amp": training(lambda: SmallResNet(recompute=True), adamw, half=True),
    "transformer-sgd": training(SmallTransformer, sgd),
    "transformer-adamw": training(SmallTransformer, adamw),
    "transformer-adamw-amp": training(SmallTransformer, adamw, half=True),
}


def requests_of(trace: Trace) -> list[tuple[bool, int]]:
    """(whether it is an allocation, bytes) in order; of frees that follow each other, the smallest first.

    Autocast's cache of half weights is emptied in the order of addresses, which differs from run to run.
    """
    out: list[tuple[bool, int]] = []
    for is_alloc, run in itertools.groupby(trace.walk(), key=lambda pair: pair[1]):
        sizes = [a.nbytes for a, _ in run]
        out += [(is_alloc, nbytes) for nbytes in (sizes if is_alloc else sorted(sizes))]
    return out


@pytest.mark.parametrize("case", CASES)
def test_every_allocation_and_free_is_that_of_the_real_step(case: str) -> None:
    real, traced = (trace_step(CASES[case], storageless=s, as_on_card=False) for s in (False, True))
    assert requests_of(traced) == requests_of(real)
    assert len(requests_of(real)) > 300


def test_the_peak_has_an_owner_and_the_cap_a_verdict() -> None:
    free = predict_step(CASES["resnet-adamw"])
    assert free.fits and free.cap_bytes == 0
    assert free.peak.by_category["weight"] > 0 and free.peak.by_category["optimizer state"] > 0
    assert free.peak.block and free.peak.operation.startswith("aten::")
    fitting = predict_step(CASES["resnet-adamw"], cap=free.reserved_peak_bytes)
    assert fitting.fits
    short = predict_step(CASES["resnet-adamw"], cap=MIB)
    assert not short.fits and "NO" in str(short)


def test_checkpointing_moves_the_peak_down() -> None:
    kept, recomputed = (predict_step(training(lambda r=r: SmallResNet(recompute=r), sgd)) for r in (False, True))
    assert recomputed.allocated_peak_bytes < kept.allocated_peak_bytes
    assert any(a.phase == "backward" and "blocks.1" in a.block for a in recomputed.trace.allocations)


def test_phases_and_modules_are_found_without_help() -> None:
    trace = predict_step(CASES["cnn-adamw"]).trace
    phases = {a.phase for a in trace.allocations}
    assert phases == {"setup", "forward", "backward", "update"}
    assert {"SmallCnn.0", "SmallCnn.4"} <= {a.block for a in trace.allocations if a.phase == "forward"}


def test_a_card_is_looked_up_by_name() -> None:
    found = predict_step(CASES["cnn-sgd"], card="gtx-970")
    assert found.fits and found.cap_bytes > 2 << 30
    with pytest.raises(ConfigError, match="gtx"):
        predict_step(CASES["cnn-sgd"], card="gtx-97")
    with pytest.raises(ConfigError, match="steps = 0"):
        predict_step(CASES["cnn-sgd"], steps=0)


def test_what_is_not_seen_is_said() -> None:
    assert any("cuDNN" in text for text in predict_step(CASES["cnn-sgd"]).unseen)
    assert any("cuBLAS" in text for text in predict_step(CASES["transformer-sgd"]).unseen)


def test_dropout_and_attention_keep_what_they_keep_on_a_card() -> None:
    as_on_cpu, as_on_card = (trace_step(CASES["transformer-sgd"], as_on_card=on_card) for on_card in (False, True))
    assert any(a.operation == "aten::native_dropout" for a in as_on_card.allocations)
    assert as_on_card.peak().nbytes < as_on_cpu.peak().nbytes
    updates = [a for a in trace_step(CASES["cnn-adamw"]).allocations if a.operation.startswith("aten::_foreach")]
    assert updates and all(a.phase == "update" for a in updates)
