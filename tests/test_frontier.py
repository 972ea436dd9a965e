import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from utilized_rank.base.sections import StudyError
from utilized_rank.compression.compressor import Compression, in_call_order
from utilized_rank.compression.costs import Choices
from utilized_rank.compression.decomposition import Decomposition
from utilized_rank.compression.policies import STEPS
from utilized_rank.datasets.sections import Augmentation
from utilized_rank.networks import cost
from utilized_rank.networks.evaluation import is_correct, outputs
from utilized_rank.ranks.layers import countable
from utilized_rank.ranks.moments import input_moments
from utilized_rank.report.figures import frontier as figures
from utilized_rank.stages import decompose, frontier
from utilized_rank.stages.frontier import boundaries_table, choices_table, paths_table, untrained
from utilized_rank.study.config import parse_study
from utilized_rank.study.sections import Frontier, Policy
from utilized_rank.training import loop as training
from utilized_rank.training import models
from utilized_rank.training.sections import Finetune, Model

METHODS = ["projection", "optimal", "svd", "compensated"]
MODELS = {
    "resnet20": Model(architecture="resnet20", width=0.25),
    "vit": Model(architecture="vit", dim=24, depth=2, heads=3, patch_size=4),
}
POLICIES = [
    Policy(search="independent", epsilon=5.0),
    Policy(search="cumulative", epsilon=5.0),
    Policy(search="cumulative", epsilon=5.0, weights="optimal"),
    Policy(search="joint", epsilon=5.0),
    Policy(budget={"params": 0.6}),
    Policy(budget={"flops": 0.6}),
]


def asked(**how: object) -> Frontier:
    rest = {"methods": METHODS, "ranks": POLICIES[:1], "images": 64, "loss_images": 32, "latency_images": 4}
    return Frontier(**rest | {"finetune": {"epochs": 1, "lr": 0.01}} | how)


@pytest.fixture(scope="module")
def trained():
    """Networks that tell the toy's two classes apart, by name."""
    from conftest import toy_dataset

    networks = {}
    for name, model in MODELS.items():
        torch.manual_seed(0)
        networks[name] = models.build(model, (1, 8, 8), 2)
        recipe = Finetune(epochs=8, lr=3e-3, batch_size=32)
        generator = torch.Generator().manual_seed(0)
        training.train_supervised(networks[name], toy_dataset(), recipe, generator, "float32", name)
    return networks


def thirds(network: nn.Module) -> pd.DataFrame:
    """As if a third of each width had been found."""
    third = {layer.name: -(-layer.width // 3) for layer in countable(network).layers}
    return pd.DataFrame([{"layer": x, "epsilon": 5.0, "k_s": k + 1, "k_t": k, "r": k} for x, k in third.items()])


def choices_of(made: Compression, policy: Policy) -> Choices:
    return frontier.choices(made, policy, thirds(made.network))


@pytest.fixture
def compression(trained, dataset):
    """Of a network by name."""

    def of(name: str, **how: object) -> Compression:
        network = trained[name].eval()
        moments = input_moments(network, countable(network).layers, [dataset.inputs("train")[:]])
        return frontier.compression(network, moments, dataset, asked(**how), 2048)

    return of


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.name} {p.weights}")
def test_every_method_gives_a_network_of_the_forms_and_ranks_that_were_chosen(compression, dataset, name, policy):
    made = compression(name)
    chosen = choices_of(made, policy)
    before = outputs(made.network, dataset.inputs("test"))
    for method in METHODS:
        small = made.build(method, chosen)
        assert {layer: tuple(how[:2]) for layer, how in small.forms.items()} == chosen
        for layer in made.layers:
            assert isinstance(small.network.get_submodule(layer), nn.Sequential) == (layer in chosen)
        assert outputs(small.network, dataset.inputs("test")).isfinite().all()
    assert torch.equal(outputs(made.network, dataset.inputs("test")), before)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("kind", "share"), [("params", 0.7), ("params", 0.4), ("flops", 0.7), ("flops", 0.5)])
