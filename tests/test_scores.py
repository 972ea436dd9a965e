"""Any score of a network, and inputs in any form that networks take."""

import copy
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from utilized_rank.compression.compressor import Compression
from utilized_rank.networks.batches import Arguments, call, count, gathered
from utilized_rank.networks.evaluation import Labelled, outputs
from utilized_rank.networks.standing import Standing
from utilized_rank.networks.suffix import Traced
from utilized_rank.ranks.layers import countable
from utilized_rank.ranks.measure import measure
from utilized_rank.ranks.moments import input_moments
from utilized_rank.ranks.projection import bases, projected, replaced

EPSILON = 10.0
README = (Path(__file__).parents[1] / "README.md").read_text()


class Two(nn.Module):
    """Takes a pair of tensors, by position or by name, and gives its logits beside something else."""

    def __init__(self, as_tuple: bool = False) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)
        self.as_tuple = as_tuple

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> object:
        hidden = torch.relu(self.left(a) + scale * self.right(b))
        logits = self.head(hidden)
        return (logits, hidden) if self.as_tuple else {"logits": logits, "hidden": hidden}


class Joined(nn.Module):
    """The same of one tensor that holds both."""

    def __init__(self, two: Two) -> None:
        super().__init__()
        self.two = two

    def forward(self, x: Tensor) -> Tensor:
        return self.two(x[:, :6], x[:, 6:])["logits"]


@pytest.fixture(scope="module")
def pairs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(60, 6, generator=generator), "b": torch.randn(60, 4, generator=generator)}


@pytest.fixture
def network() -> Two:
    torch.manual_seed(0)
    return Two().eval()


@pytest.fixture
def labelled(network, pairs) -> Labelled:
    inputs = gathered(pairs)
    return Labelled(inputs, outputs(network, inputs).argmax(1))


def test_what_any_score_finds_is_what_its_labels_find(network, pairs, labelled):
    by_labels = measure(network, labelled, pairs, [EPSILON], precision="float32")
    by_score = measure(network, lambda its: labelled(its), pairs, [EPSILON], precision="float32")
    pd.testing.assert_frame_equal(by_labels.layers, by_score.layers)
    assert by_score.score == by_labels.score == 100
    assert (by_labels.search_images, by_score.search_images) == (60, None)
    assert set(by_score.evaluations.forwards) == {1.0}
    assert by_score.evaluations.certified.all()
    assert not by_score.evaluations.duplicated(["layer", "k_s", "k_t"]).any()


@pytest.mark.parametrize("criterion", ["rank", "utilized", "energy"])
def test_every_boundary_of_a_score_is_certified(network, pairs, criterion):
    """A score in a unit of its own: minus the distance from the original's logits."""
    before = outputs(network, gathered(pairs))

    def score(its: nn.Module) -> float:
        return -float((outputs(its, gathered(pairs)) - before).square().mean())

    found = measure(network, score, pairs, [0.02], criterion=criterion, precision="float32")
    assert found.score == 0
    for row in found.layers.itertuples():
        layer = next(layer for layer in countable(network).layers if layer.name == row.layer)
        s, t = bases(layer, found.moments[layer.name])
        with replaced({layer: projected(layer.weight(), s, t, row.k_s, row.k_t)}):
            assert score(network) >= -0.02 - 1e-9
        tried = found.evaluations[found.evaluations.layer == row.layer]
        assert len(tried) == 0 or not tried.passes.all() or row.r == 1
    assert found.layers.r.min() < found.layers.n.max()


def test_a_score_that_is_no_number_fails(network, pairs):
    first = []

    def score(its: nn.Module) -> float:
        first.append(its)
        return 1.0 if len(first) == 1 else float("nan")

    found = measure(network, score, pairs, [EPSILON], precision="float32")
    assert (found.layers.utilization == 1).all()


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("form", ["dict", "tuple", "loader"])
def test_inputs_of_several_tensors_are_as_one_tensor_that_holds_them(network, pairs, labelled, form, as_tuple):
    network.as_tuple = as_tuple
    a, b = pairs.values()
    given = {"dict": pairs, "tuple": (a, b), "loader": DataLoader(TensorDataset(a, b), batch_size=7)}[form]
    found = measure(network, Labelled(gathered(given), labelled.labels), given, [EPSILON], precision="float32")
    network.as_tuple = False
    joined = torch.cat([a, b], 1)
    one = measure(Joined(network), Labelled(joined, labelled.labels), joined, [EPSILON], precision="float32")
    assert found.layers.drop(columns="layer").equals(one.layers.drop(columns="layer"))
    assert found.evaluations.forwards.sum() < len(found.evaluations)  # it is run from the layer on


