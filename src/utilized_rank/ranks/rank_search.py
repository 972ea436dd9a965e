"""The smallest ranks that pass, as certified boundaries, found through a callable.

Nothing here knows of networks or images: :data:`Passes` says whether a layer projected to (k_S, k_T)
keeps its network within the tolerance. A certified boundary is a k that passes while k - 1 fails
(or k = 1). Where passing is not monotone in k there may be several; each that is found is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Passes = Callable[[int, int], bool]
"""Whether (k_S, k_T) passes. k_S = m stands for no projection of the inputs, k_T = n of the outputs."""


@dataclass(frozen=True)
class Ranks:
    """What the search found for one layer at one tolerance."""

    k_s: int
    """Dimensions of the input subspace in W' = P_S W P_T; m where no smaller number served."""
    k_t: int
    """Dimensions of the output subspace; n where no smaller number served."""
    k_s_alone: int | None
    """The smallest passing k_S with the outputs left as they are; None where it was not asked."""
    k_t_alone: int | None
    """The smallest passing k_T with the inputs left as they are; None where it was not asked."""
    r: int
    """Utilized rank, min(k_S, k_T) (Garg et al. 2024)."""


def smallest(
    passes: Callable[[int], bool],
    low: int,
    high: int,
    likely: Callable[[int], bool] | None = None,
    start: int | None = None,
) -> int:
    """The smallest k in (low, high] found by bisection: it passes, and k - 1 fails or is ``low``.

    Args:
        passes: the verdict on k.
        low: known to fail, or not to be tried.
        high: known to pass.
        likely: a guess of the verdict that costs less. Bisection goes by guesses, and by verdicts where they
            are known; its k and k - 1 are then certified, and it goes anew where a guess was wrong.
        start: where k is expected. It is looked for from there in steps that double, until it is enclosed: a start that
            is off by d takes about 2 log2 d questions more than one that is right, which takes two.
    """
    known = {low: False, high: True}

    def verdict(k: int) -> bool:
        if k not in known:
            known[k] = passes(k)
        return known[k]

    guess = verdict if likely is None else lambda k: known[k] if k in known else likely(k)
    while True:
        start = k = _bisected(guess, *_enclosed(guess, low, high, start))
        # What fails is told sooner than what passes, so it is asked first.
        if not verdict(k - 1) and verdict(k):
            return k


def _enclosed(passes: Callable[[int], bool], low: int, high: int, start: int | None) -> tuple[int, int]:
    """Ends in [low, high], the first of which fails and the second passes, on either side of a boundary near start."""
    if start is None or high - low < 2:
        return low, high
    first, step = min(max(start, low + 1), high - 1), 1
    down = passes(first)
    low, high = (low, first) if down else (first, high)
    while high - low > step:
        k = high - step if down else low + step
        turned = passes(k) is not down
        low, high = (k, high) if down is turned else (low, k)
        if turned:
            break
        step *= 2
    return low, high


def _bisected(passes: Callable[[int], bool], low: int, high: int) -> int:
    while high - low > 1:
        middle = (low + high) // 2
        if passes(middle):
            high = middle
        else:
            low = middle
    return high


Path = Callable[[int], tuple[int, int]]
"""(k_S, k_T) for each k."""


def _along(path: Path, passes: Passes, likely: Passes | None, predicted: Passes | None, low: int, high: int) -> int:
    """The smallest k in (low, high] whose (k_S, k_T) passes; that of ``high`` is known to."""
    guess = None if likely is None else lambda k: likely(*path(k))
    start = None if predicted is None else _bisected(lambda k: predicted(*path(k)), low, high)
    return smallest(lambda k: passes(*path(k)), low, high, guess, start)


