"""Images: read from their source, split once, kept as one array, augmented in batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import config
from .store import read_tensors, write_tensors

SPLITS = ("train", "search", "test")


@dataclass(frozen=True)
class Split:
    """Some of a data set's images."""

    images: Tensor
    """uint8, (N, C, H, W)."""
    labels: Tensor
    """int64, (N,)."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A data set, its splits, and the statistics that normalise it."""

    splits: dict[str, Split]
    classes: list[str]
    mean: list[float]
    """Of each channel over the training split, in [0, 1]."""
    std: list[float]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.splits["train"].images.shape[1:]
        return channels, height, width

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 images (N, C, H, W) to float32 of zero mean and unit variance over the training split."""
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        return (images.float() / 255 - mean) / std

    def inputs(self, split: str, first: int | None = None) -> Tensor:
        """The normalised images of a split (its first ``first`` of them)."""
        return self.normalised(self.splits[split].images[:first])

    def labels(self, split: str) -> Tensor:
        """The labels of a split, int64 (N,)."""
        return self.splits[split].labels


def load_source(data: config.Data) -> tuple[Tensor, Tensor, list[str]]:
    """All images (uint8, N x C x H x W), their labels, and the classes' names."""
    from sklearn.datasets import load_digits  # only preparing needs it, and it takes a second to import

    digits = load_digits()
    images = torch.from_numpy(digits.images / 16).float().unsqueeze(1)  # (N, 1, 8, 8) in [0, 1]
    side = data.image_size
    images = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
    return (images * 255).round().byte(), torch.from_numpy(digits.target).long(), [str(d) for d in range(10)]


def split_indices(labels: np.ndarray, data: config.Data, seed: int) -> dict[str, np.ndarray]:
    """Stratified indices of each split, ascending for search and test, shuffled for train.

    The search split is carved from what is not test: selecting a rank never sees a test image.

    Raises:
        StudyError: there are too few images for a split to have every class.
    """
    from sklearn.model_selection import train_test_split

    indices = np.arange(len(labels))
    classes = len(set(labels.tolist()))
    fewest = math.ceil(classes / min(data.search_fraction, data.test_fraction))
    if min(data.limit or len(labels), len(labels)) < fewest:
        raise config.StudyError(
            f"{data.limit or len(labels)} images are too few: every split needs one of each of {classes} classes, so "
            f"data.limit must be at least {fewest}"
        )
    if data.limit is not None and data.limit < len(labels):
        indices, _ = train_test_split(indices, train_size=data.limit, stratify=labels, random_state=seed)
    rest, test = train_test_split(indices, test_size=data.test_fraction, stratify=labels[indices], random_state=seed)
    search_fraction = data.search_fraction / (1 - data.test_fraction)
    train, search = train_test_split(rest, test_size=search_fraction, stratify=labels[rest], random_state=seed)
    return {"train": train, "search": np.sort(search), "test": np.sort(test)}


def check_resolution(images: int, epsilons: list[float]) -> None:
    """Refuse an epsilon finer than one image of the search split: it could only measure noise.

    Raises:
        StudyError: naming the epsilon and what one image is worth.
    """
    finest = 100 / images
    for epsilon in epsilons:
        if 0 < epsilon < finest:
            raise config.StudyError(
                f"measure.epsilons has {epsilon:g} points, but one of the {images} search images is worth "
                f"{finest:.2g} points: use 0 or at least that, or enlarge data.search_fraction"
            )


def build(data: config.Data, seed: int) -> tuple[Dataset, dict[str, list[int]]]:
    """Load, split and describe a data set; returns it and the indices of each split in its source."""
    images, labels, classes = load_source(data)
    indices = split_indices(labels.numpy(), data, seed)
    splits = {name: Split(images[rows], labels[rows]) for name, rows in indices.items()}
    pixels = splits["train"].images.double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0).clamp_min(1e-3)
    dataset = Dataset(splits, classes, mean.tolist(), std.tolist())
    return dataset, {name: rows.tolist() for name, rows in indices.items()}


def save(dataset: Dataset, path: Path) -> None:
    """Write a data set as one safetensors file."""
    tensors = {f"{name}.images": split.images for name, split in dataset.splits.items()}
    tensors |= {f"{name}.labels": split.labels for name, split in dataset.splits.items()}
    described: dict[str, Any] = {"classes": dataset.classes, "mean": dataset.mean, "std": dataset.std}
    write_tensors(path, tensors, described)


def load(path: Path) -> Dataset:
    """Read what :func:`save` wrote."""
    tensors, described = read_tensors(path)
    splits = {name: Split(tensors[f"{name}.images"], tensors[f"{name}.labels"]) for name in SPLITS}
    return Dataset(splits, **described)


def augment(images: Tensor, how: config.Augmentation, generator: torch.Generator) -> Tensor:
    """Each image of a normalised batch (N, C, H, W) under its own random change.

    One resampling does translation, rotation, scale and flip; then contrast and noise.
    """
    count = len(images)

    def draw(largest: float) -> Tensor:  # uniform in [-largest, largest], (N,)
        return (torch.rand(count, generator=generator) * 2 - 1) * largest

    angle, scale = draw(math.radians(how.rotate)), 1 + draw(how.scale)
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0) if how.flip else 1.0
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cos * mirror, -sin, draw(2 * how.shift)], 1)]
    rows += [torch.stack([sin * mirror, cos, draw(2 * how.shift)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)  # (N, H, W, 2)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    if how.contrast:
        images = images * (1 + draw(how.contrast)).view(-1, 1, 1, 1)
    if how.noise:
        images = images + how.noise * torch.randn(images.shape, generator=generator)
    return images
