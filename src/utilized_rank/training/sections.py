"""Parameters of networks and their training: architectures, recipes, initial weights."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, model_validator

from ..base.sections import Positive, Section, suggestion
from ..datasets.sections import Augmentation

OWN_ARCHITECTURES = ("vgg11", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "vit")


def _architecture(name: str) -> str:
    if name not in OWN_ARCHITECTURES and not name.startswith(("timm/", "torchvision/")):
        known = [*OWN_ARCHITECTURES, "timm/NAME", "torchvision/NAME"]
        raise ValueError(f"there is no {name!r}{suggestion(name, known)}")
    return name


T = TypeVar("T")
Channels = Annotated[tuple[T, ...], Field(strict=False)]
"""A value for each: YAML has lists alone."""


class Model(Section):
    """An architecture and its size."""

    architecture: Annotated[str, AfterValidator(_architecture)]
    """``vgg11``, ``vit``, ``resnet20`` (32, 44, 56, 110); ``timm/NAME`` or ``torchvision/NAME``."""
    width: Annotated[float, Field(gt=0)] = 1.0
    """Channels, as a multiple of the published network's (vgg11, resnets)."""
    dim: Positive = 96
    """Embedding width (vit)."""
    depth: Positive = 6
    """Transformer blocks (vit)."""
    heads: Positive = 3
    """Attention heads (vit)."""
    patch_size: Positive = 8
    """Pixels on a side of one token (vit)."""
    stem: Literal["patches", "convolutions"] = "patches"
    """What makes tokens of pixels (vit): one product with each patch, or convolutions that halve the image until a
    patch is one place (Xiao et al. 2021)."""
    blocks: Positive | None = None
    """Keep the first so many transformer blocks (timm, torchvision); all where it is null."""
    mean: Channels[float] | None = None
    """What each channel is normalised with, in [0, 1]; that of the training images where it is null."""
    std: Channels[Annotated[float, Field(gt=0)]] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Model:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if self.stem == "convolutions" and (self.patch_size < 2 or self.patch_size.bit_count() > 1):
            raise ValueError(f"patch_size {self.patch_size} is no power of two: each convolution halves")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together")
        return self

    @property
    def layout(self) -> Model:
        """What networks have in common that differ in their weights: timm names those behind a dot."""
        architecture = self.architecture.partition(".")[0]
        return self.model_copy(update={"architecture": architecture, "mean": None, "std": None})


class Recipe(Section):
    """One optimisation: AdamW or SGD with momentum, linear warm-up, cosine decay to zero."""

    epochs: Positive
    lr: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(gt=1)] = 64
    optimizer: Literal["sgd", "adamw"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    augmentation: Augmentation = Augmentation()


class Pretrained(Recipe):
    """Weights to start from: made here by self-supervision, or read from a given checkpoint."""

    method: Literal["simclr", "mae", "checkpoint", "published"]
    """Made here without labels; read from a file; or what timm or torchvision publishes for the architecture."""
    model: Model
    title: str | None = None
    """What these weights are called in tables; the method's name where it is null."""
    supervision: Literal["supervised", "self-supervised", "weakly supervised"] | None = None
    """How they were made (checkpoint, published); those made here are self-supervised."""
    epochs: Positive = 1
    lr: Annotated[float, Field(gt=0)] = 1e-3
    temperature: Annotated[float, Field(gt=0)] = 0.2
    """Of the contrastive loss (simclr)."""
    projection_dim: Positive = 64
    """Width of the projection head's output (simclr)."""
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Part of the tokens that are hidden (mae)."""
    decoder_depth: Positive = 2
    """Transformer blocks of the decoder, which is as wide as the encoder (mae)."""
    weights: str | None = None
    """The name that torchvision gives them; timm's is a part of the architecture's name (published)."""
    file: str | None = None
    """A safetensors file, or one that torch.load reads; its path from the project's root (checkpoint)."""
    url: str | None = None
    """Where the file is downloaded from when it is not there (checkpoint)."""
    sha256: str | None = None
    """The file's SHA-256, so that another file under its name is noticed (checkpoint)."""

    @model_validator(mode="after")
    def _checkpoint_names_its_file(self) -> Pretrained:
        given = [value is not None for value in (self.file, self.sha256)]
        if given != 2 * [self.method == "checkpoint"]:
            raise ValueError("file and sha256 belong to method: checkpoint, and it needs both")
        if self.url is not None and self.method != "checkpoint":
            raise ValueError("url belongs to method: checkpoint")
        if self.url is not None and self.file is not None:
            place = PurePath(self.file)
            if place.is_absolute() or ".." in place.parts:
                raise ValueError(f"file {self.file} lies outside of the project: what url brings is kept inside")
        if self.method == "mae" and self.model.stem != "patches":
            raise ValueError("method: mae hides patches, and a stem of convolutions looks across them")
        if self.weights is not None and self.method != "published":
            raise ValueError("weights belongs to method: published")
        if (self.supervision is None) == self.given:
            raise ValueError("supervision belongs to method: checkpoint and published, which need it")
        return self

    @property
    def given(self) -> bool:
        """Whether the weights were made elsewhere, on images that this study does not know."""
        return self.method in ("checkpoint", "published")

    @property
    def name(self) -> str:
        """In tables."""
        return self.title or {"simclr": "SimCLR", "mae": "MAE"}.get(self.method, self.method)


class Train(Recipe):
    """How a run's network comes to be, from its initial weights."""

    method: Literal["supervised", "linear", "as_given"] = "supervised"
    """All weights; the classifier alone on a frozen encoder; or no training at all."""
    epochs: Positive = 1
    lr: Annotated[float, Field(gt=0)] = 1e-3


class Finetune(Recipe):
    """How decomposed networks, and the dense one, are trained on."""

    lrs: list[Annotated[float, Field(gt=0)]] = []
    """Further learning rates; each network takes the one with the best accuracy on the search split."""
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of the divergence from the original's predictions, beside that of the labels' cross-entropy."""
    seeds: Positive = 1
    """Networks that differ in their random numbers alone, at the learning rate that the first one took."""
