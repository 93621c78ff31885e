"""Paths of a user's data: absolute, to mean the same from any folder, and storable whatever bytes they have."""

from __future__ import annotations

import os
import urllib.parse
import urllib.request
from collections.abc import Collection
from pathlib import Path

_SCHEME = "file://"


def absolute_path(path: str, unless: Collection[str] = ()) -> str:
    """The path from the root, `~` expanded, links as they are; "" stays "". For a file:// URI: the path it names.

    unless: names that are no paths; with any, a word that is nothing in this folder may be a misspelt one, and stays.
    """
    if not path or path in unless:
        return path
    if unless and os.path.basename(path) == path and "\0" not in path and not os.path.lexists(path):
        return path
    if path.startswith(_SCHEME):
        path = from_uri(path)
    return os.path.abspath(os.path.expanduser(path))


def from_uri(text: str) -> str:
    """The path that a file:// URI names, any other text as it is."""
    if not text.startswith(_SCHEME):
        return text
    path = text[len(_SCHEME) :]
    if os.name == "nt":
        return urllib.request.url2pathname(path)
    return os.fsdecode(urllib.parse.unquote_to_bytes(path))


def storable(path: str) -> str:
    """The path as text that UTF-8 can hold: itself, or its file:// URI if its bytes are no UTF-8.

    `from_uri` gives the (absolute) path back.
    """
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return Path(os.path.abspath(path)).as_uri()
    return path
