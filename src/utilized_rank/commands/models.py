"""A network by what a user calls it: its weights, how its images are prepared, and how Python makes it again."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..api.given import line
from ..base.sections import StudyError, suggestion
from ..datasets.images import CHANNELS
from ..datasets.sections import Interpolation
from ..networks.devices import placed
from ..networks.evaluation import logits_of
from ..training import architectures, models
from ..training.architectures import RESNETS
from ..training.sections import Model

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation that most networks were trained with, those of ImageNet."""
SMALL = 32
"""Side of the images of our own networks."""
OWN = ("vgg11", *RESNETS)


@dataclass(frozen=True)
class Preparation:
    """How an image becomes what a network takes."""

    side: int
    """Height and width."""
    crop: float = 1.0
    """Part of the shorter side that is kept, around the centre."""
    mean: tuple[float, ...] = IMAGENET[0]
    """Of each channel, in [0, 1]."""
    std: tuple[float, ...] = IMAGENET[1]
    interpolation: Interpolation = "bicubic"
    """How it is resized."""


@dataclass(frozen=True)
class Named:
    """A network that a user named."""

    name: str
    network: nn.Module
    preparation: Preparation
    expression: str
    """Python that makes it, with random weights."""
    imports: str
    """What that needs."""
    sources: tuple[Path, ...] = ()
    """Files that it imports, where they are no package."""


def named(name: str, checkpoint: Path | None, prepared: dict[str, Any], classes: int | None = None) -> Named:
    """The network that ``name`` means: timm's or torchvision's, one of ours, or what a function makes.

    Args:
        name: ``timm/NAME``, ``torchvision/NAME``, one of :data:`OWN`, or ``package.module:function``.
        checkpoint: a file of its weights; published ones where it is None.
        prepared: fields of :class:`Preparation` that are other than the network's own.
        classes: of a network with random weights; those of its weights where it is None.

    Raises:
        StudyError: there is no such network, or its weights cannot be had or do not fit it.
    """
    tensors = None if checkpoint is None else models.tensors_of(existing(checkpoint))
    if ":" in name:
        found = _of_function(name, prepared)
    elif name.startswith(("timm/", "torchvision/")):
        found = _of_library(name, tensors, prepared, classes)
    elif name in OWN:
        if tensors is None and classes is None:
            raise StudyError(f"nobody publishes weights for {name}: give --checkpoint FILE")
        found = _own(name, tensors, prepared, classes)
    else:
        known = [*OWN, "timm/NAME", "torchvision/NAME", "package.module:function"]
        raise StudyError(f"there is no network {name!r}{suggestion(name, known)}")
    if tensors is not None:
        _load(found.network, tensors, f"checkpoint {checkpoint}")
    return replace(found, network=found.network.eval())


def existing(path: Path) -> Path:
    """A path to a file that is there.

    Raises:
        StudyError: it is not.
    """
    if not path.is_file():
        raise StudyError(f"{path} is not there, or is no file")
    return path


def _of_function(name: str, prepared: dict[str, Any]) -> Named:
    place, _, function = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(place)
        network = getattr(module, function)()
    except Exception as error:  # the user's own code
        raise StudyError(
            f"{name} cannot be made ({line(error)}): name a function without arguments, of a module that Python "
            "finds from here"
        ) from None
    finally:
        sys.path.pop(0)
    if not isinstance(network, nn.Module):
        raise StudyError(f"{name} gives no torch.nn.Module, but {type(network).__name__}")
    preparation = Preparation(**({"side": 224} | prepared))
    # A file of its own goes along; a package has to be installed.
    sources = (Path(str(module.__file__)),) if "." not in place and not hasattr(module, "__path__") else ()
    return Named(name, network, preparation, f"{function}()", f"from {place} import {function}", sources)


def _of_library(name: str, tensors: dict[str, Tensor] | None, prepared: dict[str, Any], classes: int | None) -> Named:
    model = Model(architecture=name)
    own = _timm(name) if name.startswith("timm/") else _torchvision(name)
    preparation = Preparation(**(own | prepared))
    shape = (CHANNELS, preparation.side, preparation.side)
    library, _, its = name.partition("/")
    if tensors is not None:
        classes = _classes(lambda: models.build(model, shape, 1000), tensors, 1000)
    network = models.pretrained(model, None, shape) if classes is None else models.build(model, shape, classes)
    given = {} if classes is None else {"num_classes": classes}
    if library == "timm":
        import timm

        cfg = timm.get_pretrained_cfg(its)
        given |= {"img_size": preparation.side} if cfg is not None and cfg.fixed_input_size else {}
    elif its.startswith("vit"):
        given["image_size"] = preparation.side
    arguments = "".join(f", {key}={value}" for key, value in given.items())
    make, imports = {
        "timm": ("timm.create_model", "import timm"),
        "torchvision": ("models.get_model", "from torchvision import models"),
    }[library]
    return Named(name, network, preparation, f'{make}("{its.partition(".")[0]}"{arguments})', imports)


