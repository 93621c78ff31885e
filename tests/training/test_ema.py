"""WeightEma: the averaging rule, where the copy lives, and the exchange with the live model."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nvae_lowmem.training.ema import WeightEma


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 16, 3))


def train_one_step(model: nn.Module, step: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    images = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(step))
    model(images).square().mean().backward()
    optimizer.step()


def contents(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal_contents(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def an_ema_and_its_model() -> tuple[WeightEma, nn.Module]:
    model = small_model()
    ema = WeightEma(model, decay=0.999)
    for step in range(3):
        train_one_step(model, step)
        ema.update(model, step)
    return ema, model


@settings(max_examples=20, deadline=None)
@given(decay=st.floats(0.0, 1.0), first_step=st.integers(0, 5000))
def test_parameters_follow_the_moving_average_with_decay_warm_up(decay: float, first_step: int) -> None:
    model = nn.Linear(3, 2)
    ema = WeightEma(model, decay)
    expected = model.weight.detach().double()
    for step in range(first_step, first_step + 4):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)))
        ema.update(model, step)
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * model.weight.detach().double()
    averaged = dict(ema.module.named_parameters())["weight"]
    torch.testing.assert_close(averaged.double(), expected, rtol=1e-5, atol=1e-6)


def test_after_the_decay_warm_up_it_is_torchs_average() -> None:
    model = small_model()
    ema, reference = WeightEma(model, decay=0.9), AveragedModel(model, avg_fn=get_ema_avg_fn(0.9))
    reference.update_parameters(model)  # torch's first update only copies
    for step in range(100, 105):
        train_one_step(model, step)
        ema.update(model, step)
        reference.update_parameters(model)
    for ours, theirs in zip(ema.module.parameters(), reference.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-7, check_stride=True)


def test_buffers_are_copied_not_averaged() -> None:
    ema, model = an_ema_and_its_model()
    held, live = dict(ema.module.named_buffers()), dict(model.named_buffers())
    assert live["1.num_batches_tracked"] == 3
    assert_equal_contents(held, live)


def test_a_bfloat16_model_is_averaged_in_fp32() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    ema = WeightEma(model, decay=0.999)
    nn.init.constant_(model.weight, 2.0)
    ema.update(model, 10**6)
    averaged = next(ema.module.parameters())
    assert averaged.dtype == torch.float32
    assert averaged.item() == pytest.approx(1.001, rel=1e-6)
    with ema.applied_to(model):
        assert model.weight.item() == 1.0 and model.weight.dtype == torch.bfloat16
    assert model.weight.item() == 2.0 and averaged.item() == pytest.approx(1.001, rel=1e-6)


def test_the_copy_shares_nothing_with_the_model_and_needs_no_gradient() -> None:
    model = small_model()
    ema = WeightEma(model, decay=0.9)
    assert_equal_contents(contents(ema.module), contents(model))
    pointers = {t.data_ptr() for t in model.state_dict().values()}
    assert all(t.data_ptr() not in pointers for t in ema.module.state_dict().values())
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_tied_parameters_stay_tied_in_the_copy() -> None:
    tied = nn.Linear(3, 3)
    model = nn.Sequential(tied, nn.ELU(), tied)
    module = WeightEma(model, decay=0.9).module
    assert len(list(module.parameters())) == 2


def test_within_the_context_the_model_computes_with_the_averages() -> None:
    ema, model = an_ema_and_its_model()
    images = torch.randn(2, 2, 6, 6)
    model.eval()
    ema.module.eval()
    expected, training = ema.module(images), model(images)
    with ema.applied_to(model):
        within = model(images)
    assert torch.equal(within, expected) and not torch.equal(within, training)
    assert torch.equal(model(images), training)


def test_the_model_and_the_average_come_back_exactly_also_after_an_exception() -> None:
    ema, model = an_ema_and_its_model()
    live, averaged = contents(model), copy.deepcopy(ema.state_dict())
    with pytest.raises(KeyError), ema.applied_to(model):
        for buffer in model.buffers():
            buffer.zero_()  # statistics re-estimated for sampling, say
        raise KeyError
    assert_equal_contents(contents(model), live)
    assert_equal_contents(ema.state_dict(), averaged)
    with ema.applied_to(model):  # and it can be done again
        pass
    assert_equal_contents(contents(model), live)


def test_a_model_that_does_not_fit_is_left_as_it_was() -> None:
    ema, model = an_ema_and_its_model()
    averaged = copy.deepcopy(ema.state_dict())
    other = nn.Sequential(*list(small_model(seed=1).children())[:3], nn.Linear(4 * 16, 7))
    before = contents(other)
    with pytest.raises(RuntimeError, match="size"), ema.applied_to(other):
        pytest.fail("the context must not be entered")
    assert_equal_contents(contents(other), before)
    assert_equal_contents(ema.state_dict(), averaged)


class LargestNewStorage(TorchDispatchMode):
    """Records the elements of the largest tensor copied to new memory, the only allocation an exchange makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given_ = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given_:
                self.elements = max(self.elements, tensor.numel())
                self.count += 1
        return result


def test_the_exchange_allocates_no_more_than_one_parameter_at_a_time() -> None:
    ema, model = an_ema_and_its_model()
    largest = max(p.numel() for p in model.parameters())
    with LargestNewStorage() as watch, ema.applied_to(model):
        pass
    assert watch.count > 0 and watch.elements == largest


def test_the_state_continues_in_a_new_average() -> None:
    ema, model = an_ema_and_its_model()
    resumed = WeightEma(small_model(seed=5), decay=0.999)
    resumed.load_state_dict(copy.deepcopy(ema.state_dict()))
    train_one_step(model, 3)
    for average in (ema, resumed):
        average.update(model, 3)
    assert_equal_contents(resumed.state_dict(), ema.state_dict())
    assert ema.state_dict()["n_averaged"] == 4


def test_a_state_of_another_model_is_refused() -> None:
    ema, _ = an_ema_and_its_model()
    with pytest.raises(RuntimeError, match="module.0.weight"):
        ema.load_state_dict(WeightEma(nn.Linear(2, 2), decay=0.9).state_dict())


def test_inside_the_context_the_average_can_be_neither_updated_nor_saved_nor_applied_again() -> None:
    ema, model = an_ema_and_its_model()
    with ema.applied_to(model):
        with pytest.raises(RuntimeError, match="update within applied_to"):
            ema.update(model, 3)
        with pytest.raises(RuntimeError, match="state_dict within applied_to"):
            ema.state_dict()
        with pytest.raises(RuntimeError, match="applied_to within applied_to"), ema.applied_to(model):
            pass
    ema.update(model, 3)


def test_without_a_device_the_copy_lies_where_the_model_does() -> None:
    model = nn.Linear(2, 2, device="meta")
    assert next(WeightEma(model, decay=0.9, device=None).module.parameters()).device.type == "meta"


def test_a_decay_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="ema decay 1.5"):
        WeightEma(nn.Linear(1, 1), decay=1.5)
