"""How a block keeps its activations between forward and backward: all, cheap, input or host; set from outside.

    all    plain autograd; BN-swish saves its input and the convolution after it its own
    cheap  convolution outputs alone: normalisations, activations, SE, casts, latents' arithmetic and the depthwise
           convolution's output are computed again, inside the backward functions
    input  the block's input alone (torch.utils.checkpoint, not reentrant): cells, posterior, prior, flows, combiner and
           KL together run again in backward; what that second run keeps is as in cheap
    host   as input, and that input lies in (pinned) host memory, copied on a side stream and fetched one block ahead

Loss and gradients do not depend on the choice; BatchNorm statistics and power iterations move in the first run only.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nvae_lowmem.config.sections import Keep, MemoryPlan
from nvae_lowmem.errors import ConfigError, command_line
from nvae_lowmem.model.blocks import DecoderGroup, Head
from nvae_lowmem.model.cells import Cell
from nvae_lowmem.model.flows import FlowCell
from nvae_lowmem.model.freeze import blocks_matching, unknown_block
from nvae_lowmem.model.functional import recompute_in_backward
from nvae_lowmem.model.host import host_memory
from nvae_lowmem.model.layers import NormLayer
from nvae_lowmem.model.nvae import NVAE


def apply_plan(model: NVAE, plan: MemoryPlan) -> None:
    """Make every block of the model keep what the plan says. Raises ConfigError for a block that is not there."""
    check_block_names(model, plan)
    names = _names(model)
    keeps: dict[str, Keep] = {name: plan.keep_of(name) for name in names}
    for name, keep in keeps.items():
        _set_recompute(model.blocks[name], keep)
    head = model.blocks["head"]
    assert isinstance(head, Head)
    head.chunk_bytes = plan.likelihood_chunk_bytes
    model.run_block = KeepRunner(keeps)


def check_block_names(model: NVAE, plan: MemoryPlan) -> None:
    """Raise ConfigError where plan.keep_blocks names a block that the model does not have, with the nearest names."""
    names = _names(model)
    for key in plan.keep_blocks:
        if not blocks_matching(key, names):
            raise ConfigError(
                f"{unknown_block('plan.keep_blocks', key, names)}. A plan made for another model does not serve: fit "
                f"this one ({command_line('fit-memory')})"
            )


def _names(model: NVAE) -> list[str]:
    """The blocks that a policy can be set for."""
    return [name for name in model.block_names() if name != "start"]


def _set_recompute(block: nn.Module, keep: Keep) -> None:
    for module in block.modules():
        if isinstance(module, (NormLayer, Cell, FlowCell)):
            module.recompute = keep != "all"
        if isinstance(module, DecoderGroup):
            # A block that runs again as a whole need not run its latents a third time: the peak of a step is in the
            # post-process cells (measured for the published recipes), so it would save nothing.
            module.recompute_latent = keep == "cheap"


class KeepRunner:
    """The BlockRunner of a memory plan. Holds names only, so that a model that carries it can be copied."""

    def __init__(self, keeps: Mapping[str, Keep]) -> None:
        self.keeps = dict(keeps)
        self._store: HostStore | None = HostStore() if "host" in self.keeps.values() else None

    def __call__(self, name: str, block: nn.Module, *args: Any) -> Any:
        keep = self.keeps.get(name, "all")
        if keep in ("all", "cheap") or not torch.is_grad_enabled() or not _takes_part(block, args):
            return block(*args)
        if keep == "input":
            return recompute_in_backward(block, *args)
        assert self._store is not None
        self._store.begin_block()
        with torch.autograd.graph.saved_tensors_hooks(self._store.pack, self._store.unpack):
            return recompute_in_backward(block, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> KeepRunner:
        return KeepRunner(self.keeps)


def _takes_part(block: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether the backward pass comes to the block: it learns, or something before it does."""
    inputs = (a for a in args if isinstance(a, Tensor))
    return any(t.requires_grad for t in (*block.parameters(), *inputs))


class _Parked:
    """One tensor in host memory, and its copy back on the way or back already."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream | None) -> None:
        self.device, self.stream = tensor.device, stream
        with host_memory():
            self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=stream is not None)
        if stream is None:
            self.host.copy_(tensor)
        else:
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                self.host.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
        self.back: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def fetch(self) -> None:
        """Begin the copy to the device."""
        if self.back is not None:
            return
        # Allocated on the stream that computes, although the other one writes to it: the allocator keeps a pool per
        # stream, and memory of the one cannot serve the other.
        self.back = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
        if self.stream is None:
            self.back.copy_(self.host)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # who had this memory before is done with it
        with torch.cuda.stream(self.stream):
            self.back.copy_(self.host, non_blocking=True)
            self._arrived = self.stream.record_event()

    def take(self) -> Tensor:
        """The tensor on its device, ready for the current stream."""
        self.fetch()
        back, self.back = self.back, None
        assert back is not None
        if self._arrived is not None:  # of this copy alone: others of the next block may be on their way behind it
            torch.cuda.current_stream(self.device).wait_event(self._arrived)
        return back


class HostStore:
    """Saved tensors in host memory; a block's are fetched back while backward is in the block after it."""

    def __init__(self) -> None:
        self._blocks: list[list[weakref.ref[_Parked]]] = []  # autograd owns what is parked; forward order
        self._stream: torch.cuda.Stream | None = None

    def begin_block(self) -> None:
        """What is packed from now on belongs to the next block."""
        self._blocks = [refs for refs in self._blocks if any(ref() is not None for ref in refs)]
        self._blocks.append([])

    def pack(self, tensor: Tensor) -> _Parked | Tensor:
        """To the host, unless there is nothing to gain.

        An expanded tensor has less memory than elements, and a copy of it would be staged on the side stream, for which
        the allocator opens a pool of its own.
        """
        if tensor.numel() < 1024 or not tensor.is_floating_point() or not tensor.is_contiguous():
            return tensor
        if tensor.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        parked = _Parked(tensor, self._stream)
        if not self._blocks:
            self.begin_block()
        self._blocks[-1].append(weakref.ref(parked))
        return parked

    def unpack(self, parked: _Parked | Tensor) -> Tensor:
        """Back on the device; the tensors of the block that backward needs next start on their way."""
        if isinstance(parked, Tensor):
            return parked
        tensor = parked.take()
        mine = next((i for i, refs in enumerate(self._blocks) if any(ref() is parked for ref in refs)), 0)
        del self._blocks[mine + 1 :]
        for ref in self._blocks[mine - 1] if mine else ():
            ahead = ref()
            if ahead is not None:
                ahead.fetch()
        return tensor
