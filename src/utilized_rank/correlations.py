"""The second moment of a convolution's patches from correlations of its input, each computed once.

For stride 1 the product of two entries of a patch, s_(c,i) s_(c',j), depends on where the patch lies
only through the position of i: summed over all positions it is the correlation of channels c and c'
at the shift j - i, less the few rows and columns that the window of offset i does not reach. So a 3 x 3
convolution needs 15 shifts (half of 25, by symmetry) of a C x C product, not the 81 of its patches.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from .layers import padding

Cut = tuple[int | None, int | None]
"""A row and a column of the image, None for all of them."""


SAVING = 3
"""How many times fewer products the correlations must need: each costs more than one of a matrix product."""


def pays(module: nn.Module, height: int, width: int) -> bool:
    """Whether the patches of ``module`` on images of this size overlap enough to be worth sharing.

    They must overlap at every position (stride 1, no groups), and on small images the rows and columns
    that some offset misses are most of the image.
    """
    if not isinstance(module, nn.Conv2d) or module.stride != (1, 1) or module.groups > 1:
        return False
    (down, across), (left, right, top, bottom) = module.kernel_size, padding(module)[0]
    rows = _misses(height, top, bottom, down, module.dilation[0])
    columns = _misses(width, left, right, across, module.dilation[1])
    shared = down * (2 * across - 1) * (height + len(rows)) * (width + len(columns))
    return SAVING * shared <= (down * across) ** 2 * height * width


class Correlations:
    """Sums over images of one size, as they flow into one convolution.

    Args:
        module: a convolution of stride 1 without groups.
        height: of its input.
        width: of its input.
    """

    def __init__(self, module: nn.Conv2d, height: int, width: int) -> None:
        self.module = module
        self.pads, self.mode = padding(module)
        left, right, top, bottom = self.pads
        if self.mode != "constant":  # then padding is part of the image
            height, width, left, right, top, bottom = height + top + bottom, width + left + right, 0, 0, 0, 0
        self.rows = _misses(height, top, bottom, module.kernel_size[0], module.dilation[0])
        self.columns = _misses(width, left, right, module.kernel_size[1], module.dilation[1])
        self.count = 0
        """Patches seen."""
        reach_y, reach_x = (d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
        self._reach = int(reach_y), int(reach_x)
        self._positions = (height + top + bottom - reach_y) * (width + left + right - reach_x)
        self._sums: dict[Cut, Tensor] = {}
        self._total = torch.zeros(module.in_channels, height, width, dtype=torch.float64)

    def add(self, inputs: Tensor) -> None:
        """Take in more images, (B, C, H, W)."""
        inputs = inputs.double()
        if self.mode != "constant":
            inputs = F.pad(inputs, self.pads, self.mode)
        self.count += len(inputs) * self._positions
        self._total += inputs.sum(0)
        down, across = self._reach
        beyond = F.pad(inputs, (across, across, 0, down))
        channels, (height, width) = inputs.shape[1], self.module.kernel_size
        shape = (channels, channels, height, 2 * width - 1)
        for row, column in product([None, *self.rows], [None, *self.columns]):
            y, h = (slice(None), slice(None)) if row is None else (slice(row, row + 1), slice(row, row + 1 + down))
            x, w = (
                (slice(None), slice(None))
                if column is None
                else (slice(column, column + 1), slice(column, column + 1 + 2 * across))
            )
            # The gradient of a convolution's weight is this correlation, and has the fastest code.
            part = conv2d_weight(beyond[:, :, h, w], shape, inputs[:, :, y, x], dilation=self.module.dilation)
            known = self._sums.get((row, column))
            self._sums[row, column] = part if known is None else known.add_(part)

    def products(self) -> Tensor:
        """Sum of s^T s over all patches, float64, (m, m)."""
        channels, (height, width) = self.module.in_channels, self.module.kernel_size
        result = torch.empty(channels, height, width, channels, height, width, dtype=torch.float64)
        for (a, b), (u, v) in product(product(range(height), range(width)), repeat=2):
            if u < a:
                continue
            block = self._within(a, b)[:, :, u - a, v - b + width - 1]  # (C, C)
            result[:, a, b, :, u, v] = block
            result[:, u, v, :, a, b] = block.T
        m = channels * height * width
        return result.view(m, m)

    def total(self) -> Tensor:
        """Sum of s over all patches, float64, (m,)."""
        height, width = self.module.kernel_size
        result = torch.empty(self.module.in_channels, height, width, dtype=torch.float64)
        for a, b in product(range(height), range(width)):
            kept = self._total.clone()
            kept[:, [row for row, misses in self.rows.items() if a in misses]] = 0
            kept[:, :, [column for column, misses in self.columns.items() if b in misses]] = 0
            result[:, a, b] = kept.sum((1, 2))
        return result.flatten()

    def _within(self, a: int, b: int) -> Tensor:
        """Correlations summed over the window of offset (a, b): all, less what it misses, (C, C, kh, 2 kw - 1)."""
        rows = [row for row, misses in self.rows.items() if a in misses]
        columns = [column for column, misses in self.columns.items() if b in misses]
        result = self._sums[None, None].clone()
        for row in rows:
            result -= self._sums[row, None]
        for column in columns:
            result -= self._sums[None, column]
        for row, column in product(rows, columns):
            result += self._sums[row, column]
        return result


def _misses(size: int, before: int, after: int, kernel: int, dilation: int) -> dict[int, set[int]]:
    """The rows of an image that some offset of the kernel never meets, and which offsets those are."""
    positions = size + before + after - dilation * (kernel - 1)
    missed: dict[int, set[int]] = {}
    for row in range(size):
        met = [a for a in range(kernel) if 0 <= row + before - a * dilation < positions]
        if len(met) < kernel:
            missed[row] = set(range(kernel)) - set(met)
    return missed
