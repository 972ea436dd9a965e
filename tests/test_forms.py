"""The forms that a layer of low rank takes: what two layers compute, what they lose and what they hold."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from utilized_rank.compression.lowrank import FORMS, Channel, Factors, Fit, Spatial, forms_of, saves, weights_a_rank
from utilized_rank.compression.pairs import factorized, form_of, indivisible, pair, restructure, substitute
from utilized_rank.ranks.layers import Layer, countable
from utilized_rank.ranks.moments import Moments, input_moments
from utilized_rank.ranks.projection import replaced

KINDS = ["whitened", "plain", "unknown bias"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fit_of(layer: Layer, kind: str = "whitened", seed: int = 0, rows: int | None = None) -> Fit:
    """A matrix that is not the layer's own, in the moment of correlated rows with a mean, so many or plenty.

    Args:
        layer: that should become the matrix.
        kind: ``plain`` has no moment, and neither it nor ``unknown bias`` has means.
        seed: of the matrix and the rows.
        rows: fewer than m leave directions that never vary.
    """
    g, m, n = layer.groups, layer.m, layer.n
    moments = Moments.zeros(g, m)
    moments.add(random(g, rows or 3 * m, m, seed=seed) @ random(g, m, m, seed=seed + 1) + random(g, 1, m, seed=seed))
    whole = Fit(layer, random(g, m, n, seed=seed + 2), moments.centred, moments.mean, random(g, n, seed=seed + 3))
    if kind == "whitened":
        return whole
    return replace(whole, inputs=None, outputs=None, moment=whole.moment if kind == "unknown bias" else None)


def lost(fit: Fit, matrix: Tensor, metric: Tensor | None = None) -> float:
    """tr((M - M_r)^T C (M - M_r) G), over all groups together."""
    off = fit.matrix - matrix
    weighed = off if fit.moment is None else fit.moment @ off
    return float((off * (weighed if metric is None else weighed @ metric)).sum())


def convolution_of(channels: int, n: int, *kernel: int, **how: object) -> Layer:
    torch.manual_seed(0)
    return Layer("conv", nn.Conv2d(channels, n, kernel, **how))


CONVOLUTIONS = st.builds(
    convolution_of, st.integers(1, 3), st.integers(1, 6), st.integers(2, 4), st.integers(2, 4), bias=st.booleans()
)
FITS = st.builds(
    fit_of, CONVOLUTIONS, st.sampled_from(KINDS), st.integers(0, 10_000), st.one_of(st.none(), st.integers(2, 12))
)


def assert_two_layers_compute_the_factors(layer: Layer, factors: Factors, inputs: Tensor) -> None:
    """S M_r and the layer's own bias and what is added to it, with M_r in the layer's own place."""
    module = layer.module
    added = 0 if factors.bias is None else factors.bias.reshape(-1, 1, 1)
    module.double()
    with torch.no_grad(), replaced({layer: factors.matrix()}):
        expected = module(inputs.double()) + added
    two = factorized(layer, factors)
    torch.testing.assert_close(two(inputs.double()), expected, rtol=0, atol=1e-9 * float(1 + expected.abs().max()))
    assert (two[1].bias is None) == (module.bias is None and factors.bias is None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_convolution_is_two_in_every_form_that_it_can_take(convolution, maps, kind):
    """Strided, dilated, padded by any mode or "same", grouped: as the fixture has them."""
    layer = Layer("conv", convolution)
    for form in forms_of(layer):
        cut = FORMS[form](fit_of(layer, kind))
        for rank in {1, len(cut.errors) - 1}:
            assert_two_layers_compute_the_factors(layer, cut.factors(rank), maps)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"padding": (1, 2)},
        {"stride": (2, 3), "padding": (1, 2)},
        {"stride": (3, 1), "dilation": (2, 1), "padding": (0, 3)},
        {"padding": "same"},
        {"padding": "same", "dilation": (1, 2)},
        {"padding": "valid"},
        {"padding": (2, 3), "padding_mode": "circular"},
        {"padding": (2, 1), "padding_mode": "reflect", "stride": 2},
        {"padding": "same", "padding_mode": "replicate"},
    ],
    ids=str,
)
def test_a_3_x_5_convolution_is_a_3_x_1_and_a_1_x_5_one(how, bias):
    layer = convolution_of(4, 6, 3, 5, bias=bias, **how)
    factors = Spatial(fit_of(layer)).factors(3)
    assert [tuple(its.weight.shape) for its in factorized(layer, factors)] == [(3, 4, 3, 1), (6, 3, 1, 5)]
    assert_two_layers_compute_the_factors(layer, factors, random(2, 4, 11, 13))


@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 1)])
def test_the_bias_keeps_the_mean_of_the_wanted_outputs(kernel):
    """E[s M_r + b'] = E[t] + b, whatever the rank and the form."""
    layer = convolution_of(2, 5, *kernel)
    fit = fit_of(layer)
    for form in forms_of(layer):
        factors = FORMS[form](fit).factors(1)
        mean = (fit.inputs.unsqueeze(1) @ factors.matrix()).squeeze(1) + factors.bias
        torch.testing.assert_close(mean, fit.outputs, rtol=0, atol=1e-10)


@given(FITS)
def test_errors_are_those_of_the_matrices_and_never_rise(fit):
    scale = lost(fit, 0 * fit.matrix)
    for form in forms_of(fit.layer):
        cut = FORMS[form](fit)
        assert float(cut.errors[0]) == pytest.approx(scale)
        for rank in range(1, len(cut.errors)):
            error = float(cut.errors[rank])
            assert error == pytest.approx(lost(fit, cut.factors(rank).matrix()), rel=1e-6, abs=1e-8 * scale)
        assert bool((cut.errors.diff() <= 1e-12 * scale).all())


@given(FITS, st.integers(0, 7))
def test_what_is_lost_in_a_metric_is_that_of_the_matrices(fit, rank):
    """tr((M - M_r)^T C (M - M_r) G), G of any rank."""
    g, n = fit.layer.groups, fit.layer.n
    metric = random(g, n, rank) @ random(g, n, rank).mT
    scale = lost(fit, 0 * fit.matrix, metric)
    for form in forms_of(fit.layer):
        cut = FORMS[form](fit)
        found = cut.lost(metric)
        expected = [scale, *(lost(fit, cut.factors(r).matrix(), metric) for r in range(1, len(cut.errors)))]
        torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-6, atol=1e-8 * scale)
        assert float(found.min()) >= 0
        torch.testing.assert_close(cut.lost(torch.eye(n).double().expand(g, n, n)), cut.errors)
        assert torch.equal(cut.lost(), cut.errors)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_lost_in_a_metric_adds_up_over_groups(kind):
    layer = convolution_of(6, 8, 2, 3, groups=2)
    fit, metric = fit_of(layer, kind), random(2, 4, 4) @ random(2, 4, 4).mT
    cut = Channel(fit)
    for rank in range(1, layer.width + 1):
        expected = lost(fit, cut.factors(rank).matrix(), metric)
        assert float(cut.lost(metric)[rank]) == pytest.approx(expected, abs=1e-8)