def search(passes: Passes, m: int, n: int, likely: Passes | None = None, predicted: Passes | None = None) -> Ranks:
    """Search k_S and k_T each on its own, then let both grow together until W' passes.

    Args:
        passes: the verdict on (k_S, k_T).
        m: input width.
        n: output width.
        likely: a guess of the verdict that costs less (see :func:`smallest`).
        predicted: a guess that costs nothing: it says where to start.

    Only k up to min(m, n) are tried, since r = min(k_S, k_T) cannot exceed it; a side that needs more
    is left whole.
    """
    width = min(m, n)

    def grown(steps: int) -> tuple[int, int]:
        return _or_whole(k_s + steps, width, m), _or_whole(k_t + steps, width, n)

    # One more than the width stands for the whole side, which is the unaltered layer: it passes.
    k_s = _or_whole(_along(lambda k: (_or_whole(k, width, m), n), passes, likely, predicted, 0, width + 1), width, m)
    k_t = _or_whole(_along(lambda k: (m, _or_whole(k, width, n)), passes, likely, predicted, 0, width + 1), width, n)
    # Most of the time W' passes as it is. Growing by the whole width leaves the layer unaltered.
    steps = 0 if passes(k_s, k_t) else _along(grown, passes, likely, predicted, 0, width)
    joint_s, joint_t = grown(steps)
    return Ranks(joint_s, joint_t, k_s, k_t, min(joint_s, joint_t, width))


def search_utilized(
    passes: Passes, m: int, n: int, likely: Passes | None = None, predicted: Passes | None = None
) -> Ranks:
    """Search min(k_S, k_T) only, each side on its own; W is projected on the side that gives it, the other whole.

    The narrower side is searched. Where the wider one fails just below that rank, it needs at least as
    much, and how much more is not asked (its rank by itself is None).

    Args:
        passes: the verdict on (k_S, k_T).
        m: input width.
        n: output width.
        likely: a guess of the verdict that costs less (see :func:`smallest`).
        predicted: a guess that costs nothing: it says where to start.
    """

    def narrow(k: int) -> tuple[int, int]:
        return (m, k) if n <= m else (k, n)

    def wide(k: int) -> tuple[int, int]:
        return (k, n) if n <= m else (m, k)

    first = _along(narrow, passes, likely, predicted, 0, min(m, n))
    other = None
    if first > 1 and passes(*wide(first - 1)):
        other = _along(wide, passes, likely, predicted, 0, first - 1)
    k_s, k_t = narrow(first) if other is None else wide(other)
    k_s_alone, k_t_alone = (other, first) if n <= m else (first, other)
    return Ranks(k_s, k_t, k_s_alone, k_t_alone, min(k_s, k_t))


def search_energy(
    passes: Passes,
    m: int,
    n: int,
    values_s: Tensor,
    values_t: Tensor,
    likely: Passes | None = None,
    predicted: Passes | None = None,
) -> Ranks:
    """Search one energy threshold for both sides: the smallest (k_S(e), k_T(e)) that passes.

    Args:
        passes: the verdict on (k_S, k_T).
        m: input width.
        n: output width.
        values_s: all eigenvalues of C_S, descending, (m,).
        values_t: the eigenvalues of C_T, descending; zeros beyond min(m, n) may be left out.
        likely: a guess of the verdict that costs less (see :func:`smallest`).
        predicted: a guess that costs nothing: it says where to start.
    """
    width = min(m, n)
    path = [(_or_whole(a, width, m), _or_whole(b, width, n)) for a, b in energy_path(values_s, values_t)]
    path = [*dict.fromkeys(path), (m, n)]
    k_s, k_t = path[_along(lambda i: path[i], passes, likely, predicted, -1, len(path) - 1)]
    return Ranks(k_s, k_t, k_s, k_t, min(k_s, k_t, width))


def energy_path(values_s: Tensor, values_t: Tensor) -> list[tuple[int, int]]:
    """All pairs (k_S(e), k_T(e)) as the energy threshold e rises from 0 to 1, each once."""
    kept_s, kept_t = (values.cumsum(0) / values.sum() for values in (values_s, values_t))
    thresholds = torch.cat([kept_s, kept_t]).clamp(max=1).unique()
    # k(e) is one more than the number of leading dimensions that hold less than e.
    at_s = torch.searchsorted(kept_s, thresholds).clamp(max=len(kept_s) - 1) + 1
    at_t = torch.searchsorted(kept_t, thresholds).clamp(max=len(kept_t) - 1) + 1
    return list(dict.fromkeys(zip(at_s.tolist(), at_t.tolist(), strict=True)))


def _or_whole(k: int, width: int, whole: int) -> int:
    return k if k <= width else whole
