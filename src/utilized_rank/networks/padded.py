"""Convolutions that zeros are put around the input of, as none of torch.nn does by itself."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import cast

import torch.nn.functional as F
from torch import Tensor, fx, nn

from .products import Amounts, Sides

ASKED = (
    *("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride"),
    *("padding", "dilation", "groups", "padding_mode"),
)
"""What the code of a network may ask of its layers, beside their weights."""


def same_amounts(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's padding "SAME" along one side, before and after: ceil(size / stride) outputs, less before."""
    total = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def same_padded(x: Tensor, kernel: Sides, stride: Sides, dilation: Sides) -> Tensor:
    """(B, C, H, W) with zeros around it, by :func:`same_amounts`."""
    down, across = (same_amounts(x.shape[i - 2], kernel[i], stride[i], dilation[i]) for i in (0, 1))
    return F.pad(x, (*across, *down))


fx.wrap("same_padded")  # it depends on the size: one node of a graph


class SamePad(nn.Module):
    """Pads images (B, C, H, W) as TensorFlow does for a convolution, by amounts that depend on their size."""

    def __init__(self, kernel: Sides, stride: Sides, dilation: Sides) -> None:
        super().__init__()
        self.kernel, self.stride, self.dilation = kernel, stride, dilation

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H + ..., W + ...)."""
        return same_padded(x, self.kernel, self.stride, self.dilation)

    def amounts(self, height: int, width: int) -> Amounts:
        """For an image of this size."""
        size = (height, width)
        down, across = (same_amounts(size[i], self.kernel[i], self.stride[i], self.dilation[i]) for i in (0, 1))
        return *across, *down


class Padded(nn.Sequential):
    """Zeros around an image, then a convolution: whoever asks for its weight or sizes gets what the one would answer.

    Args:
        pad: the zeros.
        conv: what takes the padded image.
        module: the one that they stand for; it is not kept.
    """

    __jit_unused_properties__ = ("weight", "bias")

    def __init__(self, pad: nn.Module, conv: nn.Conv2d, module: nn.Module) -> None:
        super().__init__(OrderedDict(pad=pad, conv=conv))
        for name in ASKED:
            if hasattr(module, name):
                setattr(self, name, getattr(module, name))

    @property
    def weight(self) -> Tensor:
        """The convolution's, or what stands for it."""
        return cast(Tensor, self.get_submodule("conv").weight)

    @property
    def bias(self) -> Tensor | None:
        """Likewise."""
        return cast(Tensor | None, self.get_submodule("conv").bias)