def test_a_budget_is_kept_by_the_whole_network_and_nearly_used(compression, dataset, name, kind, share):
    made = compression(name)
    count = cost.parameters if kind == "params" else lambda n: cost.flops(n, dataset.inputs("test")[:1])
    for method in ("optimal", "compensated"):
        small = made.build(method, choices_of(made, Policy(budget={kind: share}))).network
        assert count(small) <= share * count(made.network)
        assert count(small) > (share - 0.03) * count(made.network)


def test_a_budget_of_time_is_kept_as_it_was_measured(compression, dataset, monkeypatch):
    """Here the clock counts parameters: in nanoseconds, the network and its layers alike."""

    def latencies(modules: list[nn.Module], inputs: torch.Tensor, seconds: float = 0.2) -> list[float]:
        return [1e-9 * cost.parameters(module) for module in modules]

    monkeypatch.setattr(cost, "latencies", latencies)
    made = compression("resnet20")
    small = made.build("optimal", choices_of(made, Policy(budget={"latency": 0.6}))).network
    parts = cost.parameters(small) / cost.parameters(made.network)
    assert 0.55 < parts < 0.62  # straight lines lie between the ranks that were measured


def test_a_budget_that_cannot_be_kept_says_what_can(compression):
    with pytest.raises(StudyError, match=r"a budget of 0\.1% cannot be kept: the smallest network costs \d"):
        choices_of(compression("resnet20"), Policy(budget={"params": 0.001}))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("search", ["joint", "cumulative"])
@pytest.mark.parametrize("weights", ["optimal", "compensated"])
def test_ranks_that_compose_keep_the_whole_network_within_the_tolerance(compression, dataset, name, search, weights):
    made = compression(name)
    inputs, labels = dataset.inputs("search"), dataset.labels("search")
    # A joint search of compensated networks fits every layer of each that it tries: one is enough.
    for epsilon in (0.0, 10.0) if (search, weights) != ("joint", "compensated") else (10.0,):
        chosen = choices_of(made, Policy(search=search, epsilon=epsilon, weights=weights))
        small = made.build(weights, chosen).network
        lost = is_correct(made.network, inputs, labels).mean() - is_correct(small, inputs, labels).mean()
        assert 100 * lost <= epsilon + 1e-9


