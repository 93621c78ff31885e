"""A look and a choice in words: what was found, what was chosen, what was given up and why."""

from __future__ import annotations

from nvae_lowmem.budget.choose import ENOUGH_STEPS, MOST_PASSES, ChosenModel
from nvae_lowmem.budget.ladder import LADDER
from nvae_lowmem.data.look import Look
from nvae_lowmem.memory.plan.duration import format_days
from nvae_lowmem.model.likelihoods import make_likelihood


def found(look: Look, images: int) -> list[str]:
    """What a look has found; images: that are left to train on."""
    readable = look.looked_at - look.unreadable
    colours = "grey" if look.channels == 1 else "in colour" if not look.grey else f"in colour ({look.grey} grey)"
    w, h = look.least_size
    sizes = f"all {w} x {h} pixels" if look.same_size else f"from {w} x {h} to {look.most_size[0]} x "
    sizes += "" if look.same_size else f"{look.most_size[1]} pixels"
    out = [
        f"{look.description}: {images:,} to train on" + ("" if look.has_test_part else ", the rest held out"),
        f"{readable} looked at: {colours}, {sizes}, {look.levels} different values, "
        f"{look.middle_share:.0%} of the pixels neither dark nor light",
    ]
    if look.unreadable:
        out.append(f"{look.unreadable} of {look.looked_at} looked at cannot be read and will be left out")
    if look.is_aligned_celeba:
        out.append("the size of CelebA's aligned images: the published square is cut out (data.crop = celeba)")
    elif look.most_lost_share:
        out.append(
            f"the centred square leaves out {look.lost_share:.0%} of an image on average, {look.most_lost_share:.0%} "
            "at most"
        )
    return out


def chosen(choice: ChosenModel, look: Look) -> list[str]:
    """What was chosen, each with its reason."""
    model, training, data = choice.profile.model, choice.profile.training, choice.profile.data
    groups = " + ".join(map(str, model.scale_groups))
    sizes = ", ".join(map(str, model.scale_sizes))
    size = f"{model.image_size} x {model.image_size}"
    padded = f", padded by {model.padding} on each side to {model.network_size}" if model.padding else ""
    bits = {1: "1 bit: nearly every pixel is dark or light", 5: "5 bits: finer shades would take most of the model"}
    distribution = make_likelihood(model.likelihood, model.image_channels, model.bits, model.mixtures)
    likelihood = f"{distribution.describe()}; {bits.get(model.bits, '8 bits, as published')}"
    if model.bits == 1 and data.dynamic_binarisation and look.levels > 2:
        likelihood += "; greys are drawn anew in every step (dynamic binarisation)"
    mirrored = "mirrored at random" if data.flip else "not mirrored: grey images may be writing (--set data.flip=true)"
    steps = choice.hours * 3600 / choice.time.most_seconds, choice.hours * 3600 / choice.time.least_seconds
    out = [
        f"images {size}{padded}, {'grey' if model.image_channels == 1 else 'RGB'}, {mirrored}",
        f"likelihood: {likelihood}",
        f"model: rung {choice.rung.number} of 0 to {LADDER[-1].number}, {model.channels_encoder} channels, groups "
        f"{groups} at {sizes} pixels",
        f"total batch {training.total_batch}, the largest up to the published one that leaves {ENOUGH_STEPS:,} steps; "
        f"learning rate {training.learning_rate:g}",
        f"speed: {choice.time.speed()}; planned with the slower end, where published timings lie"
        if not choice.time.measured_on
        else f"speed: {choice.time.speed()}",
    ]
    if choice.limited_by_images:
        out.append(
            f"{choice.steps:,} steps, {choice.images_seen:,} images seen, {choice.passes:.0f} passes over "
            f"{choice.images:,} images; ends after {_ends(choice)}, before the {_hours(choice.hours)} are over"
        )
    else:
        out.append(
            f"{_count(*steps)} steps until {_hours(choice.hours)} are over, at least {choice.images_seen:,} images "
            f"seen, {choice.passes:.3g} passes over {choice.images:,} images; the first minutes of training measure "
            "the speed, and every schedule then ends with the time"
        )
        most = choice.passes * choice.time.most_seconds / choice.time.least_seconds
        if most > MOST_PASSES:
            out.append(
                f"as fast as its data sheet promises, the card makes {most:,.0f} passes, and after about {MOST_PASSES} "
                "a model learns its images: watch the held-out figure; its best checkpoint is kept beside the last"
            )
    return out


def gave_up(choice: ChosenModel) -> list[str]:
    """What more time, memory or images would have bought."""
    out = [choice.stopped] if choice.stopped else []
    if choice.limited_by_images:
        out.append(
            f"the rest of {_hours(choice.hours)}: after {MOST_PASSES} passes a model learns its images, not what they "
            "have in common; more images would use the time"
        )
    if choice.profile.model.bits == 5 and choice.profile.model.image_size <= 64:
        out.append("the three finest bits of each value: --set model.bits=8 keeps them")
    return out or ["nothing: this is the largest model there is a recipe for"]


def described(choice: ChosenModel, look: Look) -> str:
    """All of it, for a terminal."""
    parts = [("images", found(look, choice.images)), ("chosen", chosen(choice, look)), ("given up", gave_up(choice))]
    return "\n".join(f"{head}\n" + "\n".join(f"  {line}" for line in lines) for head, lines in parts)


def _hours(hours: float) -> str:
    return f"{hours:g} hours" if hours >= 1 else f"{60 * hours:g} minutes"


def _count(least: float, most: float) -> str:
    """ "9,752 to 40,956", or one number."""
    low, high = f"{least:,.0f}", f"{most:,.0f}"
    return low if low == high else f"{low} to {high}"


def _ends(choice: ChosenModel) -> str:
    return format_days(choice.steps * choice.time.least_seconds, choice.steps * choice.time.most_seconds)
