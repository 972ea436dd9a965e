"""Architectures by name, and their weights from a given file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import config
from .provenance import file_hash
from .store import read_tensors

VGG11 = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")


class VGG(nn.Module):
    """VGG11 with batch norm (Simonyan and Zisserman 2015) for small images: one linear layer on top."""

    def __init__(self, model: config.Model, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for item in VGG11:
            if item == "pool":
                layers.append(nn.MaxPool2d(2))
                continue
            width = _scaled(cast(int, item), model.width)
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, classes)."""
        return self.linear(self.features(images).mean((2, 3)))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.padding = width - channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, width, H / stride, W / stride)."""
        shortcut = x
        if self.stride > 1 or self.padding:
            half = self.padding // 2
            shortcut = x[:, :, :: self.stride, :: self.stride]
            shortcut = F.pad(shortcut, (0, 0, 0, 0, half, self.padding - half))
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + shortcut)


class ResNet20(nn.Module):
    """The CIFAR form of He et al. 2016 with three blocks a stage."""

    def __init__(self, model: config.Model, channels: int, classes: int) -> None:
        super().__init__()
        widths = [_scaled(w, model.width) for w in (16, 32, 64)]
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = self._stage(widths[0], widths[0], 1)
        self.layer2 = self._stage(widths[0], widths[1], 2)
        self.layer3 = self._stage(widths[1], widths[2], 2)
        self.linear = nn.Linear(widths[2], classes)

    @staticmethod
    def _stage(channels: int, width: int, stride: int) -> nn.Sequential:
        blocks = [ResidualBlock(channels, width, stride)]
        blocks += [ResidualBlock(width, width, 1) for _ in range(2)]
        return nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, classes)."""
        x = torch.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _scaled(width: int, multiple: float) -> int:
    return max(1, round(width * multiple))


def _vit(model: config.Model, shape: tuple[int, int, int], classes: int) -> nn.Module:
    import timm  # a second to import, and only this architecture needs it

    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=shape[1:],
        in_chans=shape[0],
        patch_size=model.patch_size,
        embed_dim=model.dim,
        depth=model.depth,
        num_heads=model.heads,
        num_classes=classes,
    )


BUILDERS: dict[str, Callable[[config.Model, tuple[int, int, int], int], nn.Module]] = {
    "vgg11": lambda model, shape, classes: VGG(model, shape[0], classes),
    "resnet20": lambda model, shape, classes: ResNet20(model, shape[0], classes),
    "vit": _vit,
}


def build(model: config.Model, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A network with random weights, for images of ``shape`` (channels, height, width).

    Convolutions are initialised as by He et al. 2015 (fan out), transformers as timm does.
    """
    network = BUILDERS[model.architecture](model, shape, classes)
    if model.architecture != "vit":
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    # Convolutions on this layout are half again as fast on processors; linear layers do not care.
    return network.to(memory_format=torch.channels_last)


def load(path: Path, model: config.Model, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A network with the weights of a safetensors file, in evaluation mode."""
    network = build(model, shape, classes)
    network.load_state_dict(read_tensors(path)[0])
    return network.eval()


def classifier(network: nn.Module) -> nn.Linear:
    """The last linear layer: its inputs are the network's features.

    Raises:
        StudyError: the network has no linear layer.
    """
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise config.StudyError(f"{type(network).__name__} has no linear layer to classify with")
    return linear[-1]


def read_checkpoint(file: str, sha256: str) -> dict[str, Tensor]:
    """The tensors of a given safetensors file.

    Raises:
        StudyError: it is missing, or is not the file that the study means.
    """
    path = Path(file)
    if not path.is_file():
        raise config.StudyError(f"checkpoint {file} is not there: put the file in place, or correct its path")
    if (found := file_hash(path)) != sha256:
        raise config.StudyError(f"checkpoint {file} has SHA-256 {found}, not {sha256}: it is another file")
    return read_tensors(path)[0]


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
            raise config.StudyError(f"{name} {tuple(tensor.shape)} does not fit the network: {expected}")
    network.load_state_dict(tensors, strict=False)
    return [name for name in own if name not in tensors]
