"""A `Profile` to and from TOML, the shipped ones by name, and `section.key=value` overrides."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pydantic

from nvae_lowmem.config.limits import shown
from nvae_lowmem.config.paths import from_uri, storable
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.config.tables import parse_toml, read_table, to_toml
from nvae_lowmem.errors import ConfigError, command_line, raise_problems
from nvae_lowmem.files import write_atomically

_PACKAGE = Path(__file__).resolve().parent.parent
# an installed wheel carries the profiles inside the package, a checkout beside it
PROFILES_DIR = _PACKAGE / "profiles" if (_PACKAGE / "profiles").is_dir() else _PACKAGE.parent / "profiles"
_SECTIONS = ("model", "data", "training", "plan")
PATHS = {"data": ("source", "test_source", "cache_dir"), "training": ("init_from",)}
"""Keys that hold paths, by section."""
_NOT_IN_FOLDER_NAMES = frozenset('/\\<>:"|?*&')
_LONGEST_NAME = 100


def loads(text: str, where: str = "profile") -> Profile:
    """A Profile from TOML text. Raises ConfigError with every problem: syntax, unknown keys, types, values."""
    return from_dict(parse_toml(text, where), where)


def load(path: str | os.PathLike[str]) -> Profile:
    """A Profile from a TOML file, or from the name of a shipped one (with or without .toml)."""
    return from_dict(read_table(find(path), f"profile {str(path)!r}"), str(path))


def shipped_profiles() -> list[str]:
    """The names of the shipped profiles, sorted."""
    return sorted(p.stem for p in PROFILES_DIR.rglob("*.toml"))


def find(path: str | os.PathLike[str]) -> Path:
    """The file of a profile given by path or by shipped name. Raises ConfigError with suggestions."""
    given, shipped = Path(path), shipped_profiles()
    if "\0" not in str(path):  # the system takes no such name
        for candidate in (given, PROFILES_DIR / given.name, PROFILES_DIR / f"{given.name}.toml"):
            if candidate.is_file():
                return candidate
    near = [name for name in shipped if given.stem and given.stem in name][:3]  # "celeba64" is a part of several
    near = near or difflib.get_close_matches(given.stem, shipped, n=3, cutoff=0.6)
    hint = f"near: {', '.join(near)}" if near else "the first to try is demo-mnist"
    every = f"{command_line('profiles')} lists them all"
    raise ConfigError(f"--profile {path}: no such file, and no shipped profile of that name; {hint}; {every}")


def dumps(profile: Profile) -> str:
    """The Profile as TOML; `loads(dumps(p)) == p`, where paths that are no UTF-8 come back absolute."""
    table = to_dict(profile)
    for section, keys in PATHS.items():
        table[section] |= {key: storable(table[section][key]) for key in keys}
    return to_toml(table)


def save(profile: Profile, path: str | os.PathLike[str], header: str = "") -> None:
    """Write the Profile as TOML under an optional comment header; atomic, so a crash leaves the old file."""
    text = "".join(f"# {line}\n" for line in header.splitlines()) + dumps(profile)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode("utf-8", "backslashreplace"))  # a header may name a file whose name is no UTF-8


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
            problems.append(f"[{section}] must be a table, not {shown(values)}")
            continue
        built, found = _section(hints[section], values, section)
        problems += found
        sections[section] = built
    name, provenance = table.get("name", "unnamed"), table.get("provenance", {})
    problems += _name_problems(name)
    if not isinstance(provenance, Mapping):
        problems.append(f"[provenance] must be a table, not {shown(provenance)}")
    raise_problems(problems, where)
    return Profile(name=name, provenance=dict(provenance), **sections).check(where)


def override(profile: Profile, assignments: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> Profile:
    """The Profile with changes: `values` by section.key, taken as they are, then `section.key=value` texts as of --set.

    The value of a text is read as TOML, and as a plain string where it is none. Raises ConfigError with every problem.
    If a change touches what the plan was fitted to, the predictions leave the provenance, which then says why.
    """
    table = to_dict(profile)
    problems = []
    for key, value in (values or {}).items():
        problems += _assign(table, key, key, value)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            problems.append(_shapeless(assignment))
        else:
            problems += _assign(table, assignment, key.strip(), _value(text.strip()))
    raise_problems(problems, "overrides")
    return _without_stale_prediction(
        profile, from_dict({key: _without_none(value) for key, value in table.items()}, "overrides")
    )


_FITTED_TO = ("freeze", "total_batch", "clip_norm", "ema_decay", "ema_on_host")
"""Training keys that a step's memory and time depend on, as they do on everything of the model and the plan."""


