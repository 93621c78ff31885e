"""Untrusted pickles: how deep their tuples go, told from the opcodes before anything is built.

Python hashes a tuple by hashing what is in it, without a limit to the depth: a key of two million nested tuples (two
megabytes of file) overflows the stack of the interpreter, and no exception says so. Lists and dictionaries cannot be
hashed, so only tuples and frozen sets count.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import IO, Any

DEEPEST_TUPLE = 100
"""Nested tuples; the files that we read have fewer than ten."""
_MOST_OPCODES = 20_000_000


class BadPickle(Exception):
    """A pickle that is not to be loaded; the text says why."""


def check_tuples(file: IO[bytes]) -> None:
    """Go through one pickle from where the file stands. Raises BadPickle for deep tuples, and for what is no pickle."""
    try:
        _check(file)
    except BadPickle:
        raise
    except Exception as error:  # genops and the stack below meet arbitrary bytes
        raise BadPickle(
            f"it is damaged or no pickle ({' '.join(str(error).split()) or type(error).__name__})"
        ) from None


def _check(file: IO[bytes]) -> None:
    stack: list[int] = []  # of every value on the pickle's stack: how deep its tuples go
    marks: list[int] = []  # where the stack stood at each open MARK
    memo: dict[Any, int] = {}

    def close() -> list[int]:
        place = marks.pop()
        values = stack[place:]
        del stack[place:]
        return values

    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if count > _MOST_OPCODES:
            raise BadPickle(f"it has more than {_MOST_OPCODES:,} instructions")
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("TUPLE", "FROZENSET"):
            stack.append(1 + max(close(), default=0))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            stack[-size:] = [1 + max(stack[-size:])]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP" and marks and len(stack) == marks[-1]:
            marks.pop()  # of nothing but a MARK
        else:
            _apply(opcode, stack, close)
        if stack and stack[-1] > DEEPEST_TUPLE:
            raise BadPickle(f"its tuples are nested more than {DEEPEST_TUPLE} deep")


def _apply(opcode: pickletools.OpcodeInfo, stack: list[int], close: Callable[[], list[int]]) -> None:
    """Any other opcode: it takes values off the stack, down to a MARK if it says so, and puts values without tuples."""
    before = opcode.stack_before
    if pickletools.markobject in before:
        close()
        before = before[: before.index(pickletools.markobject)]
    if len(before) > len(stack):
        raise ValueError("it takes more than it has put")
    del stack[len(stack) - len(before) :]
    stack += [0] * len(opcode.stack_after)
