"""A trained model to work with: sample, encode, decode, reconstruct, blend, and likelihoods of images.

    import nvae_lowmem as nl
    model = nl.load("runs/latest")
    model.sample(16, temperature=0.8, seed=1, output="pil")[0].save("sample.png")

Every result is a function of the weights, the seed and the number of the image: how the work is split into passes (the
plan's micro-batch) does not matter. Legend: B images, C channels, S pixels per side, G latent groups from the top down.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from nvae_lowmem.config.choices import BlendMode, DeviceChoice, Posterior
from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.evaluation.bounds import elbo_of_images, importance_weighted_bound
from nvae_lowmem.files import write_atomically
from nvae_lowmem.generation.blend import blend_images, parse_weights
from nvae_lowmem.generation.classes import class_names, parse_classes
from nvae_lowmem.generation.recalibrate import (
    RECALIBRATION_SEED,
    default_passes,
    recalibrate,
    recalibrate_once,
    recalibrated_statistics,
    set_statistics,
)
from nvae_lowmem.generation.reconstruct import posterior_noise, reconstruct
from nvae_lowmem.generation.sample import Temperature, decoded_mean, sample_images, temperature_text
from nvae_lowmem.interop import nvlabs
from nvae_lowmem.library.export import Unpacked, is_export, is_packed_export, read_export
from nvae_lowmem.library.images import Images, Output, as_batch, as_output
from nvae_lowmem.model.latents import FromPosterior, Given
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training.build import prepare_for_inference
from nvae_lowmem.training.open_run import (
    OpenRun,
    choose_device,
    images_per_pass,
    open_run,
)

_FORMAT = "nvae-lowmem latents 1"


@dataclass(frozen=True)
class Latents:
    """The latents of B images, on the host."""

    z: tuple[Tensor, ...]
    """One tensor (B, L, h, w) fp32 per group, from the top (lowest resolution) down."""
    kl: Tensor
    """(B, G) nats: KL of each image's posterior from the prior, per group."""

    def __len__(self) -> int:
        return len(self.kl)

    def __getitem__(self, rows: slice) -> Latents:
        return Latents(tuple(z[rows] for z in self.z), self.kl[rows])

    def rows(self, indices: Sequence[int]) -> Latents:
        """Those of some images."""
        return Latents(tuple(z[list(indices)] for z in self.z), self.kl[list(indices)])

    def save(self, path: str | os.PathLike[str], names: Sequence[str] = ()) -> None:
        """Write them as one safetensors file, whole or not at all: `group_000`, `group_001`, ..., `kl`, and names."""
        tensors = {f"group_{i:03d}": z.contiguous() for i, z in enumerate(self.z)} | {"kl": self.kl.contiguous()}
        about = json.dumps(
            {"format": _FORMAT, "names": list(names)}
        )  # one entry: several have no fixed order in the file
        write_atomically(path, safetensors.torch.save(tensors, {"about": about}))

    @staticmethod
    def names(path: str | os.PathLike[str]) -> list[str]:
        """The images' names in a file that `save` wrote; empty where it was given none."""
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
        names = about.get("names") if isinstance(about, dict) else None
        return [str(name) for name in names] if isinstance(names, list) else []

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Latents:
        """Read what `save` wrote. Raises ConfigError for anything else."""
        try:
            tensors = safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise ConfigError(f"latents {path}: cannot be read: {error}") from None
        groups = [name for name in sorted(tensors) if name.startswith("group_")]
        if "kl" not in tensors or not groups or len(groups) != len(tensors) - 1:
            raise ConfigError(f"latents {path}: holds {', '.join(sorted(tensors)[:5])}, and not latents of a model")
        return cls(tuple(tensors[name] for name in groups), tensors["kl"])


