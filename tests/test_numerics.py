"""Dead, constant, deficient, overflowing: each has a result that is defined, or an error that says where; and float64.

What is computed is held against ``plain_program``, which shares no code with it.
"""

import copy
import math

import numpy as np
import plain_program as plain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from utilized_rank.compression import lowrank
from utilized_rank.compression.compensation import RIDGE, Pairs
from utilized_rank.compression.lowrank import FORMS, METHODS, Fit, Target, outputs_kept
from utilized_rank.compression.pairs import factorized, substitute
from utilized_rank.ranks import subspaces
from utilized_rank.ranks.layers import Layer, countable
from utilized_rank.ranks.measure import energy_ranks
from utilized_rank.ranks.moments import Moments, input_moments
from utilized_rank.ranks.projection import bases, projected, replaced
from utilized_rank.ranks.subspaces import effective_rank, energy_rank, output_principal, output_spectrum, principal

# Against the plain program

KINDS = {
    "linear": (nn.Linear(6, 4), (40, 6)),
    "wide": (nn.Linear(3, 7), (40, 3)),
    "tokens": (nn.Linear(6, 4), (9, 5, 6)),
    "convolution": (nn.Conv2d(2, 5, 3, padding=1), (6, 2, 5, 4)),
    "strided": (nn.Conv2d(3, 4, (3, 2), stride=2), (6, 3, 7, 6)),
    "pixels": (nn.Conv2d(4, 3, 1), (5, 4, 3, 3)),
}


def drawn(kind: str, seed: int = 0) -> tuple[Layer, Tensor, np.ndarray, np.ndarray]:
    """A layer, what flows into it (correlated, with a mean), its rows, and its weight (m, n)."""
    module, shape = KINDS[kind]
    module = copy.deepcopy(module)
    torch.manual_seed(seed)
    module.reset_parameters()
    inputs = torch.randn(shape) + 0.7
    inputs[..., 1:] += 0.8 * inputs[..., :-1].clone()
    layer, values = Layer("its", module), inputs.double().numpy()
    if isinstance(module, nn.Linear):
        rows = values.reshape(-1, layer.m)
    else:
        rows = plain.patches(values, module.kernel_size, module.stride[0], module.padding[0])
    weight = module.weight.detach().double().numpy().reshape(layer.n, layer.m).T
    return layer, inputs, rows, weight


def moments_of(layer: Layer, inputs: Tensor) -> Moments:
    return input_moments(nn.Sequential(layer.module), [Layer("0", layer.module)], inputs.split(2))["0"]


def close(found: Tensor, expected: np.ndarray, off: float = 1e-5) -> None:
    np.testing.assert_allclose(
        found.detach().double().numpy(), expected, rtol=0, atol=off * max(1, np.abs(expected).max())
    )


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_the_plain_program(kind):
    layer, inputs, rows, weight = drawn(kind)
    found, (second, mean) = moments_of(layer, inputs), plain.moment(rows)
    assert found.count == len(rows)
    close(found.second[0], second)
    close(found.mean[0], mean)
    close(subspaces.output_moment(found.second, layer.weight())[0], plain.moment(rows @ weight)[0])


FITS = {
    "projection": lambda rows, weight, rank: plain.projection(rows, weight, rank, rank),
    "optimal": plain.optimal,
    "svd": lambda rows, weight, rank: plain.svd(weight, rank),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_at_every_rank_is_that_of_the_plain_program(kind, method):
    """As the two layers compute it, bias and all."""
    layer, inputs, rows, weight = drawn(kind)
    moments = moments_of(layer, inputs)
    own = layer.module.bias.detach().double().numpy()
    for rank in range(1, layer.width + 1):
        target = Target(layer, moments, *bases(layer, moments), rank, rank)
        factors = FORMS["channel"](METHODS[method](target)).factors(rank)
        expected = FITS[method](rows, weight, rank)
        bias = own + (plain.affine(rows, expected, rows.mean(0) @ weight) if method == "optimal" else 0)
        close(factors.matrix()[0], expected)
        found = factorized(layer, factors)(inputs).detach()
        by_row = found.movedim(1, -1) if found.ndim == 4 else found
        close(by_row.reshape(-1, layer.n), rows @ expected + bias)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["convolution", "strided"])
