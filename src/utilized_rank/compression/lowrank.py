"""Low-rank weights: what a layer should become, and the ways of cutting that to a rank.

A method says what a layer should become (:class:`Fit`): a matrix, and the moment in which an error of it
counts. A form cuts a fit to a rank, and has the two smaller layers that replace the one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations_with_replacement
from typing import Protocol

import torch
from torch import Tensor, nn

from ..networks.devices import truth
from ..ranks.layers import Layer
from ..ranks.moments import Moments
from ..ranks.projection import projected
from ..ranks.subspaces import Subspace, output_principal, principal, singular


@dataclass(frozen=True)
class Target:
    """What a method may use: a layer, its moments and subspaces, and the ranks that were found."""

    layer: Layer
    moments: Moments
    s: Subspace
    t: Subspace
    k_s: int
    k_t: int

    @property
    def rank(self) -> int:
        """min(k_S, k_T), at least 1: a dead layer keeps one dimension, since torch has no empty layer."""
        return max(1, min(self.k_s, self.k_t, self.layer.width))


@dataclass(frozen=True)
class Fit:
    """What a layer should become before it is cut to a rank: the map s -> (s - E[s]) M + E[t]."""

    layer: Layer
    matrix: Tensor
    """M, (g, m, n), float64."""
    moment: Tensor | None = None
    """C, (g, m, m), in which an error counts: tr((M - M_r)^T C (M - M_r)). None: the identity."""
    inputs: Tensor | None = None
    """E[s], (g, m); None where the bias is left alone."""
    outputs: Tensor | None = None
    """E[t], (g, n), without the layer's own bias."""

    @cached_property
    def weighted(self) -> Tensor:
        """C M, (g, m, n)."""
        return self.matrix if self.moment is None else self.moment @ self.matrix

    @cached_property
    def energy(self) -> Tensor:
        """M^T C M, (g, n, n)."""
        return self.matrix.mT @ self.weighted

    def added(self, matrix: Tensor) -> Tensor | None:
        """What is added to the layer's bias where ``matrix`` (g, m, n) is its weight: (g, n), E[t] - E[s] M_r."""
        if self.inputs is None or self.outputs is None:
            return None
        return self.outputs - (self.inputs.unsqueeze(1) @ matrix).squeeze(1)


def projection(target: Target) -> Fit:
    """W' = P_S W P_T itself (Garg et al. 2024); no bias correction."""
    return Fit(target.layer, projected(target.layer.weight(), target.s, target.t, target.k_s, target.k_t))


def svd(target: Target) -> Fit:
    """See :func:`weight_kept`."""
    return weight_kept(target.layer)


def optimal(target: Target) -> Fit:
    """See :func:`outputs_kept`."""
    return outputs_kept(target.layer, target.moments)


def weight_kept(layer: Layer) -> Fit:
    """W alone: the best approximation of the weight (Eckart and Young 1936), which knows nothing of the data."""
    return Fit(layer, layer.weight().double())


def outputs_kept(layer: Layer, moments: Moments) -> Fit:
    """The layer's own outputs on the calibration data: cut, the affine map with the least E||s W + b - s M - b'||^2.

    In the channel form M = W U U^T with U the top r eigenvectors of the centred W^T (C_S - mu^T mu) W, and
    b' = b + mu (W - M). The same optimum as whitening by C_S^(1/2) followed by an SVD (DRONE, Chen et
    al. 2021; SVD-LLM, Wang et al. 2024), without inverting anything.
    """
    mean = moments.mean
    weight = layer.weight().to(mean)
    return Fit(layer, weight, moments.centred, mean, (mean.unsqueeze(1) @ weight).squeeze(1))


METHODS: dict[str, Callable[[Target], Fit]] = {"projection": projection, "optimal": optimal, "svd": svd}


@dataclass(frozen=True)
class Factors:
    """A layer's low-rank replacement, matrix = first second, and what is added to its bias."""

    form: str
    rank: int
    first: Tensor
    """(g, m, q), float64; q = r in the channel form, r k_w in the spatial one."""
    second: Tensor
    """(g, q, n), float64."""
    bias: Tensor | None = None
    """Added to the layer's bias, (g, n), float64."""

    @property
    def across(self) -> int:
        """1 in the channel form, k_w in the spatial one."""
        return self.second.shape[-2] // self.rank

    def shared(self) -> Tensor:
        """The first factor as one column of a patch has it, (g, m / k_w, r): in the channel form the whole of it."""
        return self.first.unflatten(2, (self.rank, -1)).unflatten(1, (-1, self.across))[:, :, 0, :, 0]

    def matrix(self) -> Tensor:
        """First second, (g, m, n), column by column of a patch: the rest of the first factor is zeros."""
        side_by_side = self.second.reshape(len(self.second), self.rank, -1)  # (g, r, k_w n)
        return (self.shared() @ side_by_side).reshape(len(self.second), -1, self.second.shape[-1])


