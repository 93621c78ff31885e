"""The published recipes as one table of aligned rows, and models with other numbers of groups."""

from __future__ import annotations

from dataclasses import replace

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import DataConfig, Profile, TrainConfig
from nvae_lowmem.errors import ConfigError, unknown_name

# The published recipes (arXiv 2007.03898, table 6), one row each; `batch` is the published batch per GPU.
# fmt: off
_RECIPES: dict[str, tuple] = {
    # name     size pad ch bits | width scales groups adaptive min | blocks cells flows | batch gpus epochs warm lambdas
    "mnist":       (28,  2,  1,   1,     32, 2,  10, True,  1,   2, 3,  0,   200,  2, 400, 5, 0.0, 1e-2, 1e-2),
    "cifar10":     (32,  0,  3,   8,    128, 1,  30, False, 1,   1, 2,  1,    32,  8, 400, 5, 0.0, 1e-2, 1e-2),
    "celeba64":    (64,  0,  3,   8,     64, 3,  20, True,  1,   1, 2,  1,    16,  8,  90, 5, 0.0, 1e-1, 1e-2),
    "imagenet32":  (32,  0,  3,   8,    192, 1,  28, False, 1,   1, 2,  1,    24, 24,  45, 1, 1.0, 1e-2, 1e-2),
    "celebahq256": (256, 0,  3,   5,     30, 5,  16, True,  4,   1, 2,  2,     4, 24, 300, 5, 1.0, 1e-2, 1e-2),
    "ffhq256":     (256, 0,  3,   5,     30, 5,  16, True,  4,   1, 2,  2,     4, 24, 200, 5, 1.0, 1e-1, 8e-3),
    "tiny":        (28,  2,  1,   1,      8, 2,   3, False, 1,   1, 2,  0,    32,  1, 100, 5, 0.0, 1e-2, 3e-3),
}
# fmt: on
RECIPES: tuple[str, ...] = tuple(_RECIPES)
PUBLISHED_RECIPES: tuple[str, ...] = RECIPES[:6]
PUBLISHED_IMAGES: dict[str, int] = {
    "mnist": 60_000, "cifar10": 50_000, "celeba64": 162_770, "imagenet32": 1_281_167, "celebahq256": 27_000,
    "ffhq256": 63_000,
}  # fmt: skip
"""Training images of the published data sets: what the recipes' epochs are epochs of."""
_SOURCES = {"mnist": "mnist5k", "tiny": "mnist5k"}
WHERE_FROM: dict[str, str] = {
    "cifar10": "CIFAR-10, python version (www.cs.toronto.edu/~kriz/cifar.html), unpacked: --data cifar-10-batches-py",
    "celeba64": "CelebA, aligned and cropped (mmlab.ie.cuhk.edu.hk/projects/CelebA.html): --data img_align_celeba.zip "
    "--set data.crop=celeba",
    "imagenet32": "ImageNet as 32 x 32 images (image-net.org, after logging in), unpacked: --data train_32x32 "
    "--set data.test_source=valid_32x32",
    "celebahq256": "CelebA-HQ (github.com/tkarras/progressive_growing_of_gans says how it is made), as a folder or ZIP "
    "of images, which are resized: --data FOLDER",
    "ffhq256": "FFHQ (github.com/NVlabs/ffhq-dataset), as a folder or ZIP of images, which are resized: "
    "--data images1024x1024",
}
"""The published recipes' data that cannot be shipped -> where they come from, and how to name them."""


def recipe(name: str) -> Profile:
    """The named recipe as published, at its per-GPU batch on one card.

    Raises ConfigError for an unknown name, with the known ones and the nearest.
    """
    if name not in _RECIPES:
        raise ConfigError(unknown_name("recipe", name, _RECIPES))
    (size, pad, channels, bits, width, scales, groups, adaptive, min_groups, blocks, cells, flows,
     batch, gpus, epochs, warmup, lambda_start, lambda_end, rate) = _RECIPES[name]  # fmt: skip
    model = ModelConfig(
        image_channels=channels, image_size=size, padding=pad, bits=bits,
        channels_encoder=width, channels_decoder=width,
        scales=scales, groups=groups, adaptive=adaptive, min_groups=min_groups, latents=8 if name == "tiny" else 20,
        preprocess_blocks=blocks, preprocess_cells=cells, postprocess_blocks=blocks, postprocess_cells=cells,
        flows=flows,
    )  # fmt: skip
    training = TrainConfig(
        total_batch=batch, epochs=epochs, warmup_epochs=warmup, regulariser=lambda_end, regulariser_start=lambda_start,
        published_total_batch=batch * gpus, published_learning_rate=rate,
    )  # fmt: skip
    data = DataConfig(source=_SOURCES.get(name, name), flip=channels == 3)
    return Profile(name=name, model=model, data=data, training=training, provenance={"recipe": name})


def with_groups(model: ModelConfig, groups_per_scale: tuple[int, ...]) -> ModelConfig:
    """The same model with other numbers of groups per scale, highest resolution first."""
    return replace(model, scales=len(groups_per_scale), groups=groups_per_scale[0], groups_per_scale=groups_per_scale)
