"""Forms and ranks of all layers: what they cost, what they lose, and the choices of each policy."""

import copy
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from utilized_rank.compression import costs as costs_of
from utilized_rank.compression import policies
from utilized_rank.compression.compressor import Compression
from utilized_rank.compression.costs import (
    Candidate,
    Choices,
    Costs,
    candidates,
    flop_costs,
    latency_costs,
    parameter_costs,
)
from utilized_rank.compression.losses import Line, Losses, Table, curvature_losses, divergence_losses, energy_losses
from utilized_rank.compression.lowrank import Factors, Fit, Target, optimal, saves
from utilized_rank.compression.pairs import bias_of, factorized, substitute
from utilized_rank.compression.policies import Budgets, Cumulative, closest, descend, independent, joint
from utilized_rank.networks import cost
from utilized_rank.networks.evaluation import Labelled
from utilized_rank.ranks.layers import Layer, countable
from utilized_rank.ranks.moments import input_moments
from utilized_rank.ranks.projection import bases, replaced

NETWORKS = ["residual", "vit", "vgg11", "shared"]
FORMS = ["channel", "spatial"]
MEMORY = 64
KINDS = [energy_losses, divergence_losses, curvature_losses]


def fits_of(network: nn.Module, images: Tensor) -> list[Fit]:
    layers = countable(network).layers
    moments = input_moments(network, layers, [images])
    known = [(layer, moments[layer.name]) for layer in layers]
    return [optimal(Target(layer, its, *bases(layer, its), layer.m, layer.n)) for layer, its in known]


def candidates_of(network: nn.Module, images: Tensor, forms: list[str] | None = None) -> list[Candidate]:
    return candidates(fits_of(network, images), forms or FORMS)


def built(network: nn.Module, layers: list[Candidate], choices: Choices) -> nn.Module:
    """A copy of the network in the form of the choices."""
    small = copy.deepcopy(network)
    substitute(small, {c.layer.name: c.module(*choices[c.layer.name]) for c in layers if c.layer.name in choices})
    return small.eval()


def some_ranks(most: int) -> set[int]:
    return {1, most} if most else set()


def sum_of(choices: Choices, table: Costs | Losses) -> float:
    ways = table.ways if isinstance(table, Costs) else table.table({})
    return sum(ways[name][form][rank - 1] for name, (form, rank) in choices.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_candidate_has_the_forms_and_ranks_that_save_weights(make, images, name):
    found = candidates_of(make(name), images)
    assert any("spatial" in c.cuts for c in found) == (name != "shared")
    assert all("channel" in c.cuts for c in found)
    for c in found:
        for form in c.cuts:
            most = c.saving(form)
            assert most == 0 or saves(c.layer, form, most)
            assert not saves(c.layer, form, most + 1)
            assert most < len(c.cuts[form].errors)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["params", "flops"])
def test_costs_are_those_of_the_network_that_is_built(make, images, name, kind):
    """One layer at a time: what the network costs, less the layer, and what replaces it."""
    network = make(name)
    layers = candidates_of(network, images)
    count = cost.parameters if kind == "params" else lambda its: cost.flops(its, images[:1])
    costs = costs_of.COSTS[kind](network, layers, images)
    assert costs.network == count(network)
    for c in layers:
        its = c.layer.name
        assert set(costs.ways[its]) == set(c.cuts)
        for form, of_ranks in costs.ways[its].items():
            assert len(of_ranks) == c.saving(form)
            for rank in some_ranks(c.saving(form)):
                small = built(network, layers, {its: (form, rank)})
                assert count(small) == costs.network - costs.layers[its] + of_ranks[rank - 1]


@pytest.mark.parametrize("kind", ["params", "flops"])
def test_costs_of_several_layers_add_up(make, images, kind):
    network = make("resnet20")
    layers = candidates_of(network, images)
    costs = costs_of.COSTS[kind](network, layers, images)
    choices = {c.layer.name: (form, c.saving(form)) for c in layers for form in c.cuts if c.saving(form)}
    small = built(network, layers, choices)
    expected = costs.network - sum(costs.layers[its] for its in choices) + sum_of(choices, costs)
    assert (cost.parameters(small) if kind == "params" else cost.flops(small, images[:1])) == expected


