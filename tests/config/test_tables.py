"""Reading tables: whatever the bytes, a table or one message; nothing deep or large reaches the parser."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvae_lowmem.config.tables import DEEPEST, parse_json, parse_toml, read_table, to_toml
from nvae_lowmem.errors import ConfigError


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    for name, text in (("a.toml", "x = 1"), ("a.json", '{"x": 1}')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read_table(tmp_path / name, "it") == {"x": 1}
    assert parse_toml("\ufeffx = 1", "it") == {"x": 1}


BOMBS = {
    "arrays": "a = " + "[" * 100_000 + "]" * 100_000,
    "inline tables": "a = " + "{a=" * 100_000 + "1" + "}" * 100_000,
    "dotted key": ".".join("a" * 100_000) + " = 1",
    "dotted key with spaces and quotes": '"a" . ' * 100_000 + "a = 1",
    "dotted header": "[" + ".".join("a" * 100_000) + "]",
    "after a string": 'a = ["""x"""", ' + "[" * 100_000 + ', "y"]',
    "integer": "a = " + "9" * 5_000,
    "long": "a = '" + "x" * (1 << 20) + "'",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_one_message_before_it_is_parsed(name: str) -> None:
    tracemalloc.start()
    with pytest.raises(ConfigError, match="^the file ") as caught:
        parse_toml(BOMBS[name], "the file")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(caught.value)) < 300
    assert peak < 50 << 20


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[1]", "1", "", "{", '{"a": ' + "9" * 5_000 + "}"])
def test_json_that_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="^the file "):
        parse_json(text, "the file")


def test_brackets_and_dots_in_strings_and_comments_are_text() -> None:
    many = "[" * 100 + ".".join("a" * 100)
    text = f'a = \'{many}\' # {many}\nb = "{many}\\"{many}"\nc = \'\'\'\n{many}\'\'\'\nd = """\n{many}"""'
    assert parse_toml(text, "it")["d"] == many
    assert parse_json(json.dumps({"a": many}), "it") == {"a": many}


def test_missing_large_and_misencoded_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"a = '\xe9'")
    with (tmp_path / "large.toml").open("wb") as file:
        file.truncate(1 << 40)
    told = {"latin.toml": "not UTF-8", "large.toml": "at most", "none.toml": "No such file", "a\0b": "null"}
    for name, reason in told.items():
        with pytest.raises(ConfigError, match=f"^card file x .*{reason}"):
            read_table(tmp_path / name, "card file x")


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet="ab=[]{}.\"'#\n, 1", max_size=60)))
def test_any_text_gives_a_table_or_a_message(text: str) -> None:
    for parse in (parse_toml, parse_json):
        try:
            assert isinstance(parse(text, "it"), dict)
        except ConfigError as error:
            assert str(error).startswith("it ")


values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), values, max_size=4))
def test_what_is_written_comes_back(table: dict[str, object]) -> None:
    try:
        assert parse_toml(to_toml(table), "it") == table
    except ConfigError as error:
        assert f"more than {DEEPEST}" in str(error)


def test_what_utf_8_cannot_hold_is_written_escaped() -> None:
    assert parse_toml(to_toml({"a": "x\udcff", "b": None, "c": (1, 2)}), "it") == {"a": "x\\udcff", "c": [1, 2]}
