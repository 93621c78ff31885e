"""A `Profile` to and from TOML, the shipped ones by name, and `section.key=value` overrides."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pydantic
import tomli_w

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError, raise_problems

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PACKAGE = Path(__file__).resolve().parent.parent
# an installed wheel carries the profiles inside the package, a checkout beside it
PROFILES_DIR = _PACKAGE / "profiles" if (_PACKAGE / "profiles").is_dir() else _PACKAGE.parent / "profiles"
_SECTIONS = ("model", "data", "training", "plan")


def loads(text: str, where: str = "profile") -> Profile:
    """A Profile from TOML text. Raises ConfigError with every problem: syntax, unknown keys, types, values."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not valid TOML: {error}") from None
    return from_dict(table, where)


def load(path: str | os.PathLike[str]) -> Profile:
    """A Profile from a TOML file, or from the name of a shipped one (with or without .toml)."""
    found = find(path)
    try:
        text = found.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--profile {path}: cannot be read: {error}") from None
    return loads(text, str(path))


def find(path: str | os.PathLike[str]) -> Path:
    """The file of a profile given by path or by shipped name. Raises ConfigError with suggestions."""
    given = Path(path)
    if given.is_file():
        return given
    for candidate in (PROFILES_DIR / given.name, PROFILES_DIR / f"{given.name}.toml"):
        if candidate.is_file():
            return candidate
    shipped = sorted(p.stem for p in PROFILES_DIR.rglob("*.toml"))
    near = difflib.get_close_matches(given.stem, shipped, n=3, cutoff=0.3)
    hint = f"; near: {', '.join(near)}" if near else ""
    raise ConfigError(f"--profile {path}: no such file, and no shipped profile of that name{hint}")


def dumps(profile: Profile) -> str:
    """The Profile as TOML; `loads(dumps(p)) == p`."""
    return tomli_w.dumps(_without_none(to_dict(profile)))


def save(profile: Profile, path: str | os.PathLike[str], header: str = "") -> None:
    """Write the Profile as TOML under an optional comment header; atomic, so a crash leaves the old file."""
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(comment + dumps(profile), encoding="utf-8")
    os.replace(partial, target)


def to_dict(profile: Profile) -> dict[str, Any]:
    """The Profile as plain tables of numbers, strings and lists."""
    table: dict[str, Any] = {"name": profile.name}
    table |= {section: dataclasses.asdict(getattr(profile, section)) for section in _SECTIONS}
    return table | {"provenance": dict(profile.provenance)}


def from_dict(table: Mapping[str, Any], where: str = "profile") -> Profile:
    """A checked Profile from plain tables. Raises ConfigError with every problem at once."""
    hints = get_type_hints(Profile)
    problems = _unknown(table, [f.name for f in dataclasses.fields(Profile)], "")
    sections: dict[str, Any] = {}
    for section in _SECTIONS:
        values = table.get(section, {})
        if not isinstance(values, Mapping):
            problems.append(f"[{section}] must be a table, not {values!r}")
            continue
        built, found = _section(hints[section], values, section)
        problems += found
        sections[section] = built
    name, provenance = table.get("name", "unnamed"), table.get("provenance", {})
    if not isinstance(name, str) or not name or "/" in name or "\\" in name or name.startswith("."):
        problems.append(f"name = {name!r} must be a plain word: it becomes part of a folder's name")
    if not isinstance(provenance, Mapping):
        problems.append(f"[provenance] must be a table, not {provenance!r}")
    raise_problems(problems, where)
    return Profile(name=name, provenance=dict(provenance), **sections).check(where)


def override(profile: Profile, assignments: Sequence[str]) -> Profile:
    """The Profile with `section.key=value` assignments applied; values are read as TOML, else as plain strings."""
    table = to_dict(profile)
    problems = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        section, dot, name = key.strip().partition(".")
        if not equals or not dot or section not in _SECTIONS:
            problems.append(f"--set {assignment!r} must look like training.total_batch=32 ({', '.join(_SECTIONS)})")
            continue
        unknown = _unknown([name], list(table[section]), section + ".")
        problems += unknown
        if not unknown:
            table[section][name] = _value(text.strip())
    raise_problems(problems, "overrides")
    return from_dict(_without_none(table), "overrides")


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _section(kind: type, values: Mapping[str, Any], section: str) -> tuple[Any, list[str]]:
    """One dataclass from its table, and the problems met on the way (one per key)."""
    names = [f.name for f in dataclasses.fields(kind)]
    problems = _unknown(values, names, section + ".")
    hints = get_type_hints(kind)
    good = {}
    for name in names:
        if name in values:
            try:
                # strict: 1 is not true and "3" is not 3; integers are still good floats, lists good tuples
                good[name] = _strict(hints[name], values[name])
            except pydantic.ValidationError:
                shown = values[name]
                problems.append(f"{section}.{name} = {shown!r} must be {_describe(hints[name])}")
    return (None if problems else kind(**good)), problems


def _strict(hint: Any, value: Any) -> Any:
    value = tuple(value) if isinstance(value, list) else value
    return pydantic.TypeAdapter(hint).validate_python(value, strict=True)


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(hint, str(hint).replace("typing.", ""))


def _unknown(given: Any, known: list[str], prefix: str) -> list[str]:
    out = []
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(known)}"
            out.append(f"unknown key {prefix}{key}{hint}")
    return out


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return list(value) if isinstance(value, tuple) else value


def quoted(text: str) -> str:
    """A TOML string literal, for `override`."""
    return json.dumps(text)
