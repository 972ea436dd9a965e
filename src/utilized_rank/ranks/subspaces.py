"""Principal subspaces of second moments, and how many of their dimensions carry the energy.

Pure linear algebra in float64, on the device of what is given: no network, no images, no files. Matrices may have
leading dimensions (the groups of a layer).
"""

from __future__ import annotations

from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor

from ..networks.devices import solver, truth


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


def spectrum(moment: Tensor) -> Tensor:
    """All eigenvalues of ``moment`` (..., m, m), descending, none below zero: (..., m)."""
    home = moment.device
    moment = moment.to(solver(home, moment.shape[-1]), torch.float64)
    moment = (moment + moment.mT) / 2
    try:
        values = torch.linalg.eigvalsh(moment)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # as in `_eigh`
        values, _ = _by_scipy(moment, moment.shape[-1])
    return values.flip(-1).clamp_min(0).to(home)


LARGE = 2000
"""From this order on, few eigenvectors of a matrix are found by iteration."""
FEW = 8
"""Few are at most one in so many: beyond that, iteration is no faster."""
PART = 2
"""Up to one in so many are found without the vectors of the others."""
ANGLE = 1e-7
"""Largest angle (its sine) between the subspace that iteration finds and the exact one."""


def principal(moment: Tensor, dimensions: int | None = None) -> Subspace:
    """The top ``dimensions`` eigenpairs of ``moment`` (..., m, m); all where it is None.

    Signs are fixed (the largest component of each vector is positive), so that equal inputs give
    equal bases.
    """
    home, order = moment.device, moment.shape[-1]
    moment = moment.to(solver(home, order), torch.float64)
    moment = (moment + moment.mT) / 2
    if dimensions is not None and order >= LARGE and FEW * dimensions <= order and truth(moment.any()):
        pairs = [leading(matrix, dimensions) for matrix in moment.reshape(-1, order, order)]
        values = torch.stack([values for values, _ in pairs]).reshape(*moment.shape[:-2], dimensions)
        vectors = torch.stack([vectors for _, vectors in pairs]).reshape(*moment.shape[:-1], dimensions)
    else:
        values, vectors = _top(moment, dimensions)
    return Subspace(values.clamp_min(0).to(home), _signed(vectors).to(home))


