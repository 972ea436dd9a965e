"""How sure a difference between the accuracies of two networks is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri


@dataclass(frozen=True)
class Change:
    """A change of accuracy between two networks on the same images, in percentage points."""

    points: float
    low: float
    high: float


def paired_change(before: np.ndarray, after: np.ndarray, confidence: float = 0.95) -> Change:
    """The change of accuracy and its interval, from which images each network gets right.

    Args:
        before: bool (N,), of the reference network.
        after: bool (N,), of the other network, on the same images.
        confidence: of the interval.

    The interval is that of Agresti and Min (2005, Statistics in Medicine 24): Wald's for paired
    proportions after adding half an image to each of the four cells, which keeps its coverage when
    few images change. It is centred near, not at, the observed change.
    """
    images = len(before)
    gained, lost = int((~before & after).sum()), int((before & ~after).sum())
    b, c, n = gained + 0.5, lost + 0.5, images + 2
    centre = (b - c) / n
    margin = ndtri((1 + confidence) / 2) * np.sqrt((b + c) - (b - c) ** 2 / n) / n
    low, high = max(-1.0, centre - margin), min(1.0, centre + margin)
    return Change(100 * (gained - lost) / images, 100 * float(low), 100 * float(high))
