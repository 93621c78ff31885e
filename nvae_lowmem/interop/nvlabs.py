"""Published NVAE checkpoints (`checkpoint.pt`) as our networks. A checkpoint is untrusted: see `checkpoint_file`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError, printable
from nvae_lowmem.interop.checkpoint_file import open_checkpoint
from nvae_lowmem.interop.nvlabs_config import profile_of
from nvae_lowmem.interop.nvlabs_weights import network_tensors, translate
from nvae_lowmem.model.nvae import NVAE


def load_published(path: str | os.PathLike[str]) -> tuple[Profile, NVAE]:
    """The Profile of a published checkpoint and its network, in evaluation mode, fp32, on the CPU.

    The power iterations' vectors u and v, which published files lack, start from their random initialisation; training
    finds them again, nothing else reads them.

    Raises ConfigError for a file that is missing, truncated, of another format, or that asks for more than plain data;
    and, naming every problem, for one whose options and tensors do not describe a network of ours.
    """
    where = printable(path)
    checkpoint = _open(path)
    state, args = checkpoint["state_dict"], checkpoint["args"]
    odd = [str(key) for key, value in state.items() if not isinstance(key, str) or not _is_plain_tensor(value)]
    if odd or not state:
        raise ConfigError(f"{where}: its state_dict must map names to tensors, but has {', '.join(odd[:5]) or 'none'}")
    tensors = network_tensors(state)
    if sum(tensor.nbytes for tensor in tensors.values()) > os.path.getsize(path):  # a stride of 0 claims any size
        raise ConfigError(f"{where}: its tensors claim more bytes than the file has")
    provenance = {"imported_from": Path(path).name} | {
        key: value for key in ("epoch", "global_step") if type(value := checkpoint.get(key)) is int
    }
    profile = profile_of(vars(args), checkpoint.get("arch_instance"), tensors, provenance, where)
    model = NVAE(profile.model)
    missing, _ = model.load_state_dict(translate(model, tensors, where), strict=False)
    assert all(key.endswith((".u", ".v")) for key in missing), missing
    return profile, model.eval()


def _open(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """The checkpoint's dict, with args and state_dict of the right types."""
    checkpoint = open_checkpoint(path)
    kinds = {"state_dict": Mapping, "args": argparse.Namespace}
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(k), kind) for k, kind in kinds.items()):
        found = ", ".join(map(str, list(checkpoint)[:8])) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ConfigError(
            f"{printable(path)}: is no published NVAE checkpoint: it needs a state_dict and args, and holds "
            f"{printable(found)}"
        )
    return checkpoint


def _is_plain_tensor(value: object) -> bool:
    """Whether it is a dense tensor of real numbers that is there."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return not (value.is_quantized or value.is_complex())
