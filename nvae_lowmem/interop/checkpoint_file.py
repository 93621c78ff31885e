"""Opening an untrusted checkpoint file of torch, and saying in one sentence what is wrong with one that cannot be.

Torch's restricted unpickler builds tensors, plain containers and the `argparse.Namespace` of the options, and runs
nothing. Before it sees the file, the depth of its tuples is checked: hashing a deep one would end the interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import warnings
import zipfile
from contextlib import AbstractContextManager
from typing import IO, Any

import torch

from nvae_lowmem.data.pickles import BadPickle, check_tuples
from nvae_lowmem.errors import ConfigError, printable

_LARGEST_PICKLE_BYTES = 256 << 20
"""Of a ZIP's data.pkl, which holds names and shapes; the tensors lie beside it."""
_OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How torch's files without ZIP begin (a pickled magic number)."""
_OLD_PICKLES = 5
"""Pickles at the beginning of such a file."""
_AGAIN = "download or copy it again"
_AS_SAVED = "give the checkpoint.pt of a training run as it was saved"


def open_checkpoint(path: str | os.PathLike[str]) -> Any:
    """What torch.save wrote; the tensors of a ZIP stay in the file until they are read.

    Raises ConfigError for a file that is missing, cut short, of another format, or that asks for more than plain data.
    """
    name = printable(path)
    try:
        zipped = zipfile.is_zipfile(path)
        with open(path, "rb") as file:  # a folder, or a file that is missing or may not be read, is reported as such
            start = file.read(512)
            if problem := _wrong_kind(start, zipped, os.path.getsize(path)):
                raise ConfigError(f"{name}: {problem}")
            file.seek(0)
            _check_pickles(file, zipped)
        with _options_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters of them ends in an error
            # optimiser states fill two thirds of a checkpoint: mapped, they never reach memory
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True if zipped else None)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror or error}") from None
    except BadPickle as error:
        raise ConfigError(f"{name}: is damaged, or made to do damage: {error}; {_AGAIN}") from None
    except Exception as error:  # the unpickler meets arbitrary bytes, and fails in as many ways
        raise ConfigError(f"{name}: {_reason(error)}") from None


def _wrong_kind(start: bytes, zipped: bool, size_bytes: int) -> str:
    """What a file is, if by its beginning it is no whole checkpoint; else ""."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return f"is empty: {_AGAIN}"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return (
            "is a web page, not a checkpoint: the download asked for a login, or to confirm something; "
            "download it with a browser"
        )
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, which only names the file: fetch it with git lfs pull"
    if start.startswith(b"PK\x03\x04") and not zipped:
        return f"is cut short: the end of the ZIP is missing after {size_bytes:,} bytes; {_AGAIN}"
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")) or start[257:262] == b"ustar":
        return "is an archive: unpack it, and give the checkpoint.pt that is in it"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size_bytes:
        return "is a safetensors file, which lacks the options that describe the network: give the checkpoint.pt itself"
    if not zipped and not start.startswith(_OLD_FORMAT):
        if start[:1] == b"\x80" and start[1:2] < b"\x06":
            return f"is a pickle, but not one that torch.save wrote: {_AS_SAVED}"
        return f"is no file of torch.save: {_AS_SAVED}"
    return ""


def _check_pickles(file: IO[bytes], zipped: bool) -> None:
    """Raise BadPickle, or ConfigError without the path's name, for what is not to reach the unpickler."""
    if not zipped:
        for _ in range(_OLD_PICKLES):
            check_tuples(file)
        return
    try:
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith("data.pkl")]
            if not members:
                raise BadPickle("it is a ZIP without data.pkl, which torch.save did not write")
            for member in members:
                if member.file_size > _LARGEST_PICKLE_BYTES:
                    raise BadPickle(f"{printable(member.filename)} has {member.file_size:,} bytes")
                with archive.open(member) as pickled:
                    check_tuples(pickled)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as error:
        raise BadPickle(f"its ZIP cannot be read ({printable(error)})") from None


def _reason(error: Exception) -> str:
    """What the unpickler met, without its advice to switch the restriction off."""
    refused = re.search(r"[Uu]nsupported .*?(?= by default|\.$|$)", str(error), re.MULTILINE)
    if refused:
        what = printable(refused[0])
        return f"asks for more than plain data, which is refused; nothing of it was run ({what}); {_AS_SAVED}"
    said = re.split(r"\. |\n", str(error))[0] or type(error).__name__
    return f"is damaged ({printable(said)}): {_AGAIN}"


def _options_allowed() -> AbstractContextManager[Any]:
    """While it is open the restricted unpickler also builds `argparse.Namespace`, a container of plain values."""
    if hasattr(torch.serialization, "safe_globals"):
        return torch.serialization.safe_globals([argparse.Namespace])
    torch.serialization.add_safe_globals([argparse.Namespace])  # torch 2.4: for the rest of the process
    return contextlib.nullcontext()