def test_the_spatial_form_of_every_method_is_that_of_the_plain_program(kind, method):
    layer, inputs, rows, weight = drawn(kind)
    moments = moments_of(layer, inputs)
    channels, kernel = layer.module.in_channels, layer.module.kernel_size
    target = Target(layer, moments, *bases(layer, moments), layer.m, layer.n)
    fit = METHODS[method](target)
    seen = rows if method == "optimal" else None
    for rank in (1, 2):
        factors = FORMS["spatial"](fit, rank).factors(rank)
        close(factors.matrix()[0], plain.spatial(seen, weight, rank, channels, kernel), 1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_compensated_weights_are_those_of_the_plain_program(kind, form):
    """Fitted to outputs that have little to do with the inputs, and then cut."""
    if form not in lowrank.forms_of(drawn(kind)[0]):
        return
    layer, inputs, rows, weight = drawn(kind)
    outputs = layer.module(inputs).detach()
    outputs = outputs + 0.3 * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1))
    wanted = (outputs.movedim(1, -1) if outputs.ndim == 4 else outputs).reshape(-1, layer.n).double().numpy()
    pairs = Pairs(layer)
    pairs.add(inputs, outputs)
    fit = pairs.fit()
    whole = plain.compensated(rows, wanted, weight, RIDGE)
    close(fit.matrix[0], whole, 1e-4)
    for rank in (1, 2):
        factors = FORMS[form](fit, rank).factors(rank)
        if form == "channel":
            expected = plain.channel(rows, whole, rank)
        else:
            expected = plain.spatial(rows, whole, rank, layer.module.in_channels, layer.module.kernel_size)
        close(factors.matrix()[0], expected, 1e-3)
        close(factors.bias[0], plain.affine(rows, expected, wanted.mean(0)), 1e-3)


# Properties


def networks(seed: int, width: int, depth: int) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(seed)
    parts = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*parts, nn.Linear(width, 3)).eval(), torch.randn(20, width) + 0.3


SMALL = st.builds(networks, st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 2))


@given(SMALL, st.floats(0.05, 1), st.floats(0.05, 1))
def test_more_energy_needs_no_fewer_dimensions(case, one, other):
    network, inputs = case
    layers = countable(network).layers
    moments = input_moments(network, layers, [inputs])
    for layer in layers:
        ranks = [energy_ranks(layer, moments[layer.name], energy, False) for energy in sorted((one, other))]
        assert ranks[0].k_s <= ranks[1].k_s <= layer.m
        assert ranks[0].k_t <= ranks[1].k_t <= layer.n


@given(SMALL, st.data())
def test_on_the_span_of_the_inputs_the_projected_weight_is_the_weight(case, data):
    """Inputs of a rank k: with P_S of k dimensions, S P_S W = S W, whatever else W does."""
    network, inputs = case
    k = data.draw(st.integers(1, inputs.shape[1]))
    rows = (
        inputs.double() @ torch.randn(inputs.shape[1], k).double() @ torch.randn(k, inputs.shape[1]).double()
    ).float()
    layer = countable(network).layers[0]
    moments = input_moments(network, [layer], [rows])[layer.name]
    matrix = projected(layer.weight(), *bases(layer, moments), k, layer.n)
    torch.testing.assert_close(
        rows.double() @ matrix[0], rows.double() @ layer.weight()[0].double(), rtol=1e-4, atol=1e-4
    )


@given(SMALL, st.data())
def test_projecting_twice_is_projecting_once_and_no_rank_grows(case, data):
    network, inputs = case
    layer = countable(network).layers[0]
    k_s, k_t = data.draw(st.integers(1, layer.m)), data.draw(st.integers(1, layer.n))
    both = bases(layer, input_moments(network, [layer], [inputs])[layer.name])
    once = projected(layer.weight(), *both, k_s, k_t)
    torch.testing.assert_close(projected(once, *both, k_s, k_t), once, rtol=0, atol=1e-9)
    assert int(torch.linalg.matrix_rank(once[0], rtol=1e-9)) <= min(k_s, k_t)


@given(SMALL, st.data())
def test_a_network_in_two_layers_computes_what_its_projected_weights_compute(case, data):
    network, inputs = case
    layers = countable(network).layers
    moments = input_moments(network, layers, [inputs])
    two, weights, small = {}, {}, copy.deepcopy(network)
    for layer in layers:
        rank = data.draw(st.integers(1, layer.width))
        target = Target(layer, moments[layer.name], *bases(layer, moments[layer.name]), rank, rank)
        fit = METHODS["projection"](target)
        weights[layer] = fit.matrix
        two[layer.name] = factorized(layer, FORMS["channel"](fit).factors(rank))
    substitute(small, two)
    with torch.no_grad(), replaced(weights):
        torch.testing.assert_close(small(inputs), network(inputs), rtol=1e-3, atol=1e-4)


# Trouble


def fit_of(rows: Tensor, layer: Layer) -> Fit:
    moments = Moments.zeros(1, layer.m)
    moments.add(rows[None])
    return outputs_kept(layer, moments)


