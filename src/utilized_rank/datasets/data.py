"""A data set in its splits: normalised when a batch is asked for, augmented in batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.files import read_tensors, write_tensors
from ..base.sections import StudyError
from ..base.store import Store
from ..networks.devices import CPU
from .images import Files, Images, Split, stream
from .sections import Augmentation

SPLITS = ("train", "search", "test")


@dataclass(frozen=True)
class Dataset:
    """A data set, its splits, and the statistics that normalise it."""

    splits: dict[str, Split]
    classes: list[str]
    mean: list[float]
    """Of each channel over the training split, in [0, 1]."""
    std: list[float]
    device: torch.device = CPU
    """Where images are normalised and augmented; those that are kept as one array lie there."""
    searched: Tensor | None = None
    """Which test images are the search split of runs whose weights are given, bool (N,); None where none are."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.splits["train"].images.shape[1:]
        return channels, height, width

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 images (N, C, H, W) to float32 of zero mean and unit variance over the training split."""
        mean = torch.tensor(self.mean, device=self.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=self.device).view(-1, 1, 1)
        return (images.to(self.device, non_blocking=True).float() / 255 - mean) / std

    def augmented(self, images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
        """uint8 images (N, C, H, W), each under its own random change, normalised."""
        images = images.to(self.device, non_blocking=True)
        if how.crop:
            images = cropped(images, how.crop, generator)
        return augment(self.normalised(images), how, generator)

    def on(self, device: torch.device) -> Dataset:
        """The same images on a device; those that are files come there batch by batch."""
        return replace(self, device=device, splits={name: split.on(device) for name, split in self.splits.items()})

    def normalised_by(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> Dataset:
        """The same images, normalised with other values of each channel where they are given.

        Raises:
            StudyError: there are not as many as channels.
        """
        if mean is None or std is None:
            return self
        channels = self.shape[0]
        if not len(mean) == len(std) == channels:
            raise StudyError(f"mean and std of a model need one value for each of {channels} channels")
        return replace(self, mean=list(mean), std=list(std))

    def searching_test(self) -> Dataset:
        """The data set of a run whose weights are given: the test images are its search and its test split."""
        if self.searched is None:
            return self
        test, searched = self.splits["test"], self.searched
        halves = {"search": test.part(searched.nonzero().flatten()), "test": test.part((~searched).nonzero().flatten())}
        return replace(self, splits=self.splits | halves, searched=None)

    def inputs(self, split: str, first: int | None = None) -> Inputs:
        """The normalised images of a split (its first ``first`` of them)."""
        images = self.splits[split].images
        return Inputs(self, images, len(images) if first is None else min(first, len(images)))

    def labels(self, split: str) -> Tensor:
        """The labels of a split, int64 (N,)."""
        return self.splits[split].labels


@dataclass(frozen=True)
class Inputs:
    """Normalised images, float32 (N, C, H, W): a part of them is made when it is asked for, as if of a tensor."""

    dataset: Dataset
    images: Images
    count: int
    """Of the first images: these are meant."""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, which: Tensor | slice) -> Tensor:
        """Some of them."""
        rows = torch.arange(self.count)[which]
        return self.dataset.normalised(self.images[rows])

    def split(self, size: int) -> Iterator[Tensor]:
        """All of them, so many at a time."""
        for batch in stream(self.images, torch.arange(self.count).split(size)):
            yield self.dataset.normalised(batch)


def path(store: Store) -> Path:
    """Where a study's data set lies."""
    return store.data("prepare", "dataset.safetensors")


def save(dataset: Dataset, store: Store) -> None:
    """Write a study's data set as one safetensors file: its images, or the names of their files."""
    root = store.main.absolute()
    tensors = {f"{name}.labels": split.labels for name, split in dataset.splits.items()}
    described: dict[str, Any] = {"classes": dataset.classes, "mean": dataset.mean, "std": dataset.std, "files": {}}
    if dataset.searched is not None:
        tensors["test.searched"] = dataset.searched
    for name, split in dataset.splits.items():
        if isinstance(split.images, Tensor):
            tensors[f"{name}.images"] = split.images
            continue
        files = split.images
        tensors[f"{name}.names"] = torch.frombuffer(bytearray("\n".join(files.names).encode()), dtype=torch.uint8)
        folder = files.root.absolute()
        # From the project's root, so that the file is the same wherever that lies.
        where = folder.relative_to(root) if folder.is_relative_to(root) else folder
        described["files"][name] = [where.as_posix(), files.side, files.crop, files.workers, files.interpolation]
    write_tensors(path(store), tensors, described)


def load(store: Store) -> Dataset:
    """Read what :func:`save` wrote."""
    tensors, described = read_tensors(path(store))

    def images(name: str) -> Images:
        if name not in described["files"]:
            return tensors[f"{name}.images"]
        folder, *how = described["files"][name]
        names = tensors[f"{name}.names"].numpy().tobytes().decode().split("\n")
        return Files(store.main / folder, names, *how)

    splits = {name: Split(images(name), tensors[f"{name}.labels"]) for name in SPLITS}
    searched = tensors.get("test.searched")
    return Dataset(splits, described["classes"], described["mean"], described["std"], searched=searched)


def cropped(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Each image (N, C, H, W) moved by up to so many pixels each way, exactly; black comes in from outside."""
    count, _, height, width = images.shape
    around = F.pad(images, 4 * [pixels])
    down, across = torch.randint(0, 2 * pixels + 1, (2, count, 1), generator=generator)
    # Chosen by the processor's generator, whatever the device: the same for all of them.
    rows = (down + torch.arange(height)).to(images.device)  # (N, H)
    columns = (across + torch.arange(width)).to(images.device)  # (N, W)
    some = torch.arange(count, device=images.device).view(-1, 1, 1)
    # Indices on both sides of a slice put what they choose first: (N, H, W, C).
    return around[some, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def augment(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Each image of a normalised batch (N, C, H, W) under its own random change.

    One resampling does translation, rotation, scale and flip; then contrast and noise.
    """
    count = len(images)

    def draw(largest: float) -> Tensor:  # uniform in [-largest, largest], (N,)
        return ((torch.rand(count, generator=generator) * 2 - 1) * largest).to(images.device)

    angle, scale = draw(math.radians(how.rotate)), 1 + draw(how.scale)
    mirrored = torch.rand(count, generator=generator) < 0.5 if how.flip else torch.zeros(count, dtype=torch.bool)
    mirror = torch.where(mirrored, -1.0, 1.0).to(images.device)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cos * mirror, -sin, draw(2 * how.shift)], 1)]
    rows += [torch.stack([sin * mirror, cos, draw(2 * how.shift)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)  # (N, H, W, 2)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    if how.contrast:
        images = images * (1 + draw(how.contrast)).view(-1, 1, 1, 1)
    if how.noise:
        images = images + how.noise * torch.randn(images.shape, generator=generator).to(images.device)
    return images