@given(FITS, st.data())
def test_a_cut_at_one_rank_is_that_of_all_ranks(fit, data):
    """But for the jitter, which is a part of what is kept."""
    scale = lost(fit, 0 * fit.matrix)
    for form in forms_of(fit.layer):
        every = FORMS[form](fit)
        rank = data.draw(st.integers(1, len(every.errors) - 1))
        one = FORMS[form](fit, rank)
        torch.testing.assert_close(one.errors, every.errors[: rank + 1], rtol=1e-6, atol=1e-8 * scale)
        left = one.factors(rank).matrix() - every.factors(rank).matrix()
        assert lost(fit, fit.matrix - left) <= 1e-8 * scale


@given(FITS, st.data())
def test_the_matrix_is_the_product_of_the_factors(fit, data):
    for form in forms_of(fit.layer):
        cut = FORMS[form](fit)
        factors = cut.factors(data.draw(st.integers(1, len(cut.errors) - 1)))
        whole = factors.first @ factors.second
        torch.testing.assert_close(factors.matrix(), whole, rtol=0, atol=1e-10 * float(1 + whole.abs().max()))


@given(CONVOLUTIONS, st.integers(0, 1000))
def test_the_spatial_form_is_what_its_definition_says(layer, seed):
    """By matrices of order k_w n and whole patches: a = W V, V the top eigenvectors of W^T S W; then least squares."""
    fit, cut = fit_of(layer, seed=seed), Spatial(fit_of(layer, seed=seed))
    rows, across = layer.module.in_channels * layer.module.kernel_size[0], layer.module.kernel_size[1]
    weight = fit.matrix.reshape(rows, -1)
    blocks = fit.moment.reshape(rows, across, rows, across)
    shared = sum(blocks[:, j, :, j] for j in range(across)) / across
    top = torch.linalg.eigh(weight.T @ shared @ weight).eigenvectors.flip(1)
    for rank in range(1, len(cut.errors)):
        first = torch.kron(weight @ top[:, :rank], torch.eye(across).double())  # (m, r k_w)
        second = torch.linalg.lstsq(first.T @ fit.moment[0] @ first, first.T @ fit.moment[0] @ fit.matrix[0]).solution
        scale = float(cut.errors[0])
        assert float(cut.errors[rank]) == pytest.approx(lost(fit, first @ second), rel=1e-6, abs=1e-8 * scale)
        torch.testing.assert_close(cut.factors(rank).matrix()[0], first @ second, rtol=0, atol=1e-4)


