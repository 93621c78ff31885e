"""Tables in text files: TOML (and JSON), whose size and depth are checked before they are parsed.

A parser calls itself for every level of nesting, and makes a table for every dot of a key: a file of a few hundred
kilobytes could otherwise end the interpreter or fill the memory.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from nvae_lowmem.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LARGEST_BYTES = 1 << 20
"""The largest shipped profile has 8 KiB."""
DEEPEST = 16
"""Levels of nesting; our own files have four."""

# Strings and comments, which may hold any number of brackets and dots.
_TOML_TEXT = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}' r"|'''.*?'{3,5}" r'|"(?:\\.|[^"\\\n])*"' r"|'[^'\n]*'" r"|\#[^\n]*",
    re.DOTALL,
)
_JSON_TEXT = re.compile(r'"(?:\\.|[^"\\])*"', re.DOTALL)
_DOTTED = re.compile(rf"(?<![\w-])(?:[\w-]+[ \t]*\.[ \t]*){{{DEEPEST},}}")


def read_table(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """The table in a TOML file, or in a JSON file if it ends in .json. Raises ConfigError that begins with `what`.

    what: how messages call the file, for example "card file cards.toml".
    """
    try:
        if os.path.getsize(path) > LARGEST_BYTES:
            raise ConfigError(f"{what} has {os.path.getsize(path):,} bytes; at most {LARGEST_BYTES:,} are read")
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte in it
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        text = content.decode("utf-8-sig")  # Windows' editors put a byte-order mark in front
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    return parse_json(text, what) if Path(path).suffix.lower() == ".json" else parse_toml(text, what)


def parse_toml(text: str, what: str) -> dict[str, Any]:
    """The table in TOML text. Raises ConfigError that begins with `what`, whatever is wrong with the text."""
    text = text.removeprefix("\ufeff")
    _check_shape(text, _TOML_TEXT, what)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also: an integer of more than 4,300 digits
        raise ConfigError(f"{what} is not valid TOML: {error}") from None


def parse_json(text: str, what: str) -> dict[str, Any]:
    """The table (object) in JSON text. Raises ConfigError that begins with `what`, whatever is wrong with the text."""
    _check_shape(text, _JSON_TEXT, what)
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(table, dict):
        raise ConfigError(f"{what} must hold a table, not {type(table).__name__}")
    return table


def to_toml(table: Mapping[str, Any]) -> str:
    """The table as TOML; a None within tables is left out, a tuple is a list, and what UTF-8 cannot hold is escaped."""
    return tomli_w.dumps(_plain(table))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, str):  # half of a surrogate pair, such as Python's stand-in for a byte of a file's name
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return value


def _check_shape(text: str, texts: re.Pattern[str], what: str) -> None:
    """Raise ConfigError for text that is too long or too deeply nested to be parsed at no risk."""
    if len(text) > LARGEST_BYTES:
        raise ConfigError(f"{what} has {len(text):,} characters; at most {LARGEST_BYTES:,} are read")
    bare = texts.sub("s", text)
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", bare):
        depth = depth + 1 if bracket in "[{" else max(0, depth - 1)
        if depth > DEEPEST:
            raise ConfigError(f"{what} nests more than {DEEPEST} levels of brackets: it is no file of this program")
    if _DOTTED.search(bare):
        raise ConfigError(f"{what} has a key of more than {DEEPEST} parts: it is no file of this program")
