"""Models for the tests, and their layers written with torch.nn.functional, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.model.cells import CELLS
from nvae_lowmem.model.layers import ConvUnit, NormLayer
from nvae_lowmem.model.nvae import NVAE, ElboTerms

# --- small networks ---------------------------------------------------------------------------------------------------


def tiny_rgb(**changes: Any) -> ModelConfig:
    """RGB, two scales of two groups, with flows: everything the network has, as small as it gets."""
    base = ModelConfig(
        image_channels=3, image_size=16, bits=8, mixtures=2, channels_encoder=8, channels_decoder=8, scales=2, groups=2,
        adaptive=False, latents=3, cells_encoder=1, cells_decoder=1, preprocess_blocks=1, preprocess_cells=2,
        postprocess_blocks=1, postprocess_cells=2, flows=1,
    )  # fmt: skip
    config = replace(base, **changes)
    assert not config.problems()
    return config


def build(config: ModelConfig, seed: int = 0) -> NVAE:
    torch.manual_seed(seed)
    return NVAE(config)


def images(config: ModelConfig, batch: int = 2, seed: int = 0) -> Tensor:
    """(B, channels, S, S) in [0,1] on the grid of the configuration's bits."""
    shape, top = (batch, config.image_channels, config.network_size, config.network_size), 2**config.bits - 1
    return torch.randint(0, top + 1, shape, generator=torch.Generator().manual_seed(seed)) / top


def loss_of(terms: ElboTerms) -> Tensor:
    return (terms.nll + sum(kl.sum(1) for kl in terms.kl)).mean()


VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"architecture": name} for name in CELLS},
    "2_channels": {"image_channels": 2},
    "5_channels": {"image_channels": 5},
    "1_bit_padded": {"bits": 1, "image_channels": 1, "image_size": 12, "padding": 2},
    "5_bits": {"bits": 5},
    "normal_likelihood": {"mixtures": 1},
    "no_residual_posterior": {"residual_posterior": False},
    "no_squeeze_excitation": {"squeeze_excitation": False},
    "no_flows": {"flows": 0},
    "classes": {"classes": 5},
    "three_scales": {"scales": 3, "groups_per_scale": (2, 1, 3)},
    "other_widths": {"channels_encoder": 8, "channels_decoder": 16},
    "vanilla": {"scales": 1, "groups": 1, "preprocess_blocks": 2, "postprocess_blocks": 2},
    "vanilla_classes": {"scales": 1, "groups": 1, "preprocess_blocks": 2, "postprocess_blocks": 2, "classes": 5},
    "vanilla_no_resampling": {
        "scales": 1,
        "groups": 1,
        "preprocess_blocks": 0,
        "postprocess_blocks": 0,
        "image_size": 4,
    },
}


# --- layers -----------------------------------------------------------------------------------------------------------

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "swish": F.silu,
    "elu": F.elu,
    "elu_elu": lambda x: F.elu(F.elu(x)),
}


with_both_keeps = pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])


def scrambled(module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """The module in `dtype`, every value drawn from the seed: none is left at a 0 or 1 that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith("running_variance"):
            tensor.data.uniform_(0.5, 2.0, generator=generator)
        elif not name.endswith(("mask", "sigma")):
            tensor.data.normal_(0.0, 0.5, generator=generator)
        if name.endswith((".u", ".v")) or name in ("u", "v"):
            tensor.data.div_(tensor.data.norm())
    return module.to(dtype)


def set_recompute(module: nn.Module, recompute: bool) -> None:
    switches: list[Any] = [m for m in module.modules() if hasattr(m, "recompute")]
    for m in switches:
        m.recompute = recompute


def normals(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain_norm(layer: Any, x: Tensor) -> Tensor:
    if layer.gamma is None:
        return x
    statistics = layer.running_mean.clone(), layer.running_variance.clone()
    return F.batch_norm(x, *statistics, layer.gamma, layer.beta, layer.training, 0.05, 1e-5)


def plain_weight(unit: Any) -> Tensor:
    v = unit.weight if unit.mask is None else unit.weight * unit.mask
    if unit.log_norm is None:
        return v
    return unit.log_norm.exp() * v / (v.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-5)


def plain_unit(unit: Any, x: Tensor) -> Tensor:
    a = PLAIN[unit.activation](plain_norm(unit, x))
    if unit.upsample:
        a = F.interpolate(a, scale_factor=2, mode="nearest")
    padding = unit.dilation * (unit.weight.shape[-1] // 2)
    return F.conv2d(a, plain_weight(unit), unit.bias, unit.stride, padding, unit.dilation, unit.groups)


def plain_regulariser(module: nn.Module) -> Tensor:
    """Sum of u^T W v over convolutions, with u and v fixed, + sum of max|gamma|."""
    units: list[Any] = [m for m in module.modules() if isinstance(m, ConvUnit)]
    gammas = [m.gamma for m in module.modules() if isinstance(m, NormLayer) and m.gamma is not None]
    sigmas = [unit.u @ plain_weight(unit).flatten(1) @ unit.v for unit in units]
    return torch.stack(sigmas + [gamma.abs().max() for gamma in gammas]).sum()


def assert_same_values_and_gradients(
    module: nn.Module, plain: Callable[..., Tensor], *inputs: Tensor, rtol: float = 1e-9, atol: float = 1e-11
) -> None:
    """The module and `plain` agree in value and in the gradient of every input and parameter."""
    parameters = dict(module.named_parameters())
    leaves = [x.requires_grad_() for x in inputs] + list(parameters.values())
    expected = plain(*inputs)
    g = normals(*expected.shape, seed=5)
    wanted = torch.autograd.grad(expected, leaves, g)
    actual = module(*inputs)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
    got = torch.autograd.grad(actual, leaves, g)
    for name, a, e in zip([*(f"input {i}" for i in range(len(inputs))), *parameters], got, wanted, strict=True):
        torch.testing.assert_close(a, e, rtol=rtol, atol=atol, msg=f"gradient of {name}: {{}}".format)


def assert_gradcheck(module: nn.Module, *inputs: Tensor, fast: bool = True) -> None:
    """The backward pass agrees with finite differences in every input and parameter."""
    names = [name for name, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    leaves = [x.requires_grad_() for x in inputs]

    def run(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors[len(inputs) :], strict=True))
        return functional_call(module, given, tensors[: len(inputs)])

    assert torch.autograd.gradcheck(run, (*leaves, *values), fast_mode=fast)


def saved_storages(module: nn.Module, *inputs: Any) -> dict[int, Tensor]:
    """Every storage that the graph of module(*inputs) holds, apart from parameters: address -> one tensor of it."""
    saved: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(*inputs)
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    return {address: t for address, t in saved.items() if address not in own}
