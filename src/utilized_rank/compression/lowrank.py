"""Low-rank weights: what a layer should become, and the ways of cutting that to a rank.

A method says what a layer should become (:class:`Fit`): a matrix, and the moment in which an error of it
counts. A form cuts a fit to a rank, and has the two smaller layers that replace the one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..networks.devices import truth
from ..ranks.layers import Layer
from ..ranks.moments import Moments
from ..ranks.projection import projected
from ..ranks.subspaces import Subspace, output_moment, principal


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

    def matrix(self) -> Tensor:
        """First second, (g, m, n)."""
        return self.first @ self.second


class Cut(Protocol):
    """A fit in one form, at any rank."""

    errors: Tensor
    """tr((M - M_r)^T C (M - M_r)) for r = 0, 1, ...: float64, falling, summed over groups."""

    def factors(self, rank: int) -> Factors:
        """Those of a rank, from 1 to len(errors) - 1."""

    def lost(self, metric: Tensor) -> Tensor:
        """tr((M - M_r)^T C (M - M_r) G) for r = 0, 1, ..., G (g, n, n): float64, summed over groups."""


class Channel:
    """A linear layer becomes m -> r -> n; a convolution k x k, C_in -> g r, then 1 x 1, g r -> C_out.

    At any rank the best map that there is, in closed form: M U U^T with U the top eigenvectors of M^T C M.
    """

    def __init__(self, fit: Fit) -> None:
        self.fit = fit
        if fit.moment is None:
            self.basis = right_singular(fit.matrix)
            energies = torch.linalg.svdvals(fit.matrix).square()
        else:
            whole = principal(output_moment(fit.moment, fit.matrix))
            self.basis, energies = whole.vectors[..., : fit.layer.width], whole.values[..., : fit.layer.width]
        self._energies = energies
        self.errors = _tails(energies.sum(0))

    def lost(self, metric: Tensor) -> Tensor:
        """Of each eigenvector of M^T C M, its energy in G."""
        basis = self.basis[..., : self._energies.shape[-1]]
        return _tails((self._energies * (basis * (metric.to(basis) @ basis)).sum(-2)).sum(0))

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
    """

    def __init__(self, fit: Fit) -> None:
        self.fit = fit
        channels, down, across = patch_sizes(fit.layer)
        m, n = fit.layer.m, fit.layer.n
        moment = torch.eye(m).to(fit.matrix) if fit.moment is None else fit.moment[0]
        side_by_side = fit.matrix[0].reshape(channels * down, across * n)
        by_column = moment.reshape(channels * down, across, channels * down, across)
        shared = by_column.diagonal(dim1=1, dim2=3).mean(-1)
        most = max(1, min(largest_saving(fit.layer, "spatial"), *side_by_side.shape))
        top = principal(output_moment(shared, side_by_side)).top(most)
        self.down = side_by_side @ top  # (C k_h, r)
        self.down = self.down / self.down.norm(dim=0).clamp_min(1e-300)
        self.across = across
        first = self._first(most)
        weighted = self._weighted(moment)
        gram = first.mT @ weighted
        # A direction that never varies has no coefficient to find: the jitter sets it to zero.
        identity = torch.eye(len(gram)).to(gram)
        gram = gram + (1e-10 * gram.diagonal().mean() + 1e-300) * identity
        self._root, failed = torch.linalg.cholesky_ex(gram)
        if truth(failed):  # moments summed in float32: what should be 0 can be farther below it
            self._root = torch.linalg.cholesky(gram + 2 * torch.linalg.eigvalsh(gram)[0].abs() * identity)
        self._explained = torch.linalg.solve_triangular(self._root, weighted.mT @ fit.matrix[0], upper=False)
        self._whole = fit.matrix[0].mT @ (moment @ fit.matrix[0])  # (n, n)
        total = self._whole.trace()
        gained = self._explained.square().sum(1).reshape(most, across).sum(1).cumsum(0)
        self.errors = torch.cat([total[None], (total - gained).clamp_min(0)])

    def lost(self, metric: Tensor) -> Tensor:
        """The whole, less what the columns of the least squares solution explain."""
        its = metric[0].to(self._whole)
        total = (self._whole * its).sum()
        gained = (self._explained * (self._explained @ its)).sum(1).reshape(-1, self.across).sum(1).cumsum(0)
        return torch.cat([total[None], (total - gained).clamp_min(0)])

    def _first(self, rank: int) -> Tensor:
        """The first convolution as a map of whole patches: (m, r k_w), a column of the patch to its own r values."""
        rows = len(self.down)
        first = self.down.new_zeros(rows, self.across, rank, self.across)
        for j in range(self.across):
            first[:, j, :, j] = self.down[:, :rank]
        return first.reshape(rows * self.across, rank * self.across)

    def _weighted(self, moment: Tensor) -> Tensor:
        """C times the first convolution, (m, r k_w), by columns of the patch: k_w times less work than it looks."""
        by_column = moment.reshape(len(moment), -1, self.across)
        return torch.stack([by_column[:, :, j] @ self.down for j in range(self.across)], 2).flatten(1)

    def factors(self, rank: int) -> Factors:
        """The top r of the first convolution, and the best second one for them."""
        some = rank * self.across
        second = torch.linalg.solve_triangular(self._root[:some, :some].mT, self._explained[:some], upper=True)
        first = self._first(rank)
        return Factors("spatial", rank, first[None], second[None], self.fit.added((first @ second)[None]))


FORMS: dict[str, Callable[[Fit], Cut]] = {"channel": Channel, "spatial": Spatial}


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


def _tails(energies: Tensor) -> Tensor:
    """What is left of their sum after each of them: (K + 1,)."""
    return torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])


def right_singular(matrix: Tensor) -> Tensor:
    """Right singular vectors of (g, m, n) as columns, by descending singular value, (g, n, min(m, n))."""
    return torch.linalg.svd(matrix, full_matrices=False).Vh.mT
