"""Which layers count, and each of them as a matrix: one view of linear layers and convolutions.

Row convention, as in Garg et al. 2024: a layer takes rows S (N x m), has weight W (m x n) and gives
T = S W (N x n). A convolution is the same on its patches (im2col): m = C_in k k, n = C_out, one row
per output position. A layer of g groups is g such layers side by side, so every matrix here has a
leading dimension g (1 for a layer without groups).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

Weighted = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution of a network, by its name there."""

    name: str
    module: Weighted

    @property
    def groups(self) -> int:
        """G."""
        return self.module.groups if isinstance(self.module, nn.Conv2d) else 1

    @property
    def m(self) -> int:
        """Input width of a group."""
        return self.module.weight[0].numel()

    @property
    def n(self) -> int:
        """Output width of a group."""
        return len(self.module.weight) // self.groups

    @property
    def width(self) -> int:
        """min(m, n): the largest rank that a group can have."""
        return min(self.m, self.n)

    def weight(self) -> Tensor:
        """W as (g, m, n), a view."""
        return self.module.weight.detach().reshape(self.groups, self.n, self.m).mT

    def weight_from(self, matrix: Tensor) -> Tensor:
        """W (g, m, n) as the module stores it: its shape, type and memory format."""
        own = self.module.weight
        stored = matrix.mT.reshape(own.shape).to(own)
        return own.detach().clone().copy_(stored)

    def rows(self, inputs: Tensor) -> Tensor:
        """The rows S of the module's inputs: (g, N, m), N over images and positions."""
        if isinstance(self.module, nn.Linear):
            return inputs.reshape(1, -1, self.m)
        return patches(self.module, inputs)

    def row_count(self, inputs: Tensor) -> int:
        """How many rows (a group) the module's inputs have."""
        if isinstance(self.module, nn.Linear):
            return inputs.numel() // self.m
        return len(inputs) * positions(self.module, inputs.shape[-2], inputs.shape[-1])


def patches(module: nn.Conv2d, inputs: Tensor) -> Tensor:
    """The patches that a convolution sees in ``inputs`` (B, C, H, W): (g, B L, m)."""
    padded = F.pad(inputs, *padding(module))
    dilation = (module.dilation[0], module.dilation[1])
    kernel = (module.kernel_size[0], module.kernel_size[1])
    stride = (module.stride[0], module.stride[1])
    if kernel == (1, 1):  # a patch is a pixel: nothing to copy
        unfolded = padded[:, :, :: stride[0], :: stride[1]].flatten(2)
    else:
        unfolded = F.unfold(padded, kernel, dilation, 0, stride)  # (B, g m, L)
    count, _, positions = unfolded.shape
    grouped = unfolded.view(count, module.groups, -1, positions)
    return grouped.permute(1, 0, 3, 2).reshape(module.groups, count * positions, -1)


def padding(module: nn.Conv2d) -> tuple[list[int], str]:
    """How ``torch.nn.functional.pad`` pads as the convolution does: amounts and mode."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    # torch keeps the amounts in this form for every kind of padding ("same" may differ on two sides).
    return list(module._reversed_padding_repeated_twice), mode


def positions(module: nn.Conv2d, height: int, width: int) -> int:
    """At how many places a convolution sees a patch in one image of this size."""
    left, right, top, bottom = padding(module)[0]
    (down, across), (step_y, step_x), (gap_y, gap_x) = module.kernel_size, module.stride, module.dilation
    return places(height + top + bottom, down, step_y, gap_y) * places(width + left + right, across, step_x, gap_x)


def places(size: int, kernel: int, stride: int, dilation: int) -> int:
    """The same along one side, ``size`` with its padding."""
    return (size - dilation * (kernel - 1) - 1) // stride + 1


@dataclass(frozen=True)
class Selection:
    """The layers that count towards the mean layer utilization, and the others with the reason."""

    layers: list[Layer]
    left_out: dict[str, str]


def countable(network: nn.Module) -> Selection:
    """Select every linear layer and two-dimensional convolution, in the order of definition.

    Depthwise convolutions are left out: with one input channel and one output channel a group,
    their rank is 1 by construction and says nothing about the data. So is the inside of
    ``nn.MultiheadAttention``, which never calls its projections as modules, and what has a forward of its own or
    computes its weight: :func:`utilized_rank.networks.plain.plain` makes layers of most of them.
    """
    layers: list[Layer] = []
    left_out: dict[str, str] = {}
    inside = {
        id(part)
        for module in network.modules()
        if isinstance(module, nn.MultiheadAttention)
        for part in module.modules()
    }
    for name, module in network.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            left_out[name] = "nn.MultiheadAttention: its projections are not called as modules"
        elif id(module) in inside:
            continue
        elif isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels:
            left_out[name] = "depthwise convolution: one channel a group"
        elif isinstance(module, Weighted):
            if "weight" not in module._parameters:  # setting it would be undone, or go through a parametrization
                left_out[name] = f"{type(module).__name__}: its weight is computed whenever it is called"
            elif type(module).forward in (nn.Linear.forward, nn.Conv2d.forward):
                layers.append(Layer(name, module))
            else:  # timm's Conv2dSame pads by itself, its StdConv2d standardises the weight
                left_out[name] = f"{type(module).__name__}: computes something else than its class of torch.nn"
        elif isinstance(module, nn.modules.conv._ConvNd):
            left_out[name] = f"{type(module).__name__}: only two-dimensional convolutions are measured"
    return Selection(layers, left_out)
