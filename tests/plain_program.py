"""The moments and the decompositions again, in float64, slowly: loops over images and positions, numpy and no more.

A convolution's kernel is (n, c, kh, kw) and its patch is read channel by channel, row by row. Nothing has groups.
"""

from __future__ import annotations

from itertools import product

import numpy as np

Matrix = np.ndarray


def patches(images: np.ndarray, kernel: tuple[int, int], stride: int, padding: int) -> Matrix:
    """The rows S of a convolution, pixel by pixel: (N, m)."""
    (down, across), rows = kernel, []
    for image in images:
        channels, height, width = image.shape
        padded = np.zeros((channels, height + 2 * padding, width + 2 * padding))
        padded[:, padding : padding + height, padding : padding + width] = image
        tops = range(0, padded.shape[1] - down + 1, stride)
        lefts = range(0, padded.shape[2] - across + 1, stride)
        for top, left in product(tops, lefts):
            places = product(range(channels), range(down), range(across))
            rows.append([padded[c, top + i, left + j] for c, i, j in places])
    return np.array(rows)


def moment(rows: Matrix) -> tuple[Matrix, np.ndarray]:
    """E[s^T s] and E[s], a row at a time."""
    second, mean = np.zeros((rows.shape[1], rows.shape[1])), np.zeros(rows.shape[1])
    for row in rows:
        second += np.outer(row, row)
        mean += row
    return second / len(rows), mean / len(rows)


def top(symmetric: Matrix, k: int) -> Matrix:
    """Its k principal eigenvectors, as columns."""
    return np.linalg.eigh((symmetric + symmetric.T) / 2)[1][:, ::-1][:, :k]


def projection(rows: Matrix, weight: Matrix, k_s: int, k_t: int) -> Matrix:
    """P_S W P_T."""
    v_s, v_t = top(moment(rows)[0], k_s), top(moment(rows @ weight)[0], k_t)
    return v_s @ v_s.T @ weight @ v_t @ v_t.T


def svd(weight: Matrix, rank: int) -> Matrix:
    """The nearest matrix of a rank."""
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    return left[:, :rank] @ np.diag(values[:rank]) @ right[:rank]


def affine(rows: Matrix, matrix: Matrix, wanted: np.ndarray) -> np.ndarray:
    """The bias with which s M + b has this mean."""
    return wanted - moment(rows)[1] @ matrix


def optimal(rows: Matrix, weight: Matrix, rank: int) -> Matrix:
    """The map of a rank with the least E||(s - E[s]) (W - M)||^2: W on the principal subspace of what it gives."""
    outputs = (rows - moment(rows)[1]) @ weight
    basis = top(moment(outputs)[0], rank)
    return weight @ basis @ basis.T


def compensated(rows: Matrix, wanted: Matrix, weight: Matrix, ridge: float) -> Matrix:
    """The map with the least E||t - s M - b||^2 + a ||M - W||^2, a being the ridge times the mean variance of s."""
    centred = rows - moment(rows)[1]
    amount = ridge * np.mean(centred**2)
    # The normal equations, from a least squares problem with W as further rows.
    system = np.concatenate([centred / np.sqrt(len(rows)), np.sqrt(amount) * np.eye(rows.shape[1])])
    right = np.concatenate([(wanted - wanted.mean(0)) / np.sqrt(len(rows)), np.sqrt(amount) * weight])
    return np.linalg.lstsq(system, right, rcond=None)[0]


def channel(rows: Matrix | None, matrix: Matrix, rank: int) -> Matrix:
    """The map of a rank that gives most nearly what ``matrix`` gives of centred rows; of any, where there are none."""
    return svd(matrix, rank) if rows is None else optimal(rows, matrix, rank)


def spatial(rows: Matrix | None, matrix: Matrix, rank: int, channels: int, kernel: tuple[int, int]) -> Matrix:
    """k_h x 1 to ``rank`` channels, then 1 x k_w: the second one by least squares on every patch."""
    down, across = kernel
    centred = np.eye(len(matrix)) * np.sqrt(len(matrix)) if rows is None else rows - moment(rows)[1]
    columns = [[(c * down + i) * across + j for c, i in product(range(channels), range(down))] for j in range(across)]
    shared = sum(moment(centred[:, its])[0] for its in columns) / across
    values, vectors = np.linalg.eigh(shared)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    beside = np.concatenate([matrix[its] for its in columns], axis=1)  # (C k_h, k_w n)
    right = np.linalg.svd(root @ beside, full_matrices=False)[2][:rank].T
    first = beside @ right
    first /= np.linalg.norm(first, axis=0)
    whole = np.zeros((len(matrix), rank * across))
    for j, its in enumerate(columns):
        for r in range(rank):
            whole[its, r * across + j] = first[:, r]
    second = np.linalg.lstsq(centred @ whole, centred @ matrix, rcond=None)[0]
    return whole @ second
