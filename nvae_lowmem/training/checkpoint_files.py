"""One checkpoint folder: its three files, written so that damage shows, and read only where there is none.

checkpoints/step-00001234/
    model.safetensors      what sampling uses: averaged weights where there are any, and the buffers
    training.safetensors   what training needs to go on: weights, Adamax states, buffers, loss scale
    state.json             format version, step, held-out figures, and the size and SHA-256 of every other file

state.json is written last and holds a checksum of itself, so a folder that has a valid one is whole. SHA-256, because
`sha256sum` can check a file by hand everywhere; what it costs stands in docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from nvae_lowmem.errors import ConfigError, Diverged

FORMAT = 2
WITHOUT_CHECKSUMS = 1
"""The format of earlier versions, still read: sizes can be checked, contents cannot."""
MODEL, TRAINING, STATE = "model.safetensors", "training.safetensors", "state.json"
LARGEST_STATE_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20


class NotFinite(Diverged):
    """A state that holds inf or NaN: it is not saved, because nothing good can come of going on from it."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What state.json says of a file."""

    size_bytes: int
    sha256: str
    """Empty in a checkpoint of an earlier version."""


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """state.json, checked: the finished steps, the files, and the held-out figures at that step (maybe none)."""

    step: int
    files: Mapping[str, FileRecord]
    figures: Mapping[str, float] = field(default_factory=dict)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path,
    step: int,
    model: Mapping[str, Tensor],
    training: Mapping[str, Tensor],
    figures: Mapping[str, float] | None = None,
) -> None:
    """Write the files of a checkpoint into a new folder; when this returns, they are on the disk.

    Raises NotFinite, before anything is written, and OSError.
    """
    for what, tensors in (("weights for sampling", model), ("training state", training)):
        bad = not_finite(tensors)
        if bad:
            raise NotFinite(f"{len(bad)} of {len(tensors)} tensors of the {what} hold inf or NaN (first: {bad[0]})")
    folder.mkdir()
    files = {MODEL: model} | ({TRAINING: training} if training else {})
    records = {}
    for name, tensors in files.items():
        _write_tensors(folder / name, tensors)
        records[name] = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    state: dict[str, Any] = {"format": FORMAT, "step": step, "files": records, "figures": dict(figures or {})}
    (folder / STATE).write_text(json.dumps(state | {"sha256": _own_sha256(state)}, indent=1), encoding="utf-8")
    sync(folder / STATE)
    sync(folder)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold inf or NaN."""
    floating = ((name, t) for name, t in tensors.items() if t.is_floating_point() and t.numel())
    # the extremes of a tensor with a NaN in it are NaN: two numbers to look at, and no copy of the tensor
    return [name for name, t in floating if not all(math.isfinite(float(v)) for v in torch.aminmax(t.detach()))]


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Make sure the bytes are on the disk before anything is renamed over them."""
    with contextlib.suppress(OSError):  # folders cannot be opened on Windows
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
    except safetensors.SafetensorError as error:  # its name for a disk that is full
        raise OSError(f"{path}: {error}") from None
    sync(path)


def _own_sha256(state: Mapping[str, Any]) -> str:
    """The checksum of state.json over everything in it but the checksum."""
    rest = {key: value for key, value in state.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# --- reading ----------------------------------------------------------------------------------------------------------


def read_state(folder: Path, step: int | None = None) -> CheckpointState:
    """state.json of a checkpoint of `step` finished steps (None: any), and whether its files have their sizes.

    Cheap: contents are not looked at. Raises ConfigError when it is missing, damaged, or of another version.
    """
    damaged = ConfigError(f"checkpoint {folder}: {STATE} or a file it names is missing or damaged")
    try:
        if (folder / STATE).stat().st_size > LARGEST_STATE_BYTES:
            raise damaged
        table = json.loads((folder / STATE).read_text(encoding="utf-8"))
        version = table["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise damaged from None
    if version not in (FORMAT, WITHOUT_CHECKSUMS) or isinstance(version, (bool, float)):
        raise ConfigError(
            f"checkpoint {folder} has format {version!r}; this version reads {WITHOUT_CHECKSUMS} and {FORMAT}: "
            "use the version of nvae-lowmem that wrote it"
        )
    try:
        state = _parse(table)
        sizes = {name: (folder / name).stat().st_size for name in state.files}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise damaged from None
    if step is not None and state.step != step:
        raise ConfigError(f"checkpoint {folder}: {STATE} is of step {state.step}, not of the folder's: it was renamed")
    cut = [name for name, record in state.files.items() if sizes[name] != record.size_bytes]
    if cut:
        raise ConfigError(f"checkpoint {folder}: {' and '.join(cut)} is truncated or has grown")
    return state


def verify(folder: Path, state: CheckpointState, names: Iterable[str] | None = None) -> None:
    """Check files (None: all) against their checksums. Raises ConfigError that names the damaged one."""
    for name in state.files if names is None else names:
        recorded = state.files[name].sha256
        try:
            if recorded and file_sha256(folder / name) != recorded:
                raise ConfigError(f"checkpoint {folder}: {name} is damaged: its SHA-256 is not the recorded one")
        except OSError as error:
            raise ConfigError(f"checkpoint {folder}: {name} cannot be read: {error.strerror or error}") from None


def read_tensors(folder: Path, state: CheckpointState, name: str) -> dict[str, Tensor]:
    """One file of a checkpoint, checked against its checksum, on the host. Raises ConfigError that names it."""
    verify(folder, state, [name])
    try:
        tensors = safetensors.torch.load_file(folder / name)
    except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder / name} cannot be read: {error}") from None
    bad = not_finite(tensors)
    if bad:
        raise ConfigError(f"{folder / name}: {len(bad)} of {len(tensors)} tensors hold inf or NaN (first: {bad[0]})")
    return tensors


def _parse(table: Mapping[str, Any]) -> CheckpointState:
    """state.json's content with every type checked. Raises what a wrong type or a missing key raises."""
    if table["format"] == FORMAT:
        if table["sha256"] != _own_sha256(table):
            raise ValueError("the checksum of state.json itself")
        files = {name: FileRecord(size_bytes=v["bytes"], sha256=v["sha256"]) for name, v in table["files"].items()}
        figures = {name: float(value) for name, value in table["figures"].items()}
    else:
        files = {name: FileRecord(size_bytes=size, sha256="") for name, size in table["bytes"].items()}
        figures = {}
    step = table["step"]
    known = MODEL in files and not files.keys() - {MODEL, TRAINING}
    if not known or not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError("files or step")
    if any(not isinstance(f.size_bytes, int) or not isinstance(f.sha256, str) for f in files.values()):
        raise ValueError("sizes or checksums")
    return CheckpointState(step=step, files=files, figures=figures)
