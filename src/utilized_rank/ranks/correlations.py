"""The second moment of a convolution's patches from correlations of its input, each computed once.

The product of two entries of a patch, s_(c,i) s_(c',j), is that of two pixels of the input, j - i apart.
Over all patches, offset i meets the same pixels whatever j is; so the pixels are sorted by the offsets
that meet them (inside the image: all, for stride 1), and for each sort the correlations of channels c and
c' are summed at each shift. A 3 x 3 convolution needs 15 shifts of a C x C product (half of 25, by
symmetry) where its patches have 81 products.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ..networks.devices import sums_on
from .layers import padding, places, positions

TERMS = 2**14
"""Products that are summed in the inputs' own precision, before float64 takes over (those of one image at least).

In float32 so short a sum is exact to 4e-6 of the largest, which is less than activations in float32 are off.
"""


@dataclass(frozen=True)
class Band:
    """The rows (or columns) of an image that the same offsets of a kernel meet."""

    start: int
    step: int
    count: int
    offsets: tuple[int, ...]
    """Ascending."""

    def inside(self) -> slice:
        """Its rows."""
        return slice(self.start, self.start + (self.count - 1) * self.step + 1, self.step)

    def beyond(self, first: int, last: int) -> slice:
        """All rows from the shift ``first`` of its first row to the shift ``last`` of its last one."""
        return slice(self.start + first, self.start + (self.count - 1) * self.step + last + 1)


def bands(size: int, before: int, after: int, kernel: int, stride: int, dilation: int) -> list[Band]:
    """The bands of an image ``size`` rows high: every row that some offset meets is in one of them."""
    count = places(before + size + after, kernel, stride, dilation)
    met: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row in range(size):
        tops = [row + before - a * dilation for a in range(kernel)]
        offsets = tuple(a for a, top in enumerate(tops) if top % stride == 0 and 0 <= top // stride < count)
        if offsets:
            met[offsets].append(row)
    return [band for offsets, rows in met.items() for band in _runs(rows, stride, offsets)]


def _runs(rows: list[int], step: int, offsets: tuple[int, ...]) -> list[Band]:
    """Ascending rows as bands of even steps."""
    starts = [i for i, row in enumerate(rows) if i == 0 or row - rows[i - 1] != step]
    ends = [*starts[1:], len(rows)]
    return [Band(rows[i], step, end - i, offsets) for i, end in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class Sort:
    """The pixels of an image that the same offsets of a kernel meet, and the shifts to those that they multiply."""

    rows: Band
    columns: Band
    down: range
    """Shifts in steps of the dilation; downwards only: a product of two pixels is met from the upper one."""
    across: range

    @property
    def pixels(self) -> int:
        """In one image."""
        return self.rows.count * self.columns.count


def sorts(module: nn.Conv2d, height: int, width: int) -> list[Sort]:
    """All pixels of an image that has no padding but zeros; shifts that lead out of it are left out."""
    amounts, mode = padding(module)
    left, right, top, bottom = amounts if mode == "constant" else [0, 0, 0, 0]
    (tall, wide), (step_y, step_x), (gap_y, gap_x) = module.kernel_size, module.stride, module.dilation
    found = []
    for rows, columns in product(
        bands(height, top, bottom, tall, step_y, gap_y), bands(width, left, right, wide, step_x, gap_x)
    ):
        lowest = min(tall - 1 - rows.offsets[0], (height - 1 - rows.start) // gap_y)
        leftmost = min(columns.offsets[-1], (columns.inside().stop - 1) // gap_x)
        rightmost = min(wide - 1 - columns.offsets[0], (width - 1 - columns.start) // gap_x)
        found.append(Sort(rows, columns, range(lowest + 1), range(-leftmost, rightmost + 1)))
    return found


def _padded(module: nn.Conv2d, height: int, width: int) -> tuple[int, int]:
    """Height and width of an image with the padding that is not zeros."""
    (left, right, top, bottom), mode = padding(module)
    return (height, width) if mode == "constant" else (height + top + bottom, width + left + right)


def pays(module: nn.Conv2d, height: int, width: int) -> bool:
    """Whether patches of ``module`` on images of this size overlap, and correlations need fewer products."""
    (tall, wide), (step_y, step_x), (gap_y, gap_x) = module.kernel_size, module.stride, module.dilation
    overlap = step_y <= gap_y * (tall - 1) or step_x <= gap_x * (wide - 1)
    if module.groups > 1 or not overlap:
        return False
    shared = sum(
        sort.pixels * len(sort.down) * len(sort.across) for sort in sorts(module, *_padded(module, height, width))
    )
    return shared < (tall * wide) ** 2 * positions(module, height, width)


class Correlations:
    """Sums over images of one size, as they flow into one convolution.

    Args:
        module: a convolution without groups.
        height: of its input.
        width: of its input.
    """

    def __init__(self, module: nn.Conv2d, height: int, width: int) -> None:
        self.module = module
        self.count = 0
        """Patches seen."""
        self._positions = positions(module, height, width)
        height, width = _padded(module, height, width)
        self._sums: dict[Sort, Tensor | None] = dict.fromkeys(sorts(module, height, width))
        """For each sort of pixels, the products of two channels at each shift, float64, (C, C, down, across)."""
        self._sums_on = sums_on(module.weight.device)
        self._total = torch.zeros(height, width, module.in_channels, dtype=torch.float64, device=self._sums_on)

    def add(self, inputs: Tensor) -> None:
        """Take in more images, (B, C, H, W)."""
        amounts, mode = padding(self.module)
        if inputs.dtype not in (torch.float32, torch.float64):
            inputs = inputs.float()
        if mode != "constant":
            inputs = F.pad(inputs, amounts, mode)
        self.count += len(inputs) * self._positions
        # As a matrix product, which is several times faster than a sum over images.
        flat = inputs.permute(0, 2, 3, 1).reshape(len(inputs), -1)
        self._total += (flat.new_ones(1, len(flat)) @ flat).view_as(self._total).to(self._sums_on)
        (tall, wide), (gap_y, gap_x) = self.module.kernel_size, self.module.dilation
        margin = gap_x * (wide - 1)
        beyond = F.pad(inputs, (margin, margin, 0, gap_y * (tall - 1)))
        for sort, total in self._sums.items():
            few = max(1, TERMS // sort.pixels)
            for images, around in zip(inputs.split(few), beyond.split(few), strict=True):
                below = sort.rows.beyond(0, gap_y * sort.down[-1])
                beside = sort.columns.beyond(margin + gap_x * sort.across[0], margin + gap_x * sort.across[-1])
                inside = images[:, :, sort.rows.inside(), sort.columns.inside()]
                part = self._correlation(sort, inside, around[:, :, below, beside])
                part = part.to(self._sums_on)
                total = part.double() if total is None else total.add_(part)
            self._sums[sort] = total

    def _correlation(self, sort: Sort, inside: Tensor, around: Tensor) -> Tensor:
        """Products of the pixels of one sort with those around them, summed, (C, C, down, across)."""
        channels, steps, gaps = inside.shape[1], (sort.rows.step, sort.columns.step), self.module.dilation
        if sort.columns.count > 2:
            # The gradient of a convolution's weight is this correlation, and has the fastest code.
            shape = (channels, channels, len(sort.down), len(sort.across))
            return conv2d_weight(around, shape, inside, steps, dilation=gaps)
        # On images as narrow as this it has not.
        shifted = around.unfold(2, (sort.rows.count - 1) * steps[0] + 1, gaps[0])[..., :: steps[0]]
        shifted = shifted.unfold(3, (sort.columns.count - 1) * steps[1] + 1, gaps[1])[..., :: steps[1]]
        left = inside.permute(1, 0, 2, 3).reshape(channels, -1)
        right = shifted.permute(2, 3, 0, 4, 5, 1).reshape(len(sort.down), len(sort.across), -1, channels)
        return (left @ right).permute(2, 3, 0, 1)

    def products(self) -> Tensor:
        """Sum of s^T s over all patches, float64, (m, m)."""
        channels, (tall, wide) = self.module.in_channels, self.module.kernel_size
        # Offsets first, so that whole C x C blocks are added and turned over; as patches have them only at the end.
        result = self._total.new_zeros(tall, wide, tall, wide, channels, channels)
        for sort, total in self._sums.items():
            if total is None:
                continue
            blocks = total.permute(2, 3, 0, 1).contiguous()
            for a, b in product(sort.rows.offsets, sort.columns.offsets):
                for y, x in product(sort.down, sort.across):
                    u, v = a + y, b + x
                    if u < tall and 0 <= v < wide and (u, v) >= (a, b):
                        result[a, b, u, v] += blocks[y, x - sort.across[0]]
        for (a, b), (u, v) in combinations(product(range(tall), range(wide)), 2):
            result[u, v, a, b] = result[a, b, u, v].T
        m = channels * tall * wide
        return result.permute(4, 0, 1, 5, 2, 3).reshape(m, m)

    def total(self) -> Tensor:
        """Sum of s over all patches, float64, (m,)."""
        tall, wide = self.module.kernel_size
        result = self._total.new_zeros(self.module.in_channels, tall, wide)
        for sort in self._sums:
            pixels = self._total[sort.rows.inside(), sort.columns.inside()].sum((0, 1))
            for a, b in product(sort.rows.offsets, sort.columns.offsets):
                result[:, a, b] += pixels
        return result.flatten()
