"""What a change of a layer costs the predictions, from one backward pass, and the inputs that it is taken over."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from utilized_rank.networks.batches import Arguments
from utilized_rank.networks.each import in_turn
from utilized_rank.ranks import curvature as of_curvature
from utilized_rank.ranks.curvature import _inclusion, _root, curvature, sample
from utilized_rank.ranks.layers import Layer, countable


def curvature_of_logits(logits: Tensor) -> Tensor:
    """E[diag(p) - p^T p], float64."""
    p = logits.double().softmax(-1).flatten(0, -2)
    return (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)


@pytest.mark.parametrize("shape", [(60_000, 4), (6000, 10, 4), (600, 4, 10, 10)])
def test_the_root_has_the_curvature_of_the_divergence_as_its_second_moment(shape):
    """Of classes, of sequences, and of pixels; divided by their number, so that it is of the mean over positions."""
    logits = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    classes = 1 if len(shape) != 3 else 2
    v = _root(logits, torch.full((shape[0],), 1 / shape[0]), torch.Generator().manual_seed(1))
    rows = v.movedim(classes, -1).reshape(-1, 4).double()
    torch.testing.assert_close(rows.T @ rows, curvature_of_logits(logits.movedim(classes, -1)), rtol=0.03, atol=2e-3)
    assert rows.sum(1).abs().max() < 1e-5  # adding to all logits alike changes nothing


@pytest.mark.parametrize("sharp", [1.0, 6.0])
def test_a_small_change_of_a_layer_costs_what_the_curvature_says(sharp):
    """tr(D^T C D G) / 2 nats, for one input, whose rows and gradients have nothing to depend on."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double().eval()
    network[2].weight.data *= sharp
    x = torch.randn(1, 5, dtype=torch.float64)
    layers = countable(network).layers
    found = curvature(network, layers, x.repeat(40_000, 1), batch_size=10_000)
    network.requires_grad_(False)
    before = network(x).log_softmax(1)
    for layer, rows in zip(layers, (x, network[:2](x)), strict=True):
        change = 1e-3 * torch.randn(layer.weight()[0].shape, dtype=torch.float64)
        predicted = float(torch.trace(change.T @ rows.T @ rows @ change @ found[layer.name][0])) / 2
        original = layer.module.weight.data.clone()
        layer.module.weight.data += change.T
        after = network(x).log_softmax(1)
        layer.module.weight.data.copy_(original)
        assert predicted == pytest.approx(float((before.exp() * (before - after)).sum()), rel=0.05)


def test_sums_of_chunks_are_the_same_to_the_bit_wherever_they_are_made(make, images, monkeypatch, elsewhere):
    monkeypatch.setattr(of_curvature, "CHUNK", 20)
    network = make("vit")
    here, there = (
        curvature(network, countable(network).layers, images, None, 8, each) for each in (in_turn, elsewhere)
    )
    assert here.keys() == there.keys()
    assert len(here) == len(countable(network).layers)
    assert all(torch.equal(its, there[name]) for name, its in here.items())
    monkeypatch.setattr(of_curvature, "CHUNK", 1000)
    whole = curvature(network, countable(network).layers, images, None, 8)
    for name, its in here.items():
        torch.testing.assert_close(its, whole[name])


class Everything(nn.Module):
    """Groups, values that are overwritten, a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.twice = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        inside = self.grouped(torch.relu_(self.first(images))).relu_().mean((2, 3))
        return self.head(self.twice(self.twice(inside).tanh_()))


def test_the_second_moment_of_gradients_is_summed_over_positions_and_calls():
    """Against the gradients themselves: those of a change that is added to the layer's outputs, image by image."""
    torch.manual_seed(0)
    network, images = Everything().eval(), torch.randn(8, 3, 7, 7)
    found = curvature(network, countable(network).layers, images, batch_size=8)
    v = _root(network(images), torch.full((8,), 1 / 8), torch.Generator().manual_seed(0))
    for layer in countable(network).layers:
        gradients: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Tensor], outputs: Tensor, seen: list[Tensor] = gradients) -> Tensor:
            added = torch.zeros_like(outputs, requires_grad=True)
            seen.append(added)
            return outputs + added

        handle = layer.module.register_forward_hook(hook)
        its = torch.autograd.grad(network(images), gradients, v)
        handle.remove()
        rows = [(g if g.ndim == 2 else g.permute(0, 2, 3, 1)).reshape(-1, layer.groups, layer.n) for g in its]
        expected = torch.einsum("pgi,pgj->gij", torch.cat(rows), torch.cat(rows)).double()
        torch.testing.assert_close(found[layer.name], expected, rtol=1e-4, atol=1e-8)
        assert len(gradients) == (2 if layer.name == "twice" else 1)


