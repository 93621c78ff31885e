"""What the tests of the training command run: a small profile, and the command in this process."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

from nvae_lowmem.commands.train import main

STEPS, EMA_DECAY = 4, 0.5
PROFILE = f"""
name = "quick"

[model]
image_size = 16
bits = 1
channels_encoder = 4
channels_decoder = 4
scales = 1
groups = 2
adaptive = false
latents = 2
cells_encoder = 1
cells_decoder = 1
preprocess_blocks = 1
preprocess_cells = 1
postprocess_blocks = 1
postprocess_cells = 1

[training]
total_batch = 8
steps = {STEPS}
warmup_epochs = 0
ema_decay = {EMA_DECAY}
log_every = 1
evaluate_every = 2
evaluate_images = 6
sample_every = 4
save_every = 1
keep_last = 10

[plan]
micro_batch = 4
"""


class Finished(NamedTuple):
    """A command's exit code and what it said."""

    code: int
    said: str
    complained: str


def run(profile: Path | str, *arguments: str) -> Finished:
    """The training command in this process."""
    return run_command_line("--profile", str(profile), "--device", "cpu", *arguments)


def run_command_line(*arguments: str) -> Finished:
    """The same with these arguments and no others."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return Finished(code, out.getvalue(), err.getvalue())


def write_profile(folder: Path, **changes: str) -> Path:
    """The quick profile with lines replaced: steps="steps = 9"."""
    lines = [next((v for k, v in changes.items() if ln.startswith(f"{k} =")), ln) for ln in PROFILE.splitlines()]
    path = folder / "quick.toml"
    path.write_text("\n".join(lines))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
