import pytest
import torch
from torch import nn

from utilized_rank.ranks.layers import Layer, countable
from utilized_rank.ranks.moments import Moments
from utilized_rank.ranks.projection import bases, projected, replaced
from utilized_rank.ranks.subspaces import Subspace, numerical_rank, output_moment, principal

M, N, GROUPS = 7, 5, 2


@pytest.fixture
def rows(generator):
    """Correlated inputs with a mean, (g, N, m)."""
    mixing = torch.randn(GROUPS, M, M, dtype=torch.float64, generator=generator)
    return torch.randn(GROUPS, 300, M, dtype=torch.float64, generator=generator) @ mixing + 0.5


@pytest.fixture
def weight(generator):
    return torch.randn(GROUPS, M, N, generator=generator)


@pytest.fixture
def subspaces(rows, weight) -> tuple[Subspace, Subspace]:
    moments = Moments.zeros(GROUPS, M)
    moments.add(rows)
    return principal(moments.second), principal(output_moment(moments.second, weight))


@pytest.mark.parametrize("dimensions", [1, 3, M])
def test_bases_of_so_many_dimensions_are_the_first_of_all_inputs_and_all_outputs(rows, generator, dimensions):
    layer = Layer("conv", nn.Conv2d(GROUPS * M, GROUPS * N, 1, groups=GROUPS))
    moments = Moments.zeros(GROUPS, M)
    moments.add(rows)
    (s, t), (all_s, all_t) = bases(layer, moments, dimensions), bases(layer, moments)
    assert s.vectors.shape == (GROUPS, M, dimensions)
    assert torch.equal(s.vectors, all_s.top(dimensions))
    assert torch.equal(s.values, all_s.values[:, :dimensions])
    assert torch.equal(t.vectors, all_t.vectors)
    assert t.vectors.shape == (GROUPS, N, N)


def test_bases_of_more_outputs_than_inputs_have_as_many_dimensions_as_inputs(rows):
    layer = Layer("fc", nn.Linear(M, 3 * M))
    moments = Moments.zeros(1, M)
    moments.add(rows[:1])
    s, t = bases(layer, moments)
    assert (s.vectors.shape, t.vectors.shape) == ((1, M, M), (1, 3 * M, M))
    whole = projected(layer.weight(), s, t, M, M)
    torch.testing.assert_close(whole, layer.weight().double(), rtol=0, atol=1e-12)


def energy(rows: torch.Tensor) -> torch.Tensor:
    """E||row||^2 of each group, (g,)."""
    return rows.square().sum(-1).mean(-1)


