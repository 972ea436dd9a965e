import math

import numpy as np
import pytest
import torch
from torch import nn

from utilized_rank.layers import Layer, countable
from utilized_rank.moments import Moments, from_tensors, input_moments, to_tensors
from utilized_rank.subspaces import energy_rank, output_moment, principal


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
        assert energy_rank(principal(moments.second).values, 1 - 1e-7) == 36


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


def test_moments_survive_the_disk_form(make, images):
    moments = of(make("residual"), images)
    again = from_tensors(to_tensors(moments))
    assert again.keys() == moments.keys()
    for name, moment in moments.items():
        assert again[name].count == moment.count
        assert torch.equal(again[name].products, moment.products)
        assert torch.equal(again[name].total, moment.total)