class Model:
    """A trained NVAE in evaluation mode on one device. Made by `load`."""

    def __init__(
        self,
        profile: Profile,
        network: NVAE,
        device: torch.device,
        micro_batch: int,
        name: str,
        folder: Path | None = None,
    ) -> None:
        self.profile = profile
        """What it was made with: model, data, training, plan."""
        self.network = network
        """The torch module itself."""
        self.device = device
        self.micro_batch = micro_batch
        """Images per pass, as the run's memory plan has room for."""
        self.name = name
        self._folder = folder  # where BatchNorm statistics for sampling lie beside the weights
        self._unpacked: Any = None  # a temporary folder, which goes when the model does
        self._posterior_statistics = {key: value.clone() for key, value in recalibrated_statistics(network).items()}
        self._prior_statistics: dict[tuple[str, int], Mapping[str, Tensor]] = {}

    @property
    def config(self) -> ModelConfig:
        """The network's configuration."""
        return self.profile.model

    @property
    def classes(self) -> tuple[str, ...]:
        """What the classes are called, by their numbers; none for a model without labels."""
        return class_names(self.profile)

    def __repr__(self) -> str:
        c = self.config
        size = f"{c.image_channels} x {c.image_size} x {c.image_size}"
        return f"<nvae_lowmem.Model {self.name}: {size} images, {c.total_groups} latent groups, on {self.device}>"

    # -- from the prior --

    def sample(
        self,
        count: int,
        temperature: Temperature = 0.8,
        seed: int = 0,
        *,
        classes: int | str | Sequence[int | str] = (),
        guidance: float = 1.0,
        draw_pixels: bool = False,
        passes: int = 0,
        output: Output = "tensor",
    ) -> Any:
        """`count` images from the prior.

        temperature: what the prior's sigma is multiplied by, one number or one per scale, highest resolution first.
        classes: of a model with labels, one class or several that the images take in turn, by number or name ("all",
        "none" for no class); nothing: all of them. guidance: how far to go towards the class, 1 as learned.
        draw_pixels: pixels drawn from p(x|z) instead of its mean. passes: batches of prior samples that BatchNorm's
        statistics are estimated from, once per temperature; 0: enough. output: see `nvae_lowmem.library.images.Output`.
        Raises ConfigError for a count below 1, for temperatures and classes that do not fit the model, and for classes
        or guidance of a model without labels.
        """
        asked = parse_classes([classes] if isinstance(classes, (int, str)) else classes, self.profile)
        with self._statistics_for(temperature, passes or default_passes(self.device, self.micro_batch)):
            images = sample_images(
                self.network, count, temperature, seed, self.micro_batch, draw_pixels, None, asked, guidance
            )
        return as_output(images, output)

    # -- through the posterior --

    def encode(self, images: Images, *, posterior: Posterior = "sample", seed: int = 0) -> Latents:
        """The latents of images (see `as_batch` for what those may be): draws from q(z|x), or each group's mean."""
        return self.encode_batch(as_batch(images, self.profile), posterior=posterior, seed=seed)

    @torch.no_grad()
    def encode_batch(
        self, batch: Tensor, *, posterior: Posterior = "sample", seed: int = 0, slots: Sequence[int] | None = None
    ) -> Latents:
        """`encode` of a batch (B, C, S', S') as the network takes it; slots: the images' numbers, else from 0 up."""
        numbers = range(len(batch)) if slots is None else slots
        parts = []
        for first in range(0, len(batch), self.micro_batch):
            x = batch[first : first + self.micro_batch].to(self.device)
            source = FromPosterior(posterior_noise(posterior, seed, numbers[first : first + len(x)]))
            _, latents = self.network.top_down(source, self.network.encode(x), return_z=True)
            z = tuple(latent.z.float().cpu() for latent in latents if latent.z is not None)
            kl = torch.stack([latent.kl.sum(1) for latent in latents if latent.kl is not None], dim=1)
            parts.append(Latents(z, kl.cpu()))
        groups = zip(*(part.z for part in parts), strict=True)
        return Latents(tuple(torch.cat(z) for z in groups), torch.cat([part.kl for part in parts]))

    @torch.no_grad()
    def decode(self, latents: Latents, *, output: Output = "tensor") -> Any:
        """The mean images of p(x|z), (B, C, S, S). Raises ConfigError for latents of another model."""
        shapes, wanted = [tuple(z.shape[1:]) for z in latents.z], [tuple(s) for s in self.network.latent_shapes]
        if shapes != wanted:
            raise ConfigError(f"latents: this model has groups of shape {wanted}, and these are of shape {shapes}")
        out = []
        for first in range(0, len(latents), self.micro_batch):
            chunk = latents[first : first + self.micro_batch]
            out.append(decoded_mean(self.network, Given([z.to(self.device) for z in chunk.z]), None, len(chunk)))
        return as_output(torch.cat(out), output)

    def reconstruct(
        self, images: Images, *, posterior: Posterior = "sample", seed: int = 0, output: Output = "tensor"
    ) -> Any:
        """Images through the model and back: the mean of p(x|z), z from q(z|x)."""
        batch = as_batch(images, self.profile)
        return as_output(reconstruct(self.network, batch, seed, self.micro_batch, posterior).images, output)

    def blend(
        self,
        a: Images,
        b: Images,
        weights: float | Sequence[float] | Sequence[Sequence[float]] = 0.5,
        *,
        mode: BlendMode = "linear",
        posterior: Posterior = "sample",
        seed: int = 0,
        output: Output = "tensor",
    ) -> Any:
        """Blends of two images, one per entry of `weights`: (P, C, S, S).

        weights: 0 is a, 1 is b. A number, or a list with one entry per blend; an entry is a number for all groups, or
        one number per scale or per group, HIGHEST RESOLUTION FIRST. Raises ConfigError for weights that do not fit.
        """
        entries = weights if isinstance(weights, Sequence) else [weights]
        pair = torch.cat([as_batch(a, self.profile), as_batch(b, self.profile)])
        if len(pair) != 2:
            raise ConfigError(f"a blend is of two images: {len(pair)} were given")
        rows = [entry if isinstance(entry, Sequence) else [entry] for entry in entries]
        points = torch.stack([parse_weights(",".join(map(repr, map(float, row))), self.config) for row in rows])
        images = blend_images(self.network, pair, points, mode, posterior, seed, self.micro_batch)
        return as_output(images, output)

    # -- likelihoods --

    def elbo(self, images: Images, *, seed: int = 0) -> Tensor:
        """The ELBO of each image with one posterior draw, (B,) float64, nats."""
        parts = (elbo_of_images(self.network, x, seed, first_image=first) for first, x in self._chunks(images))
        return torch.cat([-(part.nll + part.kl.sum(1)) for part in parts])

    def log_likelihood(self, images: Images, k: int = 100, *, seed: int = 0) -> Tensor:
        """The importance-weighted bound of log p(x) with k draws, (B,) float64, nats (arXiv 1509.00519, equation 8).

        Never below the ELBO on average, and closer to log p(x) the larger k is. Raises ConfigError for k below 1.
        """
        bounds = [
            importance_weighted_bound(self.network, x, k, seed, self.micro_batch, first_image=first)
            for first, x in self._chunks(images)
        ]
        return torch.cat(bounds)

    # -- pieces --

    def _chunks(self, images: Images) -> Iterator[tuple[int, Tensor]]:
        """(number of the first image, images (b, C, S', S') on the device): as many at a time as there is room for."""
        batch = as_batch(images, self.profile)
        for first in range(0, len(batch), self.micro_batch):
            yield first, batch[first : first + self.micro_batch].to(self.device)

    @contextmanager
    def _statistics_for(self, temperature: Temperature, passes: int) -> Iterator[None]:
        """Inside, BatchNorm's statistics are those of prior samples at the temperature; afterwards the posterior's."""
        key = (temperature_text(temperature), passes)
        try:
            if key in self._prior_statistics:
                set_statistics(self.network, self._prior_statistics[key])
            else:
                self._estimate(temperature, passes)
                found = recalibrated_statistics(self.network)
                self._prior_statistics[key] = {name: value.clone() for name, value in found.items()}
            yield
        finally:
            set_statistics(self.network, self._posterior_statistics)

    def _estimate(self, temperature: Temperature, passes: int) -> None:
        """Read from the file beside the weights if it has these settings; else estimated, and written there."""
        if self._folder is None:
            recalibrate(self.network, temperature, passes, self.micro_batch, RECALIBRATION_SEED)
        else:
            recalibrate_once(self.network, self._folder, temperature, passes, self.micro_batch, RECALIBRATION_SEED)


