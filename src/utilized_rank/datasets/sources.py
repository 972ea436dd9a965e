"""Where images come from: scikit-learn, torchvision (or files that it would have downloaded), or a folder."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.sections import StudyError
from .images import CHANNELS, Files, Split, array
from .sections import Data

RAW = Path("data", "raw")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist has its files."""
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Of files that are images, as torchvision's image folders have them."""
SMALL = 64
"""Up to this side images are decoded once and kept as one array; larger ones whenever they are asked for."""


@dataclass(frozen=True)
class Source:
    """What a source has: images to split, test images of its own where it has them, and names of the classes."""

    images: Split
    test: Split | None
    classes: list[str]


def read(data: Data, root: Path) -> Source:
    """All images of the source that ``data`` names, in the project at ``root``.

    Raises:
        StudyError: they cannot be reached, or are not what an image folder must be; says what to do.
    """
    return {"sklearn": _sklearn, "torchvision": _torchvision, "folder": _folder}[data.source](data, root)


def _sklearn(data: Data, root: Path) -> Source:
    from sklearn.datasets import load_digits  # only preparing needs it, and it takes a second to import

    digits = load_digits()
    images = _resized(torch.from_numpy(digits.images / 16).float().unsqueeze(1), data.image_size)  # 8 x 8 in [0, 1]
    labels = torch.from_numpy(digits.target).long()
    return Source(Split(images, labels), None, [str(d) for d in range(10)])


def _resized(images: Tensor, side: int) -> Tensor:
    """Images (N, C, H, W) of values in [0, 1] at another size, uint8."""
    smaller = side < images.shape[-1]
    if images.shape[-1] != side:
        images = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False, antialias=smaller)
    return (images * 255).round().byte()


def _torchvision(data: Data, root: Path) -> Source:
    import torchvision

    raw = root / RAW
    if (raw / data.dataset / "train").is_dir():
        return _image_folder(data, raw / data.dataset)
    kind = getattr(torchvision.datasets, data.dataset)
    problems = []
    for where, fetch in _ways(data.dataset, kind, raw):
        try:
            fetch()
            parts = [kind(raw, train=train) for train in (True, False)]
        except (RuntimeError, OSError, EOFError, zlib.error) as error:
            problems.append(f"{where} ({_first_line(error)})")
        else:
            train, test = (_of_torchvision(part, data.image_size) for part in parts)
            return Source(train, test, [str(name) for name in parts[0].classes])
    raise StudyError(
        f"{data.dataset} cannot be reached. Tried, in this order: an image folder {RAW / data.dataset} "
        f"(it has no train/); {'; '.join(problems)}. Connect to a network once, or put torchvision's files, or an "
        f"image folder with train/ and test/, under {RAW}."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(":") if str(error).strip() else type(error).__name__


def _ways(dataset: str, kind: Any, raw: Path) -> Iterator[tuple[str, Any]]:
    """In what order a data set's files are looked for: a name for the place, and what brings them to ``raw``."""
    yield f"torchvision's files in {RAW}", lambda: None
    if dataset == "FashionMNIST":
        yield "Debian's package dataset-fashion-mnist", lambda: _from_debian(kind, raw)
    yield "a download by torchvision", lambda: kind(raw, download=True)


def _from_debian(kind: Any, raw: Path) -> None:
    """Unpack the package's files to where torchvision looks for them.

    Debian compresses them anew, so torchvision's checksums do not hold; gzip's own are checked while unpacking.
    """
    from torchvision.datasets.utils import extract_archive

    if not DEBIAN.is_dir():
        raise FileNotFoundError("it is not installed")
    target = raw / kind.__name__ / "raw"
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as folder:  # a file that is there is whole
        for name, _ in kind.resources:
            unpacked = Path(extract_archive(DEBIAN / name, folder))
            unpacked.replace(target / unpacked.name)


def _of_torchvision(part: Any, side: int) -> Split:
    pixels = torch.as_tensor(np.asarray(part.data))  # (N, H, W) or (N, H, W, C)
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    if pixels.shape[-1] != side:
        pixels = torch.cat([_resized(some.float() / 255, side) for some in pixels.split(4096)])
    return Split(pixels.contiguous(), torch.as_tensor(part.targets, dtype=torch.int64))


def _folder(data: Data, root: Path) -> Source:
    return _image_folder(data, root / data.dataset)


def _image_folder(data: Data, folder: Path) -> Source:
    """One directory a class under ``train/``, and under ``test/`` or ``val/`` where the folder has test images."""
    if not (folder / "train").is_dir():
        raise StudyError(f"{folder} is no image folder: it needs train/, with one directory of images for each class")
    classes = class_names(folder / "train")
    own = test_folder(folder)
    if own is not None:
        check_same_classes(own, folder / "train")
    train, test = (None if part is None else listed(data, part, classes) for part in (folder / "train", own))
    assert train is not None
    return Source(_kept(train), None if test is None else _kept(test), classes)


def test_folder(folder: Path) -> Path | None:
    """Where the test images of an image folder are; None where it has none of its own."""
    return next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)


def class_names(folder: Path) -> list[str]:
    """The directories of a folder, each a class.

    Raises:
        StudyError: there are fewer than two.
    """
    classes = _directories(folder)
    if len(classes) < 2:
        raise StudyError(f"{folder} has {len(classes)} directories: each is a class, and two are needed")
    return classes


def check_same_classes(one: Path, other: Path) -> None:
    """Refuse two folders of one data set that do not have the same directories.

    Raises:
        StudyError: they have not.
    """
    if others := sorted(set(_directories(one)) ^ set(_directories(other))):
        raise StudyError(
            f"{one} and {other} do not have the same classes: only one of them has {', '.join(others[:5])}"
        )


def _directories(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def listed(data: Data, folder: Path, classes: list[str]) -> Split:
    """The images of a folder with one directory a class, as files.

    Raises:
        StudyError: a class has none.
    """
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(path for path in (folder / name).rglob("*") if _is_image(path))
        if not files:
            raise StudyError(f"{folder / name} has no image ({', '.join(EXTENSIONS)})")
        names += [path.relative_to(folder).as_posix() for path in files]
        labels += [label] * len(files)
    images = Files(folder, names, data.image_size, data.crop, data.workers, data.interpolation)
    return Split(images, torch.tensor(labels))


def _kept(split: Split) -> Split:
    return Split(array(split.images), split.labels) if split.images.shape[-1] <= SMALL else split


@dataclass(frozen=True)
class Size:
    """How much a source has, without reading it."""

    images: int
    """That are to be split."""
    test: int
    """Of its own."""
    channels: int
    classes: int


PUBLISHED = {
    "digits": Size(1797, 0, 1, 10),
    "FashionMNIST": Size(60_000, 10_000, 1, 10),
    "CIFAR10": Size(50_000, 10_000, 3, 10),
    "CIFAR100": Size(50_000, 10_000, 3, 100),
}


def size(data: Data, root: Path) -> Size:
    """How many images of which kind ``data`` names; an image folder is listed, nothing is decoded or downloaded.

    Raises:
        StudyError: the folder is none.
    """
    folder = root / (data.dataset if data.source == "folder" else RAW / data.dataset)
    if data.source == "sklearn" or (data.source == "torchvision" and not (folder / "train").is_dir()):
        return PUBLISHED[data.dataset]
    listed = _image_folder(data.model_copy(update={"image_size": SMALL + 1}), folder)
    return Size(len(listed.images), len(listed.test) if listed.test else 0, CHANNELS, len(listed.classes))
