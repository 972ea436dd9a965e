"""Architectures by name, and their weights from a given file."""

from __future__ import annotations

import difflib
import pickle
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..base.files import Damaged, file_hash, read_tensors
from ..base.sections import StudyError
from ..datasets.images import CHANNELS
from ..networks.devices import device_of
from ..networks.standard import standardize
from .architectures import RESNETS, VGG, ResNet
from .sections import Model

Shape = tuple[int, int, int]
"""Of an image: channels, height, width."""
UNREADABLE = (
    *(OSError, EOFError, IndexError, ValueError, RuntimeError, MemoryError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, Damaged),
)
"""What a file that is no checkpoint raises."""


def _vit(model: Model, shape: Shape, classes: int) -> nn.Module:
    import timm  # a second to import, and only this architecture needs it

    stem: dict[str, Any] = {"embed_layer": partial(_convolutions, model)} if model.stem == "convolutions" else {}
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=shape[1:],
        in_chans=shape[0],
        patch_size=model.patch_size,
        embed_dim=model.dim,
        depth=model.depth,
        num_heads=model.heads,
        num_classes=classes,
        **stem,
    )


def _convolutions(model: Model, img_size: Any, in_chans: int, **how: Any) -> nn.Module:
    """In place of timm's patches: 3 x 3 convolutions of stride 2, each twice as wide as the one before."""
    from timm.layers.hybrid_embed import HybridEmbed
    from timm.models.vision_transformer_hybrid import ConvStem

    depth = model.patch_size.bit_length() - 1
    stem = ConvStem(in_chans, depth, model.dim, stride=depth * (2,))
    return HybridEmbed(stem, img_size, in_chans=in_chans, embed_dim=model.dim, proj=False)


def _timm(model: Model, shape: Shape, classes: int | None, weights: bool = False) -> nn.Module:
    import timm

    name = model.architecture.removeprefix("timm/")
    if not timm.is_model(name):
        raise StudyError(f"timm has no {name!r}{_like(name, timm.list_models())}")
    base, _, tag = name.partition(".")
    if tag and name not in timm.list_pretrained(f"{base}.*"):
        known = timm.list_pretrained(f"{base}.*")
        raise StudyError(f"timm has no {name!r}{_like(name, known)}")
    cfg = timm.get_pretrained_cfg(name)
    given: dict[str, Any] = {"in_chans": shape[0]}
    if classes is not None:
        given["num_classes"] = classes
    if cfg is not None and cfg.fixed_input_size:
        given["img_size"] = shape[1:]
    return _cut(timm.create_model(name, pretrained=weights, **given), model.blocks)


def _torchvision(model: Model, shape: Shape, classes: int | None, weights: str | None = None) -> nn.Module:
    from torchvision import models

    name = model.architecture.removeprefix("torchvision/")
    if name not in models.list_models(models):
        raise StudyError(f"torchvision has no {name!r}{_like(name, models.list_models(models))}")
    if shape[0] != CHANNELS:
        raise StudyError(f"torchvision's networks take images of {CHANNELS} channels, not {shape[0]}")
    named = list(models.get_model_weights(name).__members__)
    if weights not in (None, "DEFAULT", *named):
        raise StudyError(f"torchvision has no weights {weights!r} for {name} (known: {', '.join(named)})")
    given: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if name.startswith("vit"):
        given["image_size"] = shape[1]
    try:
        return _cut(models.get_model(name, weights=weights, **given), model.blocks)
    except (AssertionError, ValueError) as error:  # its own words on sizes that it does not take
        raise StudyError(f"torchvision's {name} does not take data.image_size {shape[1]}: {error}") from None