def load(
    source: str | os.PathLike[str] | int, *, runs_dir: str | os.PathLike[str] = "runs", device: DeviceChoice = "auto"
) -> Model:
    """A trained model, ready to use.

    source: a run by folder, number, name or "latest" (as `--run` takes it; "runs/latest" is the newest run in runs/),
    a folder or a ZIP that `nvae-lowmem export` made, or a published NVAE checkpoint (checkpoint.pt).
    Raises ConfigError with what to do for anything else.
    """
    path = Path(str(source))
    if path.is_file() and zipfile.is_zipfile(path) and is_packed_export(path):
        return _of_zip(path, device)
    if path.is_file():
        return _of_parts(*nvlabs.load_published(path), device, path.name)
    if is_export(path):
        return _of_parts(*read_export(path), device, path.name, path)
    if path.name == "latest" and not path.exists():
        return _of_run(open_run("latest", str(path.parent) if len(path.parts) > 1 else str(runs_dir), device))
    return _of_run(open_run(str(source), str(runs_dir), device))


def _of_run(run: OpenRun) -> Model:
    return Model(run.profile, run.model, run.device, run.micro_batch, run.folder.name, run.checkpoint)


def _of_parts(profile: Profile, network: NVAE, device: DeviceChoice, name: str, folder: Path | None = None) -> Model:
    where = choose_device(device)
    prepare_for_inference(network, profile)
    return Model(profile, network.to(where), where, images_per_pass(profile), name, folder)


def _of_zip(path: Path, device: DeviceChoice) -> Model:
    unpacked = Unpacked(path)
    model = _of_parts(*read_export(unpacked.folder), device, path.stem, unpacked.folder)
    model._unpacked = unpacked
    return model
