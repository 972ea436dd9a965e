import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from utilized_rank.compression.decomposition import Decomposition, agreement, spectra, sweep
from utilized_rank.compression.lowrank import METHODS, Channel, Target, saves
from utilized_rank.networks import cost
from utilized_rank.networks.evaluation import features, is_correct
from utilized_rank.ranks.layers import Layer, countable
from utilized_rank.ranks.moments import Moments, input_moments
from utilized_rank.ranks.projection import bases, replaced
from utilized_rank.ranks.subspaces import numerical_rank
from utilized_rank.stages import decompose


def ranks(network: nn.Module) -> pd.DataFrame:
    """As if measured: at epsilon 1 a third of each width on the inputs and half on the outputs, at 0 all."""
    rows = []
    for layer in countable(network).layers:
        some = {"k_s": -(-layer.width // 3), "k_t": -(-layer.width // 2)}
        rows += [{"layer": layer.name, "epsilon": 1.0, **some}]
        rows += [{"layer": layer.name, "epsilon": 0.0, "k_s": layer.m, "k_t": layer.n}]
    return pd.DataFrame(rows)


@pytest.fixture
def decomposition(make, images):
    """The decomposition of a network by name."""

    def of(name: str) -> Decomposition:
        network = make(name)
        moments = input_moments(network, countable(network).layers, [images])
        return Decomposition(network, ranks(network), moments, images)

    return of


def logits(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return network(images)


def test_targets_are_the_ranks_of_their_epsilon(decomposition):
    both = decomposition("residual")
    assert [(t.k_s, t.k_t) for t in both.targets(1.0)] == [(3, 4), (2, 2), (3, 4), (2, 3)]
    assert [(t.k_s, t.k_t) for t in both.targets(0.0)] == [(27, 8), (36, 4), (72, 8), (8, 5)]


@pytest.mark.parametrize("name", ["residual", "resnet20", "vit"])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_is_in_two_exactly_where_that_saves_weights(decomposition, name, method):
    whole = decomposition(name)
    built = whole.build(method, 1.0)
    saved = 0
    for target in whole.targets(1.0):
        layer = target.layer
        now = built.network.get_submodule(layer.name)
        assert isinstance(now, nn.Sequential) == saves(layer, "channel", target.rank) == (layer.name in built.forms)
        if isinstance(now, nn.Sequential):
            added = now[1].bias is not None and layer.module.bias is None
            saved += layer.groups * (layer.m * layer.n - target.rank * (layer.m + layer.n))
            saved -= layer.groups * layer.n * added
        else:
            assert torch.equal(now.weight, layer.module.weight)
    assert cost.parameters(whole.network) - cost.parameters(built.network) == saved > 0


@pytest.fixture
def timed(make, images, monkeypatch):
    """The decomposition of a network by what is faster, and what was timed; layers of some shapes are slow in two."""

    def of(name: str, slow: set[tuple[int, ...]]) -> tuple[Decomposition, list]:
        calls = []

        def latencies(modules: list[nn.Module], inputs: torch.Tensor) -> list[float]:
            dense, two = modules
            assert isinstance(two, nn.Sequential)
            assert not two.training
            calls.append((dense, inputs))
            return [1.0, 2.0 if tuple(dense.weight.shape) in slow else 0.5]

        monkeypatch.setattr(decompose.cost, "latencies", latencies)
        network = make(name)
        moments = input_moments(network, countable(network).layers, [images])
        return Decomposition(network, ranks(network), moments, images[:5], faster=True), calls

    return of


@pytest.mark.parametrize("method", METHODS)
def test_where_speed_counts_a_layer_is_in_two_only_where_that_is_faster(timed, decomposition, method):
    saving = decomposition("residual").build(method, 1.0).forms
    slow = {tuple(timed("residual", set())[0].network.conv2.weight.shape)}
    whole, calls = timed("residual", slow)
    built = whole.build(method, 1.0)
    assert built.forms == {name: form for name, form in saving.items() if name != "conv2"}
    assert "conv2" in saving
    assert torch.equal(built.network.conv2.weight, whole.network.conv2.weight)
    for name in built.forms:
        assert isinstance(built.network.get_submodule(name), nn.Sequential)
    assert [dense for dense, _ in calls] == [whole.network.get_submodule(name) for name in saving]


def test_latency_is_that_of_what_flows_into_the_layer(timed, images):
    whole, calls = timed("residual", set())
    whole.build("projection", 1.0)
    for dense, inputs in calls:
        name = next(n for n, module in whole.network.named_modules() if module is dense)
        torch.testing.assert_close(inputs, features(whole.network, dense, images[:5]), rtol=0, atol=1e-6)
        assert name in whole.layers
    assert len(calls) > 1


@pytest.mark.parametrize("method", METHODS)
def test_where_nothing_is_faster_the_network_is_the_original(timed, images, method):
    network = timed("residual", set())[0].network
    slow = {tuple(layer.module.weight.shape) for layer in countable(network).layers}
    whole, _ = timed("residual", slow)
    built = whole.build(method, 1.0)
    assert built.forms == {}
    assert torch.equal(logits(built.network, images), logits(whole.network, images))


def test_as_many_dimensions_of_the_inputs_are_held_as_the_largest_rank_needs(decomposition, make, images):
    """The whole input is projected on nothing; where no other rank was found, one dimension is held."""
    held = {name: s.vectors.shape[-1] for name, (s, _) in decomposition("residual").bases.items()}
    assert held == {"stem": 3, "conv1": 2, "conv2": 3, "head": 2}
    network = make("residual")
    moments = input_moments(network, countable(network).layers, [images])
    found = ranks(network)
    more = Decomposition(network, pd.concat([found, found.assign(k_s=4, epsilon=5.0)]), moments, images)
    assert [s.vectors.shape[-1] for s, _ in more.bases.values()] == [4, 4, 4, 4]
    whole = Decomposition(network, found[found.epsilon == 0.0], moments, images)
    assert [s.vectors.shape[-1] for s, _ in whole.bases.values()] == [1, 1, 1, 1]
    assert all(torch.equal(w, layer.weight().double()) for layer, w in whole.projected_weights(0.0).items())


@pytest.mark.parametrize("method", METHODS)
def test_where_nothing_saves_the_network_is_the_original(decomposition, images, method):
    whole = decomposition("residual")
    built = whole.build(method, 0.0)
    assert built.forms == {}
    assert torch.equal(logits(built.network, images), logits(whole.network, images))


@pytest.mark.parametrize("left_out", ["stem", "conv1", "head"])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_was_not_measured_stays_as_it_is(decomposition, make, images, tmp_path, left_out, method):
    """Its module is never called, say: it has neither ranks nor moments, and the others are decomposed without it."""
    every = decomposition("residual").build(method, 1.0)
    network = make("residual")
    found = ranks(network).query("layer != @left_out")
    moments = input_moments(network, [x for x in countable(network).layers if x.name != left_out], [images])
    whole = Decomposition(network, found, moments, images)
    built = whole.build(method, 1.0)
    assert built.forms == {name: form for name, form in every.forms.items() if name != left_out}
    assert torch.equal(built.network.get_submodule(left_out).weight, network.get_submodule(left_out).weight)
    assert left_out not in {layer.name for layer in whole.projected_weights(1.0)}
    assert left_out not in set(whole.weight_ranks(1.0).layer)
    decompose.save(built, tmp_path / "small.safetensors")
    loaded = decompose.load(network, tmp_path / "small.safetensors")
    assert torch.equal(logits(loaded, images), logits(built.network, images))


@pytest.mark.parametrize("name", ["residual", "resnet20", "vit", "vgg11"])
def test_the_decomposed_network_computes_what_the_projected_weights_compute(decomposition, images, name):
    whole = decomposition(name)
    built = whole.build("projection", 1.0)
    weights = {layer: w for layer, w in whole.projected_weights(1.0).items() if layer.name in built.forms}
    assert weights
    with replaced(weights):
        expected = logits(whole.network, images)
    torch.testing.assert_close(logits(built.network, images), expected, rtol=0, atol=1e-4)


def test_a_shared_module_is_decomposed_under_all_its_names(decomposition, images):
    whole = decomposition("shared")
    built = whole.build("projection", 1.0)
    weights = {layer: w for layer, w in whole.projected_weights(1.0).items() if layer.name in built.forms}
    with replaced(weights):
        expected = logits(whole.network, images)
    torch.testing.assert_close(logits(built.network, images), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_building_leaves_the_measured_network_as_it_was(decomposition, images, method):
    whole = decomposition("residual")
    before = {name: value.clone() for name, value in whole.network.state_dict().items()}
    built = whole.build(method, 1.0).network
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in whole.network.state_dict().items())


@pytest.mark.parametrize("name", ["residual", "vit"])
@pytest.mark.parametrize("method", METHODS)
def test_a_decomposed_network_survives_the_disk_to_the_bit(decomposition, images, tmp_path, name, method):
    whole = decomposition(name)
    built = whole.build(method, 1.0)
    decompose.save(built, tmp_path / "small.safetensors")
    loaded = decompose.load(whole.network, tmp_path / "small.safetensors")
    assert torch.equal(logits(loaded, images), logits(built.network, images))
    own = built.network.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in loaded.state_dict().items())


def test_the_optimum_is_nearer_to_the_network_than_the_others_at_one_layer(make, images):
    """One layer changed: its outputs are nearest by construction, here the network's logits too."""
    network = make("vit")
    layer = next(x for x in countable(network).layers if x.name == "blocks.0.mlp.fc1")
    moments = input_moments(network, [layer], [images])[layer.name]
    target = Target(layer, moments, *bases(layer, moments), 4, 4)
    error = {}
    for name, method in METHODS.items():
        factors = Channel(method(target)).factors(4)
        error[name] = agreement(network, {layer: factors.matrix()}, images)
    assert error["optimal"] < error["svd"]


def test_the_rank_of_the_projected_weights_is_the_utilized_rank(decomposition):
    whole = decomposition("residual")
    table = whole.weight_ranks(1.0)
    assert table.layer.tolist() == ["stem", "conv1", "conv2", "head"]
    assert table.width.tolist() == table.rank_before.tolist() == [8, 4, 8, 5]
    assert table.rank_after.tolist() == table.r.tolist() == [3, 2, 3, 2]
    for layer, weight in whole.projected_weights(1.0).items():
        s, _ = whole.bases[layer.name]
        assert max(map(numerical_rank, weight)) == table.set_index("layer").r[layer.name]
        torch.testing.assert_close(s.projector(layer.width // 3 + 1) @ weight, weight, rtol=0, atol=1e-9)


def test_agreement_is_the_relative_error_of_the_logits(make, images):
    network = make("residual")
    layer = Layer("head", network.head)
    assert agreement(network, {layer: layer.weight()}, images) == 0
    z = logits(network, images)
    without = network.head.bias.detach().expand_as(z)
    expected = float((z - without).norm() / z.norm())
    assert agreement(network, {layer: layer.weight() * 0}, images) == pytest.approx(expected)


def test_a_row_of_results_by_hand(make, images):
    network = make("residual")
    said = logits(network, images).argmax(1)
    labels = torch.where(torch.arange(70) < 63, said, (said + 1) % 5)
    reference = np.arange(70) < 56  # the reference missed 14 of them, 7 of which this network gets right
    row = decompose.assess(network, images, labels, reference, form="original", epsilon=None)
    assert (row["accuracy"], row["images"], row["form"]) == (90.0, 70, "original")
    assert row["change"] == pytest.approx(10)
    assert row["change_low"] < 10 < row["change_high"]
    assert row["parameters"] == sum(p.numel() for p in network.parameters())
    assert row["flops"] == cost.flops(network, images[:1])


def test_latency_is_of_both_networks_on_the_same_images_beside_the_flops_that_are_kept(decomposition, images):
    whole = decomposition("vit")
    built = whole.build("optimal", 1.0).network.train()
    result = decompose.latency(whole.network, built, images[:3])
    assert result["images"] == 3
    assert min(result["original"], result["decomposed"]) > 0
    assert not built.training  # dropout and the like take no time where the network is used
    before, after = (cost.flops(network, images[:1]) for network in (whole.network, built))
    assert result["flops_kept"] == after / before < 1


def test_a_table_of_results_has_no_epsilon_for_the_original():
    table = decompose.results_table([{"epsilon": None, "x": 1}, {"epsilon": 1, "x": 2}])
    assert table.epsilon.isna().tolist() == [True, False]
    assert table.epsilon.dtype == float


@pytest.fixture
def swept(make, images):
    """A layer, the weights that its sweep put in place by (subspace, k), and the sweep's table."""
    network = make("residual")
    layer = Layer("conv1", network.conv1)
    moments = input_moments(network, [layer], [images])["conv1"]
    s, t = bases(layer, moments)
    seen: list[torch.Tensor] = []

    def accuracy() -> float:
        seen.append(layer.weight().double().clone())
        return float(len(seen))

    table = sweep(layer, s, t, 3, accuracy, torch.Generator().manual_seed(0))
    weights = dict(zip(zip(table.subspace, table.k, strict=True), seen, strict=True))
    return layer, s, t, weights, table


def test_a_sweep_tries_five_subspaces_from_one_dimension_to_the_width(swept):
    _, _, _, _, table = swept
    assert sorted(set(table.k)) == [1, 2, 4]
    assert table.groupby("subspace").k.apply(list).tolist() == [[1, 2, 4]] * 5
    assert table.accuracy.tolist() == list(range(1, 16))


def test_a_sweep_projects_on_the_subspace_that_it_names(swept):
    layer, s, t, weights, _ = swept
    w = layer.weight().double()
    for k in (1, 2, 4):
        expected = {
            "inputs only": s.projector(k) @ w,
            "outputs only": w @ t.projector(k),
            "both": s.projector(k) @ w @ t.projector(k),
        }
        for subspace, matrix in expected.items():
            torch.testing.assert_close(weights[subspace, k], matrix, rtol=0, atol=1e-6)
        beyond = torch.linalg.svdvals(w)[:, k:].square().sum()
        torch.testing.assert_close((w - weights["SVD of W", k]).square().sum(), beyond, rtol=0, atol=1e-6)
        random = weights["random", k]
        assert all(numerical_rank(matrix, 1e-5) == k for matrix in random)
        assert float((w - random).square().sum()) >= float(beyond) - 1e-6


def test_a_sweep_over_all_outputs_is_the_original_and_the_weight_comes_back(swept):
    layer, _, _, weights, _ = swept
    own = layer.weight().double()
    for subspace in ("outputs only", "SVD of W", "random"):
        torch.testing.assert_close(weights[subspace, 4], own, rtol=0, atol=1e-6)


def test_spectra_are_singular_values_over_the_largest(generator):
    layer = Layer("fc", nn.Linear(4, 3))
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for n in (4, 3))
    weight = left[:, :3] @ torch.diag(torch.tensor([4.0, 2.0, 1.0])) @ right
    with torch.no_grad():
        layer.module.weight.copy_(layer.weight_from(weight[None]))
    moments = Moments.zeros(1, 4)
    moments.add(torch.eye(4)[None])
    table = spectra(layer, Target(layer, moments, *bases(layer, moments), 4, 2))
    assert table.dimension.tolist() == [1, 2, 3]
    np.testing.assert_allclose(table.W, [1, 0.5, 0.25], atol=1e-6)
    np.testing.assert_allclose(table.projected, [1, 0.5, 0], atol=1e-6)  # white inputs: the SVD of W


def test_accuracy_is_back_after_projected_weights(decomposition, images):
    whole = decomposition("residual")
    labels = logits(whole.network, images).argmax(1)
    with replaced(whole.projected_weights(1.0)):
        assert is_correct(whole.network, images, labels).mean() < 1
    assert is_correct(whole.network, images, labels).all()
    with replaced(whole.projected_weights(0.0)):
        assert is_correct(whole.network, images, labels).all()
