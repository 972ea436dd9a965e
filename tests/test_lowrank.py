import copy
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from utilized_rank.compression.lowrank import FORMS, METHODS, Factors, Target, forms_of, right_singular, saves
from utilized_rank.compression.pairs import factorized, pair, restructure, substitute
from utilized_rank.ranks.layers import Layer, countable
from utilized_rank.ranks.moments import Moments, input_moments
from utilized_rank.ranks.projection import bases, projected, replaced
from utilized_rank.ranks.subspaces import numerical_rank, output_moment, principal


@dataclass(frozen=True)
class Case:
    """A layer of 1 x 1 patches, and the rows that flow into it."""

    target: Target
    rows: Tensor
    """(g, N, m)."""

    @property
    def weight(self) -> Tensor:
        """(g, m, n)."""
        return self.target.layer.weight().double()

    def error(self, matrix: Tensor, bias: Tensor | float = 0.0) -> float:
        """E||s W - s M - b||^2, over all groups together."""
        return float((self.rows @ (self.weight - matrix) - bias).square().sum(-1).mean(1).sum())

    def error_of(self, factors: Factors) -> float:
        return self.error(factors.matrix(), 0.0 if factors.bias is None else factors.bias.unsqueeze(1))

    def best_bias(self, matrix: Tensor) -> Tensor:
        """The bias with the least error beside a matrix, (g, 1, n)."""
        return (self.rows @ (self.weight - matrix)).mean(1, keepdim=True)

    def at(self, rank: int) -> Target:
        return replace(self.target, k_s=rank, k_t=rank)