def test_nothing_of_the_order_of_all_columns_weights_is_made(monkeypatch):
    """Of large patches with many outputs: k_w n = 16,384, where the patch of a column has 2 entries."""
    orders: list[int] = []
    solve = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: orders.append(a.shape[-1]) or solve(a))
    cut = Spatial(fit_of(convolution_of(1, 256, 2, 64), "unknown bias"))
    assert orders == [2]
    assert cut.factors(1).matrix().shape == (1, 128, 256)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 2])
def test_errors_add_up_over_groups_and_end_at_nothing_at_the_full_rank(kind, groups):
    layer = convolution_of(6, 8, 2, 3, groups=groups)
    fit = fit_of(layer, kind)
    cut = Channel(fit)
    assert len(cut.errors) == layer.width + 1
    for rank in range(1, layer.width + 1):
        assert float(cut.errors[rank]) == pytest.approx(lost(fit, cut.factors(rank).matrix()), abs=1e-8)
    assert float(cut.errors[-1]) == pytest.approx(0, abs=1e-8)


@given(FITS, st.data())
def test_the_channel_form_is_no_worse_than_any_other_map_of_its_rank(fit, data):
    """Any, near it, or a spatial one: r columns of k_w values are a map of rank r k_w."""
    channel, (g, m, n) = Channel(fit), fit.matrix.shape
    rank = data.draw(st.integers(1, fit.layer.width))
    best = channel.factors(rank)
    others = [random(g, m, rank) @ random(g, rank, n)]
    for size in (1e-1, 1e-3):
        near = (best.first + size * random(*best.first.shape, seed=1), best.second + size * random(*best.second.shape))
        others.append(near[0] @ near[1])
    spatial = Spatial(fit)
    across = fit.layer.module.kernel_size[1]
    if across <= rank:
        others.append(spatial.factors(min(rank // across, len(spatial.errors) - 1)).matrix())
    assert all(float(channel.errors[rank]) <= lost(fit, other) + 1e-9 * lost(fit, 0 * other) for other in others)


@given(FITS, st.data())
def test_the_second_convolution_is_the_best_for_the_first(fit, data):
    """Least squares: A^T C (M - A B) = 0 and no other B has less error."""
    cut = Spatial(fit)
    factors = cut.factors(data.draw(st.integers(1, len(cut.errors) - 1)))
    first, second = factors.first, factors.second
    moment = torch.eye(fit.layer.m, dtype=torch.float64) if fit.moment is None else fit.moment
    left = first.mT @ moment @ (fit.matrix - first @ second)
    scale = lost(fit, 0 * fit.matrix)
    assert float(left.abs().max()) <= 1e-7 * float((first.mT @ moment @ fit.matrix).abs().max() + 1)
    for size, seed in [(1.0, 1), (1e-2, 2), (1e-4, 3)]:
        other = first @ (second + size * random(*second.shape, seed=seed))
        assert lost(fit, first @ second) <= lost(fit, other) + 1e-9 * scale


@given(CONVOLUTIONS)
def test_a_rank_more_takes_the_first_convolution_one_further(layer):
    """The first convolutions of all ranks are parts of one."""
    cut = Spatial(fit_of(layer))
    whole = factorized(layer, cut.factors(len(cut.errors) - 1))[0].weight
    for rank in range(1, len(cut.errors)):
        assert torch.equal(factorized(layer, cut.factors(rank))[0].weight, whole[:rank])


@given(st.integers(1, 3), st.integers(1, 6), st.integers(2, 4), st.integers(2, 4), st.sampled_from(KINDS))
def test_a_separable_kernel_is_exact_at_rank_1(channels, n, down, across, kind):
    """W[(c, i, j), o] = a[c, i] b[j, o]."""
    layer = convolution_of(channels, n, down, across)
    kernel = torch.einsum("ci,jo->cijo", random(channels, down), random(across, n, seed=1))
    fit = replace(fit_of(layer, kind), matrix=kernel.reshape(1, layer.m, n))
    cut = Spatial(fit)
    assert float(cut.errors[1]) <= 1e-8 * float(cut.errors[0])
    torch.testing.assert_close(cut.factors(1).matrix(), fit.matrix, rtol=0, atol=1e-6)


@given(st.data(), st.sampled_from(KINDS))
def test_a_sum_of_separable_kernels_is_exact_at_as_many_ranks(data, kind):
    layer = convolution_of(3, 5, data.draw(st.integers(2, 4)), data.draw(st.integers(2, 4)))
    down, across = layer.module.kernel_size
    terms = data.draw(st.integers(1, 3))
    kernel = torch.einsum("cir,rjo->cijo", random(3, down, terms), random(terms, across, 5, seed=1))
    fit = replace(fit_of(layer, kind), matrix=kernel.reshape(1, layer.m, 5))
    assert float(Spatial(fit).errors[terms]) <= 1e-8 * float(Spatial(fit).errors[0])


@given(CONVOLUTIONS)
def test_the_spatial_form_stops_at_the_last_rank_that_saves_weights(layer):
    """It would be exact at min(C k_h, k_w n), the rank of all columns' weights side by side, which saves never."""
    channels, (down, across) = layer.module.in_channels, layer.module.kernel_size
    ranks = len(Spatial(fit_of(layer)).errors) - 1
    assert ranks == max(1, max((r for r in range(1, 100) if saves(layer, "spatial", r)), default=0))
    assert not saves(layer, "spatial", min(channels * down, across * layer.n))


def test_at_the_largest_rank_little_of_a_kernel_is_left():
    """The 8 x 12 matrix of its columns' weights side by side, of which the last four ranks would save nothing."""
    layer = convolution_of(4, 6, 2, 2)
    fit = fit_of(layer, "plain")
    cut = Spatial(fit)
    assert len(cut.errors) - 1 == 4
    beyond = torch.linalg.svdvals(fit.matrix.reshape(8, 12))[4:].square().sum()
    assert float(cut.errors[-1]) == pytest.approx(float(beyond))


@given(CONVOLUTIONS, st.data())
def test_of_a_weight_alone_the_spatial_form_is_the_svd_of_its_columns_side_by_side(layer, data):
    """Eckart and Young on (C k_h) x (k_w n) (Jaderberg et al. 2014; Tai et al. 2016)."""
    fit = fit_of(layer, "plain")
    cut = Spatial(fit)
    rank = data.draw(st.integers(1, len(cut.errors) - 1))
    rows, down = layer.module.in_channels, layer.module.kernel_size[0]
    sigma = torch.linalg.svdvals(fit.matrix.reshape(rows * down, -1))
    assert float(cut.errors[rank]) == pytest.approx(float(sigma[rank:].square().sum()), rel=1e-8)


@pytest.mark.parametrize("kind", ["whitened", "unknown bias"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 1)])
def test_a_layer_whose_inputs_never_vary_loses_nothing(kernel, kind, generator):
    """Dead, or constant: a zero moment. The outputs are the wanted ones, by the bias where the means are known."""
    layer = convolution_of(2, 5, *kernel)
    layer.module.double()
    fit = fit_of(layer, kind)
    fit = replace(fit, moment=0 * fit.moment)
    for form in forms_of(layer):
        cut = FORMS[form](fit)
        assert bool((cut.errors == 0).all())
        factors = cut.factors(1)
        assert bool(torch.isfinite(factors.matrix()).all())
        if fit.inputs is not None:
            patch = fit.inputs.reshape(1, 2, *kernel)
            outputs = factorized(layer, factors)(patch).reshape(1, -1) - layer.module.bias
            torch.testing.assert_close(outputs, fit.outputs, rtol=0, atol=1e-10)


def test_moments_that_are_only_rounded_to_semidefinite_are_cut_in_both_forms(images):
    """Of linear combinations of few channels, summed in float32: eigenvalues that should be 0 come out negative."""
    torch.manual_seed(0)
    mixed = torch.einsum("bihw,oi->bohw", images, torch.randn(24, 3)) + 3
    layer = convolution_of(24, 32, 3, 3, padding=1)
    network = nn.Sequential(layer.module)
    moments = input_moments(network, [Layer("0", layer.module)], [mixed])["0"]
    assert float(torch.linalg.eigvalsh(moments.centred).min()) < 0
    fit = Fit(layer, layer.weight().double(), moments.centred)
    for form in ("channel", "spatial"):
        cut = FORMS[form](fit)
        for rank in (1, len(cut.errors) // 2, len(cut.errors) - 1):
            error = lost(fit, cut.factors(rank).matrix())
            assert float(cut.errors[rank]) == pytest.approx(error, abs=1e-5 * float(cut.errors[0]))
            assert float(cut.factors(rank).second.abs().max()) < 100


@pytest.mark.parametrize(
    ("module", "forms"),
    [
        (nn.Conv2d(4, 8, 3), ["channel", "spatial"]),
        (nn.Conv2d(4, 8, (2, 5), stride=2, dilation=2), ["channel", "spatial"]),
        (nn.Conv2d(4, 8, 3, groups=2), ["channel"]),
        (nn.Conv2d(4, 4, 3, groups=4), ["channel"]),
        (nn.Conv2d(4, 8, 1), ["channel"]),
        (nn.Conv2d(4, 8, (1, 3)), ["channel"]),
        (nn.Conv2d(4, 8, (3, 1)), ["channel"]),
        (nn.Linear(4, 8), ["channel"]),
    ],
    ids=str,
)
def test_only_ungrouped_convolutions_larger_than_1_both_ways_have_the_spatial_form(module, forms):
    assert forms_of(Layer("layer", module)) == forms


def assert_weights_are_counted(layer: Layer) -> None:
    for form in forms_of(layer):
        for rank in (1, 2, 3, 7):
            held = sum(its.weight.numel() for its in pair(layer.module, form, rank, bias=True))
            assert held == rank * weights_a_rank(layer, form)
            assert saves(layer, form, rank) == (held < layer.module.weight.numel())


def test_the_weights_of_two_convolutions_are_counted_as_they_hold_them(convolution):
    assert_weights_are_counted(Layer("conv", convolution))


@pytest.mark.parametrize("shape", [(1, 1), (4, 8), (9, 9), (30, 2)])
def test_the_weights_of_two_linear_layers_are_counted_as_they_hold_them(shape):
    assert_weights_are_counted(Layer("fc", nn.Linear(*shape)))


@pytest.mark.parametrize("bias", [True, False])
def test_two_layers_have_a_bias_where_asked_and_the_type_of_the_one(convolution, bias):
    layer = Layer("conv", convolution.double())
    for form in forms_of(layer):
        first, second = pair(convolution, form, 2, bias)
        assert (first.bias, second.bias is not None) == (None, bias)
        assert {p.dtype for its in (first, second) for p in its.parameters()} == {torch.float64}


@pytest.mark.parametrize("name", ["residual", "resnet20", "vgg11", "vit"])
def test_a_network_takes_the_spatial_form_of_another_to_load_its_weights(make, images, name):
    network = make(name)
    small, forms = copy.deepcopy(network), {}
    for layer in countable(network).layers:
        factors = FORMS[forms_of(layer)[-1]](fit_of(layer, "plain")).factors(1)
        two = factorized(layer, factors)
        substitute(small, {layer.name: two})
        forms[layer.name] = form_of(two, factors)
    assert "spatial" in {form for form, _, _ in forms.values()}  # of a transformer, the patches'
    again = copy.deepcopy(network)
    restructure(again, forms)
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images[:5]), small(images[:5]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_form_says_whether_there_is_a_bias(bias, kind):
    layer = convolution_of(2, 5, 3, 3, bias=bias)
    factors = Spatial(fit_of(layer, kind)).factors(2)
    assert form_of(factorized(layer, factors), factors) == ["spatial", 2, int(bias or kind == "whitened")]


def test_whether_layers_can_be_put_in_two_is_tried_without_gradients(make, images):
    network, graded = make("residual"), []
    network.register_forward_hook(lambda *_: graded.append(torch.is_grad_enabled()))
    assert indivisible(network, countable(network).layers, images[:2]) == {}
    assert graded == [False]
