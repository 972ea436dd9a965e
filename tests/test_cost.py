import copy

import pytest
import torch
from torch import nn

from utilized_rank.compression.pairs import pair, substitute
from utilized_rank.networks import cost
from utilized_rank.training import models
from utilized_rank.training.sections import Model


def conv(c_in: int, c_out: int, kernel: int, side: int) -> int:
    """FLOPs of a convolution that gives maps of side x side: two for each weight and position."""
    return 2 * c_in * c_out * kernel**2 * side**2


def linear(m: int, n: int, rows: int = 1) -> int:
    return 2 * m * n * rows


def attention(tokens: int, dim: int) -> int:
    """q k^T and its product with v: tokens x tokens x dim each, over all heads together."""
    return 2 * (2 * tokens * tokens * dim)


def flops(network: nn.Module, *shape: int) -> int:
    return cost.flops(network, torch.zeros(1, *shape))


def test_vgg11_by_hand():
    network = models.build(Model(architecture="vgg11"), (3, 32, 32), 10)
    expected = (
        conv(3, 64, 3, 32)
        + conv(64, 128, 3, 16)
        + conv(128, 256, 3, 8)
        + conv(256, 256, 3, 8)
        + conv(256, 512, 3, 4)
        + conv(512, 512, 3, 4)
        + 2 * conv(512, 512, 3, 2)
        + linear(512, 10)
    )
    assert flops(network, 3, 32, 32) == expected


def test_resnet20_by_hand():
    network = models.build(Model(architecture="resnet20"), (3, 32, 32), 10)
    expected = (
        conv(3, 16, 3, 32)
        + 6 * conv(16, 16, 3, 32)
        + conv(16, 32, 3, 16)
        + 5 * conv(32, 32, 3, 16)
        + conv(32, 64, 3, 8)
        + 5 * conv(64, 64, 3, 8)
        + linear(64, 10)
    )
    assert flops(network, 3, 32, 32) == expected


def test_vit_by_hand_with_its_attention_products():
    dim, depth, tokens, classes = 24, 2, 1 + 16, 7
    model = Model(architecture="vit", dim=dim, depth=depth, heads=3, patch_size=8)
    network = models.build(model, (3, 32, 32), classes)
    block = (
        linear(dim, 3 * dim, tokens)
        + attention(tokens, dim)
        + linear(dim, dim, tokens)
        + linear(dim, 4 * dim, tokens)
        + linear(4 * dim, dim, tokens)
    )
    assert flops(network, 3, 32, 32) == conv(3, dim, 8, 4) + depth * block + linear(dim, classes)


@pytest.mark.parametrize("heads", [1, 4])
def test_multihead_attention_by_hand(heads):
    tokens, dim = 5, 8
    network = nn.TransformerEncoderLayer(dim, heads, dim_feedforward=16, batch_first=True)
    expected = (
        linear(dim, 3 * dim, tokens)
        + attention(tokens, dim)
        + linear(dim, dim, tokens)
        + linear(dim, 16, tokens)
        + linear(16, dim, tokens)
    )
    assert flops(network, tokens, dim) == expected


def test_groups_divide_the_work():
    assert flops(nn.Conv2d(4, 8, 3, groups=2), 4, 8, 8) == conv(4, 8, 3, 6) // 2


@pytest.mark.parametrize(("groups", "bias"), [(1, True), (2, False)])
def test_a_factorized_convolution_costs_its_two_layers(groups, bias):
    two = pair(nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=groups), "channel", 2, bias)
    inner = 2 * groups
    assert flops(two, 8, 8, 8) == (conv(8, inner, 3, 4) + conv(inner, 12, 1, 4)) // groups
    assert cost.parameters(two) == (8 * inner * 9 + inner * 12) // groups + 12 * bias


def test_a_factorized_linear_layer_costs_its_two_layers():
    two = pair(nn.Linear(20, 30), "channel", 3, bias=True)
    assert flops(two, 5, 20) == linear(20, 3, 5) + linear(3, 30, 5)
    assert cost.parameters(two) == 3 * (20 + 30) + 30


@pytest.mark.parametrize("name", ["resnet20", "vit"])
def test_factorizing_one_layer_changes_the_cost_by_the_difference(make, name):
    network = make(name)
    layer, positions = {"resnet20": ("layer2.1.conv1", 16), "vit": ("blocks.1.attn.qkv", 5)}[name]
    smaller = copy.deepcopy(network)
    own = network.get_submodule(layer)
    m, n = own.weight[0].numel(), len(own.weight)
    substitute(smaller, {layer: pair(own, "channel", 2, own.bias is not None)})
    saved = m * n - 2 * (m + n)
    assert cost.parameters(network) - cost.parameters(smaller) == saved
    assert flops(network, 3, 8, 8) - flops(smaller, 3, 8, 8) == 2 * saved * positions


def test_flops_of_a_part_are_those_of_its_products():
    inputs = torch.zeros(7, 4)
    two = nn.Linear(4, 3, bias=False), nn.Linear(4, 5)
    assert cost.flops_of(lambda x, y: two[0](x) + two[1](y).sum(), inputs, inputs[:2]) == (
        linear(4, 3, 7) + linear(4, 5, 2)
    )
    assert cost.flops_of(torch.relu, inputs) == 0


def test_flops_are_counted_in_inference_mode_too(make, images):
    network = make("vit")
    expected = cost.flops_of(network, images[:2])
    assert expected == 2 * cost.flops(network, images[:1])
    with torch.inference_mode():
        assert cost.flops_of(network, images[:2]) == expected


def test_latency_is_one_positive_time_a_module_and_leaves_them_as_they_are():
    calls = {"a": 0, "b": 0, "c": 0}

    class Counted(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert torch.is_inference_mode_enabled()
            assert torch.equal(x, inputs)
            calls[self.name] += 1
            return x + 1

    inputs = torch.zeros(3, 2)
    times = cost.latencies([Counted(name) for name in calls], inputs, seconds=0)
    assert len(times) == 3
    assert all(isinstance(time, float) and time > 0 for time in times)
    assert len(set(calls.values())) == 1  # they take turns
    assert calls["a"] >= 4


def test_parameters_are_all_of_them_without_buffers_and_each_once():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 6, bias=False))
    assert cost.parameters(network) == (3 * 9 * 4 + 4) + 2 * 4 + 30
    shared = nn.Linear(5, 5)
    assert cost.parameters(nn.Sequential(shared, shared)) == 30


def test_counting_changes_neither_weights_nor_the_settings_of_torch(make, images):
    network = make("vit")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    cost.flops(network, images[:1])
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
