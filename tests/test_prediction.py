"""What a rank costs, as its curvature predicts it; and searches that begin there."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from utilized_rank.ranks.curvature import curvature
from utilized_rank.ranks.layers import Layer, countable
from utilized_rank.ranks.moments import input_moments
from utilized_rank.ranks.prediction import LEAST, START, Divergence, Guide, guide, predicts
from utilized_rank.ranks.projection import bases, projected

NETWORKS = ["residual", "in_place", "shared", "vgg11", "vit"]


def taken(network: nn.Module, images: Tensor) -> tuple[list[Layer], dict, dict]:
    layers = countable(network).layers
    return layers, input_moments(network, layers, [images]), curvature(network, layers, images)


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
        divergence = Divergence(layer, s, t, g)
        some = sorted({1, max(1, layer.width // 2), max(1, layer.width - 1), layer.width})
        for k_s, k_t in [(a, b) for a in [*some, layer.m] for b in [*some, layer.n]]:
            expected = brute_force(layer, second, g, projected(layer.weight(), s, t, k_s, k_t))
            scale = divergence(0, 0)
            assert divergence(k_s, k_t) == pytest.approx(expected, rel=1e-6, abs=1e-9 * scale)
        assert divergence(0, 0) == pytest.approx(brute_force(layer, second, g, torch.zeros(1)), rel=1e-6)
        assert divergence(layer.m, layer.n) == pytest.approx(0, abs=1e-9 * scale)


@pytest.mark.parametrize("name", ["residual", "vit"])
def test_it_falls_as_either_side_alone_keeps_more(make, images, name):
    layers, moments, curvatures = taken(make(name), images)
    for layer in layers:
        divergence = Divergence(layer, *bases(layer, moments[layer.name]), curvatures[layer.name])
        for costs in (
            [divergence(k, layer.n) for k in range(layer.m + 1)],
            [divergence(layer.m, k) for k in range(layer.n + 1)],
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
    divergence = Divergence(layer, s, t, curvatures["layer"])
    assert [divergence(3, k) for k in range(4)] == pytest.approx([14 / 6, 5 / 6, 1 / 6, 0])
    assert [divergence(k, 3) for k in range(4)] == pytest.approx([14 / 6, 5 / 6, 1 / 6, 0])
    assert divergence(1, 2) == pytest.approx(5 / 6)


def test_a_guide_moves_halfway_to_a_verdict_that_it_got_wrong_and_stays_at_one_that_it_got_right():
    layer, both, curvatures = identity()
    its = Guide(curvatures)
    assert its.knows(layer)
    assert not Guide({}).knows(layer)
    its.learn(layer, *both, 3, 2, 0.5, False)  # 1/6 fails, as expected
    its.learn(layer, *both, 3, 3, 0.5, True)
    assert its.threshold(0.5) == START
    its.learn(layer, *both, 3, 1, 0.5, True)
    assert its.threshold(0.5) == pytest.approx(math.sqrt(START * 5 / 6))
    assert its.threshold(1.0) == START  # each tolerance has its own
    assert not its.predicted(layer, *both, 3, 2, 0.5)
    its.learn(layer, *both, 3, 3, 1.0, False)  # nothing is lost, and it fails: as of the least there is
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
        assert not any(map(guide(network, layers, images, 32).knows, layers))
    assert predicts(make("residual"), images)
    assert not predicts(Number(), images)