def test_latencies_are_measured_at_a_few_ranks_and_lie_on_lines_between_them(make, images, monkeypatch):
    """Here every module takes a microsecond a parameter, for each of its calls."""
    network = make("shared")
    layers = candidates_of(network, images)
    asked: list[int] = []

    def latencies(modules: list[nn.Module], inputs: Tensor, seconds: float = 1) -> list[float]:
        asked.append(len(modules))
        return [1e-6 * cost.parameters(module) for module in modules]

    monkeypatch.setattr(cost, "latencies", latencies)
    costs = latency_costs(network, layers, images[:2])
    assert costs.network == 1000 * cost.parameters(network)
    for c in layers:
        calls = 2 if c.layer.name == "block" else 1
        assert costs.layers[c.layer.name] == calls * 1000 * cost.parameters(c.layer.module)
        expected = [calls * 1000 * cost.parameters(c.module("channel", 1 + r)) for r in range(c.saving("channel"))]
        assert costs.ways[c.layer.name]["channel"] == pytest.approx(expected, abs=1)
    assert max(asked) <= 1 + costs_of.POINTS


def test_latencies_of_this_machine_are_of_every_layer_form_and_rank(make, images, monkeypatch):
    network = make("residual")
    layers = candidates_of(network, images)
    monkeypatch.setattr(costs_of, "SECONDS", 0)
    costs = latency_costs(network, layers, images[:2])
    assert min(costs.network, *costs.layers.values()) > 0
    for c in layers:
        ways = costs.ways[c.layer.name]
        assert {form: len(times) for form, times in ways.items()} == {form: c.saving(form) for form in c.cuts}
        assert all(bool((times > 0).all()) and times.dtype == np.int64 for times in ways.values())


def budgets_of(network: nn.Module, images: Tensor, kind: str = "params") -> tuple[list[Candidate], Costs, Losses]:
    layers = candidates_of(network, images)
    return (
        layers,
        costs_of.COSTS[kind](network, layers, images),
        energy_losses(network, layers, images, len(images), MEMORY),
    )


@pytest.mark.parametrize("name", [*NETWORKS, "resnet20"])
@pytest.mark.parametrize("kind", ["params", "flops"])
def test_what_is_built_keeps_the_budget(make, images, name, kind):
    network = make(name)
    layers, costs, losses = budgets_of(network, images, kind)
    budgets = Budgets(layers, costs, losses)
    before = np.inf
    for amount in np.linspace(budgets.least, costs.network, 3).astype(int):
        choices = budgets.within(int(amount))
        small = built(network, layers, choices)
        assert (cost.parameters(small) if kind == "params" else cost.flops(small, images[:1])) <= amount
        assert sum_of(choices, losses) <= before + 1e-12
        before = sum_of(choices, losses)
    # Of FLOPs there are so many that their costs are rounded up, and not all of a budget is spent.
    assert before == 0 if kind == "params" else before < 0.01


def test_a_budget_is_spent_where_it_loses_least(make, images):
    """Against other choices within it, drawn at random."""
    layers, costs, losses = budgets_of(make("residual"), images)
    budgets = Budgets(layers, costs, losses)
    amount = (budgets.least + costs.network) // 2
    best = sum_of(budgets.within(amount), losses)
    draw, tried = np.random.default_rng(0), 0
    for _ in range(1000):
        choices = {}
        for c in layers:
            form = draw.choice(list(c.cuts))
            if c.saving(form) and draw.random() < 0.7:
                choices[c.layer.name] = (form, int(draw.integers(1, c.saving(form) + 1)))
        if costs.network - sum(costs.layers[its] for its in choices) + sum_of(choices, costs) <= amount:
            tried += 1
            assert sum_of(choices, losses) >= best - 1e-12
    assert tried > 50


