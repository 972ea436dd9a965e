"""Tolerances of the rank search: none finer than one image of the split that it is searched on."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from ..base.sections import StudyError
from .sections import DEFAULT_EPSILONS, Measure


def check_resolution(images: int, epsilons: list[float], where: str = "measure.epsilons") -> None:
    """Refuse an epsilon finer than one image of the search split: it could only measure noise.

    Raises:
        StudyError: naming the epsilon and what one image is worth.
    """
    finest = 100 / images
    for epsilon in epsilons:
        if 0 < epsilon < finest:
            raise StudyError(
                f"{where} has {epsilon:g} points, but one of the {images} search images is worth "
                f"{finest:.2g} points: use 0 or at least that, or enlarge data.search"
            )


def search_images(indices: dict[str, list[int]]) -> int:
    """How many images the smallest search split of a run has, from the indices of all splits."""
    return min(len(indices[name]) for name in ("search", "test_searched") if name in indices)


def tolerances(images: int, measure: Measure) -> list[float]:
    """The tolerances of a study, in points: those it names, or default ones that its search splits resolve.

    Says so on standard error where a default one had to give way.

    Raises:
        StudyError: as :func:`check_resolution`.
    """
    check_resolution(images, measure.epsilons)
    found = measure.resolved(images).epsilons
    if not measure.epsilons and found != list(DEFAULT_EPSILONS):
        print(
            f"tolerances are {_points(found)} points in place of {_points(DEFAULT_EPSILONS)}: one of the "
            f"{images} search images is worth {100 / images:.2f} (measure.epsilons names others)",
            file=sys.stderr,
        )
    return found


def _points(epsilons: Iterable[float]) -> str:
    return " and ".join(f"{epsilon:g}" for epsilon in epsilons)