def make_case(seed: int = 0, m: int = 7, n: int = 5, groups: int = 1) -> Case:
    """Correlated rows with a mean."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    layer = Layer("conv", nn.Conv2d(groups * m, groups * n, 1, groups=groups))
    mixing = torch.randn(groups, m, m, generator=generator, dtype=torch.float64)
    rows = torch.randn(groups, 6 * m, m, generator=generator, dtype=torch.float64) @ mixing
    rows += 2 * torch.randn(groups, 1, m, generator=generator, dtype=torch.float64)
    moments = Moments.zeros(groups, m)
    moments.add(rows)
    return Case(Target(layer, moments, *bases(layer, moments), m, n), rows)


def cut(method: str, target: Target, form: str = "channel") -> Factors:
    """The fit of a method at the rank of its target."""
    return FORMS[form](METHODS[method](target)).factors(target.rank)


CASES = st.builds(
    make_case,
    seed=st.integers(0, 10_000),
    m=st.integers(1, 8),
    n=st.integers(1, 8),
    groups=st.integers(1, 2),
)


def ranked(case: Case, data: st.DataObject) -> int:
    return data.draw(st.integers(1, case.target.layer.width))


def at_most(error: float, other: float, case: Case) -> bool:
    return error <= other + 1e-9 * (1 + case.error(0 * case.weight))


@given(CASES, st.data())
def test_the_optimum_is_no_worse_than_any_other_map_of_its_rank(case, data):
    rank = ranked(case, data)
    best = cut("optimal", case.at(rank))
    error, generator = case.error_of(best), torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    tried = [cut(name, case.at(rank)).matrix() for name in METHODS]
    tried += [noise(best.first) @ noise(best.second) for _ in range(3)]
    for size in (1e-1, 1e-3):  # and near the optimum
        tried += [(best.first + size * noise(best.first)) @ (best.second + size * noise(best.second))]
    for matrix in tried:
        assert at_most(error, case.error(matrix), case)
        assert at_most(error, case.error(matrix, case.best_bias(matrix)), case)


@given(CASES, st.data())
def test_the_error_of_the_optimum_is_the_variance_of_the_outputs_beyond_its_rank(case, data):
    rank = ranked(case, data)
    variances = principal(output_moment(case.target.moments.centred, case.weight)).values
    left, rounding = float(variances[:, rank:].sum()), 1e-9 * float(variances.sum())
    assert case.error_of(cut("optimal", case.at(rank))) == pytest.approx(left, rel=1e-6, abs=rounding)


@pytest.mark.parametrize("rank", [1, 2, 4, 5])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_optimum_is_whitening_then_svd(rank, groups):
    """M = C^(-1/2) (C^(1/2) W)_r, with the centred C."""
    case = make_case(groups=groups)
    values, vectors = torch.linalg.eigh(case.target.moments.centred)
    root = vectors @ torch.diag_embed(values.sqrt()) @ vectors.mT
    u, sigma, vh = torch.linalg.svd(root @ case.weight, full_matrices=False)
    truncated = u[..., :rank] @ torch.diag_embed(sigma[..., :rank]) @ vh[..., :rank, :]
    expected = torch.linalg.solve(root, truncated)
    torch.testing.assert_close(cut("optimal", case.at(rank)).matrix(), expected, rtol=0, atol=1e-8)


@given(CASES, st.data())
def test_centred_with_corrected_bias_is_no_worse_than_uncentred(case, data):
    rank = ranked(case, data)
    top = principal(output_moment(case.target.moments.second, case.weight)).top(rank)
    uncentred = case.weight @ top @ top.mT
    best = cut("optimal", case.at(rank))
    assert at_most(case.error_of(best), case.error(uncentred), case)
    assert at_most(case.error_of(best), case.error(uncentred, case.best_bias(uncentred)), case)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_corrected_bias_keeps_the_mean_of_the_outputs(rank):
    case = make_case(groups=2)
    best = cut("optimal", case.at(rank))
    before = (case.rows @ case.weight).mean(1)
    torch.testing.assert_close((case.rows @ best.matrix()).mean(1) + best.bias, before, rtol=0, atol=1e-10)
    assert float((before - (case.rows @ best.matrix()).mean(1)).abs().max()) > 1e-2  # it had to be corrected


@pytest.mark.parametrize(("k_s", "k_t"), [(2, 3), (3, 2), (7, 2), (3, 5), (1, 1), (7, 5)])
def test_projection_is_p_s_w_p_t_in_factors_of_its_rank(k_s, k_t):
    case = make_case(groups=2)
    factors = cut("projection", replace(case.target, k_s=k_s, k_t=k_t))
    s, t = case.target.s, case.target.t
    expected = s.projector(k_s) @ case.weight @ t.projector(k_t)
    torch.testing.assert_close(factors.matrix(), expected, rtol=0, atol=1e-10)
    assert factors.rank == min(k_s, k_t)
    assert factors.bias is None


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_svd_is_the_best_approximation_of_the_weight_alone(rank):
    """||W - M||_F^2 is the sum of the squared singular values beyond the rank (Eckart and Young)."""
    case = make_case()
    factors = cut("svd", case.at(rank))
    beyond = torch.linalg.svdvals(case.weight)[:, rank:].square().sum()
    error = (case.weight - factors.matrix()).square().sum()
    torch.testing.assert_close(error, beyond, rtol=0, atol=1e-12)
    assert factors.bias is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_every_method_gives_its_rank(method, rank):
    factors = cut(method, make_case(groups=2).at(rank))
    assert factors.rank == rank
    assert factors.first.shape == (2, 7, rank)
    assert factors.second.shape == (2, rank, 5)
    assert all(numerical_rank(matrix) == rank for matrix in factors.matrix())


@pytest.mark.parametrize("method", METHODS)
def test_at_full_rank_every_method_gives_the_weight(method):
    case = make_case(groups=2)
    torch.testing.assert_close(cut(method, case.target).matrix(), case.weight, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_a_dead_layer_keeps_one_dimension_and_what_it_computes(method):
    case = make_case()
    layer = case.target.layer
    moments = Moments.zeros(1, layer.m)
    moments.add(torch.zeros(1, 10, layer.m))
    target = Target(layer, moments, *bases(layer, moments), 0, 0)
    zeros = torch.zeros(1, layer.m, 1, 1)
    two = factorized(layer, cut(method, target))
    assert target.rank == 1
    torch.testing.assert_close(two(zeros), layer.module(zeros))


def test_right_singular_vectors_are_orthonormal_and_descending():
    case = make_case(m=4, n=6)
    vectors = right_singular(case.weight)
    assert vectors.shape == (1, 6, 4)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(4).double().unsqueeze(0), rtol=0, atol=1e-12)
    lengths = (case.weight @ vectors).norm(dim=1)
    torch.testing.assert_close(lengths, torch.linalg.svdvals(case.weight))


@pytest.mark.parametrize(
    ("m", "n", "rank", "expected"), [(4, 4, 1, True), (4, 4, 2, False), (3, 6, 2, False), (3, 6, 1, True)]
)
def test_a_rank_saves_where_two_layers_hold_fewer_weights_than_one(m, n, rank, expected):
    layer = Layer("fc", nn.Linear(m, n))
    assert saves(layer, "channel", rank) is expected
    two = pair(layer.module, "channel", rank, bias=True)
    assert expected == (two[0].weight.numel() + two[1].weight.numel() < layer.module.weight.numel())


def of_random_inputs(layer: Layer, rank: int | None = None) -> Target:
    """A target whose moments are of full rank; it keeps all dimensions where no rank is given."""
    moments = Moments.zeros(layer.groups, layer.m)
    generator = torch.Generator().manual_seed(0)
    moments.add(torch.randn(layer.groups, 3 * layer.m, layer.m, generator=generator) + 0.3)
    return Target(layer, moments, *bases(layer, moments), rank or layer.m, rank or layer.n)


@pytest.mark.parametrize("method", METHODS)
def test_two_layers_compute_what_the_replaced_weight_computes(convolution, maps, method):
    layer = Layer("conv", convolution)
    factors = cut(method, of_random_inputs(layer, max(1, layer.width // 2)))
    added = 0 if factors.bias is None else factors.bias.reshape(-1, 1, 1).float()
    with torch.no_grad(), replaced({layer: factors.matrix()}):
        expected = convolution(maps) + added
    torch.testing.assert_close(factorized(layer, factors)(maps), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_two_on_tokens_too(method, bias, generator):
    torch.manual_seed(0)
    layer = Layer("fc", nn.Linear(6, 9, bias=bias))
    tokens = torch.randn(2, 5, 6, generator=generator)
    factors = cut(method, of_random_inputs(layer, 2))
    two = factorized(layer, factors)
    expected = tokens.double() @ factors.matrix()
    expected += sum(b for b in (layer.module.bias, factors.bias) if b is not None)
    torch.testing.assert_close(two(tokens).double(), expected, rtol=0, atol=1e-5)
    assert (two[1].bias is not None) == (bias or method == "optimal")


@pytest.mark.parametrize("method", METHODS)
def test_at_full_rank_two_layers_compute_what_the_one_did(convolution, maps, method):
    layer = Layer("conv", convolution)
    two = factorized(layer, cut(method, of_random_inputs(layer)))
    torch.testing.assert_close(two(maps), convolution(maps), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["residual", "resnet20", "vgg11", "vit"])
def test_at_full_rank_the_factorized_network_is_the_original(make, images, method, name):
    network = make(name)
    small = copy.deepcopy(network)
    layers = countable(network).layers
    substitute(small, {x.name: factorized(x, cut(method, of_random_inputs(x))) for x in layers})
    with torch.no_grad():
        torch.testing.assert_close(small(images), network(images), rtol=0, atol=1e-5)
    assert all(isinstance(small.get_submodule(layer.name), nn.Sequential) for layer in layers)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_two_layers_are_torch_s_own_and_script(convolution, maps):
    for form in forms_of(Layer("conv", convolution)):
        two = pair(convolution, form, 2, convolution.bias is not None)
        assert [type(part) for part in (two, *two)] == [nn.Sequential, nn.Conv2d, nn.Conv2d]
        torch.testing.assert_close(torch.jit.script(two)(maps), two(maps))


def test_two_layers_are_frozen_where_the_one_is():
    case = make_case()
    for learned in (True, False):
        case.target.layer.module.weight.requires_grad_(learned)
        two = factorized(case.target.layer, cut("svd", case.at(2)))
        assert {parameter.requires_grad for parameter in two.parameters()} == {learned}


def test_two_layers_share_no_memory_with_the_one():
    case = make_case()
    module = case.target.layer.module
    two = factorized(case.target.layer, cut("svd", case.at(2)))
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_two_layers_can_be_trained():
    two = factorized(make_case().target.layer, cut("optimal", make_case().at(2)))
    two(torch.ones(1, 7, 1, 1)).sum().backward()
    assert all(parameter.grad is not None for parameter in two.parameters())


def test_the_optimum_of_real_inputs_of_a_padded_convolution_beats_the_others(make, images):
    network = make("residual")
    layers = countable(network).layers
    moments = input_moments(network, layers, [images])
    layer = layers[2]
    target = Target(layer, moments[layer.name], *bases(layer, moments[layer.name]), 3, 3)
    inputs: list[Tensor] = []
    hook = layer.module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    network(images)
    hook.remove()
    with torch.no_grad():
        expected = layer.module(inputs[0])
        error = {
            name: float((factorized(layer, cut(name, target))(inputs[0]) - expected).square().mean())
            for name in METHODS
        }
    assert error["optimal"] < min(error["projection"], error["svd"])


def test_a_network_takes_the_form_and_the_weights_of_a_decomposed_one(make, images):
    network, form = (
        make("residual"),
        {"conv1": ["channel", 2, 1], "conv2": ["spatial", 3, 0], "head": ["channel", 2, 1]},
    )
    small = copy.deepcopy(network)
    restructure(small, form)
    assert small.conv2[1].bias is None
    assert [small.conv1[0].out_channels, small.conv2[0].out_channels] == [2 * 2, 3]
    again = make("residual")
    restructure(again, form)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(images), small(images))


def test_a_module_under_two_names_is_replaced_under_both(make, images):
    network = make("shared")
    layer = countable(network).layers[1]
    factors = cut("svd", of_random_inputs(layer, 2))
    with torch.no_grad(), replaced({layer: factors.matrix()}):
        expected = network(images)
    substitute(network, {layer.name: factorized(layer, factors)})
    torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-5)


def test_projected_weights_and_their_factors_are_one_function(make, images):
    """The projected network and the decomposed one give the same logits."""
    network = make("resnet20")
    layers = countable(network).layers
    moments = input_moments(network, layers, [images])
    known = [(x, moments[x.name]) for x in layers]
    targets = [Target(x, its, *bases(x, its), x.width // 2, x.width - 1) for x, its in known]
    small = copy.deepcopy(network)
    substitute(small, {t.layer.name: factorized(t.layer, cut("projection", t)) for t in targets})
    weights = {t.layer: projected(t.layer.weight(), t.s, t.t, t.k_s, t.k_t) for t in targets}
    with torch.no_grad(), replaced(weights):
        expected = network(images)
    torch.testing.assert_close(small(images), expected, rtol=0, atol=1e-4)