@pytest.mark.parametrize("kind", ["params", "flops"])
def test_the_smallest_network_is_the_one_of_least_cost(make, images, kind):
    network = make("residual")
    layers, costs, losses = budgets_of(network, images, kind)
    budgets = Budgets(layers, costs, losses)
    small = built(network, layers, budgets.within(budgets.least))
    assert (cost.parameters(small) if kind == "params" else cost.flops(small, images[:1])) == budgets.least
    steps = budgets.steps()
    assert (steps[0], steps[-1], len(steps)) == (budgets.least, costs.network, policies.STEPS + 1)
    assert steps == sorted(steps)


def test_a_budget_below_the_smallest_network_is_refused_with_both_shares(make, images):
    layers, costs, losses = budgets_of(make("residual"), images)
    budgets = Budgets(layers, costs, losses)
    amount = budgets.least - 1
    said = f"a budget of {amount / costs.network:.1%} cannot be kept: "
    said += f"the smallest network costs {budgets.least / costs.network:.1%}"
    with pytest.raises(ValueError, match=said):
        budgets.within(amount)


@torch.no_grad()
def outputs_of(network: nn.Module, layer: Layer, images: Tensor) -> Tensor:
    """What a layer gives, as rows (N, n), float64."""
    seen: list[Tensor] = []
    handle = layer.module.register_forward_hook(lambda *args: seen.append(args[2].double()))
    network(images)
    handle.remove()
    return torch.cat([its if its.ndim < 4 else its.permute(0, 2, 3, 1) for its in seen]).reshape(-1, seen[0].shape[1])


@pytest.mark.parametrize("name", ["stem", "conv1", "conv2", "head"])
def test_energy_losses_are_the_lost_part_of_the_variance_of_the_outputs(make, images, name):
    network = make("residual")
    layers = candidates_of(network, images)
    c = next(c for c in layers if c.layer.name == name)
    losses = energy_losses(network, layers, images, len(images), MEMORY).table({})[name]
    before = outputs_of(network, c.layer, images)
    variance = float((before - before.mean(0)).square().sum())
    assert set(losses) == set(c.cuts)
    for form, of_ranks in losses.items():
        for rank in some_ranks(c.saving(form)):
            with in_two(c.layer, c.cuts[form].factors(rank)):
                off = float((before - outputs_of(network, c.layer, images)).square().sum())
            assert of_ranks[rank - 1] == pytest.approx(off / variance, rel=1e-3, abs=1e-6)


def in_two(layer: Layer, factors: Factors):
    """The layer with the matrix and the bias of factors."""
    return replaced({layer: factors.matrix()}, {layer: bias_of(layer, factors.bias)})


@torch.no_grad()
def divergence(network: nn.Module, small: nn.Module, images: Tensor) -> float:
    """E KL(p, p'), in nats."""
    before, after = (its(images).double().log_softmax(1) for its in (network, small))
    return float((before.exp() * (before - after)).sum(1).mean())


