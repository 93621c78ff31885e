"""Which precision a card trains in, decided in one place; where fp16 may be unreliable it is tested first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nvae_lowmem.config.sections import Precision
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.card import Card
from nvae_lowmem.hardware.find_card import detect_card

if TYPE_CHECKING:
    import torch


def choose_precision(wanted: Precision, card: Card | None, device: torch.device | None = None) -> tuple[Precision, str]:
    """fp32, bf16 or fp16 for training on a card, and the reason.

    card: None where none was named. device: of this machine, where training is about to run on it: a CPU gains nothing
    by half precision, and a card whose fp16 may give NaN has to pass `fp16_convolution_selftest`. None: fp16 is chosen
    for such a card on the condition that it passes when training begins.
    Raises ConfigError for what was asked for by name and the card cannot do.
    """
    if wanted == "bf16" and card is not None and not card.bf16:
        raise ConfigError(
            f"plan.precision = 'bf16': {card.name} has no bf16 in hardware; use fp16, fp32, or leave it at auto"
        )
    precision, why = (wanted, "as asked") if wanted != "auto" else _best(card, device)
    if precision != "fp16" or card is None or device is None or not card.needs_fp16_selftest:
        return precision, why
    passed, finding = fp16_convolution_selftest(device)
    if passed:
        return "fp16", f"{why.partition(':')[0]}; here {finding}"
    if wanted == "fp16":
        raise ConfigError(f"plan.precision = 'fp16': {finding}; use fp32, and fit the plan anew for it")
    return "fp32", finding


def precision_here(wanted: Precision, device: torch.device) -> tuple[Precision, str]:
    """`choose_precision` for training on this machine's `device`."""
    return choose_precision(wanted, detect_card(device.index or 0) if device.type == "cuda" else None, device)


def _best(card: Card | None, device: torch.device | None) -> tuple[Precision, str]:
    if card is None:
        if device is not None:
            return "fp32", "no GPU; half precision saves card memory, which there is none of"
        return "fp16", "no card was named; every one can store activations in it"
    if card.bf16:
        return "bf16", f"{card.name} computes in bf16: fp32's range, so no loss scaling"
    if card.fp16 == "tensor":
        return "fp16", f"{card.name} has fp16 tensor cores and no bf16"
    if card.fp16 == "double":
        return "fp16", f"{card.name} may give NaN in fp16 convolutions: fp16 once the self-test passes on it, else fp32"
    return "fp16", f"{card.name} stores activations in fp16, half the bytes; its arithmetic stays at the fp32 rate"


def fp16_convolution_selftest(device: torch.device | str) -> tuple[bool, str]:
    """(passed, what was found): fp16 convolutions forward and backward on `device` against fp32 on the CPU.

    Catches the cards whose fp16 convolutions give NaN: one dense 3x3 and one depthwise 5x5, as in NVAE's cells. The
    caller's random generators are left alone. A device that cannot convolve in fp16 at all has not passed.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for kernel, groups in ((3, 1), (5, 32)):
        fan_in = 32 // groups * kernel**2
        image, slope = torch.randn(2, 4, 32, 16, 16, generator=generator).half()  # slope: d loss / d output
        weight = (torch.randn(32, 32 // groups, kernel, kernel, generator=generator) / fan_in**0.5).half()
        try:
            found = _convolve((image, weight, slope), groups, device, torch.float16)
        except RuntimeError as error:
            return False, f"fp16 convolutions do not run on {device}: {str(error).strip().splitlines()[0]}"
        exact = _convolve((image, weight, slope), groups, "cpu", torch.float32)
        for part, got, true in zip(("output", "input gradient", "weight gradient"), found, exact, strict=True):
            if not torch.isfinite(got).all():
                return False, f"fp16 {kernel}x{kernel} convolution on {device} gives NaN or infinity in its {part}"
            worst = max(worst, float((got - true).norm() / true.norm()))
    if worst > 0.01:  # rounding to fp16 alone gives less than 0.001
        return False, f"fp16 convolutions on {device} are off by {worst:.1%} from fp32"
    return True, f"fp16 convolutions on {device} agree with fp32 within {worst:.1e}"


def _convolve(
    tensors: tuple[torch.Tensor, ...], groups: int, device: torch.device | str, dtype: torch.dtype
) -> list[torch.Tensor]:
    """[output, d/d image, d/d weight] of one convolution computed in `dtype` on `device`, brought back as fp32."""
    import torch

    image, weight, slope = (t.to(device, dtype).clone() for t in tensors)
    for leaf in (image, weight):
        leaf.requires_grad_()
    output = torch.nn.functional.conv2d(image, weight, padding=weight.shape[-1] // 2, groups=groups)
    gradients = torch.autograd.grad(output, (image, weight), slope)
    return [t.detach().float().cpu() for t in (output, *gradients)]
