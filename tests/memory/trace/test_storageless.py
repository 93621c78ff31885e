"""Tensors without memory: their bytes, and what operations on them return."""

from __future__ import annotations

import pytest
import torch

from nvae_lowmem.memory.trace.storageless import StoragelessTensors, make_storageless, operator_info

aten = torch.ops.aten


def test_a_tensor_without_memory_reports_its_bytes_and_has_none() -> None:
    tensor = make_storageless((1 << 20, 1 << 20), (1 << 20, 1), torch.float16)
    assert type(tensor) is torch.Tensor and tensor.device.type == "cpu"
    assert tensor.untyped_storage().nbytes() == 2 << 40 and tensor.data_ptr() == 0
    assert tensor[0].untyped_storage()._cdata == tensor.untyped_storage()._cdata


@pytest.mark.parametrize(("scalar", "dtype"), [(1, torch.int64), (1.0, torch.float32), (True, torch.int64)])
def test_equal_arguments_of_other_types_have_other_answers(scalar: float, dtype: torch.dtype) -> None:
    tensors, integers = StoragelessTensors(), make_storageless((3,), (1,), torch.int64)
    func = aten.mul.Tensor
    for other in (1, 1.0, True):  # so that all three are remembered, whichever is asked for
        tensors.run(func, operator_info(func), (integers, other), {})
    assert tensors.run(func, operator_info(func), (integers, scalar), {}).dtype == dtype


def test_operations_that_write_return_what_they_were_given() -> None:
    tensors = StoragelessTensors()
    a, b = (make_storageless((2, 3), (3, 1), torch.float32) for _ in range(2))
    assert tensors.run(aten.add_.Tensor, operator_info(aten.add_.Tensor), (a, b), {}) is a
    assert tensors.run(aten.maximum.out, operator_info(aten.maximum.out), (a, b), {"out": b}) is b
    sums = tensors.run(aten.sum.dim_IntList, operator_info(aten.sum.dim_IntList), (a, [1]), {"keepdim": True})
    assert sums.shape == (2, 1) and sums.untyped_storage().nbytes() == 8