def _like(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f": did you mean {' or '.join(close)}?" if close else ""


def _cut(network: nn.Module, blocks: int | None) -> nn.Module:
    """A transformer with its first ``blocks`` only, as timm or torchvision keeps them."""
    if blocks is not None:
        path = next((path for path in ("blocks", "encoder.layers") if _has(network, path)), None)
        if path is None:
            raise StudyError(f"{type(network).__name__} has no list of blocks: leave blocks away")
        parent, _, name = path.rpartition(".")
        whole = cast(nn.Sequential, network.get_submodule(path))
        setattr(network.get_submodule(parent), name, whole[:blocks])
    return network


def _has(network: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in network.named_modules())


def _of_library(model: Model, shape: Shape, classes: int | None) -> nn.Module:
    make = _timm if model.architecture.startswith("timm/") else _torchvision
    return make(model, shape, classes)


def _resnet(model: Model, shape: Shape, classes: int) -> nn.Module:
    return ResNet(RESNETS[model.architecture], model.width, shape[0], classes)


BUILDERS: dict[str, Callable[[Model, Shape, int], nn.Module]] = {
    "vgg11": lambda model, shape, classes: VGG(model.width, shape[0], classes),
    "vit": _vit,
    **dict.fromkeys(RESNETS, _resnet),
}


def build(model: Model, shape: Shape, classes: int) -> nn.Module:
    """A network with random weights, for images of ``shape`` (channels, height, width).

    Convolutions of our own networks are initialised as by He et al. 2015 (fan out), all else as timm or
    torchvision does.

    Raises:
        StudyError: timm or torchvision does not have it, or not for such images.
    """
    network = BUILDERS.get(model.architecture, _of_library)(model, shape, classes)
    if isinstance(network, VGG | ResNet):
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    # Convolutions on this layout are half again as fast on processors; linear layers do not care.
    return network.to(memory_format=torch.channels_last)


def load(path: Path, model: Model, shape: Shape, classes: int, qkv: str = "fused") -> nn.Module:
    """A network with the weights of a safetensors file, in evaluation mode, all of whose layers are called.

    Args:
        path: of the file.
        model: whose weights are in it.
        shape: of images: channels, height, width.
        classes: how many.
        qkv: whether a ``fused`` projection of queries, keys and values stays one layer, or is ``split`` in three.
    """
    network = build(model, shape, classes)
    network.load_state_dict(read_tensors(path)[0])
    return callable_layers(network, shape, qkv)


def callable_layers(network: nn.Module, shape: Shape, qkv: str) -> nn.Module:
    """The network itself, in evaluation mode, all of whose layers are called with what they really multiply.

    Args:
        network: changed in place.
        shape: of images: channels, height, width.
        qkv: as of :func:`load`.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    image = torch.randn(1, *shape, generator=generator, device="cpu").to(device_of(network))
    standardize(network, image, qkv == "split")
    return network


def classifier(network: nn.Module) -> nn.Linear:
    """The last linear layer: its inputs are the network's features.

    Raises:
        StudyError: the network has no linear layer.
    """
    return classifier_of(network)[1]


def classifier_of(network: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the last linear layer.

    Raises:
        StudyError: the network has no linear layer.
    """
    linear = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise StudyError(f"{type(network).__name__} has no linear layer to classify with")
    return linear[-1]


def read_checkpoint(path: Path, sha256: str, url: str | None = None) -> dict[str, Tensor]:
    """The tensors of a given file: safetensors, or a state dict that ``torch.load`` reads without running code.

    Args:
        path: of the file.
        sha256: its SHA-256, in hexadecimal.
        url: where it is downloaded from when it is not there.

    Raises:
        StudyError: it is missing, is not the file that the study means, or holds something else.
    """
    if not path.is_file():
        _download(path, sha256, url)
    if (found := file_hash(path)) != sha256:
        raise StudyError(f"checkpoint {path} has SHA-256 {found}, not {sha256}: it is another file")
    return tensors_of(path)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, as of :func:`read_checkpoint`.

    Raises:
        StudyError: it cannot be read, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return read_tensors(path)[0]
        _check_packed(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in why:  # torch's words invite to run its code
            why = "it is none of torch's, cut short, or holds more than tensors"
        raise StudyError(f"checkpoint {path} cannot be read: {why}") from None
    for key in ("state_dict", "model"):  # what training scripts wrap it in
        held = held.get(key, held) if isinstance(held, dict) else held
    if not isinstance(held, dict) or not all(isinstance(tensor, Tensor) for tensor in held.values()):
        raise StudyError(f"checkpoint {path} holds no state dict")
    return {name.removeprefix("module."): tensor for name, tensor in held.items()}


def _check_packed(path: Path) -> None:
    """Refuse an archive that unpacks to more than itself: torch compresses nothing, and memory has an end."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(part.file_size for part in archive.infolist())
    if unpacked > (size := path.stat().st_size):
        raise ValueError(f"its {size:,} bytes unpack to {unpacked:,}, and torch compresses nothing")


def _download(path: Path, sha256: str, url: str | None) -> None:
    """Bring a file from ``url`` to ``path``, whole and checked or not at all."""
    if url is None:
        raise StudyError(f"checkpoint {path} is not there: put the file in place, or correct its path")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), sha256, progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: it has another hash
        raise StudyError(
            f"checkpoint {path} is not there, and cannot be downloaded ({error}). Connect to a network once; or get "
            f"{url} by other means, with SHA-256 {sha256}, and put it there under that name."
        ) from None


def published(model: Model, weights: str | None, shape: Shape, classes: int) -> dict[str, Tensor]:
    """The tensors that timm or torchvision publishes for an architecture, from their caches or a download.

    The classifier is left out where it is for another number of classes.

    Raises:
        StudyError: as :func:`pretrained`.
    """
    tensors = pretrained(model, weights, shape).state_dict()
    own = build(model, shape, classes)
    head, last = classifier_of(own)
    fits = f"{head}.weight" in tensors and tensors[f"{head}.weight"].shape == last.weight.shape
    return {name: tensor for name, tensor in tensors.items() if fits or name.rpartition(".")[0] != head}


def pretrained(model: Model, weights: str | None, shape: Shape) -> nn.Module:
    """A network with the weights that timm or torchvision publishes for it, and its own classes.

    Raises:
        StudyError: the architecture is not theirs, or the weights cannot be had.
    """
    library, _, name = model.architecture.rpartition("/")
    if not library:
        raise StudyError(f"nobody publishes weights for {name}: method published is for timm/ and torchvision/")
    try:
        if library == "timm":
            return _timm(model, shape, None, weights=True)
        return _torchvision(model, shape, None, weights or "DEFAULT")
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise StudyError(
            f"the weights of {model.architecture} are in no cache, and cannot be downloaded "
            f"({str(error).splitlines()[0]}): connect to a network once, or give a file (in a study by "
            "method: checkpoint, to a command by --checkpoint)"
        ) from None


def start_from(network: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Load the tensors that are given into ``network``; the others keep their random values.

    Returns the names of those others: none for a whole checkpoint, the classifier's for an
    encoder, all of them where nothing is given.

    Raises:
        StudyError: a tensor that the network does not have, or of another shape.
    """
    own = network.state_dict()
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            expected = tuple(own[name].shape) if name in own else "no such tensor"
            raise StudyError(f"{name} {tuple(tensor.shape)} does not fit the network: {expected}")
    network.load_state_dict(tensors, strict=False)
    return [name for name in own if name not in tensors]
