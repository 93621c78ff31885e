"""Files that a command writes: whole or not at all, and refused before the long work where they cannot be written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nvae_lowmem.errors import ConfigError


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write a file, text as UTF-8; whoever looks meanwhile sees the old file or the new one, never half of one.

    Raises OSError, and then the old file is still there.
    """
    with partial_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


@contextmanager
def partial_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file beside `path` to write to, which becomes `path` at the end; it is removed if anything goes wrong.

    A link stays one, and what it leads to is replaced. A device or a pipe (/dev/stdout) is written to itself. An
    OSError that names no file, as a full disk's does, names this one.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file() and not target.is_dir():
        yield target
        return
    partial = target.with_name(f".{target.name}-{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, target)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from None
    finally:
        partial.unlink(missing_ok=True)


def write_output(flag: str, path: Path, content: bytes | str) -> Path:
    """`write_atomically` of the file that a flag names. Raises ConfigError where it cannot be written."""
    try:
        return write_atomically(path, content)
    except OSError as error:
        raise cannot_write(flag, path, error) from None


def cannot_write(flag: str, path: str | os.PathLike[str], error: OSError) -> ConfigError:
    """The message for a file or folder that a flag names and that the system refuses."""
    return ConfigError(f"{flag} {os.fspath(path)} cannot be written: {error.strerror or error}; name another place")


def output_file(flag: str, name: str, suffixes: Sequence[str] = ()) -> Path | None:
    """The file to write that a flag names, None for "" and for "-", which is the screen.

    Nothing is made. Raises ConfigError for another ending, a folder, a file in a folder that does not exist, and one
    that may not be written: before the long work, not after it.
    """
    if name in ("", "-"):
        return None
    path = Path(name)
    if suffixes and path.suffix.lower() not in suffixes:
        raise ConfigError(f"{flag} {name}: the name must end in {' or '.join(suffixes)}")
    if path.is_dir() or not path.parent.is_dir():
        why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ConfigError(f"{flag} {name} cannot be written: {why}; name a file in a folder that exists")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{flag} {name} cannot be written: no permission; name a file in a folder of your own")
    return path


def writable_folder(flag: str, folder: Path) -> Path:
    """The folder, made if need be. Raises ConfigError where nothing can be written: before the long work, not after."""
    probe, problem = folder / ".writable", "cannot be made"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = "cannot write there"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{flag} {folder}: {problem}: {error.strerror or error}; name another folder") from None
    return folder


def writable_file(flag: str, file: Path) -> Path:
    """The file, whose folder is made if need be. Raises ConfigError for a folder, and where nothing can be written."""
    if file.is_dir():
        raise ConfigError(f"{flag} {file}: is a folder; name a file")
    writable_folder(flag, file.parent)
    return file
