import copy
from collections.abc import Callable
from itertools import islice, pairwise

import pytest
import torch
from torch import Tensor, nn

from utilized_rank.networks.devices import free_memory
from utilized_rank.networks.suffix import Suffix, Traced
from utilized_rank.ranks.layers import Layer, countable
from utilized_rank.ranks.projection import replaced

PLENTY = 2**40
NETWORKS = [
    "residual",
    "in_place",
    "in_place_on_shortcut",
    "data_dependent",
    "shared",
    "vgg11",
    "resnet20",
    "vit",
]


def random_weight(layer: Layer) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return layer.weight() * torch.rand(layer.weight().shape, generator=generator)


def assert_logits_are_the_networks(network: nn.Module, suffix: Suffix, layer: Layer) -> None:
    """With the layer as it is, with another weight, and with its own again."""
    for weight in (layer.weight(), random_weight(layer), layer.weight()):
        with torch.inference_mode(), replaced({layer: weight}):
            for index, batch in enumerate(suffix.batches):
                expected = network(suffix.images[batch])
                torch.testing.assert_close(suffix.logits(index), expected, rtol=1e-5, atol=1e-5)


def suffix_of(network: nn.Module, images: Tensor, size: int, budget: int = PLENTY) -> Suffix:
    """On batches of ``size`` images, in another order than theirs."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return Suffix(Traced(network), images, order.split(size), budget)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("budget", [0, 40_000, PLENTY])
def test_from_every_layer_on_the_logits_are_those_of_the_whole_network(make, images, name, budget):
    network = make(name)
    suffix = suffix_of(network, images, 20, budget)
    for layer in countable(network).layers:
        suffix.move_to(layer.name)
        assert_logits_are_the_networks(network, suffix, layer)


@pytest.mark.parametrize("name", ["residual", "resnet20", "vit"])
def test_layers_may_be_visited_in_any_order(make, images, name):
    network = make(name)
    suffix = suffix_of(network, images, 40)
    layers = countable(network).layers
    for layer in [layers[-1], layers[0], *layers[::-2], layers[1], layers[1]]:
        suffix.move_to(layer.name)
        assert_logits_are_the_networks(network, suffix, layer)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_but_data_dependent_control_flow_is_traced(make, name):
    assert Traced(make(name)).traced == (name != "data_dependent")


def calls_of(module: nn.Module) -> list[int]:
    """A list that grows with each call of a module."""
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(
    ("name", "first", "later"),
    [
        ("residual", "stem", "conv2"),
        ("in_place", "stem", "conv2"),
        ("vgg11", "vgg.features.0", "vgg.features.22"),
        ("resnet20", "layer1.0.conv1", "layer1.0.conv2"),
        ("vit", "patch_embed.proj", "blocks.1.attn.qkv"),
        ("shared", "stem", "head"),
    ],
)
def test_what_comes_before_the_layer_is_not_computed_again(make, images, name, first, later):
    network = make(name)
    suffix = suffix_of(network, images, 20)
    suffix.move_to(later)
    before, own = calls_of(network.get_submodule(first)), calls_of(network.get_submodule(later))
    with torch.inference_mode():
        for index in range(4):
            suffix.logits(index)
    assert (len(before), len(own)) == (0, 4)


def test_moving_on_starts_from_what_was_kept(make, images):
    network = make("resnet20")
    suffix = suffix_of(network, images, 10)
    suffix.move_to("layer1.0.conv1")
    calls = calls_of(network.conv1)
    suffix.move_to("layer3.2.conv1")
    assert not calls


@pytest.mark.parametrize(
    ("name", "tried"), [("residual", 0), ("in_place", 0), ("vit", 0), ("resnet20", 0), ("in_place_on_shortcut", 3)]
)
def test_where_what_is_changed_in_place_is_read_elsewhere_every_layer_is_tried(make, images, name, tried):
    """Elsewhere once is enough, at the first layer; each try runs the network, and the two parts of it."""
    network = make(name)
    layers = [layer.name for layer in countable(network).layers]
    suffix = suffix_of(network, images, 70)
    suffix.move_to(layers[0])
    calls = calls_of(network.get_submodule(layers[0]))
    for layer in layers[1:]:
        suffix.move_to(layer)
    assert len(calls) == 1 + 2 * tried


class WritesOnTheWay(nn.Module):
    """Two convolutions on the same input, and ``run`` on what they give."""

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.one, self.other = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.last, self.head, self.run = nn.Conv2d(4, 4, 1), nn.Linear(4, 3), run

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.run(self.one(x), self.other(x))
        return self.head(self.last(x).relu().mean((2, 3)))


def added_to_the_first(one: Tensor, other: Tensor) -> Tensor:
    return one.add_(other)


def changed_unseen(one: Tensor, other: Tensor) -> Tensor:
    one.mul_(2)
    return one + other


def changed_through_a_view(one: Tensor, other: Tensor) -> Tensor:
    changed = one.flatten(2).mul_(2)
    return one + other + changed.mean((1, 2), keepdim=True).unsqueeze(3)


def changed_after_it_was_read(one: Tensor, other: Tensor) -> Tensor:
    before = one.sigmoid()
    return one.add_(1) + other + before


WRITES = [added_to_the_first, changed_unseen, changed_through_a_view, changed_after_it_was_read]


@pytest.mark.parametrize("run", WRITES)
@pytest.mark.parametrize("budget", [20_000, PLENTY])
def test_what_is_changed_in_place_spoils_nothing(images, run, budget):
    network = WritesOnTheWay(run).eval()
    suffix = suffix_of(network, images, 20, budget)
    for layer in countable(network).layers:
        suffix.move_to(layer.name)
        assert_logits_are_the_networks(network, suffix, layer)


def test_changes_in_place_are_found_with_what_else_lies_in_the_same_memory(images):
    for run, names in ((added_to_the_first, {"one"}), (changed_through_a_view, {"one", "flatten"})):
        traced = Traced(WritesOnTheWay(run).eval())
        with torch.no_grad():
            logits, (write,) = traced.watched((images.clone(),))
            torch.testing.assert_close(logits, traced.network(images))
        assert {node.name for node in write.changed} == names
        assert write.alone == (run is added_to_the_first)


def test_batches_that_were_not_asked_for_are_computed_later(make, images):
    """Where a walk is given up, what was not carried forward is not taken for what it is not."""
    network = make("resnet20")
    suffix = suffix_of(network, images, 20)
    first, second, later = [countable(network).layers[i] for i in (2, 5, 9)]
    suffix.move_to(first.name)
    assert len(list(islice(suffix.flow(second.name), 2))) == 2
    assert_logits_are_the_networks(network, suffix, second)
    suffix.move_to(later.name)
    assert all(values is not None for values in suffix.kept)
    assert_logits_are_the_networks(network, suffix, later)


@pytest.mark.parametrize("name", ["shared", "data_dependent", "in_place_on_shortcut"])
def test_where_there_is_no_suffix_the_whole_network_runs(make, images, name):
    """A module called twice, control flow on values, a value changed after it was read."""
    network = make(name)
    suffix = suffix_of(network, images, 70)
    suffix.move_to("block" if name == "shared" else "conv1")
    calls = calls_of(network.stem)
    with torch.inference_mode():
        suffix.logits(0)
    assert len(calls) == 1


def kept_bytes(suffix: Suffix) -> int:
    kept = {v.data_ptr(): v for values in suffix.kept if values for v in values if isinstance(v, Tensor)}
    return sum(v.nbytes for v in kept.values())


@pytest.mark.parametrize("budget", [0, 20_000, 60_000, PLENTY])
def test_kept_values_stay_within_the_budget(make, images, budget):
    network = make("residual")
    suffix = suffix_of(network, images, 10, budget)
    for name in ("stem", "conv1", "conv2"):
        suffix.move_to(name)
        assert kept_bytes(suffix) <= budget
    whole = 2 * 10 * 8 * 8 * 8 * 4  # bytes a batch before conv2: the shortcut and its own input
    assert sum(values is not None for values in suffix.kept) == min(7, budget // whole)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("budget", [5_000, 50_000, 200_000])
def test_from_no_layer_on_is_more_kept_than_the_budget(make, images, name, budget):
    """The images themselves count where they are what is kept."""
    network = make(name)
    suffix = suffix_of(network, images, 10, budget)
    for layer in countable(network).layers:
        suffix.move_to(layer.name)
        assert kept_bytes(suffix) <= budget


def test_images_that_are_kept_count_in_the_budget(make, images):
    suffix = suffix_of(make("residual"), images, 10, 3 * 10 * 3 * 8 * 8 * 4)
    suffix.move_to("stem")
    assert [values is not None for values in suffix.kept] == [True] * 3 + [False] * 4


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("residual", ["stem", "conv1", "conv2", "head"]),
        ("vgg11", ["vgg.features.0", "vgg.features.4", "vgg.features.11", "vgg.features.22"]),
        ("resnet20", ["conv1", "layer1.0.conv1", "layer2.0.conv1", "layer3.2.conv2", "linear"]),
        ("vit", ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.mlp.fc2", "head"]),
    ],
)
def test_the_share_falls_from_the_first_layer_to_the_last(make, images, name, layers):
    suffix = suffix_of(make(name), images, 20)
    shares = []
    for layer in layers:
        suffix.move_to(layer)
        shares.append(suffix.share)
    assert shares[0] == pytest.approx(1)
    assert all(later < earlier for earlier, later in pairwise(shares))
    assert shares[-1] > 0


def test_the_share_by_hand(make, images):
    """Multiplications for each weight and pixel; the shortcut of conv2 costs nothing."""
    suffix = suffix_of(make("residual"), images, 35)
    stem, conv1, conv2, head = 8 * 27 * 64, 8 * 36 * 64, 8 * 72 * 64, 8 * 5
    suffix.move_to("conv2")
    assert suffix.share == pytest.approx((conv2 + head) / (stem + conv1 + conv2 + head))


def test_the_share_is_a_mean_over_batches_that_are_kept_and_others(make, images):
    network = make("residual")
    suffix = suffix_of(network, images, 35)
    suffix.move_to("conv2")
    half = suffix_of(network, images, 35, 2 * 35 * 8 * 8 * 8 * 4)  # the first of two batches, with its shortcut
    half.move_to("conv2")
    assert [values is not None for values in half.kept] == [True, False]
    assert half.share == pytest.approx((1 + suffix.share) / 2)


@pytest.mark.parametrize(
    ("name", "budget"),
    [("residual", 0), ("resnet20", 0), ("vit", 0), ("data_dependent", PLENTY)],
)
def test_where_nothing_is_kept_the_share_is_the_whole(make, images, name, budget):
    network = make(name)
    suffix = suffix_of(network, images, 20, budget)
    for layer in countable(network).layers:
        suffix.move_to(layer.name)
        assert suffix.share == 1
        assert not any(suffix.kept)


@pytest.mark.parametrize(
    ("name", "layer", "next_layer"), [("shared", "block", "head"), ("in_place_on_shortcut", "conv1", "conv2")]
)
def test_the_share_is_the_whole_at_a_layer_that_has_no_suffix_and_less_after_it(make, images, name, layer, next_layer):
    suffix = suffix_of(make(name), images, 20)
    suffix.move_to(layer)
    assert suffix.share == 1
    suffix.move_to(next_layer)
    assert suffix.share < 0.9


class DirectRead(nn.Module):
    """Reads a layer's weight beside calling it, as tied embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tied, self.head = nn.Linear(192, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        return self.head((x @ self.tied.weight).relu() + self.tied(x) @ self.tied.weight)