def test_a_joint_search_is_certified_by_networks_that_were_really_built(compression, dataset):
    made = compression("resnet20")
    found = made.joint("optimal", 2.5)
    inputs, labels = dataset.inputs("search"), dataset.labels("search")
    needed = is_correct(made.network, inputs, labels).mean() - 0.025
    steps = made.budgets("params").steps()
    assert len(steps) == STEPS + 1
    for budget, verdict in found.tried.items():
        small = made.build("optimal", made.budgets("params").within(budget)).network
        assert (is_correct(small, inputs, labels).mean() >= needed - 1e-9) == verdict
    below = steps.index(found.budget) - 1
    assert below < 0 or found.tried[steps[below]] is False
    small = made.build("optimal", found.choices).network
    assert is_correct(small, inputs, labels).mean() >= needed - 1e-9
    assert made.budgets("params").cost(found.choices) <= found.budget
    # No layer can be made smaller by itself: what says so was tried beside the others as they are.
    for name in made.layers:
        for way in made.budgets("params").cheaper(found.choices, name)[:1]:
            smaller = found.choices | {name: way}
            small = made.build("optimal", smaller).network
            assert is_correct(small, inputs, labels).mean() < needed - 1e-9
            asked = ({name: way}, made.budgets("params").cost(smaller), False)
            assert asked in [(s.cuts, s.cost, s.passes) for s in found.descent]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_from_a_network_that_was_built_another_one_is_what_it_is_from_the_original(compression, dataset, name, method):
    """Whichever layer is the first to change: smaller, whole, or in two where it was not."""
    made = compression(name)
    chosen = choices_of(made, Policy(budget={"params": 0.5}))
    known = made.build(method, chosen)
    names = list(chosen)
    for at in (0, len(names) // 2, len(names) - 1):
        form, rank = chosen[names[at]]
        for change in ({names[at]: (form, max(1, rank // 2))}, None):
            choices = chosen | change if change else {n: way for n, way in chosen.items() if n != names[at]}
            here, anew = made._from(known, method, choices, {}), made.build(method, choices)
            assert here.forms == anew.forms
            for its, other in zip(here.network.parameters(), anew.network.parameters(), strict=True):
                torch.testing.assert_close(its, other, rtol=1e-4, atol=1e-5)
    assert known.choices() == chosen


def test_what_a_cumulative_search_finds_is_taken_only_where_it_passes(compression, monkeypatch):
    """Here it finds the smallest network that there is, which keeps less of the accuracy than it has to."""
    made = compression("resnet20")
    budgets = made.budgets("params")
    least = budgets.within(budgets.least)
    needed = made.score(made.network) - 1.0
    assert made.score(made.build("optimal", least).network) < needed
    monkeypatch.setattr(made, "cumulative", lambda method, epsilon: least)
    found = made.joint("optimal", 1.0)
    assert found.cumulative is None
    assert made.score(made.build("optimal", found.choices).network) >= needed - 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_no_cumulative_network_is_smaller_than_the_joint_one(compression, name):
    made = compression(name)
    cost_of = made.budgets("params").cost
    joint = choices_of(made, Policy(search="joint", epsilon=5.0))
    cumulative = choices_of(made, Policy(search="cumulative", epsilon=5.0))
    assert cost_of(joint) <= cost_of(cumulative)
    found = made.joint("compensated", 5.0)
    assert found.cumulative in (None, cost_of(cumulative))
    assert cost_of(joint) <= (found.cumulative or found.budget)


def test_the_paper_s_projection_is_at_the_dimensions_that_were_found(compression, dataset):
    """As the study's own decomposition has it, where every layer takes the channel form."""
    made = compression("vit")
    policy = Policy(search="independent", epsilon=5.0)
    assert set(frontier.dimensions(made, policy, thirds(made.network)).values()) > {(9, 8)}
    assert frontier.dimensions(made, Policy(budget={"params": 0.5}), thirds(made.network)) == {}
    dimensions = frontier.dimensions(made, policy, thirds(made.network))
    small = made.build("projection", choices_of(made, policy), dimensions).network
    expected = Decomposition(made.network, thirds(made.network), made.moments, made.inputs[:1]).build("projection", 5.0)
    torch.testing.assert_close(
        outputs(small, dataset.inputs("test")), outputs(expected.network, dataset.inputs("test")), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("search", ["joint", "cumulative"])
def test_a_tolerance_finer_than_one_search_image_is_refused(compression, search):
    with pytest.raises(StudyError, match=rf"the frontier's {search}-0\.01 has 0\.01 points, but one of the"):
        choices_of(compression("resnet20"), Policy(search=search, epsilon=0.01))


def test_where_nothing_before_a_layer_was_replaced_compensated_weights_are_the_optimum(compression, dataset):
    """On the same images; from the second layer that is replaced on, they are not."""
    made = compression("resnet20", images=96)
    chosen = choices_of(made, Policy(budget={"params": 0.5}))
    first = next(iter(chosen))

    def apart(choices):
        """The largest difference of a logit."""
        networks = [made.build(method, choices).network for method in ("optimal", "compensated")]
        optimal, compensated = [outputs(network, dataset.inputs("test")) for network in networks]
        return float((optimal - compensated).abs().max())

    assert apart({first: chosen[first]}) < 1e-3
    assert apart(chosen) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_compensated_logits_are_closer_to_the_originals_than_those_of_the_optimum(compression, dataset, name):
    made = compression(name)
    chosen = choices_of(made, Policy(budget={"params": 0.25}))
    before = outputs(made.network, dataset.inputs("test"))
    off = {m: (outputs(made.build(m, chosen).network, dataset.inputs("test")) - before).norm() for m in METHODS}
    assert off["compensated"] < off["optimal"] < off["svd"]


def test_layers_are_in_the_order_of_calls(compression, trained):
    layers = countable(trained["vit"]).layers
    shuffled = [layers[i] for i in (4, 1, 0, 3, 2, *range(5, len(layers)))]
    ordered = in_call_order(trained["vit"], shuffled, torch.zeros(1, 1, 8, 8))
    assert [layer.name for layer in ordered] == [layer.name for layer in layers]


def test_a_network_from_random_weights_has_the_forms_and_the_size_of_the_compressed_one(compression, dataset):
    made = compression("resnet20")
    small = made.build("compensated", choices_of(made, Policy(budget={"params": 0.5})))
    other = untrained(MODELS["resnet20"], dataset.shape, 2, "fused", small.forms)
    shapes = [{name: t.shape for name, t in n.state_dict().items()} for n in (small.network, other)]
    assert shapes[0] == shapes[1]
    assert not torch.equal(outputs(other, dataset.inputs("test")), outputs(small.network, dataset.inputs("test")))


def test_what_is_saved_is_loaded_again(compression, dataset, tmp_path):
    made = compression("resnet20")
    small = made.build("compensated", choices_of(made, Policy(budget={"params": 0.5})))
    assert "spatial" in {form for form, *_ in small.forms.values()}
    decompose.save(small, tmp_path / "small.safetensors")
    again = decompose.load(made.network, tmp_path / "small.safetensors")
    assert torch.equal(outputs(again, dataset.inputs("test")), outputs(small.network, dataset.inputs("test")))


def study(parameters: dict):
    return parse_study(parameters | {"seed": 3, "threads": torch.get_num_threads()})


RECIPE = Finetune(epochs=2, lr=1e-3, batch_size=32)


def tuned(network: nn.Module, dataset, parameters: dict, **how: object) -> list[training.Tuned]:
    recipe = RECIPE.model_copy(update=how)
    return training.finetune(network, network, dataset, recipe, 0, "frontier toy", "float32", "toy")


def test_of_several_learning_rates_the_best_on_the_search_split_is_taken(trained, dataset, parameters):
    torch.manual_seed(0)
    network = models.build(MODELS["resnet20"], (1, 8, 8), 2)  # untrained: small steps do not suffice
    alone = {lr: tuned(network, dataset, parameters, lr=lr)[0] for lr in (1e-6, 1e-2)}
    accuracy = {lr: one.curve.search_accuracy.iloc[-1] for lr, one in alone.items()}
    assert accuracy[1e-2] > accuracy[1e-6]
    (best,) = tuned(network, dataset, parameters, lr=1e-6, lrs=[1e-2])
    assert best.lr == 1e-2
    assert best.curve.equals(alone[1e-2].curve)


def test_a_learning_rate_whose_loss_does_not_stay_finite_is_out_unless_there_is_no_other(trained, dataset, parameters):
    network = trained["resnet20"]
    (alone,) = tuned(network, dataset, parameters, optimizer="sgd")
    (found,) = tuned(network, dataset, parameters, optimizer="sgd", lrs=[1e30])
    assert (found.lr, found.curve.equals(alone.curve)) == (alone.lr, True)
    with pytest.raises(FloatingPointError, match="smaller lr"):
        tuned(network, dataset, parameters, optimizer="sgd", lr=1e30)


def test_statistics_are_those_of_the_training_images_as_they_flow_through(trained, dataset):
    network = trained["resnet20"].eval()
    before = copy.deepcopy(network.state_dict())
    other = training.with_statistics(network, dataset, 10_000, Augmentation(), torch.Generator())
    norm = next(m for m in other.modules() if isinstance(m, nn.BatchNorm2d))
    count = len(dataset.splits["train"])
    seen = network.conv1(dataset.inputs("train")[: count if count < 256 else count // 256 * 256])
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not other.training


def test_seeds_differ_and_the_first_is_that_of_one_seed_alone(trained, dataset, parameters):
    network = trained["resnet20"]
    before = copy.deepcopy(network.state_dict())
    three = tuned(network, dataset, parameters, seeds=3)
    (alone,) = tuned(network, dataset, parameters)
    assert len(three) == 3
    assert three[0].curve.equals(alone.curve)
    assert not three[1].curve.loss.equals(three[2].curve.loss)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_distillation_has_no_loss_where_predictions_are_the_teachers():
    teacher, images = nn.Linear(4, 3), torch.randn(6, 4)
    logits = teacher(images).detach()
    assert float(training.distillation(logits + 5, teacher, images)) == pytest.approx(0, abs=1e-5)
    assert float(training.distillation(-logits, teacher, images)) > 0


def test_distilled_networks_follow_the_original_and_not_the_labels(dataset, parameters):
    """The original takes one class for the other."""
    original = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        half = torch.cat([torch.ones(32), -torch.ones(32)])
        original[1].weight.copy_(torch.stack([-half, half]))
        original[1].bias.zero_()
    accuracy = {}
    for weight in (0.0, 1.0):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        recipe = RECIPE.model_copy(update={"epochs": 10, "lr": 1e-2, "distillation": weight})
        (one,) = training.finetune(network, original, dataset, recipe, 0, "frontier toy", "float32", "toy")
        accuracy[weight] = one.curve.search_accuracy.iloc[-1]
    assert accuracy[0.0] > 90
    assert accuracy[1.0] < 10


def test_the_tables_say_what_was_chosen_and_what_was_tried(compression):
    made = compression("resnet20")
    choices = {p.name: choices_of(made, p) for p in (POLICIES[3], POLICIES[4])}
    table = choices_table(choices, made.layers)
    assert len(table) == 2 * len(made.layers)
    for name, chosen in choices.items():
        rows = table[table.ranks == name].set_index("layer")
        small = made.build("svd", chosen).network  # which adds no bias
        assert rows.weights.sum() == sum(
            p.numel()
            for layer in made.layers
            for n, p in small.get_submodule(layer).named_parameters()
            if "bias" not in n
        )
        assert {layer for layer, form in rows.form.items() if form == "whole"} == set(made.layers) - set(chosen)
    tried = boundaries_table(frontier.boundaries(made, POLICIES), cost.parameters(made.network))
    assert set(tried.ranks) == {"joint-5"}
    assert tried.budget[tried.path == "budgets"].is_monotonic_increasing
    assert tried.kept.between(0, 1).all()
    paths = paths_table(tried)
    assert paths.tried.sum() == len(tried)
    assert paths.kept.is_monotonic_decreasing
    joint = made.budgets("params").cost(choices_of(made, next(p for p in POLICIES if p.search == "joint")))
    assert paths.kept.iloc[-1] == joint / cost.parameters(made.network)


def results() -> pd.DataFrame:
    draw = np.random.default_rng(0)
    rows = []
    for form, method, ranks, seed in (
        ("original", "dense", "all", None),
        ("decomposed", "compensated", "joint-0.5", None),
        ("decomposed", "svd", "params-0.5", None),
        ("fine-tuned", "dense", "all", 0),
        ("fine-tuned", "compensated", "params-0.5", 0),
        ("fine-tuned", "compensated", "params-0.5", 1),
    ):
        low, change, high = np.sort(draw.uniform(-40, 1, 3)) if form != "original" else (0.0, 0.0, 0.0)
        costs = {"parameters": 1000 if method == "dense" else 500, "flops": 10_000 if method == "dense" else 4000}
        about = {"form": form, "method": method, "ranks": ranks, "seed": seed, "accuracy": 90 + change}
        rows.append(about | {"change": change, "change_low": low, "change_high": high} | costs)
    return pd.DataFrame(rows).astype({"seed": "Int64"})


def test_the_frontier_has_a_mark_for_every_network_of_the_first_seed_at_its_cost():
    others = figures.published(Model(architecture="resnet20"), "CIFAR10")
    table = results()
    figure = figures.frontier(table, "ResNet-20", others)
    shown = table[(table.form != "original") & (table.seed.fillna(0) == 0)]
    for axes, column in zip(figure.axes, ("parameters", "flops"), strict=True):
        at = [tuple(mark.get_offsets()[0]) for mark in axes.collections]
        assert at == [
            (cost_ / table[column][0], change) for cost_, change in zip(shown[column], shown.change, strict=True)
        ]
        named = [text.get_text() for text in axes.texts]
        assert named == others[others[f"{column}_kept"].notna()].work.tolist()
    assert figure.axes[0].get_yscale() == "symlog"
    words = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert {"compensated", "SVD of W", "dense", "joint", "params", "before training", "fine-tuned"} < set(words)


def test_published_figures_are_of_the_same_network_and_images_only():
    assert len(figures.published(Model(architecture="resnet20"), "CIFAR10")) > 5
    assert figures.published(Model(architecture="resnet20"), "digits").empty
    assert figures.published(Model(architecture="vgg11"), "CIFAR10").empty
    assert figures.published(Model(architecture="resnet20", width=0.5), "CIFAR10").empty
    assert figures.published(Model(architecture="resnet20"), "CIFAR10").source.notna().all()