def test_a_network_of_several_inputs_is_compressed(network, pairs, labelled):
    inputs = gathered(pairs)
    moments = input_moments(network, countable(network).layers, inputs.split(20))
    compression = Compression(network, moments, inputs, labelled)
    small = compression.build("compensated", {"left": ("channel", 2), "head": ("channel", 2)}).network
    assert outputs(small, inputs).shape == (60, 3)
    assert (outputs(small, inputs).argmax(1) == labelled.labels).float().mean() > 0.6


def test_ranks_for_a_whole_network_are_those_of_the_same_score_in_another_form(network, pairs, labelled):
    inputs = gathered(pairs)
    moments = input_moments(network, countable(network).layers, inputs.split(20))
    ways = [
        {"cumulative": made.cumulative("optimal", EPSILON), "joint": made.joint("optimal", EPSILON).choices}
        for made in (Compression(network, moments, inputs, score) for score in (labelled, lambda its: labelled(its)))
    ]
    assert ways[0] == ways[1]


def test_a_score_stands_as_the_network_does(network, labelled):
    small = copy.deepcopy(network)
    for score in (labelled, lambda its: labelled(its)):
        standing = Standing(small, score, 64)
        standing.turn_to("head")
        assert standing.now() == 100
        weight = small.head.weight.data.clone()
        small.head.weight.data.neg_()
        assert standing.now() == labelled(small) < 100
        small.head.weight.data.copy_(weight)


def test_an_iterable_of_batches_is_read_once_and_kept(pairs):
    a, b = pairs.values()
    assert gathered(a) is a
    assert torch.equal(gathered([*a.split(7)]), a)
    assert torch.equal(gathered(DataLoader(a, batch_size=7))[:], a)
    for batches in (gathered(pairs), gathered([{"a": a[:9], "b": b[:9]}, {"a": a[9:], "b": b[9:]}])):
        assert isinstance(batches, Arguments)
        assert len(batches) == 60
        assert torch.equal(batches[torch.tensor([3, 1])]["b"], b[[3, 1]])
        parts = list(batches.split(25))
        assert [count(part) for part in parts] == [25, 25, 10]
        assert torch.equal(torch.cat([part["a"] for part in parts]), a)
    with pytest.raises(ValueError, match="no batch"):
        gathered([])


def test_a_graph_takes_arguments_in_their_order_with_the_defaults_of_the_others(network, pairs):
    a, b = pairs.values()
    traced = Traced(network)
    assert len(traced.images()) == 3
    for batch in (pairs, {"b": b, "a": a}, (a, b)):
        given = traced.arguments(batch)
        assert given[0] is a
        assert given[1] is b
        assert given[2] == 1.0
        assert torch.equal(call(network, batch)["logits"], call(network, given)["logits"])


def test_the_readmes_example_runs_as_it_stands(capsys, tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(import utilized_rank as ur\n.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    attending = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
    network = nn.Sequential(nn.Conv2d(3, 12, 4, 4), nn.Flatten(2), nn.Linear(16, 12), attending, nn.Flatten(1))
    network.append(nn.Linear(144, 3)).eval()
    images = torch.randn(40, 3, 16, 16)
    loader = DataLoader(TensorDataset(images, network(images).argmax(1)), batch_size=16)
    given = {"network": network, "loader": loader}
    before = copy.deepcopy(network)
    exec(example, given)
    assert "linear1" in capsys.readouterr().out
    assert len(given["found"].layers) == 7  # of attention, too
    with torch.no_grad():
        torch.testing.assert_close(given["small"](images), given["again"](images), rtol=0, atol=1e-5)
        assert torch.equal(network(images), before(images))
