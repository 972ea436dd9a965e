from collections import Counter, defaultdict
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from utilized_rank.ranks.correlations import TERMS, Correlations, bands, pays, sorts
from utilized_rank.ranks.layers import Layer, padding, positions


def sums(conv: nn.Conv2d, *batches: torch.Tensor) -> Correlations:
    correlations = Correlations(conv, *batches[0].shape[2:])
    for batch in batches:
        correlations.add(batch)
    return correlations


def assert_sums_of_patches(correlations: Correlations, patches: np.ndarray, tolerance: float) -> None:
    """Count, sum and sum of squares are those of the patches, (N, m)."""
    assert correlations.count == len(patches)
    np.testing.assert_allclose(correlations.total(), patches.sum(0), rtol=0, atol=tolerance)
    np.testing.assert_allclose(correlations.products(), patches.T @ patches, rtol=0, atol=tolerance)


def test_correlations_make_the_sums_over_all_patches(convolution, maps, patches_by_loop):
    if convolution.groups > 1:
        pytest.skip("grouped: its patches are multiplied out")
    correlations = sums(convolution.double(), maps.double())
    assert_sums_of_patches(correlations, patches_by_loop(convolution, maps)[0], 1e-10)


@pytest.mark.parametrize("side", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "kind",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 5, "padding": 2},
        {"kernel_size": 3, "padding": 3, "dilation": 2},
        {"kernel_size": (1, 5), "padding": (0, 4)},
        {"kernel_size": (4, 2), "padding": "same"},
        {"kernel_size": 3, "padding": 2, "padding_mode": "replicate"},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 5, "padding": 2, "stride": (2, 3)},
        {"kernel_size": 3, "padding": 2, "stride": 2, "dilation": 2},
        {"kernel_size": (3, 4), "padding": (2, 3), "stride": 3, "dilation": (2, 1)},
        {"kernel_size": 3, "padding": 2, "stride": 2, "padding_mode": "replicate"},
        {"kernel_size": 2, "padding": 1, "stride": 4},
    ],
    ids=str,
)
def test_also_on_images_that_the_kernel_overhangs(kind, side, patches_by_loop, generator):
    conv = nn.Conv2d(2, 3, **kind).double()
    images = torch.randn(2, 2, side, side, generator=generator, dtype=torch.float64)
    assert_sums_of_patches(sums(conv, images), patches_by_loop(conv, images)[0], 1e-10)


def test_batches_add_up(patches_by_loop, generator):
    conv = nn.Conv2d(2, 3, 3, padding=1).double()
    images = torch.randn(9, 2, 5, 4, generator=generator, dtype=torch.float64)
    correlations = sums(conv, *images.split([1, 6, 2]))
    assert_sums_of_patches(correlations, patches_by_loop(conv, images)[0], 1e-10)


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_in_single_precision_the_sums_are_as_exact_as_that(mean, patches_by_loop, generator):
    conv = nn.Conv2d(2, 3, 3, padding=1)
    images = torch.randn(20, 2, 8, 8, generator=generator) + mean
    patches = patches_by_loop(conv, images)[0]
    assert_sums_of_patches(sums(conv, images), patches, 1e-6 * (patches**2).sum(0).max())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_sums_of_many_terms_in_single_precision_are_exact_to_four_millionths_of_the_largest(mean, stride, generator):
    """More images than are summed in their own precision, of more pixels than one sort has terms."""
    conv = nn.Conv2d(2, 3, 3, stride=stride, padding=1)
    images = torch.randn(40, 2, 64, 64, generator=generator) + mean
    assert len(images) * positions(conv, 64, 64) > TERMS
    rows = Layer("conv", conv).rows(images.double())[0].numpy()
    correlations = sums(conv, images)
    assert correlations.products().dtype == correlations.total().dtype == torch.float64
    assert_sums_of_patches(correlations, rows, 4e-6 * (rows**2).sum(0).max())


def test_products_are_symmetric_to_the_bit(maps):
    products = sums(nn.Conv2d(4, 3, (2, 3), stride=(1, 2), padding=1), maps).products()
    assert torch.equal(products, products.T)


