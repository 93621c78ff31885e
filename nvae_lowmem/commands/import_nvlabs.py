"""Load a published NVAE checkpoint, check it against saved arrays, and make a run of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.errors import ConfigError, ExitCode, command_line

if TYPE_CHECKING:
    from nvae_lowmem.config.sections import Profile
    from nvae_lowmem.model.nvae import NVAE


@dataclass(frozen=True, kw_only=True)
class ImportCommand:
    """Load a published NVAE checkpoint, check it against saved arrays, and make a run folder of it.

    Exit status: 0; 1 when an array of --verify differs by more than 1e-4, and then nothing is written; 2 when a file
    or the command line is wrong.

    Examples:
      nvae-lowmem import-nvlabs checkpoint.pt --out runs/imported
      nvae-lowmem import-nvlabs checkpoint.pt --verify arrays.npz
    """

    checkpoint: tyro.conf.Positional[str]
    """checkpoint.pt of the published training code."""
    verify: str = ""
    """.npz of arrays that the published network computed: x, logits, ..."""
    out: str = ""
    """Write a run folder, to sample from and to evaluate."""


def main(argv: Sequence[str] | None = None) -> int:
    """Import, verify, write; returns the exit code."""
    return run_command(ImportCommand, _import, argv)


def _import(command: ImportCommand) -> ExitCode:
    out = _new_folder(command.out) if command.out else None
    from nvae_lowmem.interop import nvlabs
    from nvae_lowmem.interop.nvlabs_verify import read_expected, verify

    expected = read_expected(command.verify) if command.verify else None
    profile, model = nvlabs.load_published(command.checkpoint)
    print(_summary(profile, model))
    if expected is not None and not _report(verify(model, expected)):
        return ExitCode.CHECK_FAILED
    if out is not None:
        _export(out, profile, model)
    return ExitCode.DONE


def _report(errors: dict[str, float]) -> bool:
    """Print every array's error; returns whether all are within the tolerance, which nan is not."""
    from nvae_lowmem.interop.nvlabs_verify import TOLERANCE

    good = {name: error <= TOLERANCE for name, error in errors.items()}
    for name, error in errors.items():
        print(f"  {name:<20} {error:.1e}  {'ok' if good[name] else f'DIFFERS: more than {TOLERANCE:.0e}'}")
    return all(good.values())


def _summary(profile: Profile, model: NVAE) -> str:
    c = profile.model
    scales = ", ".join(f"{g} of {s} x {s}" for g, s in zip(c.scale_groups, c.scale_sizes, strict=True))
    return "\n".join(
        [
            f"{profile.name}: {c.image_size} x {c.image_size} x {c.image_channels} images, {c.architecture}",
            f"  latent groups        {scales}; {c.latents} latents each, {c.flows} flows",
            f"  likelihood           {model.likelihood.describe()}",
            f"  parameters           {sum(p.numel() for p in model.parameters()):,}",
        ]
    )


def _new_folder(name: str) -> Path:
    folder = Path(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out {name}: exists and is not an empty folder; name a new one")
    return folder


def _export(run: Path, profile: Profile, model: NVAE) -> None:
    from safetensors import SafetensorError

    from nvae_lowmem.training.checkpoint import export_weights

    try:
        export_weights(run, profile, model.state_dict())
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--out {run}: cannot be written: {error}; name a folder that can") from None
    print(f"  run folder           {run}")
    begin = f"{command_line('train')} --init-from {run} --data FOLDER_OR_ZIP"
    print(f"\nsample from it with:    {command_line('sample')} --run {run}\ntrain it on with:       {begin}")
