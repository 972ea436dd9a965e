import numpy as np
import pytest
import torch
from torch import nn

from utilized_rank.ranks.layers import Layer, countable


def test_rows_of_a_convolution_are_its_patches(convolution, maps, patches_by_loop):
    rows = Layer("conv", convolution).rows(maps)
    np.testing.assert_array_equal(rows.numpy(), patches_by_loop(convolution, maps).astype(np.float32))


def test_a_convolution_is_its_weight_matrix_on_its_patches(convolution, maps):
    layer = Layer("conv", convolution)
    outputs = convolution(maps)
    product = layer.rows(maps) @ layer.weight()  # (g, N, n)
    image = product.permute(1, 0, 2).reshape(len(maps), *outputs.shape[2:], -1).permute(0, 3, 1, 2)
    bias = 0 if convolution.bias is None else convolution.bias[:, None, None]
    torch.testing.assert_close(image + bias, outputs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (2, 2, 3, 6)])
def test_a_linear_layer_is_its_weight_matrix_on_its_rows(shape, generator):
    layer = Layer("fc", nn.Linear(6, 4))
    inputs = torch.randn(shape, generator=generator)
    product = layer.rows(inputs) @ layer.weight()
    assert product.shape[0] == 1
    torch.testing.assert_close(
        (product[0] + layer.module.bias).view(*shape[:-1], 4), layer.module(inputs), rtol=0, atol=1e-6
    )


def test_widths_are_those_of_a_group(convolution):
    layer = Layer("conv", convolution)
    kernel = convolution.kernel_size[0] * convolution.kernel_size[1]
    assert (layer.groups, layer.m, layer.n) == (
        convolution.groups,
        4 // convolution.groups * kernel,
        8 // convolution.groups,
    )
    assert layer.width == min(layer.m, layer.n)
    assert layer.weight().shape == (layer.groups, layer.m, layer.n)


class Padding(nn.Conv2d):
    """Pads by itself, as timm's Conv2dSame does."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


class Named(nn.Linear):
    """Computes what its class does."""


def test_what_computes_something_else_than_its_class_is_left_out_and_says_so():
    found = countable(nn.Sequential(Padding(3, 4, 3), nn.Flatten(), Named(8, 2)))
    assert [layer.name for layer in found.layers] == ["2"]
    assert found.left_out == {"0": "Padding: computes something else than its class of torch.nn"}


def test_a_weight_goes_out_as_a_matrix_and_comes_back(convolution):
    convolution.to(memory_format=torch.channels_last)
    layer = Layer("conv", convolution)
    stored = layer.weight_from(layer.weight().double())
    assert torch.equal(stored, convolution.weight)
    assert stored.dtype == convolution.weight.dtype
    assert stored.stride() == convolution.weight.stride()
    assert stored.data_ptr() != convolution.weight.data_ptr()


def test_linear_layers_and_convolutions_count_in_the_order_of_definition(make):
    selection = countable(make("residual"))
    assert [layer.name for layer in selection.layers] == ["stem", "conv1", "conv2", "head"]
    assert selection.left_out == {}


def test_a_shared_module_counts_once(make):
    assert [layer.name for layer in countable(make("shared")).layers] == ["stem", "block", "head"]


def test_every_weighted_layer_of_a_vit_counts_and_qkv_is_one(make):
    names = [layer.name for layer in countable(make("vit")).layers]
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert names == ["patch_embed.proj", *(f"blocks.{i}.{name}" for i in (0, 1) for name in block), "head"]


def test_what_does_not_count_is_listed_with_its_reason():
    network = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv2d(1, 8, 3),
        nn.Conv1d(2, 2, 3),
        nn.ConvTranspose2d(2, 2, 3),
        nn.BatchNorm2d(4),
    )
    selection = countable(network)
    assert [layer.name for layer in selection.layers] == ["1", "2"]
    assert {name: reason.split(":")[0] for name, reason in selection.left_out.items()} == {
        "0": "depthwise convolution",
        "3": "Conv1d",
        "4": "ConvTranspose2d",
    }


def test_a_depthwise_convolution_with_two_outputs_a_group_counts_as_its_rank_can_be_two():
    assert [layer.width for layer in countable(nn.Conv2d(4, 8, 3, groups=4)).layers] == [2]


def test_a_projection_that_attention_never_calls_does_not_count():
    """nn.MultiheadAttention uses the weight of its out_proj directly: nothing is seen to flow in."""
    selection = countable(nn.TransformerEncoderLayer(8, 2, 16))
    assert [layer.name for layer in selection.layers] == ["linear1", "linear2"]
    assert "MultiheadAttention" in selection.left_out["self_attn"]
