"""How every command is parsed, run and ended: its help, its messages and its exit codes are decided here."""

from __future__ import annotations

import errno
import inspect
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from nvae_lowmem.errors import (
    ConfigError,
    Diverged,
    ExitCode,
    LostProcess,
    NothingFits,
    OutOfMemory,
    command_line,
    printable,
)
from nvae_lowmem.hardware.cpu import wait_politely

Flags = TypeVar("Flags")
WIDEST_HELP = 110


def run_command(flags: type[Flags], work: Callable[[Flags], ExitCode | None], argv: Sequence[str] | None) -> int:
    """Parse argv (None: this process's) as `flags`, do the work, and return the exit code.

    flags: a dataclass whose docstring is the help. work: imports torch itself, if it needs it, so that help and bad
    input are answered at once. Raises SystemExit for --help (0) and for unknown flags (2).
    """
    wait_politely()  # before torch is imported
    _say_any_name()
    program = program_name(flags)
    given = sys.argv[1:] if argv is None else list(argv)
    command = tyro.cli(flags, args=given, prog=program, description=description(flags))
    return exit_code(program, lambda: work(command))


def exit_code(program: str, work: Callable[[], ExitCode | None]) -> int:
    """Do the work of a command and return its exit code; what a user can mend is one message without a traceback."""
    try:
        return work() or ExitCode.DONE
    except NothingFits as error:
        return _ended(program, error, ExitCode.DOES_NOT_FIT)
    except Diverged as error:
        return _ended(program, error, ExitCode.DIVERGED)
    except OutOfMemory as error:
        return _ended(program, error, ExitCode.OUT_OF_MEMORY)
    except LostProcess as error:
        return _ended(program, error, ExitCode.LOST_PROCESS)
    except BrokenPipeError:  # whoever read the output wants no more of it, as in `nvae-lowmem settings | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DONE
    except (ConfigError, OSError) as error:  # OSError: a full disk, a folder that went away while the work went on
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        return _ended(
            program, error, ExitCode.BAD_INPUT, ". Make room, and give the same command again" if full else ""
        )
    except KeyboardInterrupt:
        return _ended(program, "stopped at once by Ctrl-C", ExitCode.INTERRUPTED)
    except Exception as error:
        from nvae_lowmem.training.out_of_memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        text = f"out of memory: {str(error).partition(chr(10))[0]}\nHalve --micro-batch, or use --device cpu."
        return _ended(program, text, ExitCode.OUT_OF_MEMORY)


def _ended(program: str, message: object, code: ExitCode, advice: str = "") -> ExitCode:
    if not getattr(message, "told_by_first", False):  # of several processes, the first tells what all of them met
        # line by line: a name in the message must not reach the terminal with what it would obey
        lines = [printable(line) for line in f"{message}{advice}".split("\n")]
        print(f"{program}: " + "\n".join(lines), file=sys.stderr)
    return code


def _say_any_name() -> None:
    """A name that is no UTF-8 is no reason to end with a traceback where it is to be printed."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def program_name(flags: type) -> str:
    """What the user typed, for messages: `nvae-lowmem train`, which console.py has put there, or `train.py`."""
    typed = sys.argv[0]
    return typed if typed.startswith("nvae-lowmem ") else f"{flags.__module__.rpartition('.')[2]}.py"


def description(flags: type) -> str:
    """The docstring, with paragraphs as wide as the terminal and examples that can be typed as they stand."""
    width = min(WIDEST_HELP, shutil.get_terminal_size().columns)
    paragraphs = (inspect.getdoc(flags) or "").split("\n\n")
    text = "\n\n".join(p if p.startswith("Examples:") else textwrap.fill(p, width) for p in paragraphs)
    return re.sub(r"nvae-lowmem ([a-z][a-z-]+)", lambda found: command_line(found[1]), text)
