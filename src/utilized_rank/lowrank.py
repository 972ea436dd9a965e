"""Low-rank weights from a basis, and the two smaller layers that replace one layer.

Every method is a matrix (W, or W' = P_S W P_T) and an output basis U with orthonormal columns: the
layer's new weight is matrix U U^T, of rank r, in two factors (matrix U) and U^T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Layer, Weighted
from .moments import Moments
from .projection import projected
from .subspaces import Subspace, output_moment, principal


@dataclass(frozen=True)
class Factors:
    """A layer's low-rank replacement, matrix ~ first second, and what is added to its bias."""

    first: Tensor
    """(g, m, r), float64."""
    second: Tensor
    """(g, r, n), float64."""
    bias: Tensor | None = None
    """Added to the layer's bias, (g, n), float64."""

    @property
    def rank(self) -> int:
        """R."""
        return self.second.shape[1]

    def matrix(self) -> Tensor:
        """First second, (g, m, n)."""
        return self.first @ self.second


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


def projection(target: Target) -> Factors:
    """W' = P_S W P_T itself (Garg et al. 2024), in factors of its own rank; no bias correction."""
    matrix = projected(target.layer.weight(), target.s, target.t, target.k_s, target.k_t)
    return _factors(matrix, right_singular(matrix), target.rank)


def svd(target: Target) -> Factors:
    """The best rank-r approximation of W alone (Eckart and Young 1936): knows nothing of the data."""
    weight = target.layer.weight().double()
    return _factors(weight, right_singular(weight), target.rank)


def optimal(target: Target) -> Factors:
    """The affine map of rank r with the least E||s W + b - s M - b'||^2 on the calibration data.

    M = W U U^T with U the top r eigenvectors of the centred W^T (C_S - mu^T mu) W, and
    b' = b + mu (W - M). The same optimum as whitening by C_S^(1/2) followed by an SVD (DRONE, Chen et
    al. 2021; SVD-LLM, Wang et al. 2024), without inverting anything.
    """
    weight = target.layer.weight().double()
    basis = principal(output_moment(target.moments.centred, weight)).vectors
    factors = _factors(weight, basis, target.rank)
    mean = target.moments.mean.unsqueeze(1)  # (g, 1, m)
    bias = (mean @ (weight - factors.matrix())).squeeze(1)
    return Factors(factors.first, factors.second, bias)


METHODS: dict[str, Callable[[Target], Factors]] = {"projection": projection, "optimal": optimal, "svd": svd}


def right_singular(matrix: Tensor) -> Tensor:
    """Right singular vectors of (g, m, n) as columns, by descending singular value, (g, n, min(m, n))."""
    return torch.linalg.svd(matrix, full_matrices=False).Vh.mT


def _factors(matrix: Tensor, basis: Tensor, rank: int) -> Factors:
    top = basis[..., :rank]  # (g, n, r)
    return Factors(matrix @ top, top.mT)


def saves(layer: Layer, rank: int) -> bool:
    """Whether two layers of rank r hold fewer weights than the one: r (m + n) < m n (a group)."""
    return rank * (layer.m + layer.n) < layer.m * layer.n


def pair(module: Weighted, rank: int, bias: bool) -> nn.Sequential:
    """Two layers m -> r -> n in place of ``module``, with random weights.

    A convolution becomes k x k, C_in -> g r, then 1 x 1, g r -> C_out, both in g groups.
    """
    like: dict[str, Any] = {"device": module.weight.device, "dtype": module.weight.dtype}
    if isinstance(module, nn.Linear):
        first: nn.Module = nn.Linear(module.in_features, rank, bias=False, **like)
        return nn.Sequential(first, nn.Linear(rank, module.out_features, bias, **like))
    groups, inner = module.groups, module.groups * rank
    first = nn.Conv2d(
        module.in_channels,
        inner,
        module.kernel_size,  # type: ignore[arg-type]
        module.stride,  # type: ignore[arg-type]
        module.padding,  # type: ignore[arg-type]
        module.dilation,  # type: ignore[arg-type]
        groups,
        bias=False,
        padding_mode=module.padding_mode,
        **like,
    )
    return nn.Sequential(first, nn.Conv2d(inner, module.out_channels, 1, groups=groups, bias=bias, **like))


@torch.no_grad()
def factorized(layer: Layer, factors: Factors) -> nn.Sequential:
    """The two layers that compute what ``factors`` say."""
    module = layer.module
    bias = _bias(layer, factors)
    two = pair(module, factors.rank, bias is not None)
    first, second = Layer("first", two[0]), Layer("second", two[1])  # type: ignore[arg-type]
    first.module.weight.copy_(first.weight_from(factors.first))
    second.module.weight.copy_(second.weight_from(factors.second))
    if bias is not None and second.module.bias is not None:
        second.module.bias.copy_(bias)
    return two.to(memory_format=torch.channels_last)


def _bias(layer: Layer, factors: Factors) -> Tensor | None:
    own = layer.module.bias
    if factors.bias is None:
        return own
    added = factors.bias.reshape(-1)  # (g n,)
    return added if own is None else own.double() + added


def substitute(network: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Put ``modules`` in place of those of the same names, in ``network`` itself.

    A module that the network has under several names is replaced under all of them.
    """
    new = {network.get_submodule(name): module for name, module in modules.items()}
    for name, old in list(network.named_modules(remove_duplicate=False)):
        if old in new:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, new[old])


def restructure(network: nn.Module, ranks: dict[str, list[int]]) -> None:
    """Give ``network`` the form of a decomposed one, to load its weights into.

    Args:
        network: changed in place.
        ranks: for each factorized layer, its rank and whether it has a bias (0 or 1).
    """
    found = {name: (network.get_submodule(name), rank, bias) for name, (rank, bias) in ranks.items()}
    pairs = {n: pair(m, rank, bool(bias)) for n, (m, rank, bias) in found.items()}  # type: ignore[arg-type]
    substitute(network, {name: two.to(memory_format=torch.channels_last) for name, two in pairs.items()})