def _signed(vectors: Tensor) -> Tensor:
    """The columns of (..., m, K), each with the sign that makes its largest component positive."""
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def leading(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The top k eigenpairs of a symmetric positive semi-definite matrix (m, m), float64: (k,), (m, k).

    Block Lanczos with full reorthogonalisation (Golub and Underwood 1977), in blocks of k / 8: it has
    converged when the residual, over the distance from the k-th eigenvalue to those that the next block
    sees, is :data:`ANGLE` at most (Davis and Kahan 1970). All eigenvectors are computed instead where it
    does not converge within m / 2 vectors, or missed some (more equal eigenvalues than a block has rows).
    """
    size, most = max(1, k // 8), len(matrix) // 2
    basis = matrix.new_empty(most + size, len(matrix))  # a row is a vector: faster than a column
    small = matrix.new_zeros(most, most)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(size, len(matrix), generator=generator, dtype=matrix.dtype).to(matrix.device)
    for _ in range(2):  # towards the top before it begins
        block = block @ matrix
        block /= block.norm().clamp_min(1e-300)
    block, link = _orthonormal(block)
    held = 0
    while held + size <= most:
        basis[held : held + size] = block
        image = block @ matrix
        rest = image - (image @ block.mT) @ block
        small[held : held + size, held : held + size] = image @ block.mT
        if held:
            rest -= link.mT @ basis[held - size : held]
        held += size
        rest -= (rest @ basis[:held].mT) @ basis[:held]
        block, link = _orthonormal(rest)
        exhausted = float(link.diagonal().abs().min()) <= 1e-13 * float(small[0, 0])
        # Three times k is where convergence sets in; a look costs as much as four more blocks.
        if exhausted or (held >= 3 * k + 3 * size and (held - 3 * k - 3 * size) % (4 * size) == 0):
            values, vectors = _top(small[:held, :held], k)
            beyond = torch.linalg.eigvalsh(block @ matrix @ block.mT)[-1]
            residual = torch.linalg.matrix_norm(link.mT @ vectors[-size:], 2)
            if held >= k and residual <= ANGLE * (values[-1] - beyond):
                found = vectors.mT @ basis[:held]
                if _largest_beside(matrix, found, size) < values[-1]:
                    return values, found.mT
                break
        if exhausted:
            break
        if held + size <= most:
            small[held - size : held, held : held + size] = link
            small[held : held + size, held - size : held] = link.mT
    return _top(matrix, k)


def _top(matrix: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    """The top k eigenpairs, or all, by descending eigenvalue, from all eigenvalues."""
    order = matrix.shape[-1]
    if k is not None and order >= LARGE and PART * k <= order and matrix.device.type == "cpu":
        values, vectors = _by_scipy(matrix, k)  # torch has no way to ask for some
    else:
        values, vectors = _eigh(matrix)
    return values.flip(-1)[..., :k], vectors.flip(-1)[..., :k]


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """All eigenpairs, ascending: (..., m), (..., m, m)."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch's LAPACK gives up on some matrices of a rank far below their order
        return _by_scipy(matrix, matrix.shape[-1])
    return values, vectors


def _by_scipy(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The top k eigenpairs, ascending: (..., k), (..., m, k)."""
    order = matrix.shape[-1]
    ranks = None if k == order else (order - k, order - 1)
    pairs = [scipy.linalg.eigh(one, subset_by_index=ranks) for one in matrix.reshape(-1, order, order).cpu().numpy()]
    values = torch.stack([torch.from_numpy(its) for its, _ in pairs]).reshape(*matrix.shape[:-2], k)
    vectors = torch.stack([torch.from_numpy(its) for _, its in pairs]).reshape(*matrix.shape[:-1], k)
    return values.to(matrix.device), vectors.to(matrix.device)


def singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values of (g, m, n), descending, and right singular vectors as columns: (g, K), (g, n, K)."""
    try:
        _, values, right = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # divide and conquer gave up: by QR it is slower
        pairs = [scipy.linalg.svd(one, full_matrices=False, lapack_driver="gesvd")[1:] for one in matrix.cpu().numpy()]
        values, right = (torch.stack([*map(torch.from_numpy, its)]).to(matrix) for its in zip(*pairs, strict=True))
    return values, right.mT


def _largest_beside(matrix: Tensor, found: Tensor, size: int) -> Tensor:
    """The largest eigenvalue (from below) that ``matrix`` has beside the eigenvectors ``found``, its rows."""
    generator = torch.Generator().manual_seed(1)
    block = torch.randn(size, len(matrix), generator=generator, dtype=matrix.dtype).to(matrix.device)
    for _ in range(3):
        block = block - (block @ found.mT) @ found
        block = _orthonormal(block @ matrix)[0]
    block = _orthonormal(block - (block @ found.mT) @ found)[0]
    return torch.linalg.eigvalsh(block @ matrix @ block.mT)[-1]


def _orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows Q and the square L with rows = L Q."""
    q, r = torch.linalg.qr(rows.mT)
    return q.mT.contiguous(), r.mT


def output_moment(moment: Tensor, weight: Tensor) -> Tensor:
    """C_T = W^T C_S W, (..., n, n), from C_S (..., m, m) and W (..., m, n): never stored, always derived."""
    weight = weight.to(moment.device, torch.float64)
    return weight.mT @ moment @ weight


def output_principal(moment: Tensor, weight: Tensor, dimensions: int | None = None) -> Subspace:
    """The top ``dimensions`` eigenpairs of C_T = W^T C_S W; min(m, n) where it is None: beyond them the values are 0.

    Args:
        moment: C_S, (..., m, m).
        weight: W, (..., m, n).
        dimensions: K, of which there are min(m, n) at most.

    Where m < n, no matrix of order n is made: W^T = Q R, with Q (n, m) of orthonormal columns, gives
    C_T = Q (R C_S R^T) Q^T, whose eigenvectors are Q times those of order m. All m of them span what W can give,
    whatever the rank of C_S.
    """
    if weight.shape[-2] >= weight.shape[-1]:
        return principal(output_moment(moment, weight), dimensions)
    q, r = torch.linalg.qr(weight.to(moment.device, torch.float64).mT)
    inner = principal(output_moment(moment, r.mT), dimensions)
    return Subspace(inner.values, _signed(q @ inner.vectors))


def output_spectrum(moment: Tensor, weight: Tensor) -> Tensor:
    """The eigenvalues of C_T alone, descending, (..., min(m, n)), as of :func:`output_principal`."""
    if weight.shape[-2] < weight.shape[-1]:
        weight = torch.linalg.qr(weight.to(moment.device, torch.float64).mT, mode="r").R.mT
    return spectrum(output_moment(moment, weight))


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
    values = torch.linalg.svdvals(features.double())
    p = values / values.sum() + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def numerical_rank(matrix: Tensor, tolerance: float = 1e-6) -> int:
    """How many singular values of ``matrix`` (m, n) exceed ``tolerance`` times the largest; 0 for zero."""
    matrix = matrix.double()
    # Their squares are the eigenvalues of the smaller Gram matrix, ten times sooner; in float64 those are exact to
    # about 1e-15 of the largest, so that a tolerance of 1e-6 is seen.
    energies = spectrum(matrix @ matrix.mT if len(matrix) <= matrix.shape[1] else matrix.mT @ matrix)
    return int((energies > tolerance**2 * energies[0]).sum()) if energies[0] > 0 else 0
