"""Tensors that have a shape and a storage of so many bytes, but no memory: what a step is traced on.

torch's FakeTensorMode says what an operation returns. It is slow, so it is asked once per operator and kind of
arguments in this process: output layouts are cached per (operator, argument layouts). A storageless tensor is an
ordinary tensor on device "cpu", so autograd, autocast, checkpointing and views treat it as they treat any tensor; only
its bytes must never be touched, which is why no operation but views may reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

aten = torch.ops.aten
_CPU = torch.device("cpu")
# they hand on their argument's storage, though their schemas do not say so
_UNDECLARED_VIEWS = {aten._unsafe_view.default, aten.lift_fresh.default}

_FLOAT_STATISTICS = ("aten::native_batch_norm", "aten::native_group_norm")
"""Their second and third result is fp32 for half-precision images, in real kernels; the fake ones follow the images."""
_LIKE_THE_GRADIENT = ("aten::native_group_norm_backward",)
"""Their first result has the dtype of their first argument, in real kernels; the fake one has the weight's."""

TensorLayout = tuple[torch.Size, tuple[int, ...], torch.dtype]


class OperatorInfo(NamedTuple):
    """What the schema of an operator says, and the layouts that it was seen to return."""

    name: str
    touches_nothing: bool
    """It moves no bytes: a view, or a call of the profiler."""
    written: tuple[int | str, ...] | None
    """Which argument each return is, for operators that write to their arguments; None for others."""
    output_layouts: dict[Any, Any]
    """Layouts of the results by argument layouts: the cache of `StoragelessTensors.run`."""


class _Storageless(Tensor):
    """A wrapper without memory; `make_storageless` returns ordinary tensors on its storage."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} would touch a tensor without memory")


def make_storageless(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of that layout whose storage reports its bytes and has none."""
    wrapper = Tensor._make_wrapper_subclass(_Storageless, size, strides=stride, dtype=dtype, device=_CPU)
    with torch._C._DisableTorchDispatch():
        return aten.alias.default(wrapper)


class StoragelessTensors:
    """Runs operations on tensors without memory. Output layouts are cached in `operator_info`."""

    def __init__(self) -> None:
        self._fake = FakeTensorMode()
        self._fake.cache_enabled = False  # it is never asked twice

    def run(self, func: Any, info: OperatorInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `func` returns, new tensors without memory; what it would write to its arguments is not written."""
        if info.touches_nothing:
            return func(*args, **kwargs)
        if info.written is not None:
            returned = [args[w] if isinstance(w, int) else kwargs[w] for w in info.written]
            return returned[0] if len(returned) == 1 else tuple(returned) or None
        key = (_key(args), _key(kwargs.items())) if kwargs else _key(args)
        layouts = info.output_layouts.get(key)
        if layouts is None:
            layouts = _as_real_kernels(info.name, _map(_layout_of, self._ask(func, args, kwargs)), args)
            info.output_layouts[key] = layouts
        return _make(layouts)

    def _ask(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = _map(self._stand_in, (args, tuple(kwargs.values())))
        with self._fake, torch.no_grad():
            out = func(*inputs[0], **dict(zip(kwargs, inputs[1], strict=True)))
        given = {t.untyped_storage()._cdata for t in _tensors(inputs)}
        # to be made anew, a result has to be new
        assert not any(t.untyped_storage()._cdata in given for t in _tensors(out)), f"{func} returns its argument"
        return out

    def _stand_in(self, value: Any) -> Any:
        """A fake tensor of the same layout; what is not a tensor as it is."""
        if not isinstance(value, Tensor):
            return value
        shape = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return FakeTensor(self._fake, shape, _CPU)


@cache
def operator_info(func: Any) -> OperatorInfo:
    """What the schema of an operator says; cached, and the cache of its output layouts with it."""
    schema = func._schema
    aliases = [r.alias_info for r in schema.returns]
    changes_layout = torch.Tag.inplace_view in func.tags
    is_view = changes_layout or func in _UNDECLARED_VIEWS or any(a is not None and not a.is_write for a in aliases)
    writes = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    written: tuple[int | str, ...] | None = None
    if not is_view and any(writes):
        assert all(a is not None for a in aliases), f"{schema} both writes and makes tensors"
        written = tuple(
            next(
                argument.name if argument.kwarg_only else index
                for index, argument in enumerate(schema.arguments)
                if argument.alias_info is not None and argument.alias_info.before_set == alias.before_set
            )
            for alias in aliases
        )
    return OperatorInfo(func.name(), is_view or func.namespace == "profiler", written, {})


def _key(values: Any) -> tuple[Any, ...]:
    """Equal for arguments that lead to results of one layout."""
    out: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            out.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, (list, tuple)):
            out.append(_key(value))
        else:
            out += (value.__class__, value)  # 1, 1.0 and True are equal, but promote dtypes differently
    return tuple(out)


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return [_map(change, v) for v in value] if isinstance(value, list) else tuple(_map(change, v) for v in value)
    return change(value)


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(lambda v: found.append(v) if isinstance(v, Tensor) else None, value)
    return found


class _OutputLayout(NamedTuple):
    layout: TensorLayout


def _layout_of(value: Any) -> Any:
    return _OutputLayout((value.shape, value.stride(), value.dtype)) if isinstance(value, Tensor) else value


def _as_real_kernels(name: str, layouts: Any, args: tuple[Any, ...]) -> Any:
    """The layouts where torch's fake kernels are known to differ from the real ones."""

    def with_dtype(value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, _OutputLayout):
            return value
        size, stride, _ = value.layout
        return _OutputLayout((size, stride, dtype))

    if name in _FLOAT_STATISTICS and args[0].dtype in (torch.float16, torch.bfloat16):
        return (layouts[0], *(with_dtype(value, torch.float32) for value in layouts[1:]))
    if name in _LIKE_THE_GRADIENT:
        return (with_dtype(layouts[0], args[0].dtype), *layouts[1:])
    return layouts


def _make(layouts: Any) -> Any:
    """The results of an operation, by their cached layouts."""
    if isinstance(layouts, _OutputLayout):
        return make_storageless(*layouts.layout)
    if isinstance(layouts, (list, tuple)):
        return [_make(part) for part in layouts] if isinstance(layouts, list) else tuple(map(_make, layouts))
    return layouts
