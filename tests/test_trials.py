import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.plain import Plain
from utilized_rank.networks.evaluation import Labelled
from utilized_rank.networks.precision import autocast
from utilized_rank.networks.suffix import Suffix
from utilized_rank.ranks.layers import Layer, countable
from utilized_rank.ranks.measure import layer_ranks
from utilized_rank.ranks.moments import input_moments
from utilized_rank.ranks.prediction import START, Guide, Prediction, predictable
from utilized_rank.ranks.projection import bases
from utilized_rank.ranks.rank_search import search, search_utilized
from utilized_rank.ranks.subspaces import Subspace
from utilized_rank.ranks.trials import PROBE, Scored, Trials, evaluations_table, probe

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


@pytest.mark.parametrize("count", [40, 200, 500, 1000])
def test_the_tolerance_is_that_of_exact_arithmetic(make, count):
    """Where it is worth a whole number of images, that many may be lost: 9 less 0.7 points of 1000 is 2."""
    trials = Trials(make("shared"), Labelled(torch.randn(4, 3, 8, 8), torch.arange(4)), 64)
    trials.images = count
    for tenths in range(101):
        loss = Fraction(tenths, 1000) * count
        for correct in (count, count // 2, math.ceil(loss), math.ceil(loss) + 2):
            trials.correct = correct
            assert trials.needed(tenths / 10) == math.ceil(correct - loss)


@pytest.mark.parametrize(("found", "passes"), [(0.7, True), (0.7 - 1e-6, False)])
def test_a_score_passes_at_its_tolerance_however_floats_are_rounded(make, images, found, passes):
    """0.8 - 0.1 is more than 0.7 in floats."""
    network = make("shared")
    layer, (s, t) = next(iter(subspaces(network, images).items()))
    values = iter([0.8, found])
    assert Scored(network, lambda _: next(values)).passes(layer, s, t, 1, 1, 0.1) == passes


def agrees(trials: Trials, plain: Plain, layer: Layer, s: Subspace, t: Subspace, k_s: int, k_t: int) -> set[bool]:
    """The verdicts at some tolerances, which are those of the whole network on every image."""
    seen = set()
    for epsilon in (40.0, 10.0, 0.0):
        trials.likely(layer, s, t, k_s, k_t, epsilon)
        verdict = trials.passes(layer, s, t, k_s, k_t, epsilon)
        assert verdict == (plain.correct_at(layer, s, t, k_s, k_t) >= trials.needed(epsilon))
        assert trials.likely(layer, s, t, k_s, k_t, epsilon) == verdict  # what is known is no guess
        seen.add(verdict)
    return seen


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("memory", [0, 64], ids=["recomputed", "kept"])
def test_verdicts_are_those_of_full_evaluations(make, images, name, memory):
    network = make(name)
    labels = labelled(network, images)
    trials, plain = Trials(network, Labelled(images, labels), memory, batch_size=16), Plain(network, images, labels)
    assert trials.correct == plain.correct == 56
    seen = set()
    for layer, (s, t) in subspaces(network, images).items():
        for k_s, k_t in pairs(layer):
            seen |= agrees(trials, plain, layer, s, t, k_s, k_t)
    assert seen == {True, False}


def test_layers_may_be_tried_in_any_order(make, images):
    network = make("residual")
    labels = labelled(network, images)
    trials, plain = Trials(network, Labelled(images, labels), 64), Plain(network, images, labels)
    known = subspaces(network, images).items()
    tried = [(layer, *both, 1, k_t) for layer, both in known for k_t in (1, layer.n)]
    for pair in tried[::-1]:
        agrees(trials, plain, *pair)


@pytest.mark.parametrize("name", ["residual", "data_dependent", "shared", "vit"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_ranks_found_with_guesses_are_boundaries_of_full_evaluations(make, images, name, precision):
    network = make(name)
    with autocast(precision):
        labels = labelled(network, images)
        plain = Plain(network, images, labels)
    trials = Trials(network, Labelled(images, labels), 64, precision, batch_size=8)
    assert trials.correct == plain.correct
    for layer, (s, t) in subspaces(network, images).items():
        if name == "vit" and not layer.name.startswith("blocks.1"):
            continue
        for epsilon in (0.0, 5.0, 20.0):

            def full(k_s: int, k_t: int) -> bool:
                with autocast(precision):
                    return plain.correct_at(layer, s, t, k_s, k_t) >= trials.needed(epsilon)  # noqa: B023

            ask = (layer, s, t)
            passes = lambda k_s, k_t: trials.passes(*ask, k_s, k_t, epsilon)  # noqa: B023, E731
            likely = lambda k_s, k_t: trials.likely(*ask, k_s, k_t, epsilon)  # noqa: B023, E731
            found = search(passes, layer.m, layer.n, likely)
            assert full(found.k_s, found.k_t)
            for side, k, whole in ((0, found.k_s_alone, layer.m), (1, found.k_t_alone, layer.n)):
                below = k - 1 if k <= layer.width else layer.width
                assert full(*((k, layer.n) if side == 0 else (layer.m, k)))
                assert 1 <= k <= layer.width or k == whole
                assert below == 0 or not full(*((below, layer.n) if side == 0 else (layer.m, below)))
            smaller = search_utilized(passes, layer.m, layer.n, likely)
            assert full(smaller.k_s, smaller.k_t)


@pytest.mark.parametrize("epsilon", [0.0, 5.0, 20.0])
def test_ranks_found_with_guesses_are_those_of_plain_bisection_where_passing_is_monotone(points, epsilon):
    """A linear map of well-separated directions loses classes one by one."""
    network, inputs, labels = points
    trials, plain = Trials(network, Labelled(inputs, labels), 64, batch_size=8), Plain(network, inputs, labels)
    ((layer, (s, t)),) = subspaces(network, inputs).items()
    passes = lambda k_s, k_t: trials.passes(layer, s, t, k_s, k_t, epsilon)  # noqa: E731
    likely = lambda k_s, k_t: trials.likely(layer, s, t, k_s, k_t, epsilon)  # noqa: E731
    correct = [plain.correct_at(layer, s, t, k, layer.n) for k in range(1, layer.m + 1)]
    assert correct == sorted(correct)
    assert correct[0] < correct[-1]
    expected = plain.ranks(layer, s, t, epsilon)
    assert search(passes, layer.m, layer.n, likely) == expected
    smaller = min(expected.k_s_alone, expected.k_t_alone)
    assert search_utilized(passes, layer.m, layer.n, likely).r == smaller


@pytest.mark.parametrize("start", [1e-5, START, 10.0])
@pytest.mark.parametrize("criterion", ["rank", "utilized", "energy"])
def test_a_guide_changes_no_rank_where_passing_is_monotone(points, start, criterion, monkeypatch):
    """However far its first threshold is off."""
    network, inputs, labels = points
    monkeypatch.setattr("utilized_rank.ranks.prediction.START", start)
    plain = Plain(network, inputs, labels)
    ((layer, (s, t)),) = subspaces(network, inputs).items()
    prediction = Prediction(layer, s, t, predictable(network, [layer], inputs, 32)[layer.name])
    for epsilon in (0.0, 5.0, 20.0):
        trials = [Trials(network, Labelled(inputs, labels), 64, batch_size=8) for _ in range(2)]
        unguided, guided = (
            layer_ranks(layer, s, t, of, epsilon, criterion, which)
            for of, which in zip(trials, (None, Guide(prediction)), strict=True)
        )
        assert guided == unguided
        if criterion == "rank":
            assert guided == plain.ranks(layer, s, t, epsilon)


def identity(width: int) -> nn.Module:
    """Logits that are the pixels themselves, by a layer."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(width, width, bias=False)).eval()
    with torch.no_grad():
        network[1].weight.copy_(torch.eye(width))
    return network


@pytest.fixture
def points() -> tuple[nn.Module, Tensor, Tensor]:
    """Twelve classes along the axes, each of another length, and a network that tells them apart."""
    labels = torch.arange(240) % 12
    inputs = torch.eye(12)[labels] * (1 + torch.arange(12.0))[labels, None]
    return identity(12), inputs[..., None, None], labels


@pytest.fixture
def case(make, images):
    """A network, its trials in batches of 8 and the plain verdicts, and one of its layers with its subspaces."""
    network = make("residual")
    labels = labelled(network, images)
    layer, (s, t) = next(iter(subspaces(network, images).items()))
    return Trials(network, Labelled(images, labels), 64, batch_size=8), Plain(network, images, labels), layer, s, t


def test_the_unaltered_layer_passes_without_a_look(case):
    trials, plain, layer, s, t = case
    assert trials.correct == plain.correct == 56
    assert trials.passes(layer, s, t, layer.m, layer.n, 0.0)
    assert trials.likely(layer, s, t, layer.m, layer.n, 0.0)
    assert evaluations_table(trials.evaluations).empty


def test_a_table_without_a_row_has_its_columns(case):
    empty = evaluations_table(case[0].evaluations)
    case[0].passes(*case[2:], 1, 1, 0.0)
    assert list(empty.columns) == list(evaluations_table(case[0].evaluations).columns)


def test_a_trial_stops_when_its_verdict_is_certain_and_goes_on_for_another(case):
    """What it knows is enough for the verdict, and was not before the last batch of 8."""
    trials, plain, layer, s, t = case
    correct = plain.correct_at(layer, s, t, 1, layer.n)
    margin = 100 * (56 - correct) / 70  # the smallest tolerance at which it passes
    asked = [0.0, 2.0, margin / 2, margin - 1.4, margin, margin + 3, 90.0]
    for epsilon in asked:
        assert trials.passes(layer, s, t, 1, layer.n, epsilon) == (epsilon >= margin)
    table = evaluations_table(trials.evaluations)
    assert table.images.sum() <= 70
    assert table.images.iloc[0] < 70
    assert trials.passes(layer, s, t, 1, layer.n, margin)
    assert len(evaluations_table(trials.evaluations)) == len(table) <= len(asked)


def test_a_larger_tolerance_goes_on_from_what_a_smaller_one_looked_at(case):
    trials, _, layer, s, t = case
    for epsilon in (0.0, 1.5, 3.0, 10.0, 20.0, 40.0):
        for pair in pairs(layer):
            trials.likely(layer, s, t, *pair, epsilon)
            trials.passes(layer, s, t, *pair, epsilon)
    table = evaluations_table(trials.evaluations)
    assert bool((table.images > 0).all())
    assert int(table.groupby(["layer", "k_s", "k_t"]).images.sum().max()) <= 70


def test_a_verdict_that_is_known_is_no_row(case):
    trials, _, layer, s, t = case
    trials.passes(layer, s, t, 1, layer.n, 0.0)
    assert len(evaluations_table(trials.evaluations)) == 1
    for ask in (trials.passes, trials.likely, trials.passes):
        ask(layer, s, t, 1, layer.n, 0.0)
    assert len(evaluations_table(trials.evaluations)) == 1
    assert trials.passes(layer, s, t, 2, 1, 80.0)  # any result passes: 56 of 70 may be lost
    assert len(evaluations_table(trials.evaluations)) == 1


def test_the_hardest_images_come_first():
    """Most lie along (10, -8); the 4 near the boundary are what a projection onto that line gets wrong."""
    easy = torch.tensor([[10.0, -8.0], [-10.0, 8.0]]).repeat(50, 1)
    hard = torch.tensor([[1.0, 1.1]]).repeat(4, 1)
    points = torch.cat([easy[:60], hard, easy[60:]])
    network, images = identity(2), points[..., None, None]
    trials = Trials(network, Labelled(images, points.argmax(1)), 64, batch_size=4)
    ((layer, (s, t)),) = subspaces(network, images).items()
    assert not trials.likely(layer, s, t, 1, 2, 0.0)
    assert not trials.passes(layer, s, t, 1, 2, 0.0)
    assert evaluations_table(trials.evaluations).images.tolist() == [4]
    assert trials.passes(layer, s, t, 1, 2, 100 * 4 / 104)
    assert evaluations_table(trials.evaluations).images.tolist() == [4, 100]


def test_images_close_to_another_class_come_first_whether_right_or_wrong():
    """Margins by hand; after the probe of 2 images, those that were wrong."""
    margin = torch.tensor([5.0, -4.0, 0.5, 3.0, -0.2, 9.0, 8.0, -7.0, 6.0, 2.0])
    logits = torch.stack([margin, torch.zeros(10)], 1)
    trials = Trials(nn.Identity(), Labelled(logits, torch.zeros(10, dtype=torch.int64)), 0, batch_size=1)
    assert trials.correct == 7
    order = torch.cat(list(trials._suffix.batches)).tolist()
    assert order == [4, 2, 7, 1, 9, 3, 0, 8, 6, 5]


def test_where_nothing_is_certified_the_verdicts_are_those_of_the_probe(case):
    trials, plain, layer, s, t = case
    guesses = Trials(plain.network, Labelled(plain.inputs, plain.labels), 64, batch_size=8, certifies=False)
    assert (guesses.correct, guesses.images, guesses.score) == (trials.correct, trials.images, trials.score)
    assert sum(map(len, guesses._suffix.batches)) == probe(70) == 14
    for epsilon in (0.0, 10.0, 40.0):
        for pair in pairs(layer):
            guess = guesses.likely(layer, s, t, *pair, epsilon)
            assert guesses.passes(layer, s, t, *pair, epsilon) == guess
    assert not evaluations_table(guesses.evaluations).certified.any()
    assert int(evaluations_table(guesses.evaluations).groupby(["k_s", "k_t"]).images.sum().max()) <= 14


def test_a_guess_looks_at_the_probe_and_takes_the_other_images_to_stay(case):
    """With 50 points to lose, the 14 images of the probe cannot tell."""
    trials, plain, layer, s, t = case
    assert trials.likely(layer, s, t, 2, layer.n, 50.0)
    table = evaluations_table(trials.evaluations)
    assert table.certified.tolist() == [False]
    assert PROBE * 70 <= table.images[0] < PROBE * 70 + 8
    verdict = trials.passes(layer, s, t, 2, layer.n, 50.0)
    assert verdict == (plain.correct_at(layer, s, t, 2, layer.n) >= 21)
    table = evaluations_table(trials.evaluations)
    assert table.certified.tolist() == [False, True]
    assert 0 < table.images[1] <= 70 - table.images[0]  # the certified verdict went on from there


@pytest.mark.parametrize(("label", "guess"), [(1, True), (0, False)], ids=["a wrong yes", "a wrong no"])
def test_a_guess_may_be_wrong_either_way_and_the_verdict_is_not(label, guess):
    """The projection onto (10, -8) turns far images to class 0, beyond the probe: it loses or regains them."""
    easy = torch.tensor([[1.0, -0.8], [-1.0, 0.8]]).repeat(50, 1)
    near, far = torch.tensor([[1.0, 1.1]]).repeat(4, 1), torch.tensor([[20.0, 22.0]]).repeat(4, 1)
    points = torch.cat([easy, far] if label == 1 else [easy, near, far])
    labels = points.argmax(1)
    labels[-4:] = label
    network, images = identity(2), points[..., None, None]
    trials, plain = Trials(network, Labelled(images, labels), 64, batch_size=4), Plain(network, images, labels)
    ((layer, (s, t)),) = subspaces(network, images[:100]).items()
    assert trials.likely(layer, s, t, 1, 2, 0.0) is guess
    assert trials.passes(layer, s, t, 1, 2, 0.0) is not guess
    assert (plain.correct_at(layer, s, t, 1, 2) >= plain.correct) is not guess
    assert evaluations_table(trials.evaluations).certified.tolist() == [False, True]


def test_the_table_has_one_row_for_each_question_that_images_were_looked_at_for(case):
    trials, plain, layer, s, t = case
    asked = [(1, 2), (2, 1), (1, 2), (layer.m, 1)]
    for pair in asked:
        trials.passes(layer, s, t, *pair, 10.0)
    table = evaluations_table(trials.evaluations)
    assert list(table.columns) == [
        "layer", "epsilon", "k_s", "k_t", "certified", "images", "passes", "forwards", "seconds",
    ]  # fmt: skip
    assert table.layer.tolist() == [layer.name] * 3
    assert list(zip(table.k_s, table.k_t, strict=True)) == [(1, 2), (2, 1), (layer.m, 1)]
    assert table.epsilon.tolist() == [10.0] * 3
    assert bool(table.certified.all())
    for row in table.itertuples():
        assert row.passes == (plain.correct_at(layer, s, t, row.k_s, row.k_t) >= trials.needed(10.0))
    assert bool((table.seconds > 0).all())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("memory", "share"), [(0, 1.0), (64, None)], ids=["recomputed", "kept"])
def test_forwards_are_the_part_of_the_images_times_the_part_of_the_network(make, images, memory, share, precision):
    network = make("residual")
    trials = Trials(network, Labelled(images, labelled(network, images)), memory, precision, batch_size=8)
    stem, conv1, conv2, head = 8 * 27 * 64, 8 * 36 * 64, 8 * 72 * 64, 8 * 5
    by_hand = share or (conv2 + head) / (stem + conv1 + conv2 + head)
    layer, (s, t) = next((x, both) for x, both in subspaces(network, images).items() if x.name == "conv2")
    trials.passes(layer, s, t, 1, layer.n, 5.0)
    (row,) = evaluations_table(trials.evaluations).itertuples()
    assert row.forwards == pytest.approx(row.images / 70 * by_hand)


def bits(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_memory_is_in_mib(make, images, monkeypatch):
    budgets: list[int] = []
    monkeypatch.setattr("utilized_rank.ranks.trials.Suffix", lambda *its: budgets.append(its[-1]) or Suffix(*its))
    Trials(make("shared"), Labelled(images, torch.zeros(len(images), dtype=torch.int64)), 3)
    assert budgets == [3 * 2**20]


@pytest.mark.parametrize("name", ["residual", "data_dependent"])
def test_weights_are_as_they_were_to_the_bit(make, images, name):
    network = make(name)
    before, parameters = bits(network), list(map(id, network.parameters()))
    trials = Trials(network, Labelled(images, labelled(network, images)), 64)
    for layer, (s, t) in subspaces(network, images).items():
        trials.passes(layer, s, t, 1, 1, 0.0)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert list(map(id, network.parameters())) == parameters


class Broken(Exception):
    pass


@pytest.mark.parametrize("memory", [0, 64], ids=["recomputed", "kept"])
def test_weights_are_as_they_were_when_an_evaluation_raises(make, images, memory):
    network = make("residual")
    labels = labelled(network, images)
    layer, (s, t) = next(iter(subspaces(network, images).items()))
    trials, plain = Trials(network, Labelled(images, labels), memory, batch_size=8), Plain(network, images, labels)
    trials.passes(layer, s, t, 2, 2, 0.0)  # moved to the layer
    before = bits(network)
    calls = []

    def break_down(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Broken

    hook = network.head.register_forward_hook(break_down)
    with pytest.raises(Broken):
        trials.likely(layer, s, t, layer.width, layer.n, 10.0)
    hook.remove()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    agrees(trials, plain, layer, s, t, layer.width, layer.n)
    agrees(trials, plain, layer, s, t, 1, layer.n)


def test_a_network_in_training_mode_is_judged_in_evaluation_mode(make, images):
    network = nn.Sequential(nn.Dropout(0.9), make("residual"))
    labels = labelled(network[1], images)
    assert Trials(network.train(), Labelled(images, labels), 64).correct == 56


@given(correct=st.integers(0, 500), wrong=st.integers(0, 500), epsilon=st.floats(0, 100))
def test_needed_is_the_fewest_correct_images_within_epsilon(correct, wrong, epsilon):
    total = max(1, correct + wrong)
    logits = torch.zeros(total, 2)
    logits[:, 0] = 1
    labels = (torch.arange(total) >= correct).long()
    needed = Trials(nn.Identity(), Labelled(logits, labels), 0).needed(epsilon)
    assert 100 * (correct - needed) / total <= epsilon + 1e-6
    assert 100 * (correct - (needed - 1)) / total > epsilon - 1e-6


BY_HAND = [(0, 180), (0.49, 180), (0.5, 179), (1.0, 178), (1.49, 178), (90, 0)]


@pytest.mark.parametrize(("epsilon", "needed"), BY_HAND)
def test_needed_by_hand_with_180_of_200_correct(epsilon, needed):
    logits = torch.eye(2)[torch.zeros(200, dtype=torch.int64)]
    labels = (torch.arange(200) >= 180).long()
    assert Trials(nn.Identity(), Labelled(logits, labels), 0).needed(epsilon) == needed