def test_zeros_are_exactly_zero():
    correlations = sums(nn.Conv2d(2, 3, 3, padding=1), torch.zeros(2, 2, 5, 5))
    assert not correlations.products().any()
    assert not correlations.total().any()


def met(size: int, before: int, after: int, kernel: int, stride: int, dilation: int) -> dict[int, set[int]]:
    """Which offsets of a kernel meet each row of an image, position by position."""
    found = defaultdict(set)
    for top in range(0, size + before + after - dilation * (kernel - 1), stride):
        for offset in range(kernel):
            row = top + offset * dilation - before
            if 0 <= row < size:
                found[row].add(offset)
    return dict(found)


@given(
    st.integers(1, 12), st.integers(0, 4), st.integers(0, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)
)
def test_every_row_that_an_offset_meets_is_in_one_band_with_all_offsets_that_meet_it(
    size, before, after, kernel, stride, dilation
):
    assume(size + before + after > dilation * (kernel - 1))
    found = bands(size, before, after, kernel, stride, dilation)
    rows = [(row, set(band.offsets)) for band in found for row in range(size)[band.inside()]]
    assert dict(rows) == met(size, before, after, kernel, stride, dilation)
    assert len(rows) == len(dict(rows))
    assert sum(band.count for band in found) == len(rows)
    assert all(list(band.offsets) == sorted(band.offsets) for band in found)


def test_every_pixel_that_an_offset_meets_is_in_one_sort_with_all_offsets_that_meet_it(convolution):
    (left, right, top, bottom), mode = padding(convolution)
    height, width = 7, 6
    if mode != "constant":  # such padding is part of the image
        height, width, left, right, top, bottom = height + top + bottom, width + left + right, 0, 0, 0, 0
    (tall, wide), (down, across), (gap_y, gap_x) = (
        convolution.kernel_size,
        convolution.stride,
        convolution.dilation,
    )
    rows, columns = met(height, top, bottom, tall, down, gap_y), met(width, left, right, wide, across, gap_x)
    expected = {(y, x): set(product(rows[y], columns[x])) for y, x in product(rows, columns)}
    found = sorts(convolution, height, width)
    pixels = [
        ((y, x), set(product(sort.rows.offsets, sort.columns.offsets)))
        for sort in found
        for y, x in product(range(height)[sort.rows.inside()], range(width)[sort.columns.inside()])
    ]
    assert max(Counter(pixel for pixel, _ in pixels).values()) == 1
    assert dict(pixels) == expected
    assert sum(sort.pixels for sort in found) == len(pixels)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ({"kernel_size": 3}, True),
        ({"kernel_size": 3, "padding": 1}, True),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, True),
        ({"kernel_size": 5, "dilation": 2}, True),
        ({"kernel_size": 3, "stride": 2, "padding": 1}, True),
        ({"kernel_size": 7, "stride": 4}, True),
        ({"kernel_size": 3, "stride": (1, 3)}, True),
        ({"kernel_size": 1}, False),
        ({"kernel_size": 1, "stride": 2}, False),
        ({"kernel_size": 3, "stride": 3}, False),
        ({"kernel_size": 4, "stride": 4}, False),
        ({"kernel_size": 2, "stride": 3}, False),
        ({"kernel_size": 3, "groups": 2}, False),
    ],
    ids=str,
)
def test_they_pay_where_patches_of_one_group_overlap(kind, expected):
    assert pays(nn.Conv2d(2, 2, **kind), 32, 32) is expected


@pytest.mark.parametrize("side", [1, 2, 3, 16])
def test_they_pay_on_images_that_are_mostly_border_too(side):
    """A padded patch that lies mostly outside has few products of two pixels."""
    assert pays(nn.Conv2d(2, 2, 3, padding=1), side, side)


def test_where_patches_do_not_overlap_after_all_correlations_save_nothing():
    """One patch a row of 3 pixels, of which no product is met twice; in a row of 4 some are."""
    module = nn.Conv2d(2, 2, (1, 3))
    assert not pays(module, 5, 3)
    assert pays(module, 5, 4)
