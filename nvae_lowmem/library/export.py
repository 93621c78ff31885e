"""A trained model as a folder to give to others: weights, configuration, BatchNorm statistics, pictures, a model card.

    OUT/model.safetensors         averaged weights and buffers, nothing of the training's state
    OUT/config.json               the profile it was made with, and versions
    OUT/bn-t0.80.safetensors ...  BatchNorm statistics for sampling, one file per temperature
    OUT/samples.png, reconstructions.png, README.md (the model card)

`nvae_lowmem.load(OUT)` and `load("OUT.zip")` read it; so does anything that reads safetensors and JSON.
"""

from __future__ import annotations

import contextlib
import json
import platform
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from nvae_lowmem import __version__
from nvae_lowmem.config.profile_file import PATHS, from_dict, to_dict
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.files import partial_file
from nvae_lowmem.generation import grids
from nvae_lowmem.generation.recalibrate import RECALIBRATION_SEED, default_passes, recalibrate_once
from nvae_lowmem.generation.sample import reconstruct_images, sample_images
from nvae_lowmem.interop import nvlabs_export
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.progress import OnProgress
from nvae_lowmem.training import checkpoint
from nvae_lowmem.training.figures import Figures
from nvae_lowmem.training.open_run import OpenRun, held_out_batches

FORMAT = "nvae-lowmem export 1"
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
PUBLISHED = "checkpoint.pt"
SHOWN_IMAGES = 16


def export_run(
    run: OpenRun,
    out: Path,
    temperatures: Sequence[float] = (0.7, 0.8, 0.9, 1.0),
    licence: str = "",
    passes: int = 0,
    progress: OnProgress | None = None,
) -> Path:
    """Write the run's newest checkpoint as a folder to give away; returns the folder.

    temperatures: for which of them BatchNorm statistics are estimated, each from `passes` batches of prior samples
    (0: enough). licence: what the model card says of it. Held-out images are shown where the run's data are there.
    Raises ConfigError for a folder that holds something already or cannot be written.
    """
    with _new_folder(out):
        state = {name: value.detach().cpu().contiguous() for name, value in run.model.state_dict().items()}
        safetensors.torch.save_file(state, out / WEIGHTS, metadata={"format": FORMAT})
        about = _about(run)
        (out / CONFIG).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        pictures = _pictures(run, out, temperatures, passes, progress)
        (out / CARD).write_text(_card(run.profile, about, pictures, licence), encoding="utf-8")
    return out


def export_published(run: OpenRun, out: Path) -> Path:
    """Write the run's newest checkpoint as OUT/checkpoint.pt in the published NVAE code's format; returns the file.

    Raises ConfigError for a folder as `export_run`, and naming what that format cannot hold, before anything is made.
    """
    nvlabs_export.check_holdable(run.profile.model)
    with _new_folder(out):
        path = out / PUBLISHED
        return nvlabs_export.save(path, run.profile, run.model, checkpoint.step_of(run.checkpoint))


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[None]:
    """Inside, `out` is an empty folder. Raises ConfigError where it holds something or cannot be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not an empty folder; name a new one")
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror or error}; name a folder that can") from None


def read_export(folder: Path) -> tuple[Profile, NVAE]:
    """The profile and the network in evaluation mode, on the CPU. Raises ConfigError, naming the file at fault."""
    try:
        about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        state = safetensors.torch.load_file(folder / WEIGHTS)
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{folder}: is no complete export ({error}); export it anew or copy it whole") from None
    if not isinstance(about, Mapping) or about.get("format") != FORMAT or not isinstance(about.get("profile"), Mapping):
        found = about.get("format") if isinstance(about, Mapping) else about
        raise ConfigError(f"{folder / CONFIG}: format {found!r} is not {FORMAT!r}: use the version that wrote it")
    profile = from_dict(dict(about["profile"]), str(folder / CONFIG))
    network = NVAE(profile.model)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).partition("\n")[2].strip().partition("\n")[0]
        raise ConfigError(f"{folder / WEIGHTS}: does not belong to {CONFIG}: {reason}") from None
    return profile, network.eval()


def is_export(folder: Path) -> bool:
    """Whether a folder is an export and no run."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def is_packed_export(path: Path) -> bool:
    """Whether a ZIP is an export and no checkpoint, which torch writes as a ZIP, too."""
    with zipfile.ZipFile(path) as archive:
        return any(Path(name).name == CONFIG for name in archive.namelist())


class Unpacked:
    """An export's files in a temporary folder, which goes with this object or at the end of `with`."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a ZIP that is damaged or claims to be far larger than it is."""
        self._temporary = tempfile.TemporaryDirectory(prefix="nvae-lowmem-")
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > 4 * path.stat().st_size + (1 << 20):
                raise ConfigError(f"{path}: claims to hold far more than its size, as no weights do: give an export")
            try:
                archive.extractall(self._temporary.name)  # takes drive letters and ".." out of the names
            except (zipfile.BadZipFile, OSError) as error:
                raise ConfigError(f"{path}: cannot be unpacked: {error}; copy the file anew") from None
        self.folder = next(Path(self._temporary.name).rglob(CONFIG)).parent

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *_: object) -> None:
        self._temporary.cleanup()