@pytest.mark.parametrize(("k_s", "k_t"), [(3, 2), (1, 1), (6, 4), (M, 2), (3, N), (0, 0)])
def test_w_prime_is_p_s_w_p_t(weight, subspaces, k_s, k_t):
    s, t = subspaces
    expected = s.projector(k_s) @ weight.double() @ t.projector(k_t)
    w = projected(weight, s, t, k_s, k_t)
    torch.testing.assert_close(w, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(projected(w, s, t, k_s, k_t), w, rtol=0, atol=1e-10)  # nothing left to remove
    for matrix in w:
        assert numerical_rank(matrix) == min(k_s, k_t)


def test_at_full_width_the_weight_is_as_it_was(weight, subspaces):
    assert torch.equal(projected(weight, *subspaces, M, N), weight.double())


@pytest.mark.parametrize("k_s", range(M + 1))
@pytest.mark.parametrize("k_t", [0, 2, N])
def test_the_error_is_what_each_projection_removes(rows, weight, subspaces, k_s, k_t):
    """E||sW - s P_S W P_T||^2 = E||s W (I - P_T)||^2 + E||s (I - P_S) W P_T||^2."""
    s, t = subspaces
    w, p_s, p_t = weight.double(), s.projector(k_s), t.projector(k_t)
    error = energy(rows @ (w - projected(weight, s, t, k_s, k_t)))
    outputs_lost = energy(rows @ w @ (torch.eye(N) - p_t))
    inputs_lost = energy(rows @ (torch.eye(M) - p_s) @ w @ p_t)
    torch.testing.assert_close(error, outputs_lost + inputs_lost)


def test_the_input_projection_never_lowers_the_error(rows, weight, subspaces):
    for k_t in range(N + 1):
        kept = [projected(weight, *subspaces, k_s, k_t) for k_s in (2, 4, M)]
        errors = [energy(rows @ (weight.double() - matrix)) for matrix in kept]
        assert bool((errors[2] <= errors[0] + 1e-9).all())
        assert bool((errors[2] <= errors[1] + 1e-9).all())


def test_the_output_projection_loses_the_energy_beyond_k_t(rows, weight, subspaces):
    _, t = subspaces
    for k in range(N + 1):
        lost = energy(rows @ (weight.double() - projected(weight, *subspaces, M, k)))
        torch.testing.assert_close(lost, t.values[:, k:].sum(-1), rtol=0, atol=1e-9 * float(t.values.sum()))


@pytest.mark.parametrize("name", ["residual", "resnet20", "vgg11", "vit"])
def test_at_full_rank_the_projected_network_is_the_original(make, images, name):
    """With the projectors as matrices, not the shortcut that skips them."""
    network = make(name)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in countable(network).layers:
        moments = Moments.zeros(layer.groups, layer.m)
        moments.add(torch.randn(layer.groups, 2 * layer.m, layer.m, generator=generator))
        s, t = bases(layer, moments)
        weights[layer] = s.projector(layer.m) @ layer.weight().double() @ t.projector(layer.n)
    with torch.no_grad():
        before = network(images)
        with replaced(weights):
            after = network(images)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


class Spoilt(Exception):
    pass


def snapshot(network: nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
    """Which parameters a network has, and their bits."""
    return {name: (id(p), p.detach().clone()) for name, p in network.named_parameters()}


def assert_untouched(network: nn.Module, before: dict[str, tuple[int, torch.Tensor]]) -> None:
    after = snapshot(network)
    assert list(after) == list(before)
    for name, (identity, value) in after.items():
        assert identity == before[name][0]
        assert torch.equal(value, before[name][1])


def test_weights_are_replaced_inside_and_back_to_the_bit_after(make, images):
    network = make("residual")
    before = snapshot(network)
    logits = network(images)
    layers = countable(network).layers
    with replaced({layer: torch.zeros_like(layer.weight()) for layer in layers}):
        assert not any(layer.module.weight.any() for layer in layers)
        assert not torch.equal(network(images), logits)
    assert_untouched(network, before)
    assert torch.equal(network(images), logits)


def test_weights_come_back_when_the_block_raises(make):
    network = make("residual")
    before = snapshot(network)
    layer = countable(network).layers[0]
    with pytest.raises(Spoilt), replaced({layer: torch.zeros_like(layer.weight())}):
        raise Spoilt
    assert_untouched(network, before)


def test_weights_come_back_when_one_of_them_cannot_be_replaced(make):
    network = make("residual")
    before = snapshot(network)
    first, second, *_ = countable(network).layers
    with pytest.raises(RuntimeError), replaced({first: first.weight() * 0, second: torch.zeros(1, 1, 1)}):
        pass
    assert_untouched(network, before)


def test_replacements_nest(make):
    network = make("residual")
    layer = countable(network).layers[0]
    before = snapshot(network)
    with replaced({layer: layer.weight() * 2}):
        twice = layer.weight().clone()
        with replaced({layer: layer.weight() * 0}):
            assert not layer.weight().any()
        assert torch.equal(layer.weight(), twice)
    assert_untouched(network, before)


def test_a_replaced_weight_has_the_layout_and_type_of_its_own(make):
    network = make("resnet20")
    layer = Layer("conv1", network.conv1)
    stride = layer.module.weight.stride()
    with replaced({layer: layer.weight().double()}):
        assert layer.module.weight.stride() == stride
        assert layer.module.weight.dtype == torch.float32
