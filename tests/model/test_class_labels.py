"""Class labels in the network: what they change, and that nothing changes without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import build, images, loss_of, tiny_rgb
from torch import Tensor

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.data.labels import label_rows
from nvae_lowmem.model.latents import FromPrior, SeededNoise
from nvae_lowmem.model.nvae import NVAE

PLAIN, LABELLED = tiny_rgb(), tiny_rgb(classes=4)
VANILLA = {"scales": 1, "groups": 1, "preprocess_blocks": 2, "postprocess_blocks": 2}
ROWS = label_rows([0, 3], 4)


def moved(model: NVAE) -> NVAE:
    """With class tables that are not zero any more, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "class_" in name:
                parameter.normal_(0, 0.05, generator=generator)
    return model.eval()


def terms(model: NVAE, config: ModelConfig, labels: Tensor | None) -> Tensor:
    with torch.no_grad():
        found = model(images(config), SeededNoise(0), labels)
    return torch.cat([found.nll[None], *(kl.sum(1)[None] for kl in found.kl)])


def test_without_classes_there_is_no_parameter_more() -> None:
    tables = {name for name, _ in build(LABELLED).named_parameters() if "class_" in name}
    assert tables == {
        "blocks.dec_1_0.class_prior.rows",
        *(f"blocks.dec_{scale}_{group}.class_bias.rows" for scale in (0, 1) for group in (0, 1)),
    }
    plain, labelled = build(PLAIN).state_dict(), build(LABELLED).state_dict()
    assert plain.keys() == labelled.keys() - tables
    assert all(torch.equal(plain[name], labelled[name]) for name in plain)  # not a random number more, either


@pytest.mark.parametrize("labels", [None, ROWS])
def test_new_tables_are_zero_and_labels_begin_without_effect(labels: Tensor | None) -> None:
    plain, labelled = build(PLAIN).eval(), build(LABELLED).eval()
    torch.testing.assert_close(terms(labelled, LABELLED, labels), terms(plain, PLAIN, None))


@pytest.mark.parametrize("changes", [{}, VANILLA, {"residual_posterior": False}, {"flows": 0}])
def test_no_label_is_the_last_column_and_every_class_its_own(changes: dict[str, Any]) -> None:
    config = tiny_rgb(classes=4, **changes)
    model = moved(build(config))
    torch.testing.assert_close(terms(model, config, None), terms(model, config, label_rows([-1, -1], 4)))
    found = [terms(model, config, label_rows([n, n], 4)) for n in (-1, 0, 1, 2, 3)]
    assert all(not torch.allclose(a, b) for i, a in enumerate(found) for b in found[:i])


def test_an_image_depends_on_its_own_label_alone() -> None:
    model = moved(build(LABELLED))
    both, swapped = (terms(model, LABELLED, label_rows(n, 4)) for n in ([1, 2], [1, 0]))
    assert torch.equal(both[:, 0], swapped[:, 0]) and not torch.allclose(both[:, 1], swapped[:, 1])


@pytest.mark.parametrize("changes", [{}, VANILLA])
def test_every_table_gets_a_gradient_in_the_rows_that_were_seen(changes: dict[str, Any]) -> None:
    model = moved(build(tiny_rgb(classes=4, **changes)))
    loss_of(model(images(LABELLED), SeededNoise(0), ROWS)).backward()
    tables = {name: p for name, p in model.named_parameters() if "class_" in name}
    for name, parameter in tables.items():
        assert parameter.grad is not None
        seen = parameter.grad.abs().sum(1) > 0
        assert seen.tolist() == [True, False, False, True, False], name


def test_the_gradient_is_that_of_finite_differences() -> None:
    model, x = moved(build(LABELLED)).double(), images(LABELLED).double()
    parameter = dict(model.named_parameters())["blocks.dec_1_0.class_prior.rows"]

    def loss() -> Tensor:
        return loss_of(model(x, SeededNoise(0), ROWS.double()))

    (gradient,) = torch.autograd.grad(loss(), parameter)
    with torch.no_grad():
        step = 1e-4
        parameter[3, 5] += step
        above = loss()
        parameter[3, 5] -= 2 * step
        below = loss()
    # latents are fp32 whatever the activations are
    torch.testing.assert_close(gradient[3, 5].float(), ((above - below) / (2 * step)).float(), rtol=2e-2, atol=1e-3)


def test_the_first_groups_prior_is_learned_for_each_class() -> None:
    model = moved(build(LABELLED))
    with torch.no_grad():
        _, latents = model.top_down(FromPrior(SeededNoise(0), 0.0), batch=5, return_z=True, labels=label_rows(
            [-1, 0, 1, 2, 3], 4
        ))  # fmt: skip
    z = latents[0].z
    assert z is not None and len({row.flatten()[0].item() for row in z}) == 5


def test_half_precision_takes_labels() -> None:
    model = moved(build(LABELLED))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = model(images(LABELLED), SeededNoise(0), ROWS)
    assert torch.isfinite(found.nll).all()
