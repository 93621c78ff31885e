"""HostAdamax against torch's Adamax: equal results, no large temporaries, single parameters, threads, ZeRO."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nvae_lowmem.training.engines import host_adamax
from nvae_lowmem.training.engines.host_adamax import HostAdamax

CHUNK_ELEMENTS = 4096
SMALL_ELEMENTS = 50
PUBLISHED: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 3e-4}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_adamax, "CHUNK_ELEMENTS", CHUNK_ELEMENTS)
    monkeypatch.setattr(host_adamax, "SMALL_ELEMENTS", SMALL_ELEMENTS)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "scalar": lambda: normal(),
    "empty": lambda: normal(0, 3),
    "odd_size": lambda: normal(1021),
    "several_chunks_and_a_rest": lambda: normal(2 * CHUNK_ELEMENTS + 1_235),
    "conv_weight": lambda: normal(6, 5, 3, 3),
    "channels_last": lambda: normal(6, 5, 3, 3).to(memory_format=torch.channels_last),
    "transposed": lambda: normal(37, 53).t(),
    "strided_view": lambda: normal(40, 60)[::2, 1::3],
    "float64": lambda: normal(1021, dtype=torch.float64),
    "bfloat16": lambda: normal(1021, dtype=torch.bfloat16),
    "complex": lambda: normal(17, dtype=torch.complex64),
}


def set_gradient(parameter: Tensor, step: int) -> None:
    """A gradient that is laid out like the parameter, changes over the steps, and has zeros and both signs."""
    noise = normal(*parameter.shape, seed=step, dtype=parameter.dtype)
    parameter.grad = torch.empty_like(parameter).copy_(noise * (noise.abs() > 0.3))


@pytest.fixture(params=[1, 2], ids=["1_thread", "2_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("weight_decay", [0.0, 3e-4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_equal_torch_adamax(layout: str, weight_decay: float) -> None:
    ours, theirs = LAYOUTS[layout](), LAYOUTS[layout]()
    assert ours.stride() == theirs.stride()
    settings_ = {**PUBLISHED, "weight_decay": weight_decay}
    host, reference = HostAdamax([ours], **settings_), torch.optim.Adamax([theirs], foreach=False, **settings_)
    for step in range(20):
        for parameter, optimizer in ((ours, host), (theirs, reference)):
            set_gradient(parameter, step)
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            optimizer.step()
    tolerance = 1e-7 if layout != "float64" else 1e-15
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
    for name, value in reference.state[theirs].items():
        torch.testing.assert_close(host.state[ours][name], value, rtol=tolerance, atol=0)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    rate=st.floats(1e-5, 1.0),
    betas=st.tuples(st.floats(0.0, 0.99), st.floats(0.0, 0.9999)),
    eps=st.floats(1e-8, 1e-2),
    weight_decay=st.floats(0.0, 0.1),
)
def test_any_settings_equal_torch_adamax(
    shape: list[int], rate: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    ours, theirs = normal(*shape), normal(*shape)
    given_: dict[str, Any] = {"lr": rate, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    for parameter, optimizer in (
        (ours, HostAdamax([ours], **given_)),
        (theirs, torch.optim.Adamax([theirs], foreach=False, **given_)),
    ):
        for step in range(3):
            set_gradient(parameter, step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0)


@pytest.mark.parametrize("layout", ["several_chunks_and_a_rest", "channels_last", "strided_view"])
def test_the_gradient_is_left_as_it_was(layout: str) -> None:
    parameter = LAYOUTS[layout]()
    set_gradient(parameter, 0)
    assert parameter.grad is not None
    before = parameter.grad.clone()
    HostAdamax([parameter], **PUBLISHED).step()
    assert torch.equal(parameter.grad, before)


@pytest.mark.parametrize(
    "layout", ["several_chunks_and_a_rest", "conv_weight", "channels_last", "transposed", "float64", "bfloat16"]
)
def test_every_dense_layout_is_worked_through_in_chunks(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_adamax, "torch_adamax", lambda *_, **__: pytest.fail("took torch's own path"))
    parameter = LAYOUTS[layout]()
    before = parameter.clone()
    set_gradient(parameter, 3)
    HostAdamax([parameter], **PUBLISHED).step()
    assert not torch.equal(parameter, before)


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_only_the_threads_of_the_update_are_kept_to_one_torch_thread(threads: int) -> None:
    host_adamax._thread_pool.cache_clear()  # the number is changed and put back where the threads are made
    parameter = normal(3 * CHUNK_ELEMENTS)
    set_gradient(parameter, 0)
    HostAdamax([parameter], **PUBLISHED).step()
    assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(1) as new_thread:
        assert new_thread.submit(torch.get_num_threads).result() == threads
    assert host_adamax._thread_pool(threads).submit(torch.get_num_threads).result() == 1


class LargestAllocation(TorchDispatchMode):
    """Records the bytes of the largest storage that any operation returns and that was not there before."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_no_temporary_is_larger_than_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # the watch sees the operations of its own thread only
    peaks = []
    for optimizer_type in (HostAdamax, torch.optim.Adamax):
        parameter = normal(3 * CHUNK_ELEMENTS)
        set_gradient(parameter, 0)
        optimizer = optimizer_type([parameter], **PUBLISHED)
        optimizer.step()
        state = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
        assert parameter.grad is not None
        with LargestAllocation([parameter, parameter.grad, *state]) as largest:
            optimizer.step()
        peaks.append(largest.bytes)
    assert peaks == [4 * CHUNK_ELEMENTS, 4 * 3 * CHUNK_ELEMENTS]  # torch's shows that the watch works


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ELU(), nn.Flatten(), nn.Linear(8 * 36, 5))


