"""Images as one array, or as files that are decoded when they are asked for: both give batches alike."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..base.sections import StudyError

CHANNELS = 3
"""Of every image that comes from a file."""
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""That are decoded, whatever a file is called: for some others PIL calls further programs."""
PATIENCE = 600
"""Seconds that a batch of images is waited for: a process that finds no shared memory for it would never give it."""


@dataclass(frozen=True)
class Files:
    """Images on disk, uint8 (N, 3, H, W) once decoded."""

    root: Path
    """The folder that the names are relative to."""
    names: list[str]
    side: int
    """Height and width that each is brought to."""
    crop: float = 1.0
    """Part of the shorter side that is kept, around the centre."""
    workers: int = 0
    """Processes that decode ahead; 0 decodes in this one."""
    interpolation: str = "bicubic"
    """How each is resized, by the name of PIL."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As of an array."""
        return len(self), CHANNELS, self.side, self.side

    def __getitem__(self, which: Tensor | slice) -> Tensor:
        """Decode some of them.

        Raises:
            StudyError: a file is no image, or only a part of one; names it.
        """
        names = self.names[which] if isinstance(which, slice) else [self.names[i] for i in which.tolist()]
        images = [decoded(self.root / name, self.side, self.crop, self.interpolation) for name in names]
        return torch.stack(images) if images else torch.empty(0, *self.shape[1:], dtype=torch.uint8)

    def part(self, which: Tensor) -> Files:
        """Some of them, not decoded."""
        return replace(self, names=[self.names[i] for i in which.tolist()])


Images = Tensor | Files
"""Uint8, (N, C, H, W)."""


@dataclass(frozen=True)
class Split:
    """Some of a data set's images, and their labels."""

    images: Images
    labels: Tensor
    """int64, (N,)."""

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, which: Tensor) -> Split:
        """Some of them."""
        return Split(part(self.images, which), self.labels[which])

    def on(self, device: torch.device) -> Split:
        """The same on a device; files stay where they are."""
        images = self.images.to(device) if isinstance(self.images, Tensor) else self.images
        return Split(images, self.labels.to(device))

    def batches(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of each batch of indices."""
        for rows, images in zip(batches, stream(self.images, batches), strict=True):
            yield images, self.labels[rows]


def part(images: Images, which: Tensor) -> Images:
    """Some images of a set, as a set of the same kind."""
    return images.part(which) if isinstance(images, Files) else images[which]


def stream(images: Images, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The images of each batch of indices, decoded ahead where they are files with workers."""
    if isinstance(images, Tensor):
        yield from (images[rows] for rows in batches)
        return
    from torch.utils.data import DataLoader

    sampler = cast(Any, batches)
    # Its own generator: a loader draws a seed from torch's, and images must not change what else is drawn.
    generator = torch.Generator().manual_seed(0)
    files = cast(Any, _Caught(images))
    loader: DataLoader[Any] = DataLoader(
        files,
        None,
        sampler=sampler,
        num_workers=images.workers,
        generator=generator,
        pin_memory=torch.cuda.is_available(),
        timeout=PATIENCE if images.workers else 0,
    )
    try:
        for batch in loader:
            if isinstance(batch, str):
                raise StudyError(batch)
            yield batch
    except (OSError, RuntimeError) as error:  # no process can be started, or there is no shared memory to hand over in
        told = str(error).strip().rpartition("\n")[2]  # behind a worker's traceback
        raise StudyError(
            f"{images.root}: {images.workers} processes cannot decode its images ({told}): allow for them and for "
            "shared memory, or set data.workers to 0"
        ) from None


@dataclass(frozen=True)
class _Caught:
    """Hands a mistake over as its message: an error that crosses processes comes with their tracebacks."""

    files: Files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: Tensor) -> Tensor | str:
        try:
            return self.files[rows]
        except StudyError as error:
            return str(error)


def array(images: Images, batch_size: int = 256) -> Tensor:
    """All images as one array."""
    if isinstance(images, Tensor):
        return images
    result = torch.empty(images.shape, dtype=torch.uint8)
    batches = torch.arange(len(images)).split(batch_size)
    for rows, batch in zip(batches, stream(images, batches), strict=True):
        result[rows] = batch
    return result


def decoded(path: Path, side: int, crop: float, interpolation: str = "bicubic") -> Tensor:
    """One image file as uint8 (3, side, side): upright, opaque on white, its shorter side filled, its centre cut out.

    Raises:
        StudyError: it is no image, only a part of one, or one of too many pixels.
    """
    from PIL import Image, ImageOps

    bombs = Image.DecompressionBombWarning, Image.DecompressionBombError  # from 89 million pixels; from twice as many
    try:
        with warnings.catch_warnings(action="error", category=bombs[0]), Image.open(path, formats=FORMATS) as file:
            image = _rgb(ImageOps.exif_transpose(file))
    except (OSError, SyntaxError, ValueError, *bombs) as error:
        raise StudyError(f"{path} is not a whole image ({error}): replace it or take it away") from None
    width, height = image.size
    kept = crop * min(width, height)
    left, top = (width - kept) / 2, (height - kept) / 2
    box = (left, top, left + kept, top + kept)
    image = image.resize((side, side), Image.Resampling[interpolation.upper()], box, reducing_gap=3)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not said")
    if image.mode.startswith("I"):  # 16 bits a pixel: PIL's own conversion would clip, not scale
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
