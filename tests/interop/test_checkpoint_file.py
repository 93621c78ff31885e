"""What is wrong with a checkpoint file, each kind of damage in its own sentence; and any bytes give one message."""

from __future__ import annotations

import argparse
import gzip
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_checkpoint import FIXTURES
from safetensors.torch import save

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.interop.checkpoint_file import open_checkpoint

ORIGINAL = (FIXTURES / "tiny" / "checkpoint.pt").read_bytes()


def torch_saved(value: Any, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def zip_of(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_", "/").replace("/pkl", ".pkl"), content)
    return buffer.getvalue()


NESTED = b"\x80\x02}()" + b"\x85" * 2_000_000 + b"K\x00u."
OLD = torch_saved({"a": torch.ones(300)}, zipped=False)
DAMAGE = {
    "empty": (b"", "is empty"),
    "cut in the middle": (ORIGINAL[: len(ORIGINAL) // 2], "is cut short: the end of the ZIP is missing after"),
    "cut at the end": (ORIGINAL[:-1], "is cut short"),
    "cut, old format": (OLD[: len(OLD) // 3], "damaged"),
    "cut in the tensors, old format": (OLD[:-400], "damaged"),
    "web page": (b"\n<!DOCTYPE html><html><title>Sign in</title></html>", "is a web page"),
    "web page with a mark": (b"\xef\xbb\xbf<HTML>", "is a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS pointer"),
    "pickle": (pickle.dumps({"state_dict": {}}), "is a pickle, but not one that torch.save wrote"),
    "archive": (gzip.compress(ORIGINAL[:1000]), "is an archive: unpack it"),
    "safetensors": (save({"a": torch.ones(2)}), "is a safetensors file"),
    "text": (b"hello", "is no file of torch.save"),
    "another ZIP": (zip_of(a_txt=b"x"), "ZIP without data.pkl"),
    "nested tuples": (zip_of(archive_data_pkl=NESTED), "made to do damage: its tuples are nested"),
    "nested tuples, old format": (OLD[: OLD.index(b"\x80\x02", 2)] + NESTED, "its tuples are nested"),
    "code": (torch_saved({"state_dict": torch.nn.Linear(1, 1)}), "nothing of it was run"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_kind_of_damage_has_its_own_sentence(tmp_path: Path, kind: str) -> None:
    content, told = DAMAGE[kind]
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and told in text and "\n" not in text and len(text) < 500


def test_whole_files_of_both_formats_are_opened(tmp_path: Path) -> None:
    content = {"state_dict": {"a": torch.arange(3)}, "args": argparse.Namespace(x=1)}
    for zipped in (True, False):
        (tmp_path / "checkpoint.pt").write_bytes(torch_saved(content, zipped))
        opened = open_checkpoint(tmp_path / "checkpoint.pt")
        assert opened["args"].x == 1 and opened["state_dict"]["a"].tolist() == [0, 1, 2]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1), change=st.binary(min_size=1, max_size=8), old=st.booleans(), keep=st.floats(0.5, 1))
def test_any_bytes_give_a_checkpoint_or_one_message(
    tmp_path: Path, place: float, change: bytes, old: bool, keep: float
) -> None:
    data = bytearray(OLD if old else ORIGINAL)
    start = int(place * (len(data) - 1))
    data[start : start + len(change)] = change
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(data[: int(keep * len(data))])
    try:
        open_checkpoint(path)
    except ConfigError as error:
        assert str(error).startswith(f"{path}: ")
