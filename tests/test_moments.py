import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from utilized_rank.networks.each import in_turn
from utilized_rank.ranks import moments as of_moments
from utilized_rank.ranks.layers import Layer, countable
from utilized_rank.ranks.moments import (
    FEWEST,
    Budget,
    Moments,
    chunked_moments,
    from_tensors,
    input_moments,
    to_tensors,
)
from utilized_rank.ranks.subspaces import energy_rank, output_moment, principal


def of(network: nn.Module, images: torch.Tensor, batch: int = 1000) -> dict[str, Moments]:
    return input_moments(network, countable(network).layers, images.split(batch))


def test_moments_of_a_convolution_are_those_of_its_patches(convolution, maps, patches_by_loop):
    layer = Layer("conv", convolution)
    moments = input_moments(convolution, [layer], [maps])["conv"]
    rows = patches_by_loop(convolution, maps)  # (g, N, m)
    near = {"rtol": 0, "atol": 1e-6}  # overlapping patches are multiplied in the inputs' precision
    assert moments.count == rows.shape[1]
    np.testing.assert_allclose(moments.mean, rows.mean(1), **near)
    for group in range(layer.groups):
        by_hand = sum(np.outer(row, row) for row in rows[group]) / rows.shape[1]
        np.testing.assert_allclose(moments.second[group], by_hand, **near)
        np.testing.assert_allclose(moments.centred[group], np.cov(rows[group].T, bias=True), **near)


def test_moments_of_a_linear_layer_are_over_images_and_tokens(generator):
    tokens = torch.randn(5, 3, 6, generator=generator)
    moments = of(nn.Sequential(nn.Linear(6, 4)), tokens)["0"]
    rows = tokens.double().view(15, 6)
    assert moments.count == 15
    torch.testing.assert_close(moments.second[0], rows.T @ rows / 15)
    torch.testing.assert_close(moments.mean[0], rows.mean(0))


