"""What a rank costs, as its curvature predicts it; and searches that begin there."""

import copy
import math
from itertools import pairwise

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import Tensor, nn

import utilized_rank
from utilized_rank.api.given import InputError
from utilized_rank.networks.evaluation import Labelled
from utilized_rank.ranks.curvature import curvature
from utilized_rank.ranks.layers import Layer, countable
from utilized_rank.ranks.measure import Measurement, Unpredictable, measure
from utilized_rank.ranks.moments import input_moments
from utilized_rank.ranks.prediction import (
    LEAST,
    START,
    Guide,
    Prediction,
    crossing,
    fitted,
    handful,
    predictable,
    predicts,
)
from utilized_rank.ranks.projection import bases, projected
from utilized_rank.report.figures import layers

NETWORKS = ["residual", "in_place", "shared", "vgg11", "vit"]


def taken(network: nn.Module, images: Tensor) -> tuple[list[Layer], dict, dict]:
    layers = countable(network).layers
    return (
        layers,
        input_moments(network, layers, [images]),
        curvature(network, layers, images),
    )


def brute_force(layer: Layer, second: Tensor, g: Tensor, changed: Tensor) -> float:
    """tr(D^T C D G) / 2, summed over the groups."""
    d = layer.weight().double() - changed
    return float(sum(torch.trace(x.T @ c @ x @ its) for x, c, its in zip(d, second, g, strict=True))) / 2


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dimensions", ["all", "width"])
def test_the_divergence_is_the_quadratic_form_of_what_the_projection_changes(make, images, name, dimensions):
    layers, moments, curvatures = taken(make(name), images)
    for layer in layers:
        s, t = bases(layer, moments[layer.name], None if dimensions == "all" else layer.width)
        g, second = curvatures[layer.name], moments[layer.name].second
        prediction = Prediction(layer, s, t, g)
        some = sorted({1, max(1, layer.width // 2), max(1, layer.width - 1), layer.width})
        for k_s, k_t in [(a, b) for a in [*some, layer.m] for b in [*some, layer.n]]:
            expected = brute_force(layer, second, g, projected(layer.weight(), s, t, k_s, k_t))
            scale = prediction(0, 0)
            assert prediction(k_s, k_t) == pytest.approx(expected, rel=1e-6, abs=1e-9 * scale)
        assert prediction(0, 0) == pytest.approx(brute_force(layer, second, g, torch.zeros(1)), rel=1e-6)
        assert prediction(layer.m, layer.n) == pytest.approx(0, abs=1e-9 * scale)


@pytest.mark.parametrize("name", ["residual", "vit"])
def test_it_falls_as_either_side_alone_keeps_more(make, images, name):
    layers, moments, curvatures = taken(make(name), images)
    for layer in layers:
        prediction = Prediction(layer, *bases(layer, moments[layer.name]), curvatures[layer.name])
        for costs in (
            [prediction(k, layer.n) for k in range(layer.m + 1)],
            [prediction(layer.m, k) for k in range(layer.n + 1)],
        ):
            assert all(more <= less + 1e-9 * costs[0] for less, more in pairwise(costs))


def identity() -> tuple[Layer, tuple, dict]:
    layer = Layer("layer", nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        layer.module.weight.copy_(torch.eye(3))
    moments = input_moments(nn.Sequential(layer.module), [layer], [torch.diag(torch.tensor([3.0, 2.0, 1.0]))])
    return layer, bases(layer, moments["layer"]), {"layer": torch.eye(3, dtype=torch.float64)[None]}


def test_by_hand():
    """C = diag(9, 4, 1) / 3, W = G = 1: what is cut off, halved."""
    layer, (s, t), curvatures = identity()
    prediction = Prediction(layer, s, t, curvatures["layer"])
    assert [prediction(3, k) for k in range(4)] == pytest.approx([14 / 6, 5 / 6, 1 / 6, 0])
    assert [prediction(k, 3) for k in range(4)] == pytest.approx([14 / 6, 5 / 6, 1 / 6, 0])
    assert prediction(1, 2) == pytest.approx(5 / 6)


def test_a_guide_moves_halfway_to_a_verdict_that_it_got_wrong_and_stays_at_one_that_it_got_right():
    layer, both, curvatures = identity()
    its = Guide(Prediction(layer, *both, curvatures["layer"]))
    its.learn(3, 2, 0.5, False)  # 1/6 fails, as expected
    its.learn(3, 3, 0.5, True)
    assert its.threshold(0.5) == START
    its.learn(3, 1, 0.5, True)
    assert its.threshold(0.5) == pytest.approx(math.sqrt(START * 5 / 6))
    assert its.threshold(1.0) == START  # each tolerance has its own
    assert not its.predicted(3, 2, 0.5)
    its.learn(3, 3, 1.0, False)  # nothing is lost, and it fails: as of the least there is
    assert its.threshold(1.0) == pytest.approx(math.sqrt(START * LEAST))


def test_a_network_without_a_gradient_or_without_logits_is_not_guided(make, images):
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = make("residual")

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.inside(x)

    class Number(Opaque):
        def forward(self, x: Tensor) -> Tensor:
            return self.inside(x).sum(1)

    for network in (Opaque(), Number()):
        layers = countable(network).layers
        assert predictable(network, layers, images, 32) == {}
    assert predicts(make("residual"), images)
    assert not predicts(Number(), images)


def test_a_crossing_is_the_smallest_threshold_at_a_level():
    """A stair: 3 below 0.1 nats, 2 below 0.4, then 1."""
    stair = lambda at: 3 if at < 0.1 else 2 if at < 0.4 else 1  # noqa: E731
    assert crossing(stair, 2) == pytest.approx(0.1, rel=5e-3)
    assert crossing(stair, 1) == pytest.approx(0.4, rel=5e-3)
    assert crossing(stair, 1.5) == pytest.approx(0.4, rel=5e-3)  # between two steps: where it falls


@given(st.floats(1e-5, 1.0), st.lists(st.floats(0.2, 5.0), min_size=1, max_size=6))
def test_a_threshold_that_all_layers_share_is_found_and_its_range_holds_their_own(threshold, rates):
    """Smooth curves: each falls with the logarithm, at its own rate."""
    curves = [lambda at, rate=rate: -rate * math.log(at) for rate in rates]
    its = fitted(curves, [curve(threshold) for curve in curves])
    assert its.threshold == pytest.approx(threshold, rel=5e-3)
    assert its.low <= its.threshold <= its.high
    assert its.high / its.low == pytest.approx(1, rel=1e-2)


def test_the_range_is_one_standard_deviation_of_the_layers_own_thresholds():
    curve = lambda at: -math.log(at)  # noqa: E731
    own = [0.01, 0.04, 0.16]
    its = fitted([curve] * 3, [curve(at) for at in own])
    assert its.threshold == pytest.approx(0.04, rel=5e-3)
    assert (its.low, its.high) == pytest.approx((0.01, 0.16), rel=1e-2)


@pytest.mark.parametrize(
    ("layers", "which"), [(1, [0]), (3, [1, 2]), (10, [5, 6, 7, 8, 9]), (20, [10, 12, 14, 16, 18])]
)
def test_a_handful_of_layers_lies_in_the_latter_half(layers, which):
    assert handful(list(range(layers))) == which


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network that has learnt scikit-learn's digits, and the images that it has not seen."""
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    torch.manual_seed(0)
    widths = [64, 48, 48, 48, 48]
    parts = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    network = nn.Sequential(*parts, nn.Linear(48, 10))
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(150):
        loss = nn.functional.cross_entropy(network(images[:1000]), labels[:1000])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval(), images[1000:], labels[1000:]


def test_predicted_ranks_are_near_the_certified_ones_and_said_to_be_predicted(digits):
    network, images, labels = digits
    search = Labelled(images, labels)
    found, predicted = (
        measure(network, search, images, [1.0, 3.0], criterion=which, precision="float32")
        for which in ("rank", "predicted")
    )
    assert (found.predicted, predicted.predicted) == (False, True)
    assert not predicted.evaluations.certified.any()
    assert set(predicted.evaluations.layer) <= {"4", "6", "8"}
    assert predicted.evaluations.forwards.sum() < found.evaluations.forwards.sum() / 2
    assert (predicted.layers.layer == found.layers.layer).all()
    assert (predicted.layers.r_low <= predicted.layers.r).all()
    assert (predicted.layers.r <= predicted.layers.r_high).all()
    for epsilon, mlu in found.mean_layer_utilization().items():
        assert predicted.mean_layer_utilization()[epsilon] == pytest.approx(mlu, abs=0.06)


@pytest.mark.parametrize("start", [1e-5, 1.0])
def test_where_the_first_layers_begin_is_nothing_to_the_others(digits, monkeypatch, start):
    """Those begin where the ranks of the first say, however many questions it took to find them."""
    network, images, labels = digits
    search = Labelled(images, labels)
    usual = measure(network, search, images, [1.0, 3.0], precision="float32")
    monkeypatch.setattr("utilized_rank.ranks.prediction.START", start)
    other = measure(network, search, images, [1.0, 3.0], precision="float32")
    pd.testing.assert_frame_equal(usual.layers, other.layers)
    first = [layer.name for layer in handful(countable(network).layers)]

    def asked(found: Measurement, of_the_first: bool) -> list[tuple]:
        some = found.evaluations[found.evaluations.layer.isin(first) == of_the_first]
        return list(some.drop(columns="seconds").itertuples(index=False))

    assert asked(usual, False) == asked(other, False)
    assert asked(usual, True) != asked(other, True)


def test_a_score_without_labels_is_predicted_too(digits):
    network, images, labels = digits
    score = lambda of: 100 * float((of(images).argmax(1) == labels).double().mean())  # noqa: E731
    found = measure(network, score, images, [3.0], criterion="predicted", precision="float32")
    assert found.predicted
    assert found.search_images is None
    assert 0 < found.mean_layer_utilization()[3.0] < 1


def test_a_dead_layer_is_predicted_to_have_rank_zero(digits):
    network, images, labels = copy.deepcopy(digits[0]), *digits[1:]
    nn.init.zeros_(network[6].weight)
    found = measure(network, Labelled(images, labels), images, [3.0], criterion="predicted", precision="float32")
    dead = found.layers.set_index("layer").loc["6"]
    assert not dead[["k_s", "k_t", "r", "r_low", "r_high"]].any()


def test_what_cannot_be_predicted_is_said_in_one_line(digits):
    network, images, labels = digits
    blind = copy.deepcopy(network)
    blind.forward = torch.no_grad()(blind.forward)
    search = Labelled(images, labels)
    with pytest.raises(Unpredictable, match="no gradient") as said:
        measure(blind, search, images, [3.0], criterion="predicted")
    assert "\n" not in str(said.value)
    with pytest.raises(InputError, match="search its ranks"):
        utilized_rank.measure(blind, (images, labels), images, epsilon=3.0, criterion="predicted")
    with pytest.raises(InputError, match="needs search="):
        utilized_rank.measure(network, calibration=images, epsilon=3.0, criterion="predicted")
    with pytest.raises(InputError, match="energy="):
        utilized_rank.measure(network, calibration=images, energy=0.9, criterion="predicted")


def test_a_predicted_utilization_says_so_wherever_it_is_shown(digits):
    network, images, labels = digits
    found = utilized_rank.measure(network, (images, labels), images, epsilon=3.0, criterion="predicted")
    low, high = found.mlu_range
    assert low <= found.mlu <= high
    assert found.record()["predicted"]
    for shown in (repr(found), found._repr_html_(), found.plot().get_title("left")):
        assert "predicted, not certified" in shown
    assert f"MLU {found.mlu:.1%} ({low:.1%} to {high:.1%})" in repr(found)
    plt.close("all")
    figure = layers.utilization(found.layers.assign(epsilon=3.0))
    assert "predicted" in figure.axes[0].get_legend().get_texts()[0].get_text()
    plt.close("all")
