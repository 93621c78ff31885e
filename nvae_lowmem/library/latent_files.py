"""Images to latents in files, and back: many images, some at a time, going on where an interrupted run stopped.

DIR/encoding.json                the model, the data and the settings that made it
DIR/latents-000000.safetensors   groups and KL of the first images, and their names; -000001: of the next ones
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.data.decode import UnreadableImage
from nvae_lowmem.data.pipeline import to_network
from nvae_lowmem.data.preparation import Preparation
from nvae_lowmem.data.stores import Store
from nvae_lowmem.errors import ConfigError, printable
from nvae_lowmem.files import write_atomically
from nvae_lowmem.generation.reconstruct import Posterior
from nvae_lowmem.library.model import Latents, Model
from nvae_lowmem.progress import OnProgress

ABOUT = "encoding.json"


def encode_store(
    model: Model,
    store: Store,
    source: str,
    out: Path,
    *,
    posterior: Posterior = "mean",
    seed: int = 0,
    images_per_file: int = 1000,
    say: Callable[[str], object] = print,
    progress: OnProgress | None = None,
) -> int:
    """Write the latents of every image of a store; returns how many images were encoded by this call.

    Files that are there and whole are left alone, so the same call goes on where another stopped. Image i has the noise
    of slot i. An image that cannot be read is said and left out; its name is in no file. Names are those below
    `source`, the path that the store was opened by.
    Raises ConfigError for a folder that was made from another model, other data or other settings.
    """
    about = {
        "model": model.name, "weights": _fingerprint(model), "images": len(store), "posterior": posterior, "seed": seed,
        "images_per_file": images_per_file, "first_image": _name_of(store, 0, source),
    }  # fmt: skip
    _same_encoding(out, about)
    encoded = 0
    for number, first in enumerate(range(0, len(store), images_per_file)):
        last = min(first + images_per_file, len(store))
        path = out / f"latents-{number:06d}.safetensors"
        if not _is_whole(path):
            names, batch, slots = read_store(model.profile, store, source, say, range(first, last))
            if names:
                latents = model.encode_batch(batch, posterior=posterior, seed=seed, slots=slots)
                latents.save(path, names)
                encoded += len(names)
        if progress is not None:
            progress(last, len(store))
    return encoded


def latent_files(source: Path) -> list[Path]:
    """The files of latents that a path names: itself, or a folder's in order. Raises ConfigError for none."""
    found = [source] if source.is_file() else sorted(source.glob("latents-*.safetensors"))
    if not found:
        raise ConfigError(f"{source}: no such file of latents, and no folder that `encode` has written to")
    return found


def decode_files(model: Model, files: list[Path], out: Path, progress: OnProgress | None = None) -> int:
    """Write each image of latents as a PNG of its name; returns how many were written. Those that are there stay."""
    written = 0
    for done, file in enumerate(files, start=1):
        latents, names = Latents.load(file), Latents.names(file)
        targets = [out / name for name in _as_png(names or [f"{file.stem}-{i:06d}" for i in range(len(latents))])]
        missing = [i for i, target in enumerate(targets) if not target.exists()]
        if missing:
            images = model.decode(latents.rows(missing), output="pil")
            for i, image in zip(missing, images, strict=True):
                _save(image, targets[i], out)
            written += len(missing)
        if progress is not None:
            progress(done, len(files))
    return written


def _as_png(names: list[str]) -> list[str]:
    """The names with the ending .png, in place of their own where that leaves them all different."""
    short = [f"{Path(name).with_suffix('')}.png" for name in names]
    return short if len(set(short)) == len(short) else [f"{name}.png" for name in names]


def _save(image: Image.Image, target: Path, out: Path) -> None:
    if not target.resolve().is_relative_to(out.resolve()):
        raise ConfigError(
            f"{printable(target.name)}: this name of an image leads out of {out}; the file is not trusted"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    image.save(partial, "PNG")
    partial.replace(target)


def _same_encoding(out: Path, about: dict[str, object]) -> None:
    """Leave a note of what is encoded, or see that the folder's is the same."""
    note = out / ABOUT
    if not note.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(note, json.dumps(about, indent=1) + "\n")
        return
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{note} cannot be read: {error}; name another folder") from None
    differ = [key for key, value in about.items() if not isinstance(before, dict) or before.get(key) != value]
    if differ:
        raise ConfigError(f"{out} holds latents of another encoding ({', '.join(differ)} differ); name another folder")


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        Latents.load(path)
    except ConfigError:
        return False
    return True


def read_store(
    profile: Profile, store: Store, source: str, say: Callable[[str], object], numbers: range | None = None
) -> tuple[list[str], Tensor, list[int]]:
    """(names, images (B, C, S', S') as the network takes them, numbers) of a store's images, as the run's data were.

    numbers: which of them; None: all. What cannot be read is said and left out.
    """
    prepare = Preparation.of(profile.data, profile.model)
    names, pixels, read = [], [], []
    for i in numbers if numbers is not None else range(len(store)):
        try:
            pixels.append(prepare(store.image(i), store.name(i)))
        except (UnreadableImage, ConfigError, OSError) as error:
            say(f"left out: {error}")
            continue
        names.append(_name_of(store, i, source))
        read.append(i)
    if not names:
        return [], torch.empty(0), []
    return names, to_network(torch.from_numpy(np.stack(pixels)), profile.model, None), read


def _name_of(store: Store, index: int, source: str) -> str:
    """An image's name below the folder or archive that it is in; its number where it has none."""
    name, root = store.name(index), printable(Path(source).expanduser())
    return name.removeprefix(root).lstrip("/\\:") if name.startswith(root) else f"{index:06d}"


def _fingerprint(model: Model) -> float:
    """A number that other weights hardly share."""
    return float(sum(p.detach().double().abs().sum() for p in model.network.parameters()))
