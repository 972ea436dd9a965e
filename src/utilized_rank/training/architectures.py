"""Networks for small images, of torch alone: a folder of a compressed network holds a copy of this file."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESNETS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}
"""By name, n of He et al. 2016."""
VGG11 = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")


class VGG(nn.Module):
    """VGG11 with batch norm (Simonyan and Zisserman 2015) for small images: one linear layer on top.

    Args:
        width: channels, as a multiple of the published network's.
        channels: of an image.
        classes: how many.
    """

    def __init__(self, width: float, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for item in VGG11:
            if item == "pool":
                layers.append(nn.MaxPool2d(2))
                continue
            wide = _scaled(cast(int, item), width)
            layers += [nn.Conv2d(channels, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
            channels = wide
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


class ResNet(nn.Module):
    """The CIFAR form of He et al. 2016, of 6 n + 2 layers: n blocks a stage.

    Args:
        n: 3 in ResNet-20.
        width: channels, as a multiple of the published network's.
        channels: of an image.
        classes: how many.
    """

    def __init__(self, n: int, width: float, channels: int, classes: int) -> None:
        super().__init__()
        widths = [_scaled(w, width) for w in (16, 32, 64)]
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(n, widths[0], widths[0], 1)
        self.layer2 = _stage(n, widths[0], widths[1], 2)
        self.layer3 = _stage(n, widths[1], widths[2], 2)
        self.linear = nn.Linear(widths[2], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, classes)."""
        x = torch.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(n: int, channels: int, width: int, stride: int) -> nn.Sequential:
    blocks = [ResidualBlock(channels, width, stride)]
    blocks += [ResidualBlock(width, width, 1) for _ in range(n - 1)]
    return nn.Sequential(*blocks)


def _scaled(width: int, multiple: float) -> int:
    return max(1, round(width * multiple))
