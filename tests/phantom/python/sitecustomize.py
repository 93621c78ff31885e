"""Python loads this at its start under phantom-run: what torch computes on the card and has to be true is made true.

No kernel computes isfinite(), and the zeros that memory holds would mean that every number is infinite. The same goes
for printing a tensor, which counts what is not zero, and for objects that processes send each other, whose sizes torch
adds up on the card.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import pickle
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MESSAGE_BYTES = 32768


class _WhenTorchIsImported(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_patch(module: ModuleType) -> None:
                execute(module)
                _patch(module)

            spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


def _patch(torch: Any) -> None:
    def always_finite(isfinite: Any) -> Any:
        @functools.wraps(isfinite)
        def answer(tensor: Any) -> Any:
            return isfinite(tensor).fill_(True) if tensor.is_cuda else isfinite(tensor)

        return answer

    def without_contents(text: Any) -> Any:
        @functools.wraps(text)
        def answer(tensor: Any, *, tensor_contents: Any = None) -> str:
            if tensor.is_cuda:
                return f"tensor(..., size={tuple(tensor.size())}, device='{tensor.device}')"
            return str(text(tensor, tensor_contents=tensor_contents))

        return answer

    torch.isfinite = always_finite(torch.isfinite)
    torch.Tensor.isfinite = always_finite(torch.Tensor.isfinite)
    torch._tensor_str._str = without_contents(torch._tensor_str._str)
    torch.distributed.broadcast_object_list = functools.partial(_broadcast_objects, torch)


def _broadcast_objects(torch: Any, objects: list[Any], src: int = 0, **_: Any) -> None:
    """All objects in one message of a size that copies to the card carry out."""
    message = bytearray(_MESSAGE_BYTES)
    if torch.distributed.get_rank() == src:
        text = pickle.dumps(objects)
        message[: len(text)] = text
    on_card = torch.frombuffer(message, dtype=torch.uint8).cuda()
    torch.distributed.broadcast(on_card, src)
    objects[:] = pickle.loads(on_card.cpu().numpy().tobytes())  # what follows the pickle is ignored


sys.meta_path.insert(0, _WhenTorchIsImported())
