import numpy as np
import pytest
import torch
from torch import nn

from utilized_rank.correlations import Correlations, pays


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
    if convolution.stride != (1, 1) or convolution.groups > 1:
        pytest.skip("strided or grouped: its patches are multiplied out")
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


def test_zeros_are_exactly_zero():
    correlations = sums(nn.Conv2d(2, 3, 3, padding=1), torch.zeros(2, 2, 5, 5))
    assert not correlations.products().any()
    assert not correlations.total().any()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ({"kernel_size": 3}, True),
        ({"kernel_size": 5, "dilation": 2}, True),
        ({"kernel_size": (1, 3)}, False),
        ({"kernel_size": 1}, False),
        ({"kernel_size": 3, "stride": (1, 2)}, False),
        ({"kernel_size": 3, "groups": 2}, False),
    ],
)
def test_they_pay_where_patches_overlap_enough_at_every_position(kind, expected):
    assert pays(nn.Conv2d(2, 2, **kind), 32, 32) is expected
    assert not pays(nn.Linear(2, 2), 32, 32)


def test_they_do_not_pay_on_images_that_are_mostly_border():
    convolution = nn.Conv2d(2, 2, 3, padding=1)
    assert pays(convolution, 16, 16)
    assert not pays(convolution, 3, 3)
