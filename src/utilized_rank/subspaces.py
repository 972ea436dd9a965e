"""Principal subspaces of second moments, and how many of their dimensions carry the energy.

Pure linear algebra in float64: no network, no images, no files. Matrices may have leading
dimensions (the groups of a layer).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Subspace:
    """Eigenvectors of a symmetric positive semi-definite matrix, by descending eigenvalue."""

    values: Tensor
    """Eigenvalues, none below zero, (..., K)."""
    vectors: Tensor
    """Orthonormal columns, (..., m, K)."""

    def top(self, k: int) -> Tensor:
        """V[:, :k], (..., m, k)."""
        return self.vectors[..., :k]

    def projector(self, k: int) -> Tensor:
        """P = V_k V_k^T, the orthogonal projector on the top k dimensions, (..., m, m)."""
        return self.top(k) @ self.top(k).mT


def principal(moment: Tensor, dimensions: int | None = None) -> Subspace:
    """The top ``dimensions`` eigenpairs of ``moment`` (..., m, m); all where it is None.

    Signs are fixed (the largest component of each vector is positive), so that equal inputs give
    equal bases.
    """
    moment = moment.double()
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    values, vectors = values.flip(-1)[..., :dimensions].clamp_min(0), vectors.flip(-1)[..., :dimensions]
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return Subspace(values, vectors * torch.where(largest < 0, -1.0, 1.0))


def output_moment(moment: Tensor, weight: Tensor) -> Tensor:
    """C_T = W^T C_S W, (..., n, n), from C_S (..., m, m) and W (..., m, n): never stored, always derived."""
    weight = weight.double()
    return weight.mT @ moment @ weight


def energy_rank(values: Tensor, energy: float) -> int:
    """The smallest k whose top k eigenvalues hold the fraction ``energy`` of their sum.

    ``values`` (..., K) descending; over several groups, the fraction of all groups together, k being
    common to them. A sum of zero (a dead layer) needs no dimension: 0.
    """
    per_dimension = values.reshape(-1, values.shape[-1]).sum(0)
    total = per_dimension.sum()
    if total == 0:
        return 0
    kept = per_dimension.cumsum(0) / total
    return min(int((kept < energy - 1e-12).sum()) + 1, len(per_dimension))


def effective_rank(features: Tensor) -> float:
    """RankMe of ``features`` (N, D): exp of the entropy of their normalised singular values.

    Garrido et al. 2023, arXiv 2210.02885, equation 1. Between 1 and min(N, D); compare only networks
    of one architecture.
    """
    singular = torch.linalg.svdvals(features.double())
    p = singular / singular.sum() + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def numerical_rank(matrix: Tensor, tolerance: float = 1e-6) -> int:
    """How many singular values of ``matrix`` (m, n) exceed ``tolerance`` times the largest; 0 for zero."""
    singular = torch.linalg.svdvals(matrix.double())
    return int((singular > tolerance * singular[0]).sum()) if singular[0] > 0 else 0
