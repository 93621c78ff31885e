"""predict_step against a CUDA allocator: peaks of six plain training loops, predicted without and measured with CUDA.

    python benchmarks/any_step.py --out benchmarks/results/any-step-2026-11-25.json

Runs where torch sees a CUDA card; the phantom card of tests/phantom will do, since its allocator is PyTorch's own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nvae_lowmem.memory.predict.any_step import Build, predict_step
from nvae_lowmem.units import MIB


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a skip."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels * stride, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels * stride)
        self.second = nn.Conv2d(channels * stride, channels * stride, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(channels, channels * stride, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.second(functional.relu(self.norm(self.first(x)))) + self.skip(x))


class ResNet(nn.Module):
    """Images (B, 3, S, S) to 10 classes."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 7, 2, 3)
        sizes = [(64, 1), (64, 2), (128, 2), (256, 2)]
        self.blocks = nn.ModuleList([ResidualBlock(channels, stride) for channels, stride in sizes])
        self.head = nn.Linear(512, 10)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """Tokens (B, T) to logits (B T, 1000)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 256)
        layer = nn.TransformerEncoderLayer(256, 8, 1024, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(256, 1000)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens))).flatten(0, 1)


def training(network: Callable[[], nn.Module], optimizer: Callable[..., torch.optim.Optimizer], half: bool) -> Build:
    """A plain loop's step: forward (under autocast where `half`), backward, update."""

    def build(device: torch.device) -> Callable[[], object]:
        model = network().to(device).train()
        update = optimizer(model.parameters())
        if isinstance(model, Transformer):
            x, y = (torch.randint(0, 1000, shape, device=device) for shape in ((16, 128), (16 * 128,)))
        else:
            x, y = torch.randn(32, 3, 128, 128, device=device), torch.randint(0, 10, (32,), device=device)
        dtype = torch.float16 if device.type == "cuda" else torch.bfloat16

        def step() -> None:
            with torch.autocast(device.type, dtype, enabled=half):
                loss = functional.cross_entropy(model(x), y)
            loss.backward()
            update.step()
            update.zero_grad()

        return step

    return build


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)  # type: ignore[arg-type]


CASES = {
    "ResNet, SGD": training(ResNet, sgd, False),
    "ResNet, AdamW": training(ResNet, torch.optim.AdamW, False),
    "ResNet, AdamW, checkpoints": training(lambda: ResNet(recompute=True), torch.optim.AdamW, False),
    "ResNet, AdamW, fp16 autocast": training(ResNet, torch.optim.AdamW, True),
    "transformer, AdamW": training(Transformer, torch.optim.AdamW, False),
    "transformer, AdamW, fp16 autocast": training(Transformer, torch.optim.AdamW, True),
}


def measured(build: Build, steps: int = 3) -> tuple[int, int]:
    """(allocated, reserved) peaks in bytes of the real step on the card."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = build(torch.device("cuda", 0))
    for _ in range(steps):
        step()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    out = parser.parse_args().out
    properties = torch.cuda.get_device_properties(0)
    rows = []
    for name, build in CASES.items():
        found = predict_step(build)
        allocated, reserved = measured(build)
        row = {
            "case": name,
            "predicted_allocated_bytes": found.allocated_peak_bytes,
            "measured_allocated_bytes": allocated,
            "predicted_reserved_bytes": found.reserved_peak_bytes,
            "measured_reserved_bytes": reserved,
        }
        rows.append(row)
        errors = (found.allocated_peak_bytes / allocated - 1, found.reserved_peak_bytes / reserved - 1)
        print(
            f"{name:<36}{allocated / MIB:8.1f} MiB {errors[0]:+.1%}   {reserved / MIB:8.1f} MiB {errors[1]:+.1%}",
            flush=True,
        )
    phantom = " (phantom: kernels do nothing)" if "PHANTOM_TOTAL" in os.environ else ""
    about = {
        "device": properties.name + phantom,
        "total_bytes": properties.total_memory,
        "torch": str(torch.__version__),
    }
    if out is not None:
        out.write_text(json.dumps({**about, "date": "2026-11-25", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
