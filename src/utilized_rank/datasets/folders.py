"""An image folder for a network that is given: calibration images, and others that accuracy is taken on."""

from __future__ import annotations

from pathlib import Path

import torch

from ..base.sections import StudyError
from .data import Dataset
from .images import Split, array
from .sections import Data
from .sources import check_same_classes, class_names, listed, test_folder

HELD = 2 * 2**30
"""Bytes of decoded images that are kept; more are decoded whenever they are asked for."""


def of_folder(
    data: Data, mean: list[float], std: list[float], *, train: int | None, held_out: int, halves: bool, seed: int = 0
) -> Dataset:
    """An image folder in splits, drawn at random.

    Calibration images come from ``train/``, the others from ``test/`` or ``val/``. Where there is no such pair, one
    half of all images is for calibration and the other held out.

    Args:
        data: which folder, and how its images are brought to one size.
        mean: of each channel, that images are normalised with, in [0, 1].
        std: likewise.
        train: images of the training split; all where it is None.
        held_out: images that accuracy is taken on, at most.
        halves: search on one half of those and report on the other; else both are all of them.
        seed: of the draw.

    Raises:
        StudyError: the folder is not there, has fewer than two classes, a class without images, or test images of
            other classes.
    """
    folder = Path(data.dataset)
    if not folder.is_dir():
        raise StudyError(f"{folder} is no folder: give one with a directory of images for each class")
    first = folder / "train" if (folder / "train").is_dir() else folder
    classes = class_names(first)
    own = test_folder(folder) if first != folder else None
    images = _shuffled(listed(data, first, classes), seed)
    if own is not None:
        check_same_classes(own, first)
        given, others = images, _shuffled(listed(data, own, classes), seed)
    else:
        rows = torch.arange(len(images))
        given, others = images.part(rows[::2]), images.part(rows[1::2])
    rows = torch.arange(min(held_out, len(others)))
    search, test = (others.part(rows[::2]), others.part(rows[1::2])) if halves else 2 * (others.part(rows),)
    splits = {"train": given if train is None else given.part(torch.arange(min(train, len(given))))}
    splits |= {"search": search, "test": test}
    return Dataset({name: _held(split) for name, split in splits.items()}, classes, mean, std)


def _shuffled(split: Split, seed: int) -> Split:
    return split.part(torch.randperm(len(split), generator=torch.Generator().manual_seed(seed)))


def _held(split: Split) -> Split:
    count, channels, height, width = split.images.shape
    return Split(array(split.images), split.labels) if count * channels * height * width <= HELD else split
