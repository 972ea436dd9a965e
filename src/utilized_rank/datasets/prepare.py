"""From a source to a data set: split once by class, checked, and described."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..base.sections import StudyError
from .data import SPLITS, Dataset
from .images import Images, stream
from .sections import Data
from .sources import Source, read

DESCRIBING = 50_000
"""Training images, at most, that the mean and deviation of a data set are taken over."""


def split_indices(labels: np.ndarray, data: Data, seed: int, own_test: bool) -> dict[str, np.ndarray]:
    """Stratified indices of each split, ascending for search and test, shuffled for train.

    The search split is carved from what is not test: selecting a rank never sees a test image.

    Args:
        labels: of the images to split.
        data: how many images go where.
        seed: of the draw.
        own_test: whether the source has test images of its own; then none of these become test images.

    Raises:
        StudyError: as :func:`split_counts`, or too few images of one class are left for a split.
    """
    from sklearn.model_selection import train_test_split
    from sklearn.utils import resample

    counts = split_counts(len(labels), len(set(labels.tolist())), data, own_test)
    total = sum(counts.values())
    splits: dict[str, np.ndarray] = {}
    left = np.arange(len(labels))
    if total < len(labels):
        left = resample(left, replace=False, n_samples=total, stratify=labels, random_state=seed)
    for name in [name for name in ("test", "search") if name in counts]:
        rarest, images = min(zip(*np.unique(labels[left], return_counts=True), strict=True), key=lambda pair: pair[1])
        if images < 2:
            raise StudyError(
                f"only {images} image of class number {rarest} is left for {name} and train, and each needs one: "
                "change data.limit, data.search or data.test, or add images"
            )
        left, taken = train_test_split(left, test_size=counts[name], stratify=labels[left], random_state=seed)
        splits[name] = np.sort(taken)
    return {"train": left, **splits}


def split_counts(images: int, classes: int, data: Data, own_test: bool) -> dict[str, int]:
    """How many of so many ``images`` become train, search and (without test images of the source's own) test images.

    Raises:
        StudyError: too few for every split to have each class, or a test split that is asked for twice or never.
    """
    if own_test and data.test is not None:
        raise StudyError("the source has test images of its own: leave data.test away")
    if not own_test and data.test is None:
        raise StudyError("the source has no test images of its own: say in data.test how many to take")
    total = min(data.limit or images, images)
    asked = (("search", data.search), ("test", data.test))
    counts = {name: _number(given, total, classes) for name, given in asked if given}
    counts = {"train": total - sum(counts.values()), **counts}
    if short := [name for name, count in counts.items() if count < classes]:
        shares = ", ".join(f"{count} for {name}" for name, count in counts.items())
        raise StudyError(
            f"{total} images are too few ({shares}): every split needs one of each of {classes} classes, and "
            f"{short[0]} has fewer; change data.limit, data.search or data.test"
        )
    return counts


def _number(given: float, total: int, classes: int) -> int:
    """Of images, from a number; or from a fraction of ``total``, which is one image a class at least."""
    return max(math.ceil(given * total), classes) if given < 1 else int(given)


def build(data: Data, seed: int, root: Path) -> tuple[Dataset, dict[str, list[int]]]:
    """Load, split and describe a data set; returns it and the indices of each split in its source.

    Args:
        data: which, and how it is split.
        seed: of the split.
        root: the project's root.

    Raises:
        StudyError: the source cannot be reached, or has a label out of range, or a split lacks a class.
    """
    source: Source = read(data, root)
    _check_labels("source's", source.images.labels, source.classes, 2 if source.test else 3)
    indices = split_indices(source.images.labels.numpy(), data, seed, source.test is not None)
    splits = {name: source.images.part(torch.from_numpy(rows)) for name, rows in indices.items()}
    if source.test is not None:
        kept = torch.arange(len(source.test))
        if data.limit is not None and data.limit < len(kept):
            # Evenly spread: test images often lie sorted by class.
            kept = torch.linspace(0, len(kept) - 1, data.limit).long()
        splits["test"], indices["test"] = source.test.part(kept), kept.numpy()
    for name, split in splits.items():
        _check_labels(name, split.labels, source.classes)
    statistics = _statistics(splits["train"].images)
    searched = None
    if data.search_from == "test":
        searched = _half(splits["test"].labels, source.classes, seed)
        indices |= {"test_searched": indices["test"][searched], "test_reported": indices["test"][~searched]}
    dataset = Dataset({name: splits[name] for name in SPLITS}, source.classes, *statistics, searched=searched)
    return dataset, {name: rows.tolist() for name, rows in indices.items()}


def _half(labels: Tensor, classes: list[str], seed: int) -> Tensor:
    """A stratified half of the test images, bool (N,): the search split of runs whose weights are given.

    Raises:
        StudyError: a class has one test image, which cannot be in both halves.
    """
    from sklearn.model_selection import train_test_split

    _check_labels("test", labels, classes, 2, "data.search_from is test, so each half needs one")
    _, rows = train_test_split(np.arange(len(labels)), test_size=len(labels) // 2, stratify=labels, random_state=seed)
    searched = torch.zeros(len(labels), dtype=torch.bool)
    searched[torch.from_numpy(rows)] = True
    return searched


def _statistics(images: Images) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, in [0, 1], exact: from how often each of 256 values occurs."""
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for batch in stream(images, torch.arange(min(len(images), DESCRIBING)).split(1024)):
        for channel, total in enumerate(counts):
            total += torch.bincount(batch[:, channel].flatten(), minlength=256)
    shares, values = counts.double() / counts.sum(1, keepdim=True), torch.arange(256).double() / 255
    mean = shares @ values
    std = (shares * (values - mean.unsqueeze(1)).square()).sum(1).sqrt().clamp_min(1e-3)
    return mean.tolist(), std.tolist()


def _check_labels(
    whose: str, labels: Tensor, classes: list[str], fewest: int = 1, why: str = "one for each split"
) -> None:
    """Refuse labels that name no class, and classes of fewer than ``fewest`` images."""
    if outside := sorted({label for label in labels.tolist() if not 0 <= label < len(classes)}):
        raise StudyError(f"{whose} images have label {outside[0]}, but there are {len(classes)} classes")
    counts = torch.bincount(labels, minlength=len(classes))
    if (counts < fewest).any():
        rare = int(counts.argmin())
        raise StudyError(f"{whose} images have {int(counts[rare])} of class {classes[rare]}: it needs {fewest}, {why}")
