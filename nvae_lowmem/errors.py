"""The errors that a command ends in with one message and no traceback, its exit codes, and longer messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parent.parent


class ExitCode(IntEnum):
    """What a command says to the shell, the same for all of them."""

    DONE = 0
    CHECK_FAILED = 1
    """The work was done, and what it checked is not as it should be."""
    BAD_INPUT = 2
    """The command line, a file or the machine is not what the command needs."""
    DOES_NOT_FIT = 3
    """No plan fits the card, or a run took more memory than was predicted."""
    DIVERGED = 4
    OUT_OF_MEMORY = 5
    LOST_PROCESS = 6
    """Another process of the same run has died."""
    HUNG_UP = 129
    """Training was asked to stop by SIGHUP (its terminal or its launcher is gone), and has saved a checkpoint."""
    INTERRUPTED = 130
    """Ctrl-C, as shells have it: 128 + SIGINT. Training has saved a checkpoint, unless it was the second one."""
    TERMINATED = 143
    """Training was asked to stop by SIGTERM, and has saved a checkpoint."""


class ConfigError(ValueError):
    """Something a user gave is wrong. Its text is the whole message: what, which value, what is allowed, what to do."""


class NothingFits(RuntimeError):
    """No plan of the profile fits the card; its text says by how much, and what would make it fit."""


class Diverged(RuntimeError):
    """Training cannot go on: the loss or the gradients blew up. Its text says where and what to do.

    step: where it was noticed, from 1; good_until: the last step whose state is not suspect; curable: whether going
    back and doing otherwise may help.
    """

    def __init__(self, text: str, step: int = 0, good_until: int = 0, curable: bool = True) -> None:
        super().__init__(text, step, good_until, curable)  # all of them, so that it can be pickled
        self.step, self.good_until, self.curable = step, good_until, curable

    def __str__(self) -> str:
        return str(self.args[0])


class LostProcess(RuntimeError):
    """Another process of this run has died, so that none of them can go on."""


class OutOfMemory(RuntimeError):
    """Training ran out of memory; its text is the whole report."""


def raise_problems(problems: Iterable[str], where: str) -> None:
    """Raise one ConfigError that lists every problem; do nothing if there is none."""
    found = list(problems)
    if found:
        head = f"{where}: {len(found)} problem{'s' if len(found) > 1 else ''} in the configuration"
        raise ConfigError("\n  - ".join([head, *found]))


def printable(name: object) -> str:
    r"""A file's name as messages show it: what a terminal obeys, and bytes that are no UTF-8, escaped as in \x1b."""
    return "".join(c if c.isprintable() else _escaped(c) for c in str(name))


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a name that is no UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown name: the nearest one and the list."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}: {hint}known: {', '.join(names)}"


def command_line(name: str) -> str:
    """How a command is typed here: `python launch/train.py` where the scripts stand beside the package, as in a
    checkout; `nvae-lowmem train` where the package is installed without them."""
    for folder in ("launch", "tools"):
        script = f"{folder}/{name.replace('-', '_')}.py"
        if (_CHECKOUT / script).is_file():
            return f"python {script}"
    return f"nvae-lowmem {name}"
