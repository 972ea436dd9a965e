import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from utilized_rank.evaluation import is_correct
from utilized_rank.layers import Layer, countable
from utilized_rank.moments import input_moments
from utilized_rank.projection import bases, projected, replaced
from utilized_rank.subspaces import Subspace
from utilized_rank.trials import Trials


def labelled(network: nn.Module, images: Tensor) -> Tensor:
    """What the network itself says, but for every fifth image."""
    with torch.inference_mode():
        logits = network(images)
    labels = logits.argmax(1)
    return torch.where(torch.arange(len(images)) % 5 == 0, (labels + 1) % logits.shape[1], labels)


def subspaces(network: nn.Module, images: Tensor) -> dict[Layer, tuple[Subspace, Subspace]]:
    layers = countable(network).layers
    moments = input_moments(network, layers, [images])
    return {layer: bases(layer, moments[layer.name]) for layer in layers}


def pairs(layer: Layer) -> list[tuple[int, int]]:
    """Some (k_S, k_T) of a layer, the unaltered one among them."""
    few, half = 1, max(1, layer.width // 2)
    both = [(few, layer.n), (half, layer.n), (layer.m, half), (half, half), (layer.m, layer.n)]
    return list(dict.fromkeys(both))


def full_verdict(network, images, labels, layer, s, t, k_s, k_t, needed) -> bool:
    """By the whole network on every image."""
    with replaced({layer: projected(layer.weight(), s, t, k_s, k_t)}):
        return int(is_correct(network, images, labels).sum()) >= needed


@pytest.mark.parametrize(
    "name",
    ["residual", "in_place", "in_place_on_shortcut", "data_dependent", "shared", "vgg11", "resnet20", "vit"],
)
@pytest.mark.parametrize("memory", [0, 64], ids=["recomputed", "kept"])
def test_verdicts_are_those_of_full_evaluations(make, images, name, memory):
    network = make(name)
    labels = labelled(network, images)
    trials = Trials(network, images, labels, memory, batch_size=16)
    seen = set()
    for layer, (s, t) in subspaces(network, images).items():
        for k_s, k_t in pairs(layer):
            for epsilon in (0.0, 10.0, 40.0):
                needed = trials.needed(epsilon)
                maybe = trials.passes(layer, s, t, k_s, k_t, needed, quick=True)
                verdict = trials.passes(layer, s, t, k_s, k_t, needed)
                assert verdict == full_verdict(network, images, labels, layer, s, t, k_s, k_t, needed)
                assert maybe or not verdict  # a quick no is final
                seen.add(verdict)
    assert seen == {True, False}


def test_layers_may_be_tried_in_any_order(make, images):
    network = make("residual")
    labels = labelled(network, images)
    trials = Trials(network, images, labels, 64)
    needed = trials.needed(10.0)
    known = subspaces(network, images).items()
    tried = [(layer, *both, 1, k_t) for layer, both in known for k_t in (1, layer.n)]
    for pair in tried[::-1]:
        assert trials.passes(*pair, needed) == full_verdict(network, images, labels, *pair, needed)


@pytest.fixture
def case(make, images):
    """A network, its trials with and without early stop, and one of its layers with its subspaces."""
    network = make("residual")
    labels = labelled(network, images)
    layer, (s, t) = next(iter(subspaces(network, images).items()))
    return network, labels, Trials(network, images, labels, 64, batch_size=8), layer, s, t


def test_the_unaltered_network_is_counted_once_and_passes_what_it_reaches(case, images):
    network, labels, trials, layer, s, t = case
    assert trials.correct == int(is_correct(network, images, labels).sum()) == 56
    assert trials.passes(layer, s, t, layer.m, layer.n, trials.correct)
    assert not trials.passes(layer, s, t, layer.m, layer.n, trials.correct + 1)
    assert trials.table().empty


def test_a_trial_stops_when_its_verdict_is_certain_and_goes_on_for_another(case):
    _, _, trials, layer, s, t = case
    for needed in (56, 50, 30, 56, 1, 0):
        trials.passes(layer, s, t, 1, layer.n, needed)
        row = trials.table().iloc[-1]
        assert row.correct >= needed or row.images - row.correct > 70 - needed
        assert row.images <= 70
    assert len(trials.table()) == 1


def test_the_hardest_images_come_first():
    """Most lie along (10, -8); the 4 near the boundary are what a projection onto that line gets wrong."""
    easy = torch.tensor([[10.0, -8.0], [-10.0, 8.0]]).repeat(50, 1)
    hard = torch.tensor([[1.0, 1.1]]).repeat(4, 1)
    points = torch.cat([easy[:60], hard, easy[60:]])
    network = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(2))
    trials = Trials(network, points, points.argmax(1), 64, batch_size=4)
    ((layer, (s, t)),) = subspaces(network, points).items()
    assert not trials.passes(layer, s, t, 1, 2, trials.correct)
    assert trials.table().images.tolist() == [4]
    assert trials.passes(layer, s, t, 1, 2, trials.correct - 4)
    assert trials.table().images.tolist() == [104]