def _timm(name: str) -> dict[str, Any]:
    import timm
    from timm.data.config import resolve_data_config

    cfg = timm.get_pretrained_cfg(name.removeprefix("timm/"), allow_unregistered=True)
    if cfg is None:  # not theirs, which is said later
        return {"side": 224}
    found = resolve_data_config(pretrained_cfg=cfg.to_dict())
    resized = found["interpolation"] if found["interpolation"] in get_args(Interpolation) else "bicubic"
    sizes = {"side": found["input_size"][-1], "crop": found["crop_pct"], "interpolation": resized}
    return sizes | {"mean": found["mean"], "std": found["std"]}


def _torchvision(name: str) -> dict[str, Any]:
    from torchvision import models as theirs

    try:
        its = theirs.get_model_weights(name.removeprefix("torchvision/")).DEFAULT.transforms()
        (side,), (resized,) = its.crop_size, its.resize_size
    except (ValueError, AttributeError):  # not theirs, which is said later; or not for classification
        return {"side": 224}
    sizes = {"side": side, "crop": min(1.0, side / resized), "interpolation": its.interpolation.value}
    return sizes | {"mean": tuple(its.mean), "std": tuple(its.std)}


def _own(name: str, tensors: dict[str, Tensor] | None, prepared: dict[str, Any], classes: int | None) -> Named:
    preparation = Preparation(**({"side": SMALL} | prepared))
    shape = (CHANNELS, preparation.side, preparation.side)
    model = Model(architecture=name)
    if tensors is not None:
        classes = _classes(lambda: models.build(model, shape, 10), tensors, 10)
    assert classes is not None
    network = models.build(model, shape, classes)
    first = f"ResNet({RESNETS[name]}, " if name in RESNETS else "VGG("
    made = f"architectures.{first}1.0, {CHANNELS}, {classes})"
    return Named(name, network, preparation, made, "import architectures", (Path(architectures.__file__),))


def _classes(make: Callable[[], nn.Module], tensors: dict[str, Tensor], default: int) -> int:
    """How many classes a checkpoint has: the outputs of the last linear layer, where it has such a tensor."""
    with torch.device("meta"):
        network = make()
    try:
        head, _ = models.classifier_of(network)
    except StudyError:  # a convolution, say
        return default
    weight = tensors.get(f"{head}.weight")
    return default if weight is None else len(weight)


def _load(network: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    own = network.state_dict()
    wrong = [
        # Old files do not count batches; in evaluation nobody asks.
        *(f"{name} is missing" for name in own if name not in tensors and not name.endswith("num_batches_tracked")),
        *(f"{name} is not the network's" for name in tensors if name not in own),
        *(
            f"{name} is {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
            for name, tensor in tensors.items()
            if name in own and own[name].shape != tensor.shape
        ),
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise StudyError(f"{what} does not fit the network: {'; '.join(wrong[:3])}{more}")
    network.load_state_dict(tensors, strict=False)


def check_classes(its: Named, classes: list[str], folder: Path) -> None:
    """Refuse labels that a network cannot have been trained on.

    Raises:
        StudyError: it has other classes than the folder, by number, or does not take the images.
    """
    side = its.preparation.side
    try:
        with torch.inference_mode():
            outputs = logits_of(its.network(placed(torch.zeros(1, CHANNELS, side, side), its.network)))
    except Exception as error:  # the network's own code
        raise StudyError(f"{its.name} does not take images of {side} x {side} pixels: {line(error)}") from None
    if outputs.ndim != 2:
        raise StudyError(f"{its.name} gives {tuple(outputs.shape)} for an image: one score for each class is needed")
    if outputs.shape[1] != len(classes):
        raise StudyError(
            f"{its.name} tells {outputs.shape[1]} classes apart, and {folder} has {len(classes)} directories: give "
            "--checkpoint of a network that was trained on them; `measure --energy` needs no labels"
        )