class Cut(Protocol):
    """A fit in one form, at any rank."""

    errors: Tensor
    """tr((M - M_r)^T C (M - M_r)) for r = 0, 1, ...: float64, falling, summed over groups."""

    def lost(self, metric: Tensor | None = None) -> Tensor:
        """tr((M - M_r)^T C (M - M_r) G) for r = 0, 1, ...: float64, (K + 1,), summed over groups.

        Falling where G is the identity.

        Args:
            metric: G, (g, n, n), symmetric and positive semi-definite; None for the identity.
        """

    def factors(self, rank: int) -> Factors:
        """Those of a rank, from 1 to len(errors) - 1."""


class Channel:
    """A linear layer becomes m -> r -> n; a convolution k x k, C_in -> g r, then 1 x 1, g r -> C_out.

    At any rank the best map that there is, in closed form: M U U^T with U the top eigenvectors of M^T C M.

    Args:
        fit: to be cut.
        most: the largest rank that will be asked for; it takes as long as all, min(m, n), where it is None.
    """

    def __init__(self, fit: Fit, most: int | None = None) -> None:
        self.fit = fit
        self._most = fit.layer.width if most is None else most
        if fit.moment is None:
            values, self.basis = singular(fit.matrix)
            self._energies = values.square()
        else:
            narrow = fit.layer.m < fit.layer.n
            whole = output_principal(fit.moment, fit.matrix) if narrow else principal(fit.energy)
            self.basis, self._energies = whole.vectors, whole.values
        self.errors = self.lost()

    def lost(self, metric: Tensor | None = None) -> Tensor:
        """See :meth:`Cut.lost`: M^T C M without its top r eigenpairs, the sum of lambda_i u_i^T G u_i over i > r."""
        if metric is None:
            return _tails(self._energies.sum(0))[: self._most + 1]
        weights = (self.basis * (metric.to(self.basis) @ self.basis)).sum(-2)  # u_i^T G u_i, (g, min(m, n))
        return _tails((self._energies * weights).sum(0))[: self._most + 1]

    def factors(self, rank: int) -> Factors:
        """M U_r and U_r^T."""
        top = self.basis[..., :rank]  # (g, n, r)
        first, second = self.fit.matrix @ top, top.mT
        return Factors("channel", rank, first, second, self.fit.added(first @ second))