def pack(folder: Path) -> Path:
    """The export as one ZIP beside it, uncompressed, since weights do not get smaller; returns the file."""
    path = folder.with_name(f"{folder.name}.zip")
    with partial_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"{folder.name}/{file.name}")
    return path


# --- what it holds ----------------------------------------------------------------------------------------------------


def _about(run: OpenRun) -> dict[str, Any]:
    profile = to_dict(run.profile)
    for section, keys in PATHS.items():  # nobody's folders are told to others
        profile[section] |= {key: Path(str(profile[section][key])).name for key in keys}
    return {
        "format": FORMAT,
        "checkpoint": run.checkpoint.name,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "versions": {"nvae-lowmem": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        "profile": profile,
        "figures": Figures(run.folder / "stats.jsonl").refresh().latest,
    }


def _pictures(
    run: OpenRun, out: Path, temperatures: Sequence[float], passes: int, progress: OnProgress | None
) -> list[tuple[str, str]]:
    """(file, caption) of what is drawn; the BatchNorm statistics of every temperature are left in the folder."""
    columns = grids.default_columns(run.profile.model.image_size)
    drawn: list[tuple[str, str]] = []
    try:
        images = torch.cat(list(held_out_batches(run, SHOWN_IMAGES)))
    except ConfigError:
        images = None  # the data are elsewhere: an export does not need them
    if images is not None:
        reconstructed = reconstruct_images(run.model, images, RECALIBRATION_SEED, run.micro_batch)
        grids.save_png(grids.pairs(images, reconstructed, run.model), out / "reconstructions.png")
        drawn.append(("reconstructions.png", "held-out images, each above its reconstruction"))
    passes = passes or default_passes(run.device, run.micro_batch)
    rows: list[Tensor] = []
    for done, temperature in enumerate(temperatures, start=1):
        recalibrate_once(run.model, out, temperature, passes, run.micro_batch, RECALIBRATION_SEED)
        rows.append(sample_images(run.model, SHOWN_IMAGES, temperature, RECALIBRATION_SEED, run.micro_batch))
        if progress is not None:
            progress(done, len(temperatures))
    if rows:
        captions = [f"temperature {temperature:g}" for temperature in temperatures]
        labelled = [grids.labelled(grids.grid(row, columns), text) for row, text in zip(rows, captions, strict=True)]
        grids.save_png(grids.stack(labelled), out / "samples.png")
        drawn.append(("samples.png", "samples from the prior"))
    return drawn


def _card(profile: Profile, about: Mapping[str, Any], pictures: Sequence[tuple[str, str]], licence: str) -> str:
    """The model card, Markdown."""
    c, figures = profile.model, about["figures"]
    groups = " + ".join(map(str, reversed(c.scale_groups)))
    sizes = ", ".join(f"{size} x {size}" for size in reversed(c.scale_sizes))
    rows = [
        ("images", f"{c.image_channels} x {c.image_size} x {c.image_size}, {c.bits} bits"),
        ("latent groups", f"{c.total_groups} ({groups} at {sizes}), {c.latents} latent channels each"),
        ("parameters", f"{about['parameters']:,}"),
        ("trained on", f"{about['profile']['data']['source']}"),
        ("checkpoint", f"{about['checkpoint']}, total batch {profile.training.total_batch}"),
    ]
    if "val/nelbo" in figures:
        bits = f", {figures['val/bpd_elbo']:.3f} bits/dim" if "val/bpd_elbo" in figures else ""
        rows.append(("held-out -ELBO", f"{figures['val/nelbo']:.2f} nats{bits} (the run's last evaluation)"))
    rows += [
        ("licence", licence or "not stated: ask whoever gave you this"),
        ("versions", ", ".join(f"{name} {version}" for name, version in about["versions"].items())),
    ]
    lines = [f"# {profile.name}", "", "A deep hierarchical VAE (NVAE, arXiv 2007.03898), trained with nvae-lowmem.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows), ""]
    kl = [figures[name] for i in range(c.total_groups) if (name := f"kl_vals/layer_{i}") in figures]
    if kl:
        lines += ["KL per group in nats while training, from the top (lowest resolution) down: "]
        lines += [", ".join(f"{value:.2f}" for value in kl), ""]
    for file, caption in pictures:
        lines += [f"![{caption}]({file})", ""]
    lines += ["```python", "import nvae_lowmem as nl", 'model = nl.load("path/to/this/folder")']
    lines += ["images = model.sample(16, temperature=0.8, seed=1)", "```"]
    return "\n".join(lines) + "\n"
