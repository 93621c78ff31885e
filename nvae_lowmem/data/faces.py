"""The embedded set `faces`: cartoon faces, drawn once by DiceBear styles, kept in the cache folder.

Which face index i gives is fixed by i alone (for given versions of the drawing packages). No torch here: the worker
processes that draw import this file.
"""

from __future__ import annotations

import functools
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from nvae_lowmem.config.sections import FacesStyle
from nvae_lowmem.data.cache import one_process_at_a_time, write_npz
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.progress import Log, Progress

# Part of the cache's file name: another drawing is another file.
_VERSION = 1
_FACES_PER_WORKER = 200
"""Fewer are drawn in the time that a worker process takes to start."""

_BACKGROUNDS = "b6e3f4 c0aede ffd5dc d1f4d9 ffdfbf".split()
# Scale and shift put all styles' eyes at the same height and give their heads one size. The lists leave out what
# does not read as a face at 64 pixels: masks, hats down to the eyes, hearts for eyes, a tongue out.
_STYLES: dict[str, dict[str, Any]] = {
    "toon-head": {"translateY": 2, "hairProbability": 100, "beardProbability": 20, "rearHairProbability": 50},
    "avataaars": {
        "scale": 1.12,
        "translateY": 11,
        "accessoriesProbability": 10,
        "accessoriesVariant": "prescription01 prescription02 round".split(),
        "eyesVariant": "default happy side squint surprised wink".split(),
        "mouthVariant": "default serious smile twinkle disbelief sad".split(),
        "topVariant": (
            "bigHair bob bun curly curvy dreads01 frizzle longButNotTooLong miaWallace shaggy shavedSides "
            "shortCurly shortFlat shortRound shortWaved sides straight01 straight02 straightAndStrand theCaesar "
            "theCaesarAndSidePart"
        ).split(),
        "skinColor": "614335 d08b5b ae5d29 edb98a ffdbb4".split(),
        "hairColor": "a55728 2c1b18 b58143 d6b370 724133 4a312c c93305 e8e1e1".split(),
    },
    "open-peeps": {"maskProbability": 0, "accessoriesProbability": 10},
}
_DRAWN_BY: dict[FacesStyle, tuple[str, ...]] = {"mixed": ("toon-head", "avataaars")}
"""Styles of several kinds of faces, which take turns."""
_CREDITS = {
    "toon-head": "ToonHead by Johan Melin (CC BY 4.0)",
    "avataaars": "Avataaars by Pablo Stanley (free for personal and commercial use)",
    "open-peeps": "Open Peeps by Pablo Stanley (CC0 1.0)",
}


def faces(count: int, size: int, folder: Path, log: Log, style: FacesStyle = "mixed") -> np.ndarray:
    """(count, 3, size, size) uint8 in a style: from the cache in `folder`, else drawn and cached there.

    A cache file that is damaged is drawn again; a folder that cannot be written is no error, only slower next time.
    Raises ConfigError where the drawing packages are missing.
    """
    kind = "" if style == "mixed" else f"-{style}"
    path = folder / f"faces-v{_VERSION}{kind}-{size}px-{count}.npz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with one_process_at_a_time(path):
            return _cached(path, count, size, log, style)
    except OSError as error:
        log(f"warning: faces cannot be kept in {str(folder)!r} ({error.strerror or error}); set data.cache_dir")
        return draw_faces(count, size, log, style)


def _cached(path: Path, count: int, size: int, log: Log, style: FacesStyle) -> np.ndarray:
    if path.exists():
        pixels = _read(path, (count, 3, size, size))
        if pixels is not None:
            return pixels
        log(f"{path} is damaged: drawing the faces again")
    pixels = draw_faces(count, size, log, style)
    try:
        write_npz(path, images=pixels)
    except OSError as error:
        log(f"warning: the faces cannot be kept in {path} ({error.strerror or error}); set data.cache_dir")
    return pixels


def _read(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        with np.load(path, allow_pickle=False) as content:
            pixels = content["images"]
    except Exception:  # a damaged ZIP raises nearly anything, and every reason ends in drawing again
        return None
    return pixels if pixels.shape == shape and pixels.dtype == np.uint8 else None


def draw_faces(count: int, size: int, log: Log, style: FacesStyle = "mixed") -> np.ndarray:
    """(count, 3, size, size) uint8, drawn on all cores. Raises ConfigError where the drawing packages are missing."""
    _check_packages()
    credit = " and ".join(_CREDITS[name] for name in _drawn_by(style))
    log(f"drawing {count:,} faces of {size} x {size} pixels, once: {credit}")
    out = np.empty((count, 3, size, size), dtype=np.uint8)
    progress = Progress("drawing faces", count, log)
    done = 0
    workers = min(_cores(), count // _FACES_PER_WORKER)
    if workers > 1:
        for face in _from_workers(workers, count, size, style):
            out[done] = face
            done += 1
            progress.advance()
    for index in range(done, count):  # all of them, or what workers that could not start or died have left
        out[index] = draw_face(index, size, style)
        progress.advance()
    return out


def _from_workers(workers: int, count: int, size: int, style: FacesStyle) -> Iterator[np.ndarray]:
    """(3, size, size) per face, in order, drawn by other processes in turn; ends early if one of them does.

    Plain processes, not multiprocessing's: those import the main script again, and in one without a __main__ guard
    each would start all this anew and wait for our lock.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH", "")) if path)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for first in range(workers):
            command = [sys.executable, "-m", __name__, *map(str, (first, count, workers, size)), style]
            # silent: the worker's traceback at Ctrl-C, or what this process will meet itself when it draws the rest
            processes.append(
                subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": paths}
                )
            )
        for index in range(count):
            stream = processes[index % workers].stdout
            data = stream.read(3 * size * size) if stream else b""
            if len(data) < 3 * size * size:
                return
            yield np.frombuffer(data, dtype=np.uint8).reshape(3, size, size)
    except OSError:  # no process can be started here
        return
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _work(first: int, stop: int, step: int, size: int, style: FacesStyle) -> None:
    """What a worker does: write the faces range(first, stop, step) as raw bytes to the standard output."""
    for index in range(first, stop, step):
        sys.stdout.buffer.write(draw_face(index, size, style).tobytes())
        sys.stdout.buffer.flush()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def draw_face(index: int, size: int, style: FacesStyle = "mixed") -> np.ndarray:
    """(3, size, size) uint8 of the face with this index."""
    from dicebear import Avatar
    from resvg_py import svg_to_bytes

    names = _drawn_by(style)
    name = names[index % len(names)]
    svg = Avatar(_style(name), {"seed": f"face-{index}", "backgroundColor": _BACKGROUNDS, **_STYLES[name]}).to_string()
    png = bytes(svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def _drawn_by(style: FacesStyle) -> tuple[str, ...]:
    """The DiceBear styles that draw such faces, in turn."""
    return _DRAWN_BY.get(style, (style,))


@functools.cache
def _style(name: str) -> Any:
    from dicebear import Style

    return Style(json.loads(resources.files("dicebear_styles").joinpath(f"{name}.json").read_text("utf-8")))


def _check_packages() -> None:
    try:
        import dicebear  # noqa: F401
        import dicebear_styles  # noqa: F401
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"data.source 'faces' needs packages that draw ({error.name} is missing): pip install dicebear-core "
            "dicebear-styles resvg-py, or take data.source = 'mnist5k'"
        ) from None


if __name__ == "__main__":
    _first, _stop, _step, _size = map(int, sys.argv[1:5])
    _work(_first, _stop, _step, _size, cast(FacesStyle, sys.argv[5]))