class Spatial:
    """A k_h x k_w convolution becomes k_h x 1, C_in -> r, then 1 x k_w, r -> C_out (Jaderberg et al. 2014).

    The columns j of a patch share the first convolution a (C_in k_h x r): a = W V with V the top right
    singular vectors of S^(1/2) W, W (C_in k_h x k_w C_out) the columns' weights side by side and S the mean of
    the columns' moments: the optimum if columns were uncorrelated. The second convolution is then the least
    squares solution given the first, with the whole moment.

    Args:
        fit: to be cut, of a convolution without groups.
        most: the largest rank that will be asked for; where it is None, the largest that saves weights. Fewer take
            less time.
    """

    def __init__(self, fit: Fit, most: int | None = None) -> None:
        self.fit = fit
        channels, down, across = patch_sizes(fit.layer)
        m, n = fit.layer.m, fit.layer.n
        moment = torch.eye(m).to(fit.matrix) if fit.moment is None else fit.moment[0]
        side_by_side = fit.matrix[0].reshape(channels * down, across * n)
        by_column = moment.reshape(channels * down, across, channels * down, across)
        shared = by_column.diagonal(dim1=1, dim2=3).mean(-1)
        self._most = max(1, min(most or largest_saving(fit.layer, "spatial"), *side_by_side.shape))
        self.down = side_by_side @ output_principal(shared, side_by_side).top(self._most)  # (C k_h, r)
        self.down = self.down / self.down.norm(dim=0).clamp_min(1e-300)
        self.across = across
        self._outputs = fit.energy[0]
        gram = self._gram(by_column)
        self._root = _root(gram)
        with_wanted = (self.down.mT @ fit.weighted[0].reshape(channels * down, across * n)).reshape(-1, n)  # (r k_w, n)
        self._explained = torch.linalg.solve_triangular(self._root, with_wanted, upper=False)
        self.errors = self.lost()

    def _gram(self, by_column: Tensor) -> Tensor:
        """A^T C A of the first convolution A as a map of whole patches (m, r k_w), which is not made: (r k_w, r k_w).

        A column of a patch goes to its own r values, so that it is D^T C_jk D for the columns j and k, by symmetry
        one of them no further than the other.
        """
        gram = self.down.new_empty(self._most, self.across, self._most, self.across)
        for j, k in combinations_with_replacement(range(self.across), 2):
            block = self.down.mT @ (by_column[:, j, :, k] @ self.down)
            gram[:, j, :, k] = block
            gram[:, k, :, j] = block.mT
        return gram.reshape(self._most * self.across, -1)

    def lost(self, metric: Tensor | None = None) -> Tensor:
        """See :meth:`Cut.lost`: of a least squares fit, M^T C M - E^T E with E what is explained, (r k_w, n)."""
        if metric is None:
            total, gained = self._outputs.trace(), self._explained.square().sum(1)
        else:
            metric = metric[0].to(self._outputs)
            total = (self._outputs * metric).sum()
            gained = (self._explained @ metric * self._explained).sum(1)
        gained = gained.reshape(-1, self.across).sum(1).cumsum(0)
        return torch.cat([total[None], total - gained]).clamp_min(0)

    def factors(self, rank: int) -> Factors:
        """The top r of the first convolution, and the best second one for them."""
        some = rank * self.across
        second = torch.linalg.solve_triangular(self._root[:some, :some].mT, self._explained[:some], upper=True)
        factors = Factors("spatial", rank, self._first(rank)[None], second[None])
        return replace(factors, bias=self.fit.added(factors.matrix()))

    def _first(self, rank: int) -> Tensor:
        """The first convolution as a map of whole patches: (m, r k_w), a column of the patch to its own r values."""
        first = self.down.new_zeros(len(self.down), self.across, rank, self.across)
        for j in range(self.across):
            first[:, j, :, j] = self.down[:, :rank]
        return first.reshape(-1, rank * self.across)


FORMS: dict[str, Callable[..., Cut]] = {"channel": Channel, "spatial": Spatial}
"""By name, what cuts a fit; a second argument is the largest rank that will be asked for."""


def forms_of(layer: Layer) -> list[str]:
    """The forms that a layer can take: the spatial one has a convolution without groups, larger than 1 both ways."""
    module = layer.module
    is_spatial = isinstance(module, nn.Conv2d) and module.groups == 1 and min(module.kernel_size) > 1
    return ["channel", "spatial"] if is_spatial else ["channel"]


def weights_a_rank(layer: Layer, form: str) -> int:
    """Weights that each rank costs, in all groups together."""
    if form == "channel":
        return layer.groups * (layer.m + layer.n)
    channels, down, across = patch_sizes(layer)
    return channels * down + across * layer.n


def saves(layer: Layer, form: str, rank: int) -> bool:
    """Whether two layers of rank r hold fewer weights than the one: in the channel form, r (m + n) < m n (a group)."""
    return rank * weights_a_rank(layer, form) < layer.groups * layer.m * layer.n


def largest_saving(layer: Layer, form: str) -> int:
    """The largest rank that :func:`saves`; 0 where none does."""
    return (layer.groups * layer.m * layer.n - 1) // weights_a_rank(layer, form)


def patch_sizes(layer: Layer) -> tuple[int, int, int]:
    """C_in, k_h, k_w of a convolution."""
    channels, down, across = layer.module.weight.shape[1:]
    return channels, down, across


def _root(gram: Tensor) -> Tensor:
    """The lower triangle L with L L^T = ``gram`` (K, K), jitter on its diagonal: what never varies has no coefficient.

    Of moments that were summed in float32, what should be 0 may lie far below it: the jitter grows until it does not.
    """
    jitter = 1e-10 * gram.diagonal().mean() + 1e-300
    while True:
        gram.diagonal().add_(jitter)
        root, failed = torch.linalg.cholesky_ex(gram)
        if not truth(failed):
            return root
        jitter = 10 * jitter


def _tails(energies: Tensor) -> Tensor:
    """What is left of their sum after each of them: (K + 1,)."""
    return torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])


def right_singular(matrix: Tensor) -> Tensor:
    """Right singular vectors of (g, m, n) as columns, by descending singular value, (g, n, min(m, n))."""
    return singular(matrix)[1]
