import math
from fractions import Fraction
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utilized_rank.ranks import subspaces
from utilized_rank.ranks.subspaces import (
    effective_rank,
    energy_rank,
    leading,
    numerical_rank,
    output_moment,
    output_principal,
    output_spectrum,
    principal,
    spectrum,
)


def moment(m: int, rank: int, groups: int = 1, seed: int = 0) -> torch.Tensor:
    """A random second moment of a given rank, (g, m, m)."""
    rows = torch.randn(groups, rank, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows.mT @ rows


@pytest.mark.parametrize("k", [0, 1, 3, 8])
def test_projectors_are_symmetric_idempotent_and_of_rank_k(k):
    p = principal(moment(8, 12, groups=2)).projector(k)
    torch.testing.assert_close(p @ p, p, rtol=0, atol=1e-12)
    torch.testing.assert_close(p, p.mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(p.diagonal(dim1=-2, dim2=-1).sum(-1), torch.full((2,), k, dtype=torch.float64))


def test_the_projector_on_all_dimensions_is_the_identity():
    identity = torch.eye(8, dtype=torch.float64).unsqueeze(0)
    torch.testing.assert_close(principal(moment(8, 12)).projector(8), identity, rtol=0, atol=1e-12)


def test_eigenpairs_are_orthonormal_descending_and_rebuild_the_moment():
    c = moment(8, 12, groups=3)
    subspace = principal(c)
    values, vectors = subspace.values, subspace.vectors
    assert bool((values.diff() <= 0).all())
    torch.testing.assert_close(c @ vectors, vectors * values.unsqueeze(1), rtol=0, atol=1e-10)
    identity = torch.eye(8).double().expand(3, 8, 8)
    torch.testing.assert_close(vectors.mT @ vectors, identity, rtol=0, atol=1e-12)


def test_the_top_k_dimensions_hold_the_most_energy():
    """tr(P C) of the principal projector is no less than of any other of its rank (Ky Fan)."""
    c = moment(8, 12)[0]
    best = float((principal(c).projector(3) @ c).trace())
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        q = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64, generator=generator)).Q
        assert float((q @ q.T @ c).trace()) <= best + 1e-9


def test_fewer_dimensions_are_the_first_of_all():
    c = moment(8, 12)
    few, every = principal(c, 3), principal(c)
    assert torch.equal(few.values, every.values[:, :3])
    assert torch.equal(few.vectors, every.vectors[..., :3])
    assert torch.equal(few.vectors, every.top(3))


def test_signs_are_fixed():
    c = moment(8, 12)
    vectors = principal(c).vectors
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    assert bool((largest > 0).all())