def test_it_needs_no_parameter_that_is_learned_and_leaves_no_trace():
    network, images = Everything(), torch.randn(8, 3, 7, 7)
    layers = countable(network).layers
    found = curvature(network, layers, images)
    random = torch.get_rng_state()
    frozen = curvature(network.requires_grad_(False), layers, images)
    with torch.inference_mode():
        inside = curvature(network, layers, images * 1)
    assert all(torch.equal(its, frozen[name]) and torch.equal(its, inside[name]) for name, its in found.items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks for module in network.modules())


def test_a_network_without_a_gradient_has_none():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    network.register_forward_hook(lambda *args: args[2].round().detach())
    assert curvature(network, countable(network).layers, torch.randn(4, 4)) == {}


class OfWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, words: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.words(words) * scale[:, None, None])}


def test_language_models_and_arguments_by_name_have_one():
    network = OfWords()
    inputs = Arguments({"words": torch.randint(0, 11, (40, 6)), "scale": torch.rand(40)})
    whole = sample(network, inputs, 40)
    assert set(curvature(network, countable(network).layers, whole.inputs, whole.weights)) == {"head"}
    some = sample(network, inputs, 7)
    assert len(some.inputs) == len(some.weights) == 7
    assert curvature(network, [Layer("head", network.head)], some.inputs, some.weights)["head"].shape == (1, 11, 11)


class Confident(nn.Module):
    """Sure of most inputs, as a trained network is."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def confident(count: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(count, 5, generator=draw)
    logits[:, 0] += 12 * torch.rand(count, generator=draw)
    return logits


def test_a_few_unsure_inputs_tell_more_than_as_many_at_random():
    """The same layer on top of all inputs, and of samples of them."""
    logits = confident(2000)
    network = nn.Sequential(Confident())
    truth = curvature_of_logits(logits)

    def off(its: Tensor, weights: Tensor) -> float:
        p = its.double().softmax(1)
        each = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return float(((weights[:, None, None] * each).sum(0) - truth).norm() / truth.norm())

    some = sample(network, logits, 100)
    drawn = off(some.inputs, some.weights)
    at_random = [off(logits[torch.randperm(2000)[:100]], torch.full((100,), 1 / 100)) for _ in range(50)]
    assert drawn < np.quantile(at_random, 0.25)
    assert drawn < 0.1


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0, 8), st.integers(0, 10))
def test_a_sample_has_so_many_inputs_whose_weights_are_those_of_all(count, total, sharp, seed):
    logits = sharp * torch.randn(total, 3, generator=torch.Generator().manual_seed(seed))
    network = nn.Sequential(Confident())
    some = sample(network, logits, count)
    assert len(some.inputs) == len(some.weights) == min(count, total)
    assert torch.equal(some.logits, network(some.inputs))
    # Each input stands for itself at least, and for no more than it would if it were drawn from all alike.
    assert float(some.weights.min()) >= 1 / total - 1e-6
    assert torch.equal(some.weights, sample(network, logits, count).weights)


@given(st.lists(st.floats(1e-3, 1), min_size=1, max_size=30), st.data())
def test_probabilities_of_being_drawn_sum_to_the_number_that_is_drawn(sizes, data):
    count = data.draw(st.integers(1, len(sizes)))
    share = torch.tensor(sizes, dtype=torch.float64)
    found = _inclusion(share / share.sum(), count)
    assert float(found.sum()) == pytest.approx(count)
    assert float(found.max()) <= 1 + 1e-12
    below = found < 1
    if below.any():
        ratio = (found / share)[below]
        assert float(ratio.max()) == pytest.approx(float(ratio.min()))


def test_a_mean_over_a_sample_is_near_the_mean_over_all():
    """Of what lies in the unsure inputs, such as 1 - sum p^2 itself, much nearer than over the first ones."""
    logits = confident(3000)
    some = sample(nn.Sequential(Confident()), logits, 150)

    def unsure(its: Tensor) -> Tensor:
        return 1 - F.softmax(its, 1).square().sum(1)

    whole = float(unsure(logits).mean())
    assert float((some.weights * unsure(some.inputs)).sum()) == pytest.approx(whole, rel=0.05)
