"""Which class each drawn image is of: what people ask for, and what the model is given of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.data.labels import label_rows
from nvae_lowmem.errors import ConfigError, command_line, unknown_name
from nvae_lowmem.model.nvae import NVAE

NO_CLASS = -1
"""The number that stands for no class: an image of the data as a whole."""
MOST_GUIDANCE = 100.0


def parse_classes(texts: Sequence[str | int], profile: Profile) -> tuple[int, ...]:
    """The numbers of classes given by name or number, "all" for all of them, "none" for no class; nothing: none given.

    Raises ConfigError for a class that the model does not have, and for a model without labels.
    """
    if not texts:
        return ()
    count, names = profile.model.classes, class_names(profile)
    _require_labels(f"--class {texts[0]}", profile.model)
    numbers: list[int] = []
    for text in map(str, texts):
        if text in names:
            numbers.append(names.index(text))
        elif text in ("all", "none"):
            numbers += range(count) if text == "all" else [NO_CLASS]
        elif text.isdecimal() and int(text) < count:
            numbers.append(int(text))
        else:
            raise ConfigError(f"--class: {unknown_name('class', text, names)}; or a number below {count}, all, none")
    return tuple(numbers)


def check_guidance(guidance: float, config: ModelConfig) -> None:
    """Raise ConfigError for a guidance that is no number from 0 to 100, and for one of a model without labels."""
    if not (math.isfinite(guidance) and 0 <= guidance <= MOST_GUIDANCE):
        raise ConfigError(
            f"--guidance {guidance:g}: must be from 0 (no class) over 1 (the class as learned) to {MOST_GUIDANCE:g}; "
            "1.5 to 3 make the class clearer"
        )
    if guidance != 1:
        _require_labels(f"--guidance {guidance:g}", config)


def class_names(profile: Profile) -> tuple[str, ...]:
    """What the model's classes are called, by their numbers."""
    return profile.data.class_names or tuple(map(str, range(profile.model.classes)))


def class_name(number: int, profile: Profile) -> str:
    """What one class is called."""
    return class_names(profile)[number] if number != NO_CLASS else "no class"


def labels_in_turn(model: NVAE, first: int, count: int, classes: Sequence[int] = ()) -> Tensor | None:
    """Labels of images first, ..., first + count - 1: image n is of the class at place n of `classes`, over and over.

    Without classes all the model's take turns, as in the images that BatchNorm's statistics are taken over. On the
    model's device, (count, classes + 1); None for a model without labels.
    """
    known = model.config.classes
    if not known:
        return None
    asked = np.asarray(classes or range(known))
    numbers = asked[np.arange(first, first + count) % len(asked)]
    return label_rows(numbers, known).to(next(model.parameters()).device)


def _require_labels(flag: str, config: ModelConfig) -> None:
    if not config.classes:
        raise ConfigError(
            f"{flag}: this model was trained without class labels (model.classes = 0): leave it out, or train one with "
            f"{command_line('train')} --labels"
        )