def test_a_moment_that_is_not_quite_symmetric_is_symmetrised():
    c = moment(8, 12)
    skew = torch.randn(1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(principal(c + skew - skew.mT).values, principal(c).values)


def test_rounding_below_zero_is_no_eigenvalue():
    assert float(principal(moment(8, 2)).values.min()) >= 0


def with_spectrum(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A symmetric matrix with these eigenvalues, in random directions."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator)).Q
    return q * values @ q.T


def powers(order: int, exponent: float) -> torch.Tensor:
    return torch.arange(1, order + 1, dtype=torch.float64) ** -exponent


def sine(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Of the largest angle between two subspaces of one dimension, given by orthonormal columns (m, k)."""
    return float(torch.linalg.matrix_norm(found - exact @ (exact.T @ found), 2))


def assert_leading(matrix: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """k pairs with the values of a full decomposition, orthonormal and each an eigenpair; they are returned."""
    values, vectors = leading(matrix, k)
    assert values.shape == (k,)
    assert vectors.shape == (len(matrix), k)
    scale = float(torch.linalg.matrix_norm(matrix, 2))
    expected = torch.linalg.eigvalsh(matrix).flip(0)[:k]
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-10 * scale)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(k).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(matrix @ vectors, vectors * values, rtol=0, atol=1e-6 * scale)
    return values, vectors


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(("order", "k"), [(300, 1), (301, 5), (400, 16), (400, 50)])
def test_leading_eigenpairs_are_those_of_the_full_decomposition(order, k, exponent):
    matrix = with_spectrum(powers(order, exponent))
    _, vectors = assert_leading(matrix, k)
    exact = torch.linalg.eigh(matrix).eigenvectors.flip(1)[:, :k]
    assert sine(vectors, exact) < 1e-6


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_leading_eigenvectors_do_not_depend_on_the_scale(scale):
    matrix = with_spectrum(powers(300, 2.0))
    assert sine(leading(scale * matrix, 10)[1], leading(matrix, 10)[1]) < 1e-6


@pytest.mark.parametrize("k", [1, 8, 16, 24])
@pytest.mark.parametrize("rank", [0, 1, 2, 3, 4, 6, 20])
def test_of_a_matrix_of_low_rank_as_many_pairs_as_asked_are_found(rank, k):
    """Beyond the rank the values are zero, and the vectors any that are orthonormal."""
    rows = torch.randn(rank, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    assert_leading(rows.T @ rows, k)


@pytest.mark.parametrize(
    "equal",
    [slice(0, 3), slice(0, 40), slice(5, 12), slice(0, 300)],
    ids=["the first", "more than asked", "around the last", "all"],
)
@pytest.mark.parametrize("k", [4, 8, 16])
def test_leading_eigenpairs_are_found_where_eigenvalues_are_equal(equal, k):
    values = powers(300, 2.0)
    values[equal] = values[equal][0].clone()
    assert_leading(with_spectrum(values), k)


@pytest.mark.parametrize("groups", [(), (1,), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("k", [1, 6])
def test_few_dimensions_of_a_large_matrix_are_those_of_all_dimensions(groups, k, monkeypatch):
    """Found by iteration, group by group, and given with the same signs."""
    seeds = range(math.prod(groups))
    c = torch.stack([with_spectrum(powers(300, 1.5), seed) for seed in seeds]).view(*groups, 300, 300)
    exact = principal(c, k)
    iterated: list[int] = []
    monkeypatch.setattr(subspaces, "LARGE", 100)
    monkeypatch.setattr(subspaces, "leading", lambda matrix, k: iterated.append(k) or leading(matrix, k))
    found = principal(c, k)
    assert iterated == [k] * len(seeds)
    torch.testing.assert_close(found.values, exact.values, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.vectors, exact.vectors, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.projector(k), exact.projector(k), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dimensions", [None, 38])
def test_many_dimensions_are_not_iterated_for(dimensions, monkeypatch):
    """All of them, or more than one in eight."""
    monkeypatch.setattr(subspaces, "LARGE", 100)
    monkeypatch.setattr(subspaces, "leading", None)
    found = principal(with_spectrum(powers(300, 1.0)), dimensions)
    assert found.vectors.shape == (300, dimensions or 300)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_iteration_looks_now_and_then_whether_it_has_converged(exponent, scale, monkeypatch):
    """In blocks of 2 for 16 dimensions, first at 3 * 16 + 3 * 2 vectors; no problem of the whole order is solved."""
    orders: list[int] = []
    top = subspaces._top
    monkeypatch.setattr(subspaces, "_top", lambda matrix, k: orders.append(len(matrix)) or top(matrix, k))
    leading(scale * with_spectrum(powers(400, exponent)), 16)
    assert len(orders) > 1
    assert orders == [*range(54, 54 + 8 * len(orders), 8)]
    assert orders[-1] <= 200


def test_a_part_of_the_dimensions_is_asked_of_scipy_on_the_processor_alone(monkeypatch):
    """Elsewhere there is nothing that it could read, as here on the meta device."""
    monkeypatch.setattr(subspaces, "LARGE", 8)
    values, vectors = subspaces._top(torch.empty(16, 16, dtype=torch.float64, device="meta"), 4)
    assert (values.device.type, values.shape, vectors.shape) == ("meta", (4,), (16, 4))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", [300, 20])
def test_a_part_of_the_dimensions_of_a_large_matrix_is_that_of_all(groups, rank, monkeypatch):
    """Without the vectors of the others; beyond the rank they are any that are orthonormal."""
    c, k = moment(300, rank, groups), 100
    exact = principal(c, k)
    monkeypatch.setattr(subspaces, "LARGE", 200)
    monkeypatch.setattr(subspaces, "_eigh", None)
    found, scale = principal(c, k), float(exact.values.max())
    torch.testing.assert_close(found.values, exact.values, rtol=0, atol=1e-13 * scale)
    torch.testing.assert_close(found.vectors.mT @ found.vectors, torch.eye(k).double().expand(groups, k, k))
    certain = min(k, rank)
    torch.testing.assert_close(found.projector(certain), exact.projector(certain), rtol=0, atol=1e-10)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_a_planted_subspace_is_found_exactly(k, generator):
    """Rows within k dimensions of 8: energy rank k, and all principal angles are zero."""
    basis = torch.linalg.qr(torch.randn(8, k, dtype=torch.float64, generator=generator)).Q  # (8, k)
    rows = torch.randn(500, k, dtype=torch.float64, generator=generator) @ basis.T
    found = principal(rows.T @ rows / 500)
    assert energy_rank(found.values, 1 - 1e-9) == k
    cosines = torch.linalg.svdvals(basis.T @ found.top(k))
    torch.testing.assert_close(cosines, torch.ones(k, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.projector(k), basis @ basis.T, rtol=0, atol=1e-10)


def test_the_output_moment_is_that_of_the_products(generator):
    rows = torch.randn(2, 50, 6, dtype=torch.float64, generator=generator)
    weight = torch.randn(2, 6, 4, generator=generator)
    outputs = rows @ weight.double()
    torch.testing.assert_close(output_moment(rows.mT @ rows, weight), outputs.mT @ outputs)


def isometry(m: int, n: int, groups: int = 1) -> torch.Tensor:
    """W (g, m, n) with orthonormal rows or columns, whichever are fewer."""
    tall = torch.randn(groups, max(m, n), min(m, n), generator=torch.Generator().manual_seed(m)).double()
    q = torch.linalg.qr(tall).Q
    return q if m >= n else q.mT


SIDES = pytest.mark.parametrize(("m", "n"), [(5, 12), (1, 6), (8, 8), (12, 5), (6, 1)], ids=str)
GROUPS = pytest.mark.parametrize("groups", [1, 3])


@SIDES
@GROUPS
def test_the_outputs_subspaces_from_the_smaller_side_are_those_of_order_n(m, n, groups):
    """Eigenvalues and projectors of W^T C W, where its eigenvalues are far apart."""
    c = torch.stack([with_spectrum(powers(m, 2.0), seed) for seed in range(groups)])
    weight, width = isometry(m, n, groups), min(m, n)
    found, direct = output_principal(c, weight), principal(output_moment(c, weight))
    assert found.vectors.shape == (groups, n, width)
    torch.testing.assert_close(found.values, direct.values[:, :width], rtol=0, atol=1e-14)
    torch.testing.assert_close(found.vectors, direct.top(width), rtol=0, atol=1e-11)  # the signs too
    for k in range(1, width + 1):
        torch.testing.assert_close(found.projector(k), direct.projector(k), rtol=0, atol=1e-11)


@SIDES
@GROUPS
@pytest.mark.parametrize("rank", [0, 2, 20])
def test_the_outputs_eigenpairs_are_orthonormal_whatever_the_rank_of_the_moment(m, n, groups, rank):
    """U^T U = 1, C_T U = U L with falling L, and W U U^T = W: together they hold all that the weight can give."""
    c = moment(m, rank, groups)
    weight = torch.randn(groups, m, n, generator=torch.Generator().manual_seed(1)).double()
    found = output_principal(c, weight)
    u, values, width = found.vectors, found.values, min(m, n)
    scale = 1e-13 * float(1 + output_moment(c, weight).abs().max())
    torch.testing.assert_close(u.mT @ u, torch.eye(width).double().expand(groups, width, width), rtol=0, atol=1e-13)
    torch.testing.assert_close(output_moment(c, weight) @ u, u * values.unsqueeze(1), rtol=0, atol=10 * scale)
    torch.testing.assert_close(weight @ u @ u.mT, weight, rtol=0, atol=1e-12)
    assert bool((values.diff() <= 0).all())
    assert bool((values[:, rank:] <= scale).all())


@SIDES
def test_the_outputs_eigenvalues_alone_are_the_same(m, n):
    c = moment(m, 20, 2)
    weight = torch.randn(2, m, n, generator=torch.Generator().manual_seed(1))
    values, direct = output_spectrum(c, weight), spectrum(output_moment(c, weight))
    torch.testing.assert_close(values, output_principal(c, weight).values, rtol=0, atol=1e-12 * float(direct.max()))
    torch.testing.assert_close(values, direct[:, : min(m, n)], rtol=0, atol=1e-12 * float(direct.max()))
    for energy in (0.5, 0.9, 0.99, 1.0):
        assert energy_rank(values, energy) == energy_rank(direct, energy)


@SIDES
@pytest.mark.parametrize("rank", [0, 1])
def test_a_weight_of_low_rank_has_as_many_directions_as_any(m, n, rank):
    left, right = isometry(m, 1)[:, :, :rank], isometry(1, n)[:, :rank]
    found = output_principal(moment(m, 20), left @ right)
    width = min(m, n)
    torch.testing.assert_close(found.vectors.mT @ found.vectors, torch.eye(width).double()[None], rtol=0, atol=1e-13)
    assert bool((found.values[:, rank:] <= 1e-13 * (1 + found.values[:, :1])).all())


@pytest.mark.parametrize(("m", "n"), [(8, 8), (12, 5)])
def test_where_outputs_are_no_more_than_inputs_they_are_decomposed_themselves(m, n):
    c, weight = moment(m, 20, 2), isometry(m, n, 2).float()
    found, direct = output_principal(c, weight, 3), principal(output_moment(c, weight), 3)
    assert torch.equal(found.values, direct.values)
    assert torch.equal(found.vectors, direct.vectors)


@pytest.mark.parametrize("function", [output_principal, output_spectrum])
def test_no_eigenproblem_is_larger_than_the_smaller_side(function, monkeypatch):
    orders: list[int] = []
    for name in ("eigh", "eigvalsh"):
        solve = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda a, solve=solve: orders.append(a.shape[-1]) or solve(a))
    for m, n in [(3, 40_000), (40, 2)]:
        function(moment(m, 50), isometry(m, n))
    assert orders == [3, 2]


@pytest.mark.parametrize("dimensions", [1, 3])
def test_few_dimensions_of_the_outputs_are_the_first_of_all(dimensions):
    c, weight = moment(5, 12), isometry(5, 9)
    few, every = output_principal(c, weight, dimensions), output_principal(c, weight)
    assert torch.equal(few.values, every.values[:, :dimensions])
    torch.testing.assert_close(few.vectors, every.top(dimensions), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("values", "energy", "expected"),
    [
        ([4, 3, 2, 1], 0.4, 1),
        ([4, 3, 2, 1], 0.41, 2),
        ([4, 3, 2, 1], 0.7, 2),
        ([4, 3, 2, 1], 0.9, 3),
        ([4, 3, 2, 1], 1.0, 4),
        ([9999, 1, 0, 0], 0.99991, 2),
        ([5, 0, 0, 0], 1.0, 1),
        ([1, 1, 1, 1], 0.5, 2),
        ([0, 0, 0, 0], 0.99, 0),
    ],
)
def test_energy_rank_by_hand(values, energy, expected):
    assert energy_rank(torch.tensor(values, dtype=torch.float64), energy) == expected


def test_energy_is_that_of_all_groups_together():
    values = torch.tensor([[8.0, 0.0], [1.0, 1.0]])  # together 9 and 1
    assert energy_rank(values, 0.9) == 1
    assert energy_rank(values, 0.91) == 2


SPECTRA = st.lists(st.integers(0, 100), min_size=1, max_size=12).map(lambda v: sorted(v, reverse=True))


@given(SPECTRA.filter(any), st.fractions(Fraction(1, 100), 1, max_denominator=1000))
def test_energy_rank_is_the_smallest_k_that_holds_the_energy(spectrum, energy):
    held = [Fraction(h, sum(spectrum)) for h in accumulate(spectrum)]
    smallest = next(k for k, h in enumerate(held, 1) if h >= energy)
    assert energy_rank(torch.tensor(spectrum, dtype=torch.float64), float(energy)) == smallest


@given(SPECTRA, st.floats(0.01, 1), st.floats(1e-6, 1e6))
def test_energy_rank_does_not_depend_on_the_scale(spectrum, energy, scale):
    values = torch.tensor(spectrum, dtype=torch.float64)
    assert energy_rank(values * scale, energy) == energy_rank(values, energy)


@pytest.mark.parametrize("k", [1, 4, 8])
def test_effective_rank_of_k_equal_directions_is_k(k, generator):
    left = torch.linalg.qr(torch.randn(100, k, dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(8, k, dtype=torch.float64, generator=generator)).Q
    assert effective_rank(left @ right.T) == pytest.approx(k, rel=1e-3)


def test_effective_rank_by_hand():
    """Singular values 3 and 1: exp of the entropy of (3/4, 1/4)."""
    features = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(features) == pytest.approx(math.exp(entropy), abs=1e-4)


def test_effective_rank_depends_on_neither_scale_nor_rotation(generator):
    features = torch.randn(60, 8, dtype=torch.float64, generator=generator)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=generator)).Q
    assert effective_rank(5 * features @ turn) == pytest.approx(effective_rank(features))


@pytest.mark.parametrize("rank", [0, 1, 3, 5])
def test_numerical_rank_counts_directions(rank, generator):
    left, right = (torch.randn(shape, generator=generator).double() for shape in ((7, rank), (rank, 5)))
    assert numerical_rank(left @ right) == rank


def test_numerical_rank_ignores_what_is_below_the_tolerance():
    matrix = torch.diag(torch.tensor([1.0, 1e-3, 1e-7, 0.0], dtype=torch.float64))
    assert numerical_rank(matrix) == 2
    assert numerical_rank(matrix, tolerance=1e-8) == 3


@pytest.mark.parametrize("groups", [1, 2])
def test_few_rows_that_are_mostly_zero_have_principal_subspaces_too(groups, monkeypatch):
    """Where torch's own decomposition gives up, as it does on some of them, another takes its place."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.relu(torch.randn(groups, 20, 400, generator=draw))
    rows[:, :, torch.rand(400, generator=draw) < 0.9] = 0
    moment = rows.double().mT @ rows.double()
    expected = principal(moment)

    def refuse(matrix):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    found = principal(moment)
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.projector(10), expected.projector(10), rtol=0, atol=1e-8)
    both = moment @ found.vectors, found.vectors * found.values.unsqueeze(-2)
    torch.testing.assert_close(*both, rtol=0, atol=1e-8)