@pytest.mark.parametrize("name", NETWORKS)
def test_divergence_losses_are_measured_with_the_layer_replaced(make, images, name):
    """At the measured ranks; where more ranks were worse, as bad as the worst of them. In between, in between."""
    network = make(name)
    layers = candidates_of(network, images)
    layers = [layers[0], layers[len(layers) // 2], layers[-1]]
    losses = divergence_losses(network, layers, images, len(images), MEMORY).table({})
    for c in layers:
        for form, cut in c.cuts.items():
            most, of_ranks = c.saving(form), losses[c.layer.name][form]
            if not most:
                continue
            ranks = np.unique(np.geomspace(1, most, costs_of.POINTS).round().astype(int))
            direct = []
            for rank in ranks.tolist():
                small = copy.deepcopy(network)
                substitute(small, {c.layer.name: factorized(c.layer, cut.factors(rank))})
                direct.append(divergence(network, small, images))
            expected = np.maximum.accumulate(direct[::-1])[::-1]
            assert of_ranks[ranks - 1] == pytest.approx(expected, rel=1e-3, abs=1e-6)
            assert bool((np.diff(of_ranks[:most]) <= 1e-9).all())


@pytest.mark.parametrize("kind", ["params", "flops"])
def test_what_choices_cost_is_what_the_network_that_is_built_costs(make, images, kind):
    network = make("residual")
    layers, costs, losses = budgets_of(network, images, kind)
    budgets = Budgets(layers, costs, losses)
    count = cost.parameters if kind == "params" else lambda n: cost.flops(n, images[:1])
    for part in (0.4, 0.7, 1.0):
        choices = budgets.within(int(part * budgets.network))
        assert budgets.cost(choices) == count(built(network, layers, choices))


def test_losses_are_of_the_unaltered_network(make, images):
    network = make("residual")
    before = copy.deepcopy(network.state_dict())
    layers = candidates_of(network, images)
    for losses in KINDS:
        losses(network, layers, images, len(images), MEMORY).measured({c.layer.name: ("channel", 1) for c in layers})
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("losses", KINDS)
def test_a_dead_layer_loses_nothing(make, images, losses):
    """It only ever receives zeros."""
    network = make("residual")
    nn.init.constant_(network.stem.weight, 0)
    nn.init.constant_(network.stem.bias, -1)
    layers = candidates_of(network, images)
    found = losses(network, layers, images, len(images), MEMORY)
    assert found.table({})["conv1"]["channel"].max() <= 1e-9
    budgets = Budgets(layers, parameter_costs(network, layers, images), found)
    assert sum_of(budgets.within(budgets.network - 1), found) <= 1e-9


@pytest.mark.parametrize("kind", ["params", "flops"])
@pytest.mark.parametrize("allowed", [0.05, 0.3, 1.0])
def test_a_joint_search_certifies_its_boundary(make, images, kind, allowed):
    """Where the verdict is monotone, it is the smallest budget of all that passes."""
    layers, costs, losses = budgets_of(make("residual"), images, kind)
    budgets = Budgets(layers, costs, losses)

    def passes(choices: Choices) -> bool:
        return sum_of(choices, losses) <= allowed

    found, steps = joint(budgets, passes), budgets.steps()
    assert found.choices == budgets.within(found.budget)
    assert found.tried[found.budget]
    assert not found.tried[steps[steps.index(found.budget) - 1]]
    assert found.budget == min(step for step in steps if passes(budgets.within(step)))
    assert len(found.tried) <= 10


def test_where_nothing_else_passes_the_whole_network_is_left(make, images):
    layers, costs, losses = budgets_of(make("residual"), images)
    found = joint(Budgets(layers, costs, losses), lambda choices: False)
    assert (found.choices, found.budget) == ({}, costs.network)
    assert max(found.tried) == Budgets(layers, costs, losses).steps()[-2]
    assert not any(found.tried.values())


def test_where_everything_passes_the_smallest_network_is_taken(make, images):
    layers, costs, losses = budgets_of(make("residual"), images)
    budgets = Budgets(layers, costs, losses)
    found = joint(budgets, lambda choices: True)
    assert (found.choices, found.budget) == (budgets.within(budgets.least), budgets.least)
    assert found.tried[budgets.least]


def least_by_trying_everything(
    budgets: Budgets, layers: list[Candidate], costs: Costs, table: Table, most: int
) -> float:
    """The least sum of losses of all choices that cost ``most``, by form and rank of every layer."""
    totals = {0: 0.0}  # what is saved, and the least that is lost by it
    for c in layers:
        name = c.layer.name
        options = [(0, 0.0)] + [
            (int(costs.layers[name] - costs.ways[name][form][rank]), float(table[name][form][rank]))
            for form in c.cuts
            for rank in range(c.saving(form))
        ]
        new: dict[int, float] = {}
        for (saved, lost), (more, beside) in product(totals.items(), options):
            new[saved + more] = min(new.get(saved + more, np.inf), lost + beside)
        totals = new
    return min(lost for saved, lost in totals.items() if costs.network - saved <= most)


def three_layers(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    network = nn.Sequential(*layers, *head).eval()
    network[-1].weight.data *= 20  # predictions that depend on the input
    return network


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("part", [0.75, 0.5, 0.35])
def test_budgets_lose_what_the_best_of_all_choices_loses(seed, part):
    """Every form and rank of three layers was measured, and every combination of them tried."""
    network, images = three_layers(seed), torch.randn(48, 1, 10, 10, generator=torch.Generator().manual_seed(seed))
    layers = candidates_of(network, images)
    costs = parameter_costs(network, layers, images)
    losses = curvature_losses(network, layers, images, len(images), MEMORY)
    truth = {
        c.layer.name: {
            form: np.array([_measured(losses, c.layer.name, (form, r + 1)) for r in range(c.saving(form))])
            for form in c.cuts
        }
        for c in layers
    }
    budgets = Budgets(layers, costs, losses)
    most = int(part * budgets.network)
    best = least_by_trying_everything(budgets, layers, costs, truth, most)
    chosen = budgets.within(most)
    assert budgets.cost(chosen) <= most
    assert sum(truth[name][form][rank - 1] for name, (form, rank) in chosen.items()) <= 1.02 * best + 1e-9


def _measured(losses: Losses, name: str, way: tuple[str, int]) -> float:
    return losses.measured({name: way})[name][way]


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_measured_at_a_choice_is_the_divergence_of_the_network_with_it(make, images, name):
    network = make(name)
    layers = candidates_of(network, images)
    losses = curvature_losses(network, layers, images, len(images), MEMORY)
    choices = {c.layer.name: (form, c.saving(form)) for c in layers for form in c.cuts if c.saving(form)}
    found = losses.measured(choices)
    assert set(found) == set(choices)
    for c in layers:
        for way, measured in found.get(c.layer.name, {}).items():
            small = copy.deepcopy(network)
            substitute(small, {c.layer.name: factorized(c.layer, c.cuts[way[0]].factors(way[1]))})
            assert measured == pytest.approx(divergence(network, small, images), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["residual", "vit"])
def test_what_was_measured_stands_in_the_table(make, images, name):
    network = make(name)
    layers = candidates_of(network, images)
    losses = curvature_losses(network, layers, images, len(images), MEMORY)
    choices = {c.layer.name: ("channel", max(1, c.saving("channel") // 2)) for c in layers if c.saving("channel")}
    found = losses.measured(choices)
    largest = max(its for ways in found.values() for its in ways.values())
    table = losses.table(found)
    for its, (form, rank) in choices.items():
        measured = found[its][form, rank]
        assert table[its][form][rank - 1] == pytest.approx(measured, rel=1e-6, abs=2e-3 * largest)


@pytest.mark.parametrize(("power", "slope"), [(0.5, 1.0), (1.0, 1.0), (1.5, 1.5), (2.0, 2.0), (3.0, 2.0)])
@pytest.mark.parametrize("most", [1.5, 10.0])
def test_a_line_has_the_power_that_was_measured_between_1_and_2(power, slope, most):
    """However close the points lie."""
    predicted = np.geomspace(1, most, 8)
    assert Line(predicted, 3 * predicted**power).slope == pytest.approx(slope, abs=0.05)


def test_a_line_through_one_point_is_a_multiple_of_what_was_predicted():
    line = Line(np.array([2.0]), np.array([6.0]))
    np.testing.assert_allclose(line.through(np.array([1.0, 2.0, 4.0]), [], "channel"), [3, 6, 12], rtol=0.01)


def test_a_layer_that_no_gradient_reaches_is_measured(make, images):
    """Without any, all of them are: as the measured losses are."""
    network = make("residual")
    network.register_forward_hook(lambda *args: args[2].detach())
    layers = candidates_of(network, images)
    found = curvature_losses(network, layers, images, len(images), MEMORY).table({})
    expected = divergence_losses(network, layers, images, len(images), MEMORY).table({})
    for name, forms in expected.items():
        for form, losses in forms.items():
            assert np.array_equal(found[name][form], losses)


@pytest.mark.parametrize("allowed", [0.05, 0.3, 1.0])
def test_a_descent_ends_where_no_layer_can_be_made_smaller(make, images, allowed):
    """The last verdict on each layer's next cheaper choice, beside the others as they are in the end, is no."""
    layers, costs, losses = budgets_of(make("residual"), images)
    budgets = Budgets(layers, costs, losses)

    def passes(choices: Choices) -> bool:
        return sum_of(choices, losses) <= allowed

    start = joint(budgets, passes).choices
    choices, tried = descend(budgets, start, passes)
    assert passes(choices)
    assert budgets.cost(choices) <= budgets.cost(start)
    assert budgets.cost(choices) == min([budgets.cost(start), *(step.cost for step in tried if step.passes)])
    for name in budgets.names:
        for way in budgets.cheaper(choices, name)[:1]:
            smaller = choices | {name: way}
            assert not passes(smaller)
            last = [step for step in tried if (step.cuts, step.cost) == ({name: way}, budgets.cost(smaller))]
            assert last
            assert not last[-1].passes


def test_a_descent_from_the_whole_network_to_the_smallest_takes_few_steps(make, images):
    """Steps double while they pass."""
    layers, costs, losses = budgets_of(make("vgg11"), images)
    budgets = Budgets(layers, costs, losses)
    choices, tried = descend(budgets, {}, lambda choices: True)
    assert budgets.cost(choices) == budgets.least
    assert len(tried) <= sum(1 + np.log2(1 + len(budgets.cheaper({}, name))) for name in budgets.names)


def test_cheaper_choices_fall_in_cost_and_rise_in_loss(make, images):
    layers, costs, losses = budgets_of(make("residual"), images)
    budgets = Budgets(layers, costs, losses)
    for name in budgets.names:
        ways = budgets.cheaper({}, name)
        of = [(costs.ways[name][form][rank - 1], budgets.loss(name, (form, rank))) for form, rank in ways]
        assert all(a[0] > b[0] and a[1] < b[1] for a, b in pairwise(of))
        for k, way in enumerate(ways):
            assert budgets.cheaper({name: way}, name) == ways[k + 1 :]


@pytest.mark.parametrize("name", ["residual", "resnet20", "vgg11"])
def test_the_closest_way_has_no_more_flops_and_no_more_error(make, images, name):
    """Than the channel form at its rank, nor has any other way of both forms within these FLOPs less error."""
    network = make(name)
    layers = candidates_of(network, images)
    flops = flop_costs(network, layers, images)
    taken = set()
    for c in layers:
        ways = flops.ways[c.layer.name]
        for rank in some_ranks(c.saving("channel")):
            form, its = closest(c, rank, flops)
            taken.add(form)
            most = ways["channel"][rank - 1]
            assert ways[form][its - 1] <= most
            errors = [
                float(c.cuts[other].errors[r])
                for other in c.cuts
                for r in range(1, c.saving(other) + 1)
                if ways[other][r - 1] <= most
            ]
            error = float(c.cuts[form].errors[its])
            assert error == min(errors)
            assert error <= float(c.cuts["channel"].errors[rank])
    assert taken == set(FORMS)  # each is the better one somewhere


def test_independent_ranks_are_taken_where_they_save_weights(make, images):
    network = make("resnet20")
    layers = candidates_of(network, images)
    flops = flop_costs(network, layers, images)
    ranks = {c.layer.name: c.layer.width // 2 for c in layers[1:]}
    ranks[layers[3].layer.name] = layers[3].layer.width
    choices = independent(ranks, layers, flops)
    assert set(choices) == {c.layer.name for c in layers[1:3] + layers[4:] if c.saving("channel") >= c.layer.width // 2}
    for c in layers:
        if c.layer.name in choices:
            assert choices[c.layer.name] == closest(c, ranks[c.layer.name], flops)


def test_with_the_channel_form_alone_independent_ranks_are_as_given(make, images):
    network = make("resnet20")
    layers = candidates_of(network, images, ["channel"])
    flops = flop_costs(network, layers, images)
    ranks = {c.layer.name: 1 + i % 2 for i, c in enumerate(layers) if c.saving("channel") > 1}
    assert independent(ranks, layers, flops) == {name: ("channel", rank) for name, rank in ranks.items()}


@pytest.mark.parametrize(("found", "passes"), [(0.7, True), (0.7 - 1e-6, False)])
def test_searches_take_what_is_at_their_tolerance_however_floats_are_rounded(found, passes):
    """0.8 - 0.1 is more than 0.7 in floats."""
    torch.manual_seed(0)
    network, inputs = nn.Sequential(nn.Linear(8, 8)), torch.randn(20, 8)
    moments = input_moments(network, countable(network).layers, [inputs])

    def score(its: nn.Module) -> float:
        whole = isinstance(its[0], nn.Linear) and its[0].weight.equal(network[0].weight)
        return 0.8 if whole else found

    made = Compression(network, moments, inputs, score, losses="energy")
    expected = {"0": ("channel", 1)} if passes else {}
    assert made.cumulative("optimal", 0.1) == expected
    assert made.joint("optimal", 0.1).choices == expected


class Search:
    """A cumulative search on a copy of a network, whose own predictions are the labels but for every tenth image."""

    def __init__(self, network: nn.Module, images: Tensor, epsilon: float, forms: list[str]) -> None:
        self.images, self.epsilon, self.forms = images, epsilon, forms
        self.fits, self.small = fits_of(network, images), copy.deepcopy(network)
        with torch.no_grad():
            self.labels = network(images).argmax(1)
        self.labels[::10] = (self.labels[::10] + 1) % 5
        self.flops = flop_costs(network, candidates(self.fits, forms), images)
        layers = [fit.layer for fit in self.fits]
        self.search = Cumulative(self.small, layers, forms, self.flops, Labelled(images, self.labels), epsilon, MEMORY)
        self.before = self.right(self.small)

    @torch.no_grad()
    def right(self, network: nn.Module) -> int:
        return int((network(self.images).argmax(1) == self.labels).sum())

    def with_way(self, fit: Fit, form: str, rank: int) -> nn.Module:
        """The network so far with one layer more in two."""
        small = copy.deepcopy(self.small)
        cut = candidates([fit], self.forms)[0].cuts[form]
        substitute(small, {fit.layer.name: factorized(fit.layer, cut.factors(rank))})
        return small

    def needed(self, place: int) -> float:
        return self.before - self.epsilon / 100 * len(self.labels) * place / len(self.fits) - 1e-9


@pytest.mark.parametrize("forms", [["channel"], FORMS], ids=str)
@pytest.mark.parametrize("epsilon", [0.0, 10.0, 40.0])
@pytest.mark.parametrize("name", ["residual", "vit"])
def test_after_each_layer_no_more_than_its_part_of_the_tolerance_is_gone(make, images, name, epsilon, forms):
    """And at one rank less more would be."""
    state = Search(make(name), images, epsilon, forms)
    replaced_layers = 0
    for place, fit in enumerate(state.fits, 1):
        candidate = candidates([fit], forms)[0]
        ways = {r: closest(candidate, r, state.flops) for r in range(1, candidate.saving("channel") + 1)}
        factors, needed = state.search.choose(fit), state.needed(place)
        if factors is None:
            assert not ways or state.right(state.with_way(fit, *ways[max(ways)])) < needed
            continue
        ranks = [rank for rank, way in ways.items() if way == (factors.form, factors.rank)]
        assert ranks[0] == 1 or state.right(state.with_way(fit, *ways[ranks[0] - 1])) < needed
        substitute(state.small, {fit.layer.name: factorized(fit.layer, factors)})
        assert state.right(state.small) >= needed
        replaced_layers += 1
    assert replaced_layers > (0 if epsilon else -1)


@pytest.mark.parametrize("forms", [["channel"], FORMS], ids=str)
@pytest.mark.parametrize("name", ["residual", "shared", "data_dependent"])
def test_where_everything_passes_all_ranks_are_1(make, images, name, forms):
    """In the channel form, or whatever is closer at no more FLOPs."""
    state = Search(make(name), images, 100 * len(countable(make(name)).layers), forms)
    for fit in state.fits:
        candidate = candidates([fit], forms)[0]
        factors = state.search.choose(fit)
        if candidate.saving("channel"):
            assert (factors.form, factors.rank) == closest(candidate, 1, state.flops)
        else:
            assert factors is None


def test_a_search_leaves_the_layer_as_it_is(make, images):
    """It is up to the caller to replace it."""
    state = Search(make("residual"), images, 20.0, FORMS)
    before = copy.deepcopy(state.small.state_dict())
    for fit in state.fits:
        state.search.choose(fit)
    assert all(torch.equal(value, before[name]) for name, value in state.small.state_dict().items())
