"""Profiles as files: names and paths of any bytes come back, byte-order marks do not matter, nothing half is left."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError

TINY = profiles.load("demo-mnist")


def with_source(source: str) -> Profile:
    return replace(TINY, data=replace(TINY.data, source=source))


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])).filter(lambda t: not t.startswith("file://") and t))
def test_any_text_comes_back_from_a_file(source: str) -> None:
    assert profiles.loads(profiles.dumps(with_source(source))) == with_source(source)
    assert profiles.override(TINY, values={"data.source": source}) == with_source(source)


def test_emoji_quotes_and_backslashes_in_a_path_are_kept() -> None:
    for name in ("pics \U0001f600", 'a"b', "a'b", "a\\b", "a\nb", "a'''\"\"\"b", " a "):
        assert profiles.override(TINY, values={"data.source": name}).data.source == name


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX systems only")
@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=20).filter(lambda b: b"\0" not in b and b"/" not in b and b not in (b".", b"..")))
def test_a_path_of_any_bytes_comes_back(name: bytes) -> None:
    profile = with_source("/pics/" + os.fsdecode(name))
    text = profiles.dumps(profile)
    assert text.encode("utf-8") and profiles.loads(text) == profile


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX systems only")
def test_a_relative_path_that_is_no_utf_8_comes_back_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    profile = profiles.override(TINY, [os.fsdecode(b"data.source=pics\xff")])
    profiles.save(profile, tmp_path / "config.toml")
    assert "pics%FF" in (tmp_path / "config.toml").read_text()
    assert profiles.load(tmp_path / "config.toml").data.source == os.fsdecode(os.fsencode(tmp_path) + b"/pics\xff")
    assert profiles.override(TINY, ["data.source=file:///a%20b"]).data.source == "/a b"


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    profiles.save(TINY, tmp_path / "config.toml")
    bad: Any = replace(TINY, provenance={"unwritable": object()})
    with pytest.raises(TypeError):
        profiles.save(bad, tmp_path / "config.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(OSError):
        profiles.save(TINY, tmp_path / "folder.toml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "folder.toml"]
    assert profiles.load(tmp_path / "config.toml") == TINY


def test_a_profile_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "windows.toml").write_text("\ufeff" + profiles.dumps(TINY).replace("\n", "\r\n"), newline="")
    assert profiles.load(tmp_path / "windows.toml") == TINY


@pytest.mark.parametrize(
    "name", ["<script>", "a/b", "a\\b", "", ".hidden", "a\0b", "a\x1b[31m", "a\nb", "nul:", "x" * 101, "a ", "a\udcff"]
)
def test_names_that_are_not_safe_for_folders_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="must be a plain word") as caught:
        profiles.from_dict({"name": name})
    assert str(caught.value).replace("\n  - ", "").isprintable()


@pytest.mark.parametrize("name", ["demo-mnist", "gtx-970 über 4.5", "a+b=c", "名前"])
def test_ordinary_names_are_taken(name: str) -> None:
    assert profiles.loads(profiles.dumps(replace(TINY, name=name))).name == name


@pytest.mark.parametrize(
    "table",
    [
        {"provenance": 3},
        {"model": [1]},
        {"training": {"total_batch": {"a": 1}}},
        {"data": {"source": 7}},
        {"plan": {"keep_blocks": {"a": "b"}}},
        {"a\x1b[31m": 1},
        {"training": {"published_total_batch": "many"}},
        {"training": {"published_total_batch": True}},
        {"training": {"published_learning_rate": float("inf")}},
        {"training": {"published_total_batch": 10**30}},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_types_are_one_message(table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        profiles.from_dict(table, "it")
    assert str(caught.value).replace("\n  - ", "").isprintable()


def test_names_with_a_zero_byte_are_no_files() -> None:
    with pytest.raises(ConfigError, match="no such file"):
        profiles.load("a\0b")
