"""Layers fitted front to back to what the original gives, from what the layers before them now give."""

import copy
import operator
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import LayerScale
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from utilized_rank.compression.compensation import Compensation, Pairs, _solved, residual
from utilized_rank.compression.lowrank import Channel, Fit, Target, optimal
from utilized_rank.compression.pairs import factorized, substitute
from utilized_rank.networks.suffix import FEW, Traced
from utilized_rank.ranks.layers import Layer, countable
from utilized_rank.ranks.moments import input_moments
from utilized_rank.ranks.projection import bases, replaced

PLENTY = 64


def rows_of(layer: Layer, outputs: Tensor) -> Tensor:
    """What a module gives, as the rows t: (g, N, n), float64."""
    outputs = outputs if isinstance(layer.module, nn.Linear) else outputs.permute(0, 2, 3, 1)
    return outputs.double().reshape(-1, layer.groups, layer.n).transpose(0, 1)


def pairs_of(layer: Layer, inputs: Tensor, outputs: Tensor, size: int = 2) -> Pairs:
    pairs = Pairs(layer)
    for batch in zip(inputs.split(size), outputs.split(size), strict=True):
        pairs.add(*batch)
    return pairs


def amount_of(fit: Fit, ridge: float) -> Tensor:
    """The a of a fit: (g, 1, 1)."""
    return ridge * fit.moment.diagonal(0, 1, 2).mean(-1)[:, None, None]


