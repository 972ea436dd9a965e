"""Parameters of images: which, how they are split, and how they change in training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..base.sections import Amount, Positive, Section, suggestion

Interpolation = Literal["bicubic", "bilinear", "lanczos"]


class Data(Section):
    """Which images, at which size, and how they are split."""

    source: Literal["sklearn", "torchvision", "folder"]
    dataset: str
    """``digits``; ``FashionMNIST``, ``CIFAR10`` or ``CIFAR100``; or the folder's path, from the project's root."""
    image_size: Annotated[int, Field(ge=8)]
    """Pixels on a side, to which every image is brought."""
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of the shorter side that is kept, around the centre (folder)."""
    interpolation: Interpolation = "bicubic"
    """How each is resized (folder)."""
    search: Amount = 0.2
    """Images held out of training for the rank search: how many, or which part of those that can be split."""
    test: Amount | None = None
    """Likewise for reported numbers only; null where the source has test images of its own."""
    search_from: Literal["train", "test"] = "train"
    """Where the search split of a run comes from whose weights are given, and may have seen every training image:
    ``test`` takes half of the test images, and reports the other half. Networks trained here keep theirs."""
    limit: Positive | None = None
    """Keep this many images, stratified (a shrunken study for tests); all where it is null."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that decode images ahead (folder)."""

    @model_validator(mode="after")
    def _can_be_had(self) -> Data:
        known = {"sklearn": ["digits"], "torchvision": ["FashionMNIST", "CIFAR10", "CIFAR100"]}.get(self.source)
        if known is not None and self.dataset not in known:
            raise ValueError(f"{self.source} has no {self.dataset!r}{suggestion(self.dataset, known)}")
        if self.test is not None and self.search < 1 and self.test < 1 and self.search + self.test >= 1:
            raise ValueError("search + test must leave something to train on")
        return self


class Augmentation(Section):
    """Random changes to each training image, drawn anew at each step."""

    crop: Annotated[int, Field(ge=0)] = 0
    """Largest translation in whole pixels, black from outside: nothing is resampled (He et al. 2016)."""
    shift: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest translation, as a fraction of the image's side."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation, in degrees."""
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest relative change of size."""
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest relative change of contrast."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of added Gaussian noise, in units of the normalised image."""
    flip: bool = False
    """Mirror half of the images left to right."""
    smallest_part: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Cut out a random part of the area, this much or more, of a random shape, and bring it to the whole size (of 1,
    nothing is cut)."""
    colour: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Strength s of a change of brightness, contrast and saturation by up to 0.8 s, of hue by up to 0.2 s, to four
    images in five (Chen et al. 2020, appendix A)."""
    grey: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Part of the images that lose their colours."""

    @property
    def of_views(self) -> bool:
        """Whether anything is asked for that makes views of contrastive learning."""
        return self.smallest_part < 1 or self.colour > 0 or self.grey > 0
