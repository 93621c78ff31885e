"""Which precision a card trains in, and the self-test of fp16 where a card needs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nvae_lowmem.config.sections import Precision
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware import precision
from nvae_lowmem.hardware.find_card import find_card
from nvae_lowmem.hardware.precision import choose_precision, fp16_convolution_selftest, precision_here

# ---- what it can do --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected", "why", "conditional"),
    [
        ("gtx-970", "fp16", "half the bytes", False),
        ("gtx-1650", "fp16", "self-test", True),
        ("t400", "fp16", "self-test", True),
        ("rtx-3050-laptop", "bf16", "no loss scaling", False),
        ("h200", "bf16", "no loss scaling", False),
    ],
)
def test_the_precision_follows_the_card_with_its_reason(name: str, expected: str, why: str, conditional: bool) -> None:
    card = find_card(name)
    found, reason = choose_precision("auto", card)
    assert found == expected
    assert why in reason
    assert card.needs_fp16_selftest is conditional


@pytest.mark.parametrize("wanted", ["auto", "fp16", "bf16", "fp32"])
def test_a_card_without_bf16_is_never_given_it(wanted: Precision) -> None:
    if wanted == "bf16":
        with pytest.raises(ConfigError, match=r"plan\.precision = 'bf16': .*GTX 970 has no bf16"):
            choose_precision(wanted, find_card("gtx-970"))
    else:
        assert choose_precision(wanted, find_card("gtx-970"))[0] == ("fp16" if wanted == "auto" else wanted)


def test_the_cpu_computes_in_fp32_and_an_unnamed_card_in_fp16() -> None:
    assert precision_here("auto", torch.device("cpu"))[0] == "fp32"
    assert precision_here("bf16", torch.device("cpu"))[0] == "bf16"
    assert choose_precision("auto", None)[0] == "fp16"


# ---- the self-test ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [True, False])
def test_fp16_that_may_give_nan_is_tried_before_training_in_it(monkeypatch: pytest.MonkeyPatch, passes: bool) -> None:
    card, device = find_card("gtx-1650"), torch.device("cuda", 0)
    tried: list[torch.device] = []
    monkeypatch.setattr(
        precision, "fp16_convolution_selftest", lambda d: (tried.append(d) or passes, "agree" if passes else "NaN")
    )
    monkeypatch.setattr(precision, "detect_card", lambda index: card)
    assert choose_precision("auto", card)[0] == "fp16" and not tried  # planning for a card that is elsewhere
    found, why = precision_here("auto", device)
    assert found == ("fp16" if passes else "fp32") and ("agree" if passes else "NaN") in why
    if passes:  # a shipped profile asks for fp16 by name
        assert precision_here("fp16", device)[0] == "fp16"
    else:
        with pytest.raises(ConfigError, match=r"plan\.precision = 'fp16': NaN; use fp32"):
            precision_here("fp16", device)
    assert tried == [device, device]
    assert precision_here("fp32", device)[0] == "fp32" and len(tried) == 2


def test_the_fp16_selftest_passes_on_the_cpu_and_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    passed, text = fp16_convolution_selftest("cpu")
    assert passed or "do not run on cpu" in text  # some CPUs and older torch have no half convolution
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(float("nan"), "gives NaN or infinity in its output"), (1.2, "are off by 20"), (None, "do not run")],
)
def test_the_fp16_selftest_fails_where_half_convolutions_are_wrong(
    monkeypatch: pytest.MonkeyPatch, damage: float | None, message: str
) -> None:
    honest = torch.nn.functional.conv2d

    def broken(image: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        if image.dtype == torch.float32:
            return honest(image, weight, **options)
        if damage is None:
            raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'\nsecond line")
        return (honest(image.float(), weight.float(), **options) * damage).half()

    monkeypatch.setattr(torch.nn.functional, "conv2d", broken)
    passed, text = fp16_convolution_selftest("cpu")
    assert not passed
    assert message in text
    assert "\n" not in text