class MakesTensor(nn.Module):
    """Makes a tensor while it runs, which the tracer keeps as a constant, as Swin's masks and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(192, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.stem(x.flatten(1)) + torch.arange(6.0)).relu() * torch.tensor([2.0]))


def test_constants_of_the_graph_are_left_on_no_network_and_serve_a_copy_too(images):
    torch.manual_seed(0)
    network = MakesTensor().eval()
    before = set(vars(network))
    traced = Traced(network)
    assert traced.constants
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.stem.weight.mul_(2)
    for its in (network, other):
        suffix = Suffix(traced.through(its), images, torch.arange(len(images)).split(64), 2**30)
        for layer in countable(its).layers:
            suffix.move_to(layer.name)
            assert_logits_are_the_networks(its, suffix, layer)
        assert set(vars(its)) == before


def test_a_weight_that_is_read_directly_is_seen_replaced(images):
    torch.manual_seed(0)
    network = DirectRead().eval()
    suffix = suffix_of(network, images, 70)
    for layer in countable(network).layers:
        suffix.move_to(layer.name)
        assert_logits_are_the_networks(network, suffix, layer)


def test_of_a_gpu_half_of_what_is_free_is_taken_and_of_the_processor_the_budget_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1001, 4000))
    assert [free_memory(torch.device(name)) for name in ("cuda:0", "cpu", "mps")] == [500, 0, 0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert free_memory(torch.device("cuda")) == 0
