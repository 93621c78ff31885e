"""What tells a run's data from others: how many images, and a hash of their identities, kept in the run's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from nvae_lowmem.config.tables import parse_json
from nvae_lowmem.data.stores import Store
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.files import write_atomically

FILE_NAME = "data.json"


@dataclass(frozen=True)
class Fingerprint:
    """The images of both parts: how many, and a SHA-256 of what they are known by (paths below the source, pixels)."""

    train_images: int
    train_sha256: str
    test_images: int
    test_sha256: str

    @classmethod
    def of(cls, train: tuple[Store, Iterable[int], int], test: tuple[Store, Iterable[int], int]) -> Fingerprint:
        """Of two parts, each (store, numbers, how many of these can be read)."""
        (train_store, train_numbers, train_count), (test_store, test_numbers, test_count) = train, test
        return cls(
            train_images=train_count,
            train_sha256=_sha256(train_store, train_numbers),
            test_images=test_count,
            test_sha256=_sha256(test_store, test_numbers),
        )


def record_or_compare(run_dir: Path, found: Fingerprint) -> str:
    """Keep the fingerprint in the run's folder; a sentence on how it differs from the one that is there, "" if equal.

    A file that cannot be read counts as different, and is replaced. Raises OSError where it cannot be written.
    """
    path = run_dir / FILE_NAME
    change = _change(path, found) if path.exists() else ""
    if change or not path.exists():
        write_atomically(path, json.dumps(asdict(found), indent=1) + "\n")
    return change


def _change(path: Path, found: Fingerprint) -> str:
    try:
        before = parse_json(path.read_text(encoding="utf-8"), "it")
    except (ConfigError, OSError, UnicodeDecodeError):
        return f"warning: {path} cannot be read, so nobody knows whether the run's data are what they were"
    now, changes = asdict(found), {}
    for part, what in (("train", "training"), ("test", "held-out")):
        count, digest = f"{part}_images", f"{part}_sha256"
        if before.get(count) != now[count]:
            changes[part] = f"{what} images {before.get(count)} -> {now[count]}"
        elif before.get(digest) != now[digest]:
            changes[part] = f"{now[count]} {what} images, but not the same ones"
    if not changes:
        return ""
    said = f"warning: the data are not those that the run began with ({'; '.join(changes.values())}): "
    effects = {
        "train": "training goes through its images in another order",
        "test": "figures from here on are on other held-out images than those before",
    }
    return said + ", and ".join(effects[part] for part in changes)


def _sha256(store: Store, numbers: Iterable[int]) -> str:
    found = hashlib.sha256()
    for number in numbers:
        identity = store.identity(int(number))
        found.update(b"%d:" % len(identity) + identity)
    return found.hexdigest()