def assert_pairs_are_of_the_rows(layer: Layer, inputs: Tensor, outputs: Tensor, ridge: float = 0.5) -> None:
    """Means, covariance C of s, and that of s and t, which is K = (C + a I) M - a W."""
    fit = pairs_of(layer, inputs, outputs).fit(ridge)
    s, t = layer.rows(inputs).double(), rows_of(layer, outputs)
    amount, identity = amount_of(fit, ridge), torch.eye(layer.m, dtype=torch.float64)
    cross = (fit.moment + amount * identity) @ fit.matrix - amount * layer.weight().double()
    centred = s - s.mean(1, keepdim=True)
    torch.testing.assert_close(fit.inputs, s.mean(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(fit.outputs, t.mean(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(fit.moment, centred.mT @ centred / s.shape[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(cross, centred.mT @ t / s.shape[1], rtol=0, atol=1e-5)


def test_pairs_of_a_convolution_are_of_its_patches(convolution, maps, generator):
    """Whatever the outputs are: here they have nothing to do with the inputs."""
    outputs = torch.randn(convolution(maps).shape, generator=generator)
    assert_pairs_are_of_the_rows(Layer("conv", convolution), maps, outputs)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (3, 4, 6)], ids=["rows", "tokens", "channels last"])
def test_pairs_of_a_linear_layer_are_of_its_tokens(shape, generator):
    inputs = torch.randn(9, *shape, generator=generator) + 0.5
    outputs = torch.randn(9, *shape[:-1], 7, generator=generator)
    assert_pairs_are_of_the_rows(Layer("fc", nn.Linear(6, 7)), inputs, outputs)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_of_what_the_layer_computes_anyway_the_fit_is_its_weight(convolution, maps, shift):
    """Beside a constant, which is the bias's affair."""
    layer = Layer("conv", convolution)
    with torch.no_grad():
        fit = pairs_of(layer, maps, convolution(maps) + shift).fit()
    torch.testing.assert_close(fit.matrix, layer.weight().double(), rtol=0, atol=1e-5)


def loss_of(fit: Fit, matrix: Tensor, bias: Tensor, s: Tensor, t: Tensor, ridge: float) -> float:
    """E||t - s M - b||^2 + a ||M - W||_F^2, over all groups."""
    off = (t - s @ matrix - bias.unsqueeze(1)).square().sum(-1).mean(1)
    towards = amount_of(fit, ridge).flatten() * (matrix - fit.layer.weight()).square().sum((1, 2))
    return float((off + towards).sum())


@given(st.integers(0, 10_000), st.integers(1, 2), st.sampled_from([1e-2, 1.0]), st.integers(1, 8))
def test_the_fit_is_the_ridge_regression_towards_the_weight(seed, groups, ridge, images):
    """No other matrix and bias have less of E||t - s M - b||^2 + a ||M - W||_F^2."""
    torch.manual_seed(seed)
    layer = Layer("conv", nn.Conv2d(2 * groups, 3 * groups, (2, 1), groups=groups))
    inputs, outputs = torch.randn(images, 2 * groups, 3, 2) + 1, torch.randn(images, 3 * groups, 2, 2)
    fit = pairs_of(layer, inputs, outputs).fit(ridge)
    s, t = layer.rows(inputs).double(), rows_of(layer, outputs)
    bias = fit.added(fit.matrix)
    least = loss_of(fit, fit.matrix, bias, s, t, ridge)
    for size in (1.0, 1e-2):
        matrix = fit.matrix + size * torch.randn(fit.matrix.shape)
        assert loss_of(fit, matrix, fit.added(matrix), s, t, ridge) > least
        assert loss_of(fit, fit.matrix, bias + size * torch.randn(bias.shape), s, t, ridge) > least
    assert least <= loss_of(fit, layer.weight().double(), fit.added(layer.weight().double()), s, t, ridge) + 1e-6


@pytest.mark.parametrize("ridge", [1e-4, 1e4])
def test_the_ridge_draws_from_least_squares_to_the_weight(ridge, generator):
    torch.manual_seed(0)
    layer = Layer("fc", nn.Linear(4, 3))
    inputs, outputs = torch.randn(50, 4, generator=generator), torch.randn(50, 3, generator=generator)
    fit = pairs_of(layer, inputs, outputs, 50).fit(ridge)
    s = (inputs - inputs.mean(0)).double()
    alone = torch.linalg.lstsq(s, outputs.double()).solution
    expected = alone if ridge < 1 else layer.weight()[0].double()
    torch.testing.assert_close(fit.matrix[0], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_from_inputs_that_never_vary_there_is_nothing_to_fit(value):
    """The weight stays, and the bias alone gives the wanted mean."""
    layer = Layer("fc", nn.Linear(4, 3))
    outputs = torch.randn(50, 3)
    fit = pairs_of(layer, torch.full((50, 4), value), outputs).fit()
    torch.testing.assert_close(fit.matrix, layer.weight().double())
    means = value * fit.matrix.sum(1) + fit.added(fit.matrix)
    torch.testing.assert_close(means[0], outputs.double().mean(0), rtol=0, atol=1e-6)


def compensation_of(network: nn.Module, small: nn.Module, images: Tensor, memory: int = PLENTY) -> Compensation:
    return Compensation(network, small, images, memory, batch_size=30)


def layers_of(network: nn.Module) -> dict[str, Layer]:
    return {layer.name: layer for layer in countable(network).layers}


class ChannelsLast(nn.Module):
    """Linear layers on (B, H, W, C), with a shortcut, as in Swin transformers; H is as large as C."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc1, self.fc2, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.scale = LayerScale(8, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.permute(0, 2, 3, 1)).relu()  # (B, H, W, C)
        x = x + self.scale(self.fc2(self.fc1(x).relu()))
        return self.head(x.relu().mean((1, 2)))


@pytest.fixture
def built(make) -> Callable[[str], nn.Module]:
    """A network of the fixture ``make``, or "channels_last"."""

    def named(name: str) -> nn.Module:
        torch.manual_seed(0)
        if name != "channels_last":
            return make(name)
        network = ChannelsLast()
        nn.init.uniform_(network.scale.gamma, 0.2, 1)
        return network.eval()

    return named


def assert_same_fit(fit: Fit, expected: Fit) -> None:
    """To the accuracy of sums of float32: moments by their size, matrices by the size of the outputs."""
    for name in ("moment", "inputs", "outputs"):
        its, other = getattr(fit, name), getattr(expected, name)
        torch.testing.assert_close(its, other, rtol=0, atol=1e-5 * float(1 + other.abs().max()))
    norm = expected.moment + amount_of(expected, 1e-2) * torch.eye(fit.layer.m, dtype=torch.float64)
    off, whole = (float((its * (norm @ its)).sum()) for its in (fit.matrix - expected.matrix, expected.matrix))
    assert off <= (1e-4) ** 2 * (whole + float(expected.outputs.square().sum()))


NETWORKS = ["residual", "resnet20", "vit", "vgg11", "in_place_on_shortcut", "data_dependent", "shared", "channels_last"]


@pytest.mark.parametrize("name", NETWORKS)
def test_where_nothing_was_replaced_a_layer_should_become_itself(built, images, name):
    """The same as the optimum's fit on moments of the same images."""
    network = built(name)
    compensation = compensation_of(network, copy.deepcopy(network), images)
    layers = layers_of(network)
    moments = input_moments(network, list(layers.values()), images.split(30))
    for layer in layers.values():
        its = moments[layer.name]
        target = Target(layer, its, *bases(layer, its), layer.m, layer.n)
        assert_same_fit(compensation.fit(layer), optimal(target))


def cut_one(network: nn.Module, images: Tensor, name: str, rank: int) -> nn.Module:
    """A copy of the network whose layer ``name`` has a lower rank."""
    small = copy.deepcopy(network)
    layer = layers_of(network)[name]
    fit = compensation_of(network, small, images).fit(layer)
    substitute(small, {name: factorized(layer, Channel(fit).factors(rank))})
    return small


@torch.no_grad()
def received(network: nn.Module, name: str, images: Tensor) -> Tensor:
    """What flows into a layer, its calls one after the other."""
    seen: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    network(images)
    handle.remove()
    return torch.cat(seen)


LATER = [
    ("residual", "stem", "conv1"),
    ("resnet20", "conv1", "layer1.0.conv1"),
    ("resnet20", "layer1.0.conv1", "layer3.0.conv1"),
    ("vgg11", "vgg.features.0", "vgg.features.4"),
    ("vit", "patch_embed.proj", "blocks.0.attn.qkv"),
    ("vit", "blocks.0.mlp.fc1", "head"),
    ("channels_last", "stem", "fc1"),
    ("data_dependent", "stem", "conv2"),
    ("shared", "stem", "block"),
    ("in_place_on_shortcut", "stem", "conv1"),
]


@pytest.mark.parametrize(("name", "earlier", "later"), LATER)
def test_a_layer_makes_up_for_an_earlier_one(built, images, name, earlier, later):
    """Its outputs from what now flows in are closer to the original's than by its own weight."""
    network = built(name)
    small = cut_one(network, images, earlier, 2)
    layer = layers_of(network)[later]
    fit = compensation_of(network, small, images).fit(layer)
    before, now = received(network, later, images), received(small, later, images)
    with torch.no_grad():
        wanted = rows_of(layer, layer.module(before))
        by_itself = rows_of(layer, layer.module(now))
    own = 0 if layer.module.bias is None else layer.module.bias.detach().view(layer.groups, 1, layer.n)
    fitted = layer.rows(now).double() @ fit.matrix + fit.added(fit.matrix).unsqueeze(1) + own
    assert float((fitted - wanted).square().mean()) < 0.98 * float((by_itself - wanted).square().mean())
    # And as close as a ridge regression on all rows at once, explicitly.
    direct = pairs_of(layer, now, wanted_of(layer, before), len(now)).fit()
    assert_same_fit(fit, direct)


@torch.no_grad()
def wanted_of(layer: Layer, inputs: Tensor) -> Tensor:
    """What a layer makes of ``inputs``, without its bias."""
    with replaced({layer: layer.weight()}, {} if layer.module.bias is None else {layer: 0 * layer.module.bias}):
        return layer.module(inputs)


def test_layers_are_replaced_and_fitted_in_turn(make, images):
    """By one compensation, which carries forward what flows: as by a new one for each layer, and better than alone."""
    network = make("resnet20")
    small, alone = copy.deepcopy(network), copy.deepcopy(network)
    compensation = compensation_of(network, small, images)
    untouched = compensation_of(network, copy.deepcopy(network), images)
    for layer in list(layers_of(network).values())[:9]:
        fit = compensation.fit(layer)
        assert_same_fit(fit, compensation_of(network, small, images).fit(layer))
        rank = max(1, layer.width // 2)
        substitute(small, {layer.name: factorized(layer, Channel(fit).factors(rank))})
        substitute(alone, {layer.name: factorized(layer, Channel(untouched.fit(layer)).factors(rank))})
    with torch.no_grad():
        expected = network(images)
        error, without = (float((its(images) - expected).square().mean()) for its in (small, alone))
    assert error < without


def images_through(layers: dict[str, Layer]) -> dict[str, int]:
    """How many images each layer has been called with since; it grows."""
    seen = dict.fromkeys(layers, 0)

    def count(name: str, inputs: Tensor) -> None:
        seen[name] += len(inputs)

    for name, layer in layers.items():
        layer.module.register_forward_pre_hook(lambda _, args, name=name: count(name, args[0]))
    return seen


def build(network: nn.Module, small: nn.Module, images: Tensor, memory: int) -> int:
    """Replace all layers but the last one in turn; how many there are."""
    compensation = compensation_of(network, small, images, memory)
    *others, last = layers_of(network).values()
    for layer in others:
        factors = Channel(compensation.fit(layer)).factors(max(1, layer.width // 4))
        substitute(small, {layer.name: factorized(layer, factors)})
    compensation.fit(last)
    return len(others) + 1


@pytest.mark.parametrize("name", ["resnet20", "vgg11", "channels_last", "vit"])
def test_in_one_build_every_image_passes_every_layer_of_the_original_once(built, images, name):
    """However many layers are replaced; and a few images twice, which show whether it can be run in parts."""
    network = built(name)
    small, seen = copy.deepcopy(network), images_through(layers_of(network))
    build(network, small, images, PLENTY)
    assert max(seen.values()) <= len(images) + 2 * FEW


def convolutions(run: Callable[[], object]) -> int:
    """FLOPs of convolutions forward, not of their gradients, which the sums of products are."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_flop_counts()["Global"][torch.ops.aten.convolution]


@pytest.mark.parametrize("name", ["resnet20", "vgg11"])
def test_a_build_costs_a_pass_of_either_network_and_one_of_what_they_differ_by(built, images, name):
    """That is three in all, beside the products of the statistics."""
    network = built(name)
    small = copy.deepcopy(network)
    whole = convolutions(lambda: network(images))
    cost = convolutions(lambda: build(network, small, images, PLENTY))
    few = 4 * FEW / len(images) * whole
    assert cost <= 2 * whole + convolutions(lambda: small(images)) + few


@pytest.mark.parametrize("name", ["residual", "vgg11", "vit"])
def test_where_nothing_can_be_kept_images_pass_once_a_layer(built, images, name):
    """In the original; what is behind a layer is not computed."""
    network = built(name)
    small, seen = copy.deepcopy(network), images_through(layers_of(network))
    count = build(network, small, images, 0)
    assert list(seen.values()) == [len(images) * (count - 1 - i) + 2 * FEW for i in range(count)]


@pytest.mark.parametrize("name", ["resnet20", "vit", "data_dependent"])
def test_as_long_as_the_networks_are_the_same_only_one_is_run(built, images, name):
    network = built(name)
    small = copy.deepcopy(network)
    first, second, third = list(layers_of(network).values())[:3]
    seen = images_through(layers_of(small))
    compensation = compensation_of(network, small, images)
    for layer in (first, second):
        torch.testing.assert_close(compensation.fit(layer).matrix, layer.weight().double(), rtol=0, atol=0)
    assert not any(seen.values())
    with torch.no_grad():
        small.get_submodule(second.name).weight.mul_(0.9)
    fit = compensation.fit(third)
    assert seen[second.name] > 0
    assert_same_fit(fit, compensation_of(network, small, images).fit(third))


def test_a_system_that_is_not_positive_definite_is_solved_all_the_same(generator):
    """Moments in float32 can leave directions that hardly vary below zero."""
    matrix = torch.diag(torch.tensor([2.0, 1.0, -0.1], dtype=torch.float64)).expand(2, 3, 3)
    right = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(matrix @ _solved(matrix, right), right)


def sum_of(node: fx.Node) -> fx.Node:
    """The first addition behind a node."""
    while node.target not in (operator.add, operator.iadd):
        (node,) = node.users
    return node


BRANCHES = [
    ("residual", "stem", "conv2"),
    ("resnet20", "conv1", "layer1.0.conv2"),
    ("resnet20", "conv1", "layer2.0.conv2"),
    ("vit", "patch_embed.proj", "blocks.0.attn.proj"),
    ("vit", "patch_embed.proj", "blocks.0.mlp.fc2"),
    ("channels_last", "stem", "fc2"),
]


@pytest.mark.parametrize(("name", "earlier", "later"), BRANCHES)
def test_a_residual_branch_makes_up_for_its_shortcut(built, images, name, earlier, later):
    """The sum is closer to the original's than by a fit to the branch alone."""
    network = built(name)
    small = cut_one(network, images, earlier, 2)
    layer, traced = layers_of(network)[later], Traced(network)
    inside = Layer(later, small.get_submodule(later))

    @torch.no_grad()
    def summed(network: nn.Module) -> Tensor:
        run = traced.through(network).between(traced.images(), [sum_of(traced.node(later))])
        return run(*traced.arguments(images))[0]

    def error(fit: Fit) -> float:
        bias = fit.added(fit.matrix).reshape(-1)
        bias = bias if inside.module.bias is None else bias + inside.module.bias.detach()
        with replaced({inside: fit.matrix}, {inside: bias}):
            return float((summed(small) - summed(network)).square().mean())

    both = compensation_of(network, small, images).fit(layer)
    wanted = wanted_of(layer, received(network, later, images))
    branch = pairs_of(layer, received(small, later, images), wanted, len(wanted)).fit()
    assert error(both) < 0.999 * error(branch)


class Branch(nn.Module):
    """A layer, and what ``run`` makes of it and the input."""

    def __init__(self, run: Callable[["Branch", Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 6)
        self.bn, self.plain, self.unsettled = (
            nn.BatchNorm2d(6),
            nn.BatchNorm2d(6, affine=False),
            nn.BatchNorm2d(6, track_running_stats=False),
        )
        for norm in (self.bn, self.plain):
            nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(self.bn.weight)
        self.gamma, self.gains, self.scale = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6, 1, 1)), None
        self.layer_scale, self.in_place = LayerScale(6, 0.3), LayerScale(6, 0.3, inplace=True)
        self.dropout, self.identity = nn.Dropout(), nn.Identity()
        self.run = run
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def added_in_place(net: Branch, x: Tensor) -> Tensor:
    out = net.conv(x)
    out += x
    return out


def used_twice(net: Branch, x: Tensor) -> Tensor:
    out = net.conv(x)
    return (out + x).mean() + out.mean()


def depends(net: Branch, x: Tensor) -> Tensor:
    out = net.bn(net.conv(x))
    return out + net.dropout(out)


SUMS: dict[str, tuple[str, Callable[[Branch, Tensor], Tensor], Callable[[Branch], Tensor]]] = {
    "plain": ("conv", lambda net, x: net.conv(x) + x, lambda net: torch.ones(1)),
    "shortcut first": ("conv", lambda net, x: x + net.conv(x), lambda net: torch.ones(1)),
    "torch.add": ("conv", lambda net, x: torch.add(net.conv(x), x), lambda net: torch.ones(1)),
    "in place": ("conv", added_in_place, lambda net: torch.ones(1)),
    "dropout": ("conv", lambda net, x: net.identity(net.dropout(net.conv(x))) + x, lambda net: torch.ones(1)),
    "batch norm": (
        "conv",
        lambda net, x: net.bn(net.conv(x)) + x,
        lambda net: net.bn.weight / (net.bn.running_var + 1e-5).sqrt(),
    ),
    "batch norm without weight": (
        "conv",
        lambda net, x: x + net.plain(net.conv(x)),
        lambda net: 1 / (net.plain.running_var + 1e-5).sqrt(),
    ),
    "gain": ("fc", lambda net, x: net.fc(x) * net.gamma + x, lambda net: net.gamma),
    "gain first": ("fc", lambda net, x: torch.mul(net.gamma, net.fc(x)) + x, lambda net: net.gamma),
    "layer scale": ("fc", lambda net, x: x + net.layer_scale(net.fc(x)), lambda net: net.layer_scale.gamma),
    "two gains": (
        "fc",
        lambda net, x: x + net.layer_scale(net.fc(x) * net.gamma),
        lambda net: net.gamma * net.layer_scale.gamma,
    ),
}


@pytest.mark.parametrize(("name", "run", "scale"), SUMS.values(), ids=SUMS.keys())
def test_the_sum_that_a_branch_enters_is_found_with_its_scale(name, run, scale):
    """By it an error of the layer is an error of the sum, which the other value does not depend on."""
    network = Branch(run)
    traced = Traced(network)
    into = residual(traced, traced.node(name))
    assert into is not None
    assert into.other is traced.images()[0]
    torch.testing.assert_close(into.scale, scale(network).detach())
    layer, images = Layer(name, network.get_submodule(name)), torch.randn(2, 6, 6, 6)
    change = torch.arange(1.0, 7)
    with torch.no_grad():
        before = network(images.clone())
        with replaced({layer: layer.weight()}, {layer: layer.module.bias.detach() + change}):
            after = network(images.clone())
    by_channel = (after - before).mean((0, 2, 3) if name == "conv" else (0, 1, 2))
    torch.testing.assert_close(by_channel, into.scale * change, rtol=0, atol=1e-5)


NO_SUMS: dict[str, tuple[str, Callable[[Branch, Tensor], Tensor]]] = {
    "no sum": ("conv", lambda net, x: net.bn(net.conv(x))),
    "nonlinearity": ("conv", lambda net, x: net.conv(x).relu() + x),
    "another layer": ("conv", lambda net, x: net.fc(net.conv(x)) + x),
    "used twice": ("conv", used_twice),
    "added to itself": ("conv", lambda net, x: operator.add(*2 * [net.conv(x)])),
    "other depends on it": ("conv", depends),
    "a number is added": ("conv", lambda net, x: net.conv(x) + 1),
    "gain of the data": ("conv", lambda net, x: net.conv(x) * x.mean() + x),
    "batch norm by the batch": ("conv", lambda net, x: net.unsettled(net.conv(x)) + x),
    "gain of another shape": ("conv", lambda net, x: net.conv(x) * net.gains + x),
    "the other is scaled": ("conv", lambda net, x: torch.add(net.conv(x), x, alpha=2)),
    "subtracted": ("conv", lambda net, x: x - net.conv(x)),
}


@pytest.mark.parametrize(("name", "run"), NO_SUMS.values(), ids=NO_SUMS.keys())
def test_elsewhere_there_is_no_sum(name, run):
    traced = Traced(Branch(run))
    assert residual(traced, traced.node(name)) is None


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("residual", {"conv2"}),
        ("in_place", {"conv2"}),
        ("in_place_on_shortcut", {"conv2"}),
        ("vgg11", set()),
        ("resnet20", {f"layer{i}.{j}.conv2" for i in (1, 2, 3) for j in range(3)}),
        ("vit", {f"blocks.{i}.{j}" for i in (0, 1) for j in ("attn.proj", "mlp.fc2")}),
    ],
)
def test_the_branches_of_networks_are_found(make, name, found):
    network = make(name)
    traced = Traced(network)
    assert {layer for layer in layers_of(network) if residual(traced, traced.node(layer))} == found


def test_channels_that_hardly_reach_the_sum_are_not_blown_up(images):
    """By a batch norm that is all but switched off: there is next to nothing to make up with."""
    torch.manual_seed(0)
    network = FaintBranch().eval()
    small = copy.deepcopy(network)
    with torch.no_grad():
        small.stem.weight += 0.1 * torch.randn(small.stem.weight.shape)
    layer = Layer("conv", network.conv)
    fit = compensation_of(network, small, images).fit(layer)
    assert float((fit.matrix - layer.weight()).abs().max()) < 5


class FaintBranch(nn.Module):
    """A residual branch with one channel that is scaled by 1e-6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.bn = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        nn.init.constant_(self.bn.weight[0], 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.bn(self.conv(x))


class Context(nn.Module):
    """One value a channel and image is added at all places, as in global context blocks; or the same for all images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, 5)
        self.place = nn.Parameter(torch.randn(1, 6, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = (self.stem(x) + self.place).relu()
        x = x + self.conv(x.mean((2, 3), keepdim=True))
        return self.head(x.relu().mean((2, 3)))


def test_what_is_added_in_another_shape_is_left_out_of_account(images):
    torch.manual_seed(0)
    network = Context().eval()
    small = cut_one(network, images, "stem", 2)
    compensation = compensation_of(network, small, images)
    for name, layer in layers_of(network).items():
        before, now = received(network, name, images), received(small, name, images) if name != "stem" else images
        assert_same_fit(compensation.fit(layer), pairs_of(layer, now, wanted_of(layer, before), len(now)).fit())


CHANGED = [
    ("residual", "stem"),
    ("in_place", "stem"),
    ("in_place_on_shortcut", "stem"),
    ("data_dependent", "stem"),
    ("shared", "stem"),
    ("vit", "patch_embed.proj"),
    ("channels_last", "stem"),
]


@pytest.mark.parametrize(("name", "earlier"), CHANGED)
def test_without_memory_the_fits_are_the_same(built, images, name, earlier):
    network = built(name)
    small = cut_one(network, images, earlier, 2)
    plenty, none = (compensation_of(network, small, images, memory) for memory in (PLENTY, 0))
    for layer in list(layers_of(network).values())[1:]:
        assert_same_fit(none.fit(layer), plenty.fit(layer))


@pytest.mark.parametrize(("name", "earlier"), CHANGED)
def test_fitting_changes_neither_network(built, images, name, earlier):
    network = built(name)
    small = cut_one(network, images, earlier, 2)
    before = [copy.deepcopy(its.state_dict()) for its in (network, small)]
    compensation = compensation_of(network, small, images)
    fits = [compensation.fit(layer) for layer in layers_of(network).values()]
    for its, old in zip((network, small), before, strict=True):
        assert its.state_dict().keys() == old.keys()
        assert all(torch.equal(value, old[key]) for key, value in its.state_dict().items())
        assert not any(module._forward_pre_hooks for module in its.modules())
    assert all(torch.isfinite(fit.matrix).all() for fit in fits)
    assert all(parameter.requires_grad for parameter in network.parameters())
