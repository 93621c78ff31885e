"""What the doctor says about torch, the driver and the card.

Facts are read once into `GpuFacts`; every check is a function of facts that returns one `Check`, so that it can be
tested for cards which are not in this machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.budget import this_os, usable_bytes
from nvae_lowmem.hardware.card import Card, torch_install_line
from nvae_lowmem.hardware.find_card import detect_card
from nvae_lowmem.hardware.precision import choose_precision, fp16_convolution_selftest
from nvae_lowmem.units import GIB, format_bytes

Status = Literal["OK", "WARN", "FAIL"]
_DRIVER_FOR_CUDA = {12: 525, 13: 580}  # CUDA major version -> first driver branch that runs it
BUSY_CARD_BYTES = GIB // 2
"""As much memory of other programs is worth a word."""


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report."""

    name: str
    status: Status
    finding: str
    advice: str = ""
    """What to do; empty when there is nothing to do."""


@dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """What torch and the driver say. None or empty: they do not say it."""

    torch_version: str | None = None
    torch_problem: str = ""
    """Why torch cannot be imported, or what it says against using the card."""
    cuda_version: str | None = None
    """CUDA version torch was built for; None: a CPU-only build."""
    arch_flags: tuple[str, ...] = ()
    """Architectures torch has kernels for, such as sm_50."""
    card: Card | None = None
    """The card that torch sees, with its real total."""
    free_bytes: int | None = None
    """Free on the card, this process's own context already taken off."""
    driver: str | None = None
    driver_problem: str = ""
    """Why the driver cannot be asked."""
    driver_cards: tuple[str, ...] = ()
    """Cards that the driver sees."""
    driver_capabilities: tuple[tuple[int, int], ...] = ()
    """Their compute capabilities."""
    process_bytes: tuple[int | None, ...] = ()
    """Memory of each process on the card; None under WDDM, which does not tell."""


def read_gpu() -> GpuFacts:
    """Ask torch and the driver. Creates a CUDA context where torch sees a card; never raises."""
    facts: dict[str, Any] = _ask_driver()
    try:
        import torch
    except Exception as error:
        return GpuFacts(**facts, torch_problem=first_line(error))
    facts |= {"torch_version": torch.__version__, "cuda_version": torch.version.cuda}
    read_flags = getattr(torch._C, "_cuda_getArchFlags", None)  # get_arch_list() is empty without a card
    facts["arch_flags"] = tuple((read_flags() or "").split()) if read_flags else ()
    with warnings.catch_warnings(record=True) as warned, contextlib.suppress(ConfigError, RuntimeError):
        warnings.simplefilter("always")  # torch only warns when the driver is too old for it
        facts["card"] = detect_card()
        facts["free_bytes"] = torch.cuda.mem_get_info(0)[0]
    if warned:
        facts["torch_problem"] = str(warned[0].message).strip().splitlines()[0]
    return GpuFacts(**facts)


def _ask_driver() -> dict[str, Any]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return {"driver_problem": "the package nvidia-ml-py is not installed"}
    except pynvml.NVMLError as error:
        return {"driver_problem": first_line(error)}
    facts: dict[str, Any] = {}
    try:
        facts["driver"] = _as_text(pynvml.nvmlSystemGetDriverVersion())
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        facts["driver_cards"] = tuple(_as_text(pynvml.nvmlDeviceGetName(handle)) for handle in handles)
        facts["driver_capabilities"] = tuple(map(tuple, map(pynvml.nvmlDeviceGetCudaComputeCapability, handles)))
        if len(handles) == 1:  # with several, the driver's order need not be torch's
            asks = (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses)
            used = {p.pid: p.usedGpuMemory for ask in asks for p in ask(handles[0]) if p.pid != os.getpid()}
            facts["process_bytes"] = tuple(used.values())
    except pynvml.NVMLError as error:
        facts["driver_problem"] = first_line(error)
    finally:
        pynvml.nvmlShutdown()
    return facts


def has_kernels(arch_flags: Iterable[str], compute_capability: tuple[int, int]) -> bool:
    """Whether machine code for one of these architectures (sm_50, ...) runs on that compute capability.

    It runs on its own major version from its minor version up; there is no going across major versions.
    """
    matches = (re.fullmatch(r"sm_(\d+)(\d)", flag) for flag in arch_flags)
    built = [(int(match[1]), int(match[2])) for match in matches if match]
    return any(major == compute_capability[0] and minor <= compute_capability[1] for major, minor in built)


def check_torch(facts: GpuFacts) -> Check:
    """Is there a torch, of a version that is supported?"""
    if facts.torch_version is None:
        advice = f"install it: {_install_line(facts)}"
        return Check("torch", "FAIL", f"cannot be imported: {facts.torch_problem}", advice)
    built = f"built for CUDA {facts.cuda_version}" if facts.cuda_version else "a CPU-only build"
    finding = f"{facts.torch_version}, {built}"
    if facts.arch_flags:
        finding += f", kernels for {' '.join(facts.arch_flags)}"
    version = version_numbers(facts.torch_version)
    if version < (2, 4):
        return Check("torch", "FAIL", finding, f"2.4 is the oldest that is supported: {_install_line(facts)}")
    if version >= (2, 16):
        return Check("torch", "WARN", finding, "newer than any tested; if something fails: pip install 'torch<2.16'")
    return Check("torch", "OK", finding)


