"""A data set in its splits: normalised when a batch is asked for, augmented in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.files import read_tensors, write_tensors
from ..base.sections import StudyError
from ..base.store import Store
from ..networks.devices import CPU
from .augmentation import augment, cropped, views
from .images import Files, Images, Split, part, stream
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
        """Images (N, C, H, W), from 0 to 255, to float32 of zero mean and unit variance over the training split."""
        mean = torch.tensor(self.mean, device=self.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=self.device).view(-1, 1, 1)
        return (images.to(self.device, non_blocking=True).float() / 255 - mean) / std

    def augmented(self, images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
        """uint8 images (N, C, H, W), each under its own random change, normalised."""
        images = images.to(self.device, non_blocking=True)
        if how.crop:
            images = cropped(images, how.crop, generator)
        if how.of_views:
            images = views(images, how, generator)
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
        # To normalise takes no other images: inputs may be sent to another machine.
        without = replace(self, splits={}, searched=None)
        return Inputs(without, images, len(images) if first is None else min(first, len(images)))

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

    def part(self, which: Tensor | slice) -> Inputs:
        """Some of them, not read yet."""
        rows = torch.arange(self.count)[which]
        return Inputs(self.dataset, part(self.images, rows), len(rows))

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