def _without_stale_prediction(before: Profile, now: Profile) -> Profile:
    """The changed profile without predictions that were made for the profile before."""
    old, new = to_dict(before), to_dict(now)
    changed = [
        f"{section}.{key}"
        for section, keys in (("model", new["model"]), ("training", _FITTED_TO), ("plan", new["plan"]))
        for key in keys
        if old[section][key] != new[section][key]
    ]
    of_a_step = ("margin_bytes", "speed", "measured_seconds_per_step", "measured_on")
    stale = [key for key in now.provenance if key.startswith("predicted_") or key in of_a_step]
    if not changed or not stale:
        return now
    made = {key: value for key, value in now.provenance.items() if key not in stale}
    return dataclasses.replace(now, provenance={**made, CHANGED: ", ".join(changed)})


CHANGED = "changed_since_fit"
"""Key of the provenance: what was changed after the plan was fitted and predicted."""


def _assign(table: dict[str, Any], given: str, key: str, value: Any) -> list[str]:
    """Set table[section][name] for the key section.name; returns the problem there is with the key."""
    section, _, name = key.partition(".")
    if not name or section not in _SECTIONS:
        return [_shapeless(given)]
    unknown = _unknown([name], list(table[section]), section + ".")
    if not unknown:
        table[section][name] = value
    return unknown


def _shapeless(assignment: str) -> str:
    return f"--set {shown(assignment)} must look like training.total_batch=32 ({', '.join(_SECTIONS)})"


def _value(text: str) -> Any:
    try:
        return parse_toml(f"v = {text}", "the value")["v"]
    except ConfigError:
        return text


def _name_problems(name: Any) -> list[str]:
    """Why a profile's name cannot be part of a folder's name, on any system."""
    if not isinstance(name, str) or not name:
        return [f"name = {shown(name)} must be a plain word: it becomes part of a folder's name"]
    odd = sorted({c for c in name if c in _NOT_IN_FOLDER_NAMES or not c.isprintable()})
    if odd or name.startswith(".") or name.endswith((".", " ")) or len(name) > _LONGEST_NAME:
        what = f"; it holds {' '.join(map(ascii, odd))}" if odd else ""
        return [
            f"name = {shown(name)} must be a plain word of at most {_LONGEST_NAME} letters: it becomes part of a "
            f"folder's name{what}"
        ]
    return []


def _section(kind: type, values: Mapping[str, Any], section: str) -> tuple[Any, list[str]]:
    """One dataclass from its table, and the problems met on the way (one per key)."""
    names = [f.name for f in dataclasses.fields(kind)]
    problems = _unknown(values, names, section + ".")
    hints = get_type_hints(kind)
    good: dict[str, Any] = {}
    for name in names:
        if name in values:
            try:
                # strict: 1 is not true and "3" is not 3; integers are still good floats, lists good tuples
                good[name] = _strict(hints[name], values[name])
            except pydantic.ValidationError:
                problems.append(f"{section}.{name} = {shown(values[name])} must be {describe_kind(hints[name])}")
            if name in PATHS.get(section, ()) and isinstance(good.get(name), str):
                good[name] = from_uri(good[name])
    return (None if problems else kind(**good)), problems


def _strict(hint: Any, value: Any) -> Any:
    value = tuple(value) if isinstance(value, list) else value
    return pydantic.TypeAdapter(hint).validate_python(value, strict=True)


def describe_kind(hint: Any) -> str:
    """What a value of a type has to be, in words: "a whole number", "one of 'all', 'cheap'"."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if hint in names:
        return names[hint]
    parts = [part for part in get_args(hint) if part not in (NoneType, ...)]
    if get_origin(hint) is tuple:
        return f"a list, each of it {describe_kind(parts[0])}"
    if get_origin(hint) is Mapping:
        return f"a table, each value of it {describe_kind(parts[1])}"
    return " or ".join(map(describe_kind, parts)) or str(hint).replace("typing.", "")


def _unknown(given: Any, known: list[str], prefix: str) -> list[str]:
    out = []
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(known)}"
            out.append(f"unknown key {shown(f'{prefix}{key}')[1:-1]}{hint}")
    return out


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: v for k, v in value.items() if v is not None}
    return value