def two_groups(model: nn.Module) -> list[dict[str, object]]:
    conv, *rest = model.children()
    others = [p for module in rest for p in module.parameters()]
    return [{"params": list(conv.parameters()), "lr": 5e-3}, {"params": others, "weight_decay": 0.0}]


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    model(normal(4, 3, 8, 8, seed=step)).square().mean().backward()


def assert_same_parameters(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=0)


def test_updates_of_single_parameters_equal_one_step() -> None:
    whole, single = small_model(), small_model()
    host, engine = (HostAdamax(two_groups(m), **PUBLISHED) for m in (whole, single))
    for step in range(4):
        backward(whole, step)
        host.step()
        backward(single, step)
        for parameter in reversed(list(single.parameters())):  # as gradients arrive in a backward pass
            engine.step_parameter(parameter)
        if step == 1:  # the groups are new objects after a load
            engine.load_state_dict(copy.deepcopy(host.state_dict()))
            for optimizer in (host, engine):
                optimizer.param_groups[0]["lr"] = 1e-3
    for a, b in zip(whole.parameters(), single.parameters(), strict=True):
        assert torch.equal(a, b)


def test_step_parameter_works_from_gradient_hooks_within_the_backward_pass() -> None:
    whole, hooked = small_model(), small_model()
    host, engine = (HostAdamax(m.parameters(), **PUBLISHED) for m in (whole, hooked))
    for parameter in hooked.parameters():
        parameter.register_post_accumulate_grad_hook(engine.step_parameter)
    for step in range(3):
        backward(whole, step)
        host.step()
        backward(hooked, step)
    for a, b in zip(whole.parameters(), hooked.parameters(), strict=True):
        assert torch.equal(a, b)


def test_step_parameter_refuses_strangers_and_parameters_without_gradient() -> None:
    parameter, stranger = normal(3), normal(2, 5)
    optimizer = HostAdamax([parameter])
    with pytest.raises(ValueError, match=r"shape \(3,\) has no gradient"):
        optimizer.step_parameter(parameter)
    stranger.grad = torch.ones_like(stranger)
    with pytest.raises(ValueError, match=r"shape \(2, 5\) is not in this optimizer"):
        optimizer.step_parameter(stranger)


@pytest.mark.parametrize("first, second", [(HostAdamax, torch.optim.Adamax), (torch.optim.Adamax, HostAdamax)])
def test_a_saved_state_continues_in_the_other_optimizer(
    first: type[torch.optim.Optimizer], second: type[torch.optim.Optimizer]
) -> None:
    model, reference = small_model(), small_model()
    theirs = torch.optim.Adamax(reference.parameters(), foreach=False, **PUBLISHED)
    ours = first(model.parameters(), **PUBLISHED)  # type: ignore[call-arg]
    for step in range(6):
        if step == 3:
            file = io.BytesIO()
            torch.save(ours.state_dict(), file)
            file.seek(0)
            ours = second(model.parameters())  # type: ignore[call-arg]
            ours.load_state_dict(torch.load(file, weights_only=True))
        for net, optimizer in ((model, ours), (reference, theirs)):
            backward(net, step)
            optimizer.step()
    assert_same_parameters(model, reference)


def test_a_loaded_group_with_maximize_is_maximised() -> None:
    ours, theirs = normal(50), normal(50)
    reference = torch.optim.Adamax([theirs], maximize=True, foreach=False)
    host = HostAdamax([ours])
    host.load_state_dict(reference.state_dict())
    for parameter, optimizer in ((ours, host), (theirs, reference)):
        set_gradient(parameter, 0)
        optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0)


def test_a_deep_copied_optimizer_still_updates_single_parameters() -> None:
    parameter = normal(10)
    set_gradient(parameter, 0)
    optimizer = copy.deepcopy(HostAdamax([parameter], **PUBLISHED))
    copied = optimizer.param_groups[0]["params"][0]
    optimizer.step_parameter(copied)
    assert not torch.equal(copied, parameter)


def test_the_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    parameter = nn.Parameter(normal(4))
    optimizer = HostAdamax([parameter], **PUBLISHED)

    def closure() -> float:
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    before = parameter.detach().clone()
    assert optimizer.step(closure) == pytest.approx(before.square().sum().item())
    assert not torch.equal(parameter, before)


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match="Invalid"):
            HostAdamax([normal(2)], **wrong)  # type: ignore[arg-type]


ZERO_RUN = """
    import os, sys
    import deepspeed, deepspeed.ops, torch
    from torch import nn
    from nvae_lowmem.training.engines.host_adamax import HostAdamax

    deepspeed.ops.__compatible_ops__ = {}  # no compilation of an extension that only inference uses
    deepspeed.init_distributed()
    def train(optimizer_type, under_zero):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 33), nn.ELU(), nn.Linear(33, 3))
        optimizer = optimizer_type(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=3e-4)
        if under_zero:
            config = {
                "train_micro_batch_size_per_gpu": 5, "gradient_clipping": 0.0,
                "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {"stage": 2, "reduce_bucket_size": 100, "offload_optimizer": {"device": "cpu"}},
            }
            engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for step in range(5):
            torch.manual_seed(step)
            if under_zero:
                engine.backward(engine(torch.randn(5, 7)).square().mean())
                engine.step()
            else:
                optimizer.zero_grad()
                model(torch.randn(5, 7)).square().mean().backward()
                optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    for a, b in zip(train(HostAdamax, True), train(torch.optim.Adamax, False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=0)
    print("equal under ZeRO")
"""


@pytest.mark.slow
def test_under_deepspeed_zero_offload_it_equals_plain_adamax() -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is optional")
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = {**os.environ, **launcher, "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ZERO_RUN)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert "equal under ZeRO" in run.stdout, run.stderr[-2000:]