def test_the_derived_output_moment_is_that_of_the_real_outputs(convolution, maps):
    layer = Layer("conv", convolution)
    moments = input_moments(convolution, [layer], [maps])["conv"]
    outputs = convolution(maps).detach().double()
    if convolution.bias is not None:
        outputs -= convolution.bias.detach().double()[:, None, None]
    rows = outputs.unflatten(1, (layer.groups, layer.n)).permute(1, 0, 3, 4, 2).flatten(1, 3)  # (g, N, n)
    derived = output_moment(moments.second, layer.weight())
    torch.testing.assert_close(derived, rows.mT @ rows / rows.shape[1], rtol=0, atol=1e-5)
    centred = rows - rows.mean(1, keepdim=True)
    derived = output_moment(moments.centred, layer.weight())
    torch.testing.assert_close(derived, centred.mT @ centred / rows.shape[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["residual", "resnet20", "vgg11", "vit", "shared"])
def test_the_sizes_of_the_batches_do_not_matter(make, images, name):
    network = make(name)
    whole = of(network, images)
    for batch in (1, 23):
        for layer, moments in of(network, images, batch).items():
            assert moments.count == whole[layer].count
            scale = float(whole[layer].second.abs().max())
            torch.testing.assert_close(moments.second, whole[layer].second, rtol=0, atol=1e-5 * scale)
            torch.testing.assert_close(moments.mean, whole[layer].mean, rtol=0, atol=1e-5 * math.sqrt(scale))


@pytest.mark.parametrize(("name", "rows"), [("residual", None), ("residual", 1), ("shared", None), ("vit", 1)])
def test_sums_of_chunks_are_the_same_to_the_bit_wherever_they_are_made(
    make, images, name, rows, monkeypatch, elsewhere
):
    """And those of all images at once but for rounding, of the same images where a budget takes only some."""
    monkeypatch.setattr(of_moments, "CHUNK", 16)
    monkeypatch.setattr(of_moments, "FEWEST", 20)
    network = make(name)
    layers, budget = countable(network).layers, None if rows is None else Budget(rows, len(images))
    here, there = (chunked_moments(network, layers, images, budget, 7, each) for each in (in_turn, elsewhere))
    whole = input_moments(network, layers, images.split(7), budget)
    for layer, its in here.items():
        assert its.count == there[layer].count == whole[layer].count
        assert torch.equal(its.products, there[layer].products)
        assert torch.equal(its.total, there[layer].total)
        torch.testing.assert_close(its.second, whole[layer].second, rtol=1e-5, atol=1e-6)


class Lazy:
    """Images that are read a batch at a time."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, which: slice) -> torch.Tensor:
        return pytest.fail("a whole chunk was read")

    def part(self, which: slice) -> "Lazy":
        return Lazy(self.images[which])

    def split(self, size: int) -> tuple[torch.Tensor, ...]:
        return self.images.split(size)


def test_a_chunk_is_read_a_batch_at_a_time(make, images):
    network = make("residual")
    layers = countable(network).layers
    found, expected = (chunked_moments(network, layers, inputs, None, 7) for inputs in (Lazy(images), images))
    assert all(torch.equal(its.products, expected[name].products) for name, its in found.items())


def test_rows_added_in_parts_make_the_same_sums(generator):
    rows = torch.randn(2, 90, 5, generator=generator)
    once, parts = Moments.zeros(2, 5), Moments.zeros(2, 5)
    once.add(rows)
    for part in rows.split([1, 60, 29], dim=1):
        parts.add(part)
    assert parts.count == once.count == 90
    torch.testing.assert_close(parts.products, once.products, rtol=1e-14, atol=1e-13)
    torch.testing.assert_close(parts.total, once.total, rtol=1e-14, atol=1e-13)


def test_sums_are_in_double_precision():
    """A tiny variance beside a large mean: float32 would lose it."""
    rows = (1000 + 1e-2 * torch.arange(-50, 51).float()).view(1, -1, 1)
    moments = Moments.zeros(1, 1)
    moments.add(rows)
    assert float(moments.centred) == pytest.approx(float(rows.double().var(correction=0)), rel=1e-6)


def test_a_planted_subspace_of_patches_is_found_exactly(generator):
    """4 of 16 channels carry everything: 36 of the 144 dimensions of 3 x 3 patches, with or without a mean."""
    basis = torch.linalg.qr(torch.randn(16, 4, generator=generator)).Q
    conv = nn.Conv2d(16, 8, 3, padding=1)
    for mean in (0.0, 1.0):
        hidden = torch.randn(128, 4, 16, 16, generator=generator) + mean
        images = torch.einsum("ck,nkhw->nchw", basis, hidden)
        moments = input_moments(conv, [Layer("conv", conv)], [images])["conv"]
        assert energy_rank(principal(moments.second).values, 1 - 1e-6) == 36


def test_the_calls_of_a_shared_module_add_up(make, images):
    network = make("shared")
    first = network.stem(images.flatten(1)).relu()
    second = network.block(first).relu()
    rows = torch.cat([first, second]).detach().double()
    moments = of(network, images)["block"]
    assert moments.count == 2 * len(images)
    torch.testing.assert_close(moments.second[0], rows.T @ rows / len(rows), rtol=0, atol=1e-6)


def test_moments_are_of_evaluation_mode(make, images):
    network = make("residual")
    expected = of(network, images)
    dropped = nn.Sequential(nn.Dropout(0.9), network).train()
    torch.testing.assert_close(of(dropped, images)["1.conv1"].second, expected["conv1"].second)


def test_a_layer_that_receives_zeros_has_zero_moments():
    network = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    nn.init.zeros_(network[0].weight)
    nn.init.constant_(network[0].bias, -1)
    moments = of(network, torch.ones(4, 3))["2"]
    assert moments.count == 4
    assert not moments.second.any()
    assert not moments.centred.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_first_layer_that_received_them(make, images, value):
    network = make("residual")
    with torch.no_grad():
        network.conv1.weight[0, 0, 0, 0] = value
    with pytest.raises(FloatingPointError, match=r"layer conv2 received values that are not finite"):
        of(network, images)
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_last_layer_that_gives_what_is_not_finite_is_named(make, images, value):
    network = make("residual")
    with torch.no_grad():
        network.head.weight[0, 0] = value
    with pytest.raises(FloatingPointError, match="head"):
        of(network, images)


def test_no_hook_is_left_behind_when_the_network_raises(make, images):
    network = make("residual")
    with pytest.raises(RuntimeError):
        of(network, images[:, :1])
    assert not any(module._forward_pre_hooks for module in network.modules())


def taken(count: int, budget: Budget, batch: int, width: int = 4) -> list[int]:
    """Which of ``count`` images a linear layer takes in, one row an image, all rows told apart."""
    images = torch.zeros(count, width)
    images[:, 0] = 1
    seen = []
    for one in range(count):
        images[one, 0] = 2
        moments = input_moments(layer := nn.Linear(width, 2), [Layer("", layer)], images.split(batch), budget)[""]
        seen += [one] * int(moments.total[0, 0] - moments.count)
        images[one, 0] = 1
    return seen


@pytest.fixture
def few(monkeypatch):
    """A budget may go down to 3 images."""
    monkeypatch.setattr(of_moments, "FEWEST", 3)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(1, 4), (2, 8), (5, 20), (100, 40)],
)
def test_a_budget_of_rows_is_a_multiple_of_the_width(few, rows, expected):
    assert len(taken(40, Budget(rows, 40), batch=40)) == expected


@pytest.mark.parametrize(("count", "rows"), [(40, 1), (41, 2), (17, 3), (30, 7), (9, 1)])
def test_a_budget_takes_images_that_are_evenly_spread_whatever_the_batches(few, count, rows):
    which = taken(count, Budget(rows, count), batch=count)
    gaps = {b - a for a, b in pairwise(which)}
    assert max(gaps) - min(gaps) <= 1
    assert which[0] <= max(gaps)
    assert count - which[-1] <= max(gaps)
    for batch in (1, 7):
        assert taken(count, Budget(rows, count), batch) == which


def test_a_budget_counts_patches_of_a_convolution_and_tokens_of_a_linear_layer(few, generator):
    conv, fc = nn.Conv2d(2, 3, 2), nn.Linear(9, 2)
    network = nn.Sequential(conv, nn.Flatten(2), fc)  # 9 patches of width 8; 3 tokens of width 9
    images = torch.randn(60, 2, 4, 4, generator=generator)
    layers = [Layer("conv", conv), Layer("fc", fc)]
    moments = input_moments(network, layers, images.split(7), Budget(9, 60))
    assert moments["conv"].count == 8 * 9  # 8 images give the 72 rows
    assert moments["fc"].count == 27 * 3  # 27 images give the 81 rows


@pytest.mark.parametrize("name", ["residual", "resnet20", "vit", "shared"])
def test_a_budget_of_more_than_comes_changes_nothing(make, images, name):
    network = make(name)
    layers = countable(network).layers
    whole = input_moments(network, layers, images.split(32))
    budgeted = input_moments(network, layers, images.split(32), Budget(10**6, len(images)))
    for layer, moments in whole.items():
        assert budgeted[layer].count == moments.count
        assert torch.equal(budgeted[layer].products, moments.products)
        assert torch.equal(budgeted[layer].total, moments.total)


@pytest.mark.parametrize("images", [100, 256, 282, 300, 1000, 2964])
def test_no_budget_goes_below_the_fewest_images(images, generator):
    rows = torch.randn(images, 2, generator=generator)
    layer = nn.Linear(2, 2)
    moments = input_moments(layer, [Layer("", layer)], rows.split(64), Budget(1, images))[""]
    assert moments.count == min(images, FEWEST)


def test_a_budget_takes_the_moments_of_the_images_that_it_takes(few, generator):
    network = nn.Conv2d(2, 3, 3, padding=1)
    images = torch.randn(20, 2, 6, 6, generator=generator)
    layer = Layer("conv", network)
    budgeted = input_moments(network, [layer], images.split(6), Budget(10, 20))["conv"]  # 180 rows: 5 of 20 images
    some = input_moments(network, [layer], [images[3::4]])["conv"]
    assert budgeted.count == some.count == 180
    torch.testing.assert_close(budgeted.products, some.products, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("kind", [{}, {"stride": 3}, {"groups": 2}], ids=["overlapping", "patchify", "grouped"])
def test_a_batch_of_which_the_budget_takes_no_image_adds_nothing(few, kind, generator):
    network = nn.Conv2d(2, 4, 3, **kind)
    images = torch.randn(20, 2, 9, 9, generator=generator)
    layer, budget = Layer("conv", network), Budget(1, 20)
    whole = input_moments(network, [layer], [images], budget)["conv"]
    single = input_moments(network, [layer], images.split(1), budget)["conv"]
    assert whole.count == single.count < 20 * layer.row_count(images[:1])
    torch.testing.assert_close(single.products, whole.products, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_with_a_budget_too_values_that_are_not_finite_name_the_layer(make, images, few, value):
    network = make("residual")
    with torch.no_grad():
        network.conv1.weight[0, 0, 0, 0] = value
    with pytest.raises(FloatingPointError, match=r"layer conv2 received values that are not finite"):
        input_moments(network, countable(network).layers, images.split(20), Budget(1, len(images)))


def test_moments_survive_the_disk_form(make, images):
    moments = of(make("residual"), images)
    again = from_tensors(to_tensors(moments))
    assert again.keys() == moments.keys()
    for name, moment in moments.items():
        assert again[name].count == moment.count
        assert torch.equal(again[name].products, moment.products)
        assert torch.equal(again[name].total, moment.total)
