"""For the tests on a CUDA card, a real one or the phantom of tests/phantom: what each of them starts from."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from nvae_lowmem.training.engines import distributed

_SET_BY_COMMANDS = (
    "PYTORCH_CUDA_ALLOC_CONF",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDNN_CONV_WSCAP_DBG",
    "LOCAL_RANK",
    "RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@pytest.fixture(autouse=True)
def clean_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A card without a cap, peaks or cached memory, and none of the variables that a command in this process left."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA card: make test-cuda gives it a phantom")
    for name in _SET_BY_COMMANDS:
        if name in os.environ:
            monkeypatch.delenv(name)
    _clean()
    yield
    distributed.shutdown()
    for name in _SET_BY_COMMANDS:
        os.environ.pop(name, None)
    _clean()


def _clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.reset_accumulated_memory_stats()
