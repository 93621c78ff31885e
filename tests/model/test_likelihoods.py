"""The likelihood is chosen from the configuration, and computing it in chunks changes nothing but memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from likelihood_cases import every_kind, random_images, random_parameters
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.model.likelihoods import (
    Bernoulli,
    DiscretisedNormal,
    Likelihood,
    LogisticMixture,
    make_likelihood,
    negative_log_likelihood,
)


@every_kind
def test_gradient_of_the_chunked_likelihood_is_the_derivative(likelihood: Likelihood) -> None:
    parameters = random_parameters(likelihood, 1, 3, 4).clamp(-5.5, 5.5).requires_grad_()  # off the clamp's kink at -7
    x = random_images(likelihood, 1, 3, 4)

    def loss(parameters: Tensor) -> Tensor:
        return negative_log_likelihood(likelihood, parameters, x, crop=1, chunk_bytes=1)

    assert torch.autograd.gradcheck(loss, parameters, eps=1e-7, atol=1e-4, rtol=1e-4)


def nll_and_gradient(nll: Callable[[Tensor], Tensor], parameters: Tensor) -> tuple[Tensor, Tensor]:
    leaf = parameters.clone().requires_grad_()
    values = nll(leaf)
    weights = torch.linspace(0.5, 2.0, len(values), dtype=values.dtype)
    (gradient,) = torch.autograd.grad(values, leaf, weights)
    return values.detach(), gradient


@every_kind
@pytest.mark.parametrize("crop", [0, 2])
@pytest.mark.parametrize(
    "chunk", [{}, {"chunk_images": 2}, {"chunk_images": 9}, {"chunk_bytes": 1}, {"chunk_bytes": 50_000}], ids=str
)
def test_chunks_give_the_values_and_gradients_of_plain_autograd(
    likelihood: Likelihood, crop: int, chunk: dict[str, int]
) -> None:
    parameters, x = random_parameters(likelihood, 5, 9, 8), random_images(likelihood, 5, 9, 8)
    inside = (..., slice(crop, 9 - crop), slice(crop, 8 - crop))
    expected = nll_and_gradient(lambda p: -likelihood.log_prob(p[inside], x[inside]), parameters)
    actual = nll_and_gradient(lambda p: negative_log_likelihood(likelihood, p, x, crop, **chunk), parameters)
    # Not to the last bit: a processor's vector and scalar code differ there, and a chunk has another remainder.
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-12, atol=1e-14 * expected[1].abs().max().item())


def test_gradient_has_the_type_and_layout_of_half_parameters() -> None:
    likelihood = LogisticMixture(3, 8)
    parameters = random_parameters(likelihood, 2, 8, 8).half().to(memory_format=torch.channels_last)
    x = random_images(likelihood, 2, 8, 8).float()
    expected = nll_and_gradient(lambda p: -likelihood.log_prob(p, x), parameters)
    actual = nll_and_gradient(lambda p: negative_log_likelihood(likelihood, p, x, chunk_bytes=1), parameters)
    assert actual[1].dtype == torch.float16
    assert actual[1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-3, atol=1e-3)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations create while it is on, and the most that live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.allocations = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given_storages = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given_storages | self._known:
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.allocations += 1
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def temporaries(likelihood: Likelihood, batch: int, size: int, dtype: torch.dtype, **chunk: int) -> tuple[int, int]:
    """(bytes, allocations) of a forward and backward pass: their peak beyond the gradient, and how many there were."""
    parameters = random_parameters(likelihood, batch, size, size).to(dtype).requires_grad_()
    x = random_images(likelihood, batch, size, size).float()
    with LiveBytes() as forward:
        nll = negative_log_likelihood(likelihood, parameters, x, **chunk)
    ones = torch.ones_like(nll)
    with LiveBytes() as backward:
        nll.backward(ones)
    gradient_bytes = parameters.numel() * parameters.element_size()
    return max(forward.peak, backward.peak - gradient_bytes), forward.allocations + backward.allocations


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_temporaries_stay_under_the_chunk_bytes_and_use_a_good_part_of_them(
    likelihood: Likelihood, dtype: torch.dtype
) -> None:
    size = 48
    limit = likelihood.working_values_per_pixel * 4 * size * (size // 4)  # a quarter of an image
    peak_bytes, _ = temporaries(likelihood, 2, size, dtype, chunk_bytes=limit)
    whole_bytes, _ = temporaries(likelihood, 2, size, dtype, chunk_bytes=1 << 40)
    assert 0.4 * limit < peak_bytes <= limit
    assert whole_bytes > 3.5 * peak_bytes


def test_memory_of_a_chunk_does_not_depend_on_the_batch_and_allocations_grow_with_the_chunks_alone() -> None:
    likelihood = LogisticMixture(3, 8)
    bytes_and_allocations = [temporaries(likelihood, batch, 8, torch.bfloat16) for batch in (2, 3, 4)]
    (bytes_2, count_2), (bytes_3, count_3), (bytes_4, count_4) = bytes_and_allocations
    assert bytes_4 - bytes_3 == bytes_3 - bytes_2 < 64  # the result itself
    assert count_4 - count_3 == count_3 - count_2


def test_only_the_parameters_and_the_images_are_kept_for_the_backward_pass() -> None:
    likelihood = LogisticMixture(3, 8)
    parameters = random_parameters(likelihood, 2, 8, 8).bfloat16().requires_grad_()
    x = random_images(likelihood, 2, 8, 8).float()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        negative_log_likelihood(likelihood, parameters, x)
    assert kept == [parameters.data_ptr(), x.data_ptr()]


@every_kind
def test_a_pass_runs_on_fake_tensors(likelihood: Likelihood) -> None:
    with FakeTensorMode():
        parameters = torch.empty(4, likelihood.parameter_channels, 32, 32, dtype=torch.bfloat16, requires_grad=True)
        x = torch.empty(4, likelihood.image_channels, 32, 32)
        nll = negative_log_likelihood(likelihood, parameters, x, crop=2, chunk_bytes=1_000_000)
        nll.sum().backward()
    assert nll.shape == (4,)
    assert nll.dtype == torch.float32
    assert parameters.grad is not None
    assert parameters.grad.shape == parameters.shape


@pytest.mark.parametrize(
    ("name", "channels", "bits", "mixtures", "expected", "outputs"),
    [
        ("auto", 1, 1, 10, Bernoulli, 1),
        ("auto", 3, 1, 10, Bernoulli, 3),
        ("auto", 3, 8, 10, LogisticMixture, 100),
        ("auto", 3, 5, 1, DiscretisedNormal, 6),
        ("auto", 1, 8, 10, LogisticMixture, 30),
        ("logistic_mixture", 1, 1, 1, LogisticMixture, 3),
        ("logistic_mixture", 4, 8, 2, LogisticMixture, 18),
        ("normal", 2, 8, 10, DiscretisedNormal, 4),
        ("bernoulli", 1, 1, 10, Bernoulli, 1),
    ],
)
def test_likelihood_is_chosen_by_name_or_from_the_data(
    name: str, channels: int, bits: int, mixtures: int, expected: type, outputs: int
) -> None:
    likelihood = make_likelihood(name, channels, bits, mixtures)
    assert type(likelihood) is expected
    assert (likelihood.image_channels, likelihood.bits) == (channels, bits)
    assert likelihood.parameter_channels == outputs
    assert f"{bits} bit" in likelihood.describe()
    assert f"{outputs} output channel" in likelihood.describe()


@pytest.mark.parametrize(
    ("name", "channels", "bits", "mixtures", "named"),
    [
        ("bernoulli", 1, 8, 10, ["'bernoulli'", "bits = 8"]),
        ("gaussian", 3, 8, 10, ["'gaussian'", "logistic_mixture"]),
        ("auto", 0, 9, 0, ["bits = 9", "image_channels = 0", "mixtures = 0"]),
    ],
)
def test_impossible_combinations_are_refused_with_the_option_and_the_value(
    name: str, channels: int, bits: int, mixtures: int, named: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        make_likelihood(name, channels, bits, mixtures)
    assert all(text in str(refused.value) for text in named)
