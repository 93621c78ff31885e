"""What the tests of the deepspeed engine train, and the program that each of several processes runs.

As a program: `zero_worker.py FOLDER` under a launcher's variables. It reads FOLDER/start.pt (an engine's state), trains
from it with every plan of SHARED, and writes the losses of each rank and the state that rank 0 has afterwards.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import MemoryPlan, Profile, TrainConfig
from nvae_lowmem.data.labels import label_rows
from nvae_lowmem.data.pipeline import MicroBatch
from nvae_lowmem.model.freeze import freeze_blocks
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.objective import Objective
from nvae_lowmem.training.batch_split import BatchSplit
from nvae_lowmem.training.ema import WeightEma
from nvae_lowmem.training.engines import distributed
from nvae_lowmem.training.engines.deepspeed_engine import ZeroEngine
from nvae_lowmem.training.engines.torch_engine import TorchEngine
from nvae_lowmem.training.resolve import ResolvedRun
from nvae_lowmem.training.schedule import Schedule
from nvae_lowmem.training.step import StepResult, Training, training_step

MODEL = ModelConfig(
    image_size=16, bits=1, channels_encoder=4, channels_decoder=4, scales=2, groups=2, adaptive=True, latents=2,
    cells_encoder=1, cells_decoder=1, preprocess_blocks=1, preprocess_cells=1, postprocess_blocks=1,
    postprocess_cells=1, flows=1,
)  # fmt: skip
TOTAL, TOTAL_STEPS, LEARNING_RATE = 4, 40, 3e-3
REPOSITORY = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
PLANS: dict[str, dict[str, Any]] = {
    "0": {"zero_stage": 0},
    "1": {"zero_stage": 1},
    "1, optimizer on host": {"zero_stage": 1, "offload_optimizer": True},
    "2": {"zero_stage": 2},
    "2, optimizer on host": {"zero_stage": 2, "offload_optimizer": True},
    "3": {"zero_stage": 3},
    "3, all on host": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
}
SHARED = ("0", "2, optimizer on host", "3, all on host")


def profile(plan: dict[str, Any] | None = None, **training: Any) -> Profile:
    """A small run whose buckets are smaller than the model (29,000 parameters) and than its largest weights."""
    return Profile(
        model=MODEL,
        training=TrainConfig(**{"total_batch": TOTAL, "regulariser": 1e-2, **training}),
        plan=MemoryPlan(**{"precision": "fp32", "micro_batch": TOTAL, "bucket_elements": 2000, **(plan or {})}),
    )


def make(
    kind: Callable[..., Any], run: Profile, accumulation: int = 1, *, precision: str = "fp32", evaluating: bool = False
) -> Any:
    """An engine around a model with the same initial weights every time; evaluating: BatchNorm's running statistics."""
    torch.manual_seed(0)
    objective = Objective(NVAE(run.model), run.training, precision)
    freeze_blocks(objective.model, run.training.freeze)
    return kind(objective.eval() if evaluating else objective.train(), run, CPU, accumulation)


def images(step: int, slot: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.bernoulli(torch.full((TOTAL, 1, 16, 16), 0.5), generator=generator)[slot : slot + count]


def train(
    engine: Any, run: Profile, steps: range, accumulation: int = 1, ema: WeightEma | None = None
) -> list[StepResult]:
    """Optimiser steps `steps` of a run of TOTAL_STEPS."""
    split = BatchSplit(TOTAL, TOTAL // accumulation // engine.world_size, accumulation, engine.world_size)
    resolved = ResolvedRun(profile=run, split=split, schedule=Schedule(TOTAL_STEPS, TOTAL_STEPS, 0, LEARNING_RATE))
    training = Training(run=resolved, engine=engine, ema=ema)
    return [training_step(training, micro_batches(split, engine.rank, step, run.model.classes), step) for step in steps]


def micro_batches(split: BatchSplit, rank: int, step: int, classes: int = 0) -> Iterator[MicroBatch]:
    for slots in split.slots(rank):
        labels = label_rows([0, 1, -1, 1], classes)[slots] if classes else None
        yield MicroBatch(slots.start, images(step, slots.start, split.micro), labels)


def losses(results: list[StepResult]) -> Tensor:
    return torch.stack([result.loss for result in results])


# --- processes --------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    """A Python process in a group of its own, so that it can be ended together with what it starts."""
    env = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, *arguments], env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(processes: list[subprocess.Popen[str]], seconds: float = 120) -> list[str]:
    """Their output; none of them outlives this."""
    try:
        return [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def main(folder: Path) -> None:
    start = torch.load(folder / "start.pt")
    found: dict[str, Tensor] = {}
    for name in SHARED:
        run = profile(PLANS[name], kl_balance=False)
        engine = make(ZeroEngine, run, evaluating=True)
        engine.load_state(start)
        found[name] = losses(train(engine, run, range(2, 5)))
        state = engine.state()
        if engine.rank == 0:
            torch.save(state, folder / f"{name}.pt")
        elif state:
            raise AssertionError(f"rank {engine.rank} holds a state too")
        engine.close()
    torch.save(found, folder / f"losses_{engine.rank}.pt")
    exchange(engine.rank)
    distributed.barrier()
    distributed.shutdown()


def exchange(rank: int) -> None:
    """BatchNorm's statistics, flags and an object, between two processes."""
    run = profile()
    model = make(TorchEngine, run).model
    layers = [layer for layer in model.layers() if layer.gamma is not None]
    for index, layer in enumerate(layers):
        layer.running_mean.fill_(index + 10 * rank)
        layer.running_variance.fill_(1 + rank)
    distributed.average_statistics(model)
    for index, layer in enumerate(layers):
        torch.testing.assert_close(layer.running_mean, torch.full_like(layer.running_mean, index + 5.0))
        torch.testing.assert_close(layer.running_variance, torch.full_like(layer.running_variance, 1.5))
    found = [distributed.any_process(flag, CPU) for flag in (False, rank == 1, True)]
    if found != [False, True, True]:
        raise AssertionError(f"rank {rank} heard {found}")
    if distributed.broadcast_object(f"from rank {rank}") != "from rank 0":
        raise AssertionError("rank 0's object did not arrive")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