def test_a_quick_verdict_looks_at_the_hardest_images_and_trusts_the_others(case):
    _, _, trials, layer, s, t = case
    assert trials.passes(layer, s, t, layer.width, layer.n, 50, quick=True)
    (looked_at,) = trials.table().images
    assert 0.15 * 70 <= looked_at < 0.15 * 70 + 8
    assert trials.passes(layer, s, t, layer.width, layer.n, 50) == (trials.table().correct[0] >= 50)
    assert trials.table().images[0] > looked_at  # the full verdict went on from there


def test_a_trial_that_any_result_passes_looks_at_no_image(case):
    _, _, trials, layer, s, t = case
    assert trials.passes(layer, s, t, 1, 1, 0)
    assert trials.table().images.tolist() == [0]


def test_the_table_has_one_row_for_each_pair_that_was_tried(case):
    _, _, trials, layer, s, t = case
    for pair in [(1, 2), (2, 1), (1, 2)]:
        trials.passes(layer, s, t, *pair, 50)
    table = trials.table()
    assert table.layer.tolist() == [layer.name] * 2
    assert list(zip(table.k_s, table.k_t, strict=True)) == [(1, 2), (2, 1)]
    assert bool((table.seconds > 0).all())


def bits(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("name", ["residual", "data_dependent"])
def test_weights_are_as_they_were_to_the_bit(make, images, name):
    network = make(name)
    before, parameters = bits(network), list(map(id, network.parameters()))
    trials = Trials(network, images, labelled(network, images), 64)
    for layer, (s, t) in subspaces(network, images).items():
        trials.passes(layer, s, t, 1, 1, trials.correct)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert list(map(id, network.parameters())) == parameters


class Broken(Exception):
    pass


@pytest.mark.parametrize("memory", [0, 64], ids=["recomputed", "kept"])
def test_weights_are_as_they_were_when_an_evaluation_raises(case, images, memory):
    network, labels, _, layer, s, t = case
    trials = Trials(network, images, labels, memory, batch_size=8)
    trials.passes(layer, s, t, 2, 2, 0)  # moved to the layer
    before = bits(network)
    calls = []

    def break_down(*_: object) -> None:
        calls.append(1)
        if len(calls) == 4 or memory == 0:
            raise Broken

    hook = network.head.register_forward_hook(break_down)
    with pytest.raises(Broken):
        trials.passes(layer, s, t, 1, layer.n, trials.correct)
    hook.remove()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    needed = trials.needed(10.0)
    assert trials.passes(layer, s, t, 1, layer.n, needed) == full_verdict(
        network, images, labels, layer, s, t, 1, layer.n, needed
    )


def test_a_network_in_training_mode_is_judged_in_evaluation_mode(make, images):
    network = nn.Sequential(nn.Dropout(0.9), make("residual"))
    labels = labelled(network[1], images)
    assert Trials(network.train(), images, labels, 64).correct == 56


@given(correct=st.integers(0, 500), wrong=st.integers(0, 500), epsilon=st.floats(0, 100))
def test_needed_is_the_fewest_correct_images_within_epsilon(correct, wrong, epsilon):
    total = max(1, correct + wrong)
    logits = torch.zeros(total, 2)
    logits[:, 0] = 1
    labels = (torch.arange(total) >= correct).long()
    needed = Trials(nn.Identity(), logits, labels, 0).needed(epsilon)
    assert 100 * (correct - needed) / total <= epsilon + 1e-6
    assert 100 * (correct - (needed - 1)) / total > epsilon - 1e-6


BY_HAND = [(0, 180), (0.49, 180), (0.5, 179), (1.0, 178), (1.49, 178), (90, 0)]


@pytest.mark.parametrize(("epsilon", "needed"), BY_HAND)
def test_needed_by_hand_with_180_of_200_correct(epsilon, needed):
    logits = torch.eye(2)[torch.zeros(200, dtype=torch.int64)]
    labels = (torch.arange(200) >= 180).long()
    assert Trials(nn.Identity(), logits, labels, 0).needed(epsilon) == needed
