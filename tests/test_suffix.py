import pytest
import torch
from torch import Tensor, nn

from utilized_rank.layers import Layer, countable
from utilized_rank.projection import replaced
from utilized_rank.suffix import Suffix, Traced

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
                torch.testing.assert_close(suffix.logits(index), network(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("budget", [0, 40_000, PLENTY])
def test_from_every_layer_on_the_logits_are_those_of_the_whole_network(make, images, name, budget):
    network = make(name)
    suffix = Suffix(Traced(network), list(images.split(20)), budget)
    for layer in countable(network).layers:
        suffix.move_to(layer.name)
        assert_logits_are_the_networks(network, suffix, layer)


@pytest.mark.parametrize("name", ["residual", "resnet20", "vit"])
def test_layers_may_be_visited_in_any_order(make, images, name):
    network = make(name)
    suffix = Suffix(Traced(network), list(images.split(40)), PLENTY)
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
    suffix = Suffix(Traced(network), list(images.split(20)), PLENTY)
    suffix.move_to(later)
    before, own = calls_of(network.get_submodule(first)), calls_of(network.get_submodule(later))
    with torch.inference_mode():
        for index in range(4):
            suffix.logits(index)
    assert (len(before), len(own)) == (0, 4)


def test_moving_on_starts_from_what_was_kept(make, images):
    network = make("resnet20")
    suffix = Suffix(Traced(network), list(images.split(10)), PLENTY)
    suffix.move_to("layer1.0.conv1")
    calls = calls_of(network.conv1)
    suffix.move_to("layer3.2.conv1")
    assert len(calls) <= 1  # one check of the whole network


@pytest.mark.parametrize("name", ["shared", "data_dependent", "in_place_on_shortcut"])
def test_where_there_is_no_suffix_the_whole_network_runs(make, images, name):
    """A module called twice, control flow on values, a value changed after it was read."""
    network = make(name)
    suffix = Suffix(Traced(network), [images], PLENTY)
    suffix.move_to("block" if name == "shared" else "conv1")
    calls = calls_of(network.stem)
    with torch.inference_mode():
        suffix.logits(0)
    assert len(calls) == 1


@pytest.mark.parametrize("budget", [0, 20_000, 60_000, PLENTY])
def test_kept_values_stay_within_the_budget(make, images, budget):
    network = make("residual")
    suffix = Suffix(Traced(network), list(images.split(10)), budget)
    for name in ("stem", "conv1", "conv2"):
        suffix.move_to(name)
        kept = {id(v): v for values in suffix.kept if values for v in values}
        images_themselves = {id(batch) for batch in suffix.batches}
        assert sum(v.nbytes for i, v in kept.items() if i not in images_themselves) <= budget
    whole = 2 * 10 * 8 * 8 * 8 * 4  # bytes a batch before conv2: the shortcut and its own input
    assert sum(values is not None for values in suffix.kept) == min(7, budget // whole)


class DirectRead(nn.Module):
    """Reads a layer's weight beside calling it, as tied embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tied, self.head = nn.Linear(192, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        return self.head((x @ self.tied.weight).relu() + self.tied(x) @ self.tied.weight)


def test_a_weight_that_is_read_directly_is_seen_replaced(images):
    torch.manual_seed(0)
    network = DirectRead().eval()
    suffix = Suffix(Traced(network), [images], PLENTY)
    for layer in countable(network).layers:
        suffix.move_to(layer.name)
        assert_logits_are_the_networks(network, suffix, layer)