CONV = {"kernel_size": 3, "padding": 1}
TROUBLE = {
    "dead": lambda rows: 0 * rows,
    "constant": lambda rows: torch.ones_like(rows) * 3,
    "one direction": lambda rows: rows[:, :1] * torch.ones(rows.shape[1]),
    "one row": lambda rows: rows[:1],
    "nearly singular": lambda rows: rows @ torch.diag(torch.logspace(0, -12, rows.shape[1], dtype=rows.dtype)),
    "tiny": lambda rows: 1e-150 * rows,
    "huge": lambda rows: 1e150 * rows,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trouble", TROUBLE)
def test_of_troubled_inputs_every_form_and_rank_is_finite_and_keeps_the_mean(trouble, form, generator):
    torch.manual_seed(0)
    layer = Layer("conv", nn.Conv2d(2, 4, **CONV))
    rows = TROUBLE[trouble](torch.randn(60, layer.m, generator=generator, dtype=torch.float64))
    fit = fit_of(rows, layer)
    cut = FORMS[form](fit, 3)
    scale = float(rows.abs().max()) or 1.0
    assert torch.isfinite(cut.errors).all()
    assert (cut.errors.diff() <= 1e-9 * max(float(cut.errors[0]), 1e-300)).all()
    for rank in range(1, 4):
        factors = cut.factors(rank)
        assert all(torch.isfinite(its).all() for its in (factors.first, factors.second, factors.bias))
        mean, weight = rows.mean(0), layer.weight()[0].double()
        kept = mean @ factors.matrix()[0] + factors.bias[0]
        torch.testing.assert_close(kept / scale, mean @ weight / scale, rtol=0, atol=1e-7)


@pytest.mark.parametrize("trouble", TROUBLE)
def test_of_troubled_inputs_ranks_and_subspaces_are_defined(trouble, generator):
    torch.manual_seed(0)
    layer = Layer("fc", nn.Linear(6, 4))
    rows = TROUBLE[trouble](torch.randn(60, 6, generator=generator, dtype=torch.float64))
    moments = Moments.zeros(1, 6)
    moments.add(rows[None])
    ranks = energy_ranks(layer, moments, 0.99, False)
    some = {"dead": 0, "constant": 1, "one direction": 1, "one row": 1}.get(trouble)
    assert (ranks.k_s, ranks.k_t) == (some, some) if some is not None else 1 <= ranks.r <= 4
    for its in bases(layer, moments):
        assert torch.isfinite(its.values).all()
        held = its.vectors.mT @ its.vectors
        torch.testing.assert_close(held, torch.eye(held.shape[-1]).double().expand_as(held), rtol=0, atol=1e-9)


def gives_up(*given: object, **how: object) -> None:
    raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")


def test_where_torchs_eigen_solver_gives_up_another_finds_the_same(monkeypatch, generator):
    torch.manual_seed(0)
    layer = Layer("conv", nn.Conv2d(4, 6, 3, groups=2))
    rows = torch.randn(2, 50, layer.m, generator=generator, dtype=torch.float64)
    moment, weight = rows.mT @ rows / 50, layer.weight()

    def found() -> list[Tensor]:
        whole, few, outputs = principal(moment), principal(moment, 3), output_principal(moment, weight)
        its = [value for subspace in (whole, few, outputs) for value in (subspace.values, subspace.projector(2))]
        return [*its, subspaces.spectrum(moment), output_spectrum(moment, weight)]

    expected = found()
    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    monkeypatch.setattr(torch.linalg, "eigvalsh", gives_up)
    for one, other in zip(found(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_where_torchs_singular_values_give_up_weights_are_cut_all_the_same(monkeypatch):
    torch.manual_seed(0)
    layer = Layer("fc", nn.Linear(6, 4))
    expected = FORMS["channel"](lowrank.weight_kept(layer)).factors(2).matrix()
    monkeypatch.setattr(torch.linalg, "svd", gives_up)
    found = FORMS["channel"](lowrank.weight_kept(layer)).factors(2).matrix()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("trouble", ["dead", "constant"])
def test_features_that_say_nothing_have_a_rank_that_is_defined(trouble):
    rows = TROUBLE[trouble](torch.randn(9, 4).double())
    found = effective_rank(rows)
    assert math.isnan(found) if trouble == "dead" else found == pytest.approx(1, abs=1e-3)
    assert energy_rank(torch.zeros(3, dtype=torch.float64), 0.5) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e5])
def test_what_overflows_in_half_precision_names_the_layer_that_receives_it(dtype, size):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).to(dtype).eval()
    inputs = torch.full((5, 4), 100.0, dtype=dtype)
    with torch.no_grad():
        network[0].weight.fill_(size if dtype == torch.bfloat16 else min(size, 6e4))
    layers = countable(network).layers
    if dtype == torch.float16 and size > 1:
        with pytest.raises(FloatingPointError, match=r"layer 1 received values that are not finite"):
            input_moments(network, layers, [inputs])
        return
    moments = input_moments(network, layers, [inputs])
    assert all(torch.isfinite(its.second).all() and its.second.dtype == torch.float64 for its in moments.values())