def check_card(facts: GpuFacts) -> Check:
    """Does torch see a card?"""
    if facts.card is not None:
        major, minor = facts.card.compute_capability
        others = f" (and {len(facts.driver_cards) - 1} more)" if len(facts.driver_cards) > 1 else ""
        return Check("card", "OK", f"{facts.card.name}, compute capability {major}.{minor}{others}")
    if not facts.driver_cards:
        return Check(
            "card",
            "WARN",
            "no CUDA card",
            "planning works for any card (--card NAME); training runs on the CPU, slowly",
        )
    seen = f"the driver sees {', '.join(facts.driver_cards)}, but torch does not"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if facts.cuda_version is None:
        return Check("card", "FAIL", f"{seen}: it is a CPU-only build", _install_line(facts))
    if hidden is not None:
        return Check("card", "WARN", f"{seen}: CUDA_VISIBLE_DEVICES={hidden!r}", "unset CUDA_VISIBLE_DEVICES to use it")
    said = f": {facts.torch_problem}" if facts.torch_problem else ""
    return Check("card", "FAIL", seen + said, "see the line on the driver; after a driver update restart the machine")


def check_kernels(facts: GpuFacts, planned: Card | None) -> Check | None:
    """Does this torch have machine code for the card here, or for the one planned for?"""
    card = planned or facts.card
    if card is None or card.plain or facts.torch_version is None:
        return None
    major, minor = card.compute_capability
    if has_kernels(facts.arch_flags, card.compute_capability):
        return Check("kernels", "OK", f"{card.name} ({major}.{minor}): this torch runs on it")
    line, why = torch_install_line(card.compute_capability, windows=sys.platform == "win32")
    has = f"only kernels for {' '.join(facts.arch_flags)}" if facts.arch_flags else "no CUDA kernels at all"
    finding = f"{card.name} ({major}.{minor}): this torch has {has}"
    if planned:
        return Check("kernels", "WARN", finding, f"on the machine with the card: {line}  # {why}")
    return Check("kernels", "FAIL", finding, f"{line}  # {why}")


def check_driver(facts: GpuFacts) -> Check:
    """Is there a driver, new enough for torch's CUDA?"""
    if facts.driver is None:
        needed = "fix this to see who uses the card" if facts.card else "only needed where there is a card"
        return Check("driver", "WARN", f"cannot be asked: {facts.driver_problem}", needed)
    finding = f"NVIDIA {facts.driver}"
    if facts.driver_problem:
        return Check(
            "driver", "WARN", f"{finding}; not all could be read: {facts.driver_problem}", "restart the machine"
        )
    cuda_major = int((facts.cuda_version or "0").split(".")[0])
    needed_driver = _DRIVER_FOR_CUDA.get(cuda_major, 0)
    if int(facts.driver.split(".")[0]) < needed_driver:
        advice = f"update the driver to {needed_driver} or later"
        if cuda_major == 13:
            advice += ', or take a torch for CUDA 12: pip install "torch==2.10.0"'
        return Check("driver", "FAIL", f"{finding} is too old for torch's CUDA {facts.cuda_version}", advice)
    return Check("driver", "OK", finding)


def check_memory(facts: GpuFacts, planned: Card | None) -> Check | None:
    """How much of the card's memory can training have?"""
    if planned is not None:
        return Check("memory", "OK", f"plan: {usable_bytes(planned, this_os()).reason}")
    if facts.card is None:
        return None
    total = facts.card.total_bytes(this_os())
    if facts.free_bytes is None:
        return Check("memory", "FAIL", f"{format_bytes(total)}, but no CUDA context can be made", "restart the machine")
    outside = total - facts.free_bytes
    finding = f"{format_bytes(facts.free_bytes)} free of {format_bytes(total)} (as torch counts), {_others(facts)}"
    try:
        budget = usable_bytes(facts.card, this_os(), overhead_bytes=outside)
    except ConfigError as error:
        return Check("memory", "FAIL", finding, str(error))
    finding += f"; training may take {budget.reason}"
    if outside - facts.card.context_bytes > BUSY_CARD_BYTES:
        advice = "close other programs that use the card (browsers, games, desktop effects) to get more"
        return Check("memory", "WARN", finding, advice)
    return Check("memory", "OK", finding)


def _others(facts: GpuFacts) -> str:
    """Who else is on the card, as far as the driver tells."""
    known = [used for used in facts.process_bytes if used is not None]
    if len(known) < len(facts.process_bytes):
        return f"{len(facts.process_bytes)} other processes on it (WDDM does not tell how much they use)"
    return f"{len(known)} other processes use {format_bytes(sum(known))}"


def check_fp16(facts: GpuFacts) -> Check | None:
    """Do fp16 convolutions give right numbers here?"""
    if facts.torch_version is None:
        return None
    passed, finding = fp16_convolution_selftest("cpu" if facts.card is None else "cuda")
    if facts.card is not None and passed:
        finding += f"; --precision auto takes {': '.join(choose_precision('auto', facts.card))}"
    if passed:
        return Check("fp16", "OK", finding)
    usable = "fp32 or bf16" if facts.card is None or facts.card.bf16 else "fp32"
    return Check("fp16", "WARN", finding, f"train with --precision {usable} on this machine")


def _install_line(facts: GpuFacts) -> str:
    """The pip command for a torch that runs on the cards the driver sees."""
    if not facts.driver_capabilities:
        return 'pip install "torch>=2.4,<2.16"'
    return torch_install_line(min(facts.driver_capabilities), windows=sys.platform == "win32")[0]


def version_numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _as_text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name  # bytes in older releases of nvidia-ml-py
