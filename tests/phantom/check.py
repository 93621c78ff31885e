"""The instrument's own test: does PyTorch's CUDA build behave on this card as on a card, values apart?

Run by name, for it is no test of this project: phantom-run -- python -m pytest tests/phantom/check.py
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

MIB = 1 << 20
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def clean_card() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)


# --- the card ---------------------------------------------------------------------------------------------------------


def test_there_is_a_card_of_the_size_that_was_asked_for() -> None:
    assert torch.cuda.is_available()
    card = torch.cuda.get_device_properties(CUDA)
    free, total = torch.cuda.mem_get_info(CUDA)
    assert total == card.total_memory == int(os.environ.get("PHANTOM_TOTAL", total))
    assert 0 < free < total
    assert (card.warp_size, card.max_threads_per_multi_processor) == (32, 2048) or card.major > 6
    assert card.regs_per_multiprocessor == 65536 and card.L2_cache_size > MIB  # fields near the structure's ends


def test_nvml_tells_the_same_card_and_this_process() -> None:
    import pynvml

    pynvml.nvmlInit()
    uuid = torch.cuda.get_device_properties(CUDA).uuid
    card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
    torch.empty(MIB, device=CUDA)
    (process,) = pynvml.nvmlDeviceGetComputeRunningProcesses(card)
    assert process.pid == os.getpid()
    memory = pynvml.nvmlDeviceGetMemoryInfo(card)
    assert process.usedGpuMemory <= memory.used < memory.total
    assert pynvml.nvmlDeviceGetName(card) == torch.cuda.get_device_name(CUDA)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_allocator_serves_from_segments() -> None:
    before = torch.cuda.memory_stats(CUDA)
    x = torch.empty(30 * MIB, dtype=torch.uint8, device=CUDA)
    after = torch.cuda.memory_stats(CUDA)
    assert after["allocated_bytes.all.current"] - before["allocated_bytes.all.current"] == 30 * MIB
    assert after["reserved_bytes.all.current"] % (2 * MIB) == 0
    assert x.is_cuda


def test_a_cap_ends_in_out_of_memory() -> None:
    ooms = torch.cuda.memory_stats(CUDA)["num_ooms"]
    torch.cuda.set_per_process_memory_fraction(0.25, CUDA)
    with pytest.raises(torch.OutOfMemoryError, match="allowed"):
        _ = [torch.empty(64 * MIB, dtype=torch.uint8, device=CUDA) for _ in range(100)]
    assert torch.cuda.memory_stats(CUDA)["num_ooms"] == ooms + 1


def test_the_card_itself_is_full_at_last() -> None:
    held = []
    with pytest.raises(torch.OutOfMemoryError):
        while True:
            held.append(torch.empty(256 * MIB, dtype=torch.uint8, device=CUDA))
    free, total = torch.cuda.mem_get_info(CUDA)
    assert free < 256 * MIB and total - 512 * MIB < len(held) * 256 * MIB < total


def test_the_history_tells_of_allocations_and_frees() -> None:
    torch.cuda.memory._record_memory_history(enabled="all", context=None, stacks="python")
    x = torch.empty(5 * MIB, dtype=torch.uint8, device=CUDA)
    del x
    actions = [event["action"] for event in torch.cuda.memory._snapshot()["device_traces"][0]]
    torch.cuda.memory._record_memory_history(enabled=None)
    assert [a for a in actions if a != "segment_alloc"] == ["alloc", "free_requested", "free_completed"]


def test_page_locked_memory_is_known_as_such() -> None:
    pinned, plain = torch.empty(MIB).pin_memory(), torch.empty(5)
    assert pinned.is_pinned() and torch.empty(5, pin_memory=True).is_pinned() and not plain.is_pinned()
    on_card = pinned.to(CUDA, non_blocking=True)
    pinned.copy_(on_card, non_blocking=True)
    torch.cuda.synchronize()


def test_memory_used_by_another_stream_is_kept_until_that_has_passed() -> None:
    side, x = torch.cuda.Stream(), torch.empty(1 << 16, device=CUDA)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 2
        passed = side.record_event()
    x.record_stream(side)
    torch.cuda.current_stream().wait_event(passed)
    del x, y
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    end.record()
    end.synchronize()
    assert begin.elapsed_time(end) >= 0 and passed.query()


# --- values: only small ones ------------------------------------------------------------------------------------------


def test_small_values_go_there_and_back() -> None:
    x = torch.arange(100.0)
    assert torch.equal(x.to(CUDA).cpu(), x)
    assert torch.tensor(7, device=CUDA).item() == 7
    assert torch.full((), 65536.0, device=CUDA).item() == 65536.0
    assert torch.isfinite(torch.zeros(3, device=CUDA)).cpu().all()


# --- operations: that they run, with the shapes they ought to have ----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_products_of_matrices(dtype: torch.dtype) -> None:
    a = torch.ones(64, 64, device=CUDA, dtype=dtype, requires_grad=True)
    layer = nn.Linear(64, 128, device=CUDA, dtype=dtype)
    (layer(a @ a).sum() + torch.bmm(a[None], a[None]).sum() + torch.addmm(a, a, a).sum()).backward()
    assert a.grad is not None and a.grad.shape == a.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("kernel", "groups", "stride", "dilation"),
    [(3, 1, 1, 1), (3, 32, 1, 1), (5, 32, 1, 1), (1, 1, 1, 1), (3, 4, 2, 1), (3, 1, 1, 2)],
)
def test_convolutions(kernel: int, groups: int, stride: int, dilation: int, dtype: torch.dtype) -> None:
    options = {"device": CUDA, "dtype": dtype, "requires_grad": True}
    w = torch.randn(32, 32 // groups, kernel, kernel, **options)
    x, b = torch.randn(2, 32, 16, 16, **options), torch.zeros(32, **options)
    padding = dilation * (kernel // 2)
    F.conv2d(x, w, b, stride=stride, padding=padding, dilation=dilation, groups=groups).sum().backward()
    assert [t.grad.shape for t in (x, w, b)] == [t.shape for t in (x, w, b)]


def test_layers_around_convolutions() -> None:
    x = torch.randn(4, 8, 16, 16, device=CUDA, requires_grad=True)
    norm = nn.BatchNorm2d(8, device=CUDA)
    parts = [
        norm(x),
        norm.eval()(x),
        nn.ConvTranspose2d(8, 4, 4, 2, 1, device=CUDA)(x),
        F.interpolate(x, scale_factor=2, mode="bilinear"),
        F.max_pool2d(x, 2),
        F.pad(x, (1, 1, 1, 1), mode="reflect"),
        F.softplus(x),
    ]
    torch.stack([part.sum() for part in parts]).sum().backward()
    torch.ops.aten.batch_norm_update_stats(x.half(), norm.running_mean, norm.running_var, 0.1)
    assert x.grad is not None and x.grad.shape == x.shape


def test_functions_that_have_kernels_of_their_own() -> None:
    # not nonzero() or a boolean index: how long their results are, a kernel would have to count
    x = torch.randn(1000, device=CUDA)
    for function in (torch.sort, torch.lgamma, torch.erfinv, torch.linalg.vector_norm):
        function(x)
    x.topk(5), x.cumsum(0), torch.searchsorted(x, x), torch.multinomial(x.abs() + 1, 3)
    torch.randint(0, 9, (4,), device=CUDA), torch.randperm(100, device=CUDA)
    torch.linalg.svdvals(torch.randn(4, 4, device=CUDA))
    torch.cuda.synchronize()


# --- training ---------------------------------------------------------------------------------------------------------


def test_autocast_with_a_loss_scale() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2)).to(CUDA)
    optimizer, scaler = torch.optim.Adamax(model.parameters()), torch.amp.GradScaler("cuda")
    for _ in range(2):
        with torch.autocast("cuda", torch.float16):
            loss = model(torch.randn(2, 3, 8, 8, device=CUDA)).float().pow(2).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 65536.0


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_in_the_backward_pass(reentrant: bool) -> None:
    x = torch.randn(8, 8, device=CUDA, requires_grad=True)
    checkpoint(lambda t: (t @ t).relu(), x, use_reentrant=reentrant).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", [torch.optim.Adamax, torch.optim.AdamW, torch.optim.SGD])
def test_optimisers_and_clipping(kind: type[torch.optim.Optimizer]) -> None:
    layer = nn.Linear(100, 100, device=CUDA)
    optimizer = kind(layer.parameters(), lr=1e-3)  # type: ignore[call-arg]
    layer(torch.randn(2, 100, device=CUDA)).sum().backward()
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()


def test_collectives_of_one_process() -> None:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x, one = torch.ones(4, device=CUDA), torch.empty(4, device=CUDA)
        dist.all_reduce(x)
        dist.broadcast(x, 0)
        dist.all_gather([one], x)
        dist.all_gather_into_tensor(one, x)
        dist.reduce_scatter_tensor(one, x)
        dist.barrier(device_ids=[0])
        box = ["an object"]
        dist.broadcast_object_list(box)
        assert torch.equal(one.cpu(), torch.ones(4)) and box == ["an object"]
    finally:
        dist.destroy_process_group()
