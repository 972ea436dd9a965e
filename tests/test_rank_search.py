from collections.abc import Callable
from fractions import Fraction
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utilized_rank.rank_search import Passes, Ranks, energy_path, search, search_energy, smallest
from utilized_rank.subspaces import energy_rank

WIDTHS = st.tuples(st.integers(1, 12), st.integers(1, 12))


@st.composite
def monotone(draw) -> tuple[int, int, Passes]:
    """(k_S, k_T) passes where it is above one of a few points; the unaltered layer always does."""
    m, n = draw(WIDTHS)
    pairs = st.tuples(st.integers(1, m), st.integers(1, n))
    points = [*draw(st.lists(pairs, max_size=4)), (m, n)]
    return m, n, lambda k_s, k_t: any(k_s >= a and k_t >= b for a, b in points)


@st.composite
def arbitrary(draw) -> tuple[int, int, Passes]:
    """Any verdicts, but the unaltered layer passes."""
    m, n = draw(WIDTHS)
    pairs = st.tuples(st.integers(1, m), st.integers(1, n))
    passing = draw(st.sets(pairs)) | {(m, n)}
    if draw(st.booleans()):
        every = {(a, b) for a in range(1, m + 1) for b in range(1, n + 1)}
        passing = every - passing | {(m, n)}
    return m, n, lambda k_s, k_t: (k_s, k_t) in passing


def or_whole(k: int, width: int, whole: int) -> int:
    return k if k <= width else whole


def growing(found: Ranks, m: int, n: int) -> list[tuple[int, int]]:
    """(k_S, k_T) from what passes alone, both one larger at each step, until nothing is projected."""
    width = min(m, n)
    alone = found.k_s_alone, found.k_t_alone
    return [(or_whole(alone[0] + d, width, m), or_whole(alone[1] + d, width, n)) for d in range(width + 1)]


def assert_boundary(passes: Callable[[int], bool], k: int, width: int, whole: int) -> None:
    """k passes and k - 1 fails, or k = 1; beyond min(m, n) only the whole width is tried."""
    assert passes(k)
    assert 1 <= k <= width or k == whole
    below = k - 1 if k <= width else width
    assert below == 0 or not passes(below)


def assert_certified(passes: Passes, m: int, n: int, found: Ranks) -> None:
    width = min(m, n)
    assert_boundary(lambda k: passes(k, n), found.k_s_alone, width, m)
    assert_boundary(lambda k: passes(m, k), found.k_t_alone, width, n)
    steps = growing(found, m, n)
    at = steps.index((found.k_s, found.k_t))
    assert passes(*steps[at])
    assert at == 0 or not passes(*steps[at - 1])
    assert found.r == min(found.k_s, found.k_t, width)


@given(monotone())
def test_on_monotone_verdicts_the_search_finds_the_smallest_ranks(case):
    m, n, passes = case
    width = min(m, n)
    found = search(passes, m, n)
    assert_certified(passes, m, n, found)
    assert found.k_s_alone == next((k for k in range(1, width + 1) if passes(k, n)), m)
    assert found.k_t_alone == next((k for k in range(1, width + 1) if passes(m, k)), n)
    assert (found.k_s, found.k_t) == next(pair for pair in growing(found, m, n) if passes(*pair))


@given(arbitrary())
def test_on_any_verdicts_the_search_finds_certified_boundaries(case):
    m, n, passes = case
    assert_certified(passes, m, n, search(passes, m, n))


@st.composite
def with_cheaper(draw, cases) -> tuple[int, int, Passes, Passes]:
    """A cheaper verdict beside the verdict: passes wherever that does, and at some pairs more."""
    m, n, passes = draw(cases)
    more = draw(st.sets(st.tuples(st.integers(1, m), st.integers(1, n))))
    return m, n, passes, lambda *pair: pair in more or passes(*pair)


@given(with_cheaper(arbitrary()))
def test_with_a_cheaper_verdict_the_boundaries_are_certified_all_the_same(case):
    m, n, passes, may_pass = case
    assert_certified(passes, m, n, search(passes, m, n, may_pass))


@given(with_cheaper(monotone()))
def test_with_a_cheaper_verdict_the_smallest_ranks_are_the_same_where_passing_is_monotone(case):
    m, n, passes, may_pass = case
    assert search(passes, m, n, may_pass) == search(passes, m, n)


@given(st.integers(1, 200), st.data())
def test_a_cheaper_verdict_that_is_right_saves_all_but_one_full_verdict(high, data):
    first = data.draw(st.integers(1, high))
    tried: list[int] = []

    def passes(k: int) -> bool:
        tried.append(k)
        return k >= first

    assert smallest(passes, 0, high, lambda k: k >= first) == first
    assert tried == ([first] if first < high else [])


@given(arbitrary())
def test_no_rank_above_the_width_is_tried_but_the_whole(case):
    m, n, passes = case
    tried: list[tuple[int, int]] = []

    def logged(k_s: int, k_t: int) -> bool:
        tried.append((k_s, k_t))
        return passes(k_s, k_t)

    search(logged, m, n)
    width = min(m, n)
    assert all(1 <= a <= width or a == m for a, _ in tried)
    assert all(1 <= b <= width or b == n for _, b in tried)
    assert len(tried) <= 3 * (width.bit_length() + 1)


@given(st.integers(1, 200), st.data())
def test_bisection_finds_the_first_that_passes_in_about_log2_steps(high, data):
    first = data.draw(st.integers(1, high))
    tried: list[int] = []

    def passes(k: int) -> bool:
        tried.append(k)
        return k >= first

    assert smallest(passes, 0, high) == first
    assert len(tried) <= high.bit_length()
    assert all(0 < k < high for k in tried)


def test_an_unaltered_layer_is_the_answer_where_nothing_less_passes():
    found = search(lambda k_s, k_t: (k_s, k_t) == (9, 4), 9, 4)
    assert found == Ranks(k_s=9, k_t=4, k_s_alone=9, k_t_alone=4, r=4)


def test_both_ranks_grow_together_where_each_passes_alone_but_not_both():
    found = search(lambda k_s, k_t: k_s + k_t >= 14 or max(k_s, k_t) == 10, 10, 10)
    assert (found.k_s_alone, found.k_t_alone) == (1, 1)
    assert (found.k_s, found.k_t, found.r) == (7, 7, 7)


SPECTRUM = st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(any).map(lambda v: sorted(v)[::-1])


def tensor(spectrum: list[int]) -> torch.Tensor:
    return torch.tensor(spectrum, dtype=torch.float64)


def exact_path(*spectra: list[int]) -> list[tuple[int, ...]]:
    """(k_S(e), k_T(e)) for every energy e at which one of them changes, in exact arithmetic."""
    held = [[Fraction(h, sum(spectrum)) for h in accumulate(spectrum)] for spectrum in spectra]
    energies = sorted({h for side in held for h in side})
    path = [tuple(next(k for k, h in enumerate(side, 1) if h >= e) for side in held) for e in energies]
    return list(dict.fromkeys(path))


@given(SPECTRUM, SPECTRUM)
def test_the_energy_path_has_every_pair_of_ranks_once(of_s, of_t):
    assert energy_path(tensor(of_s), tensor(of_t)) == exact_path(of_s, of_t)


@given(SPECTRUM, SPECTRUM, st.floats(0.001, 0.999))
def test_every_energy_threshold_is_a_point_of_the_path(of_s, of_t, energy):
    pair = energy_rank(tensor(of_s), energy), energy_rank(tensor(of_t), energy)
    assert pair in energy_path(tensor(of_s), tensor(of_t))


@given(st.data())
def test_the_energy_search_agrees_with_brute_force(data):
    of_s, of_t = data.draw(SPECTRUM), data.draw(SPECTRUM)
    m, n = len(of_s), len(of_t)
    width = min(m, n)
    point = data.draw(st.integers(1, m)), data.draw(st.integers(1, n))
    passes = lambda k_s, k_t: k_s >= point[0] and k_t >= point[1]  # noqa: E731
    path = [(or_whole(a, width, m), or_whole(b, width, n)) for a, b in exact_path(of_s, of_t)] + [(m, n)]
    k_s, k_t = next(pair for pair in path if passes(*pair))
    found = search_energy(passes, m, n, tensor(of_s), tensor(of_t))
    assert found == Ranks(k_s, k_t, k_s, k_t, min(k_s, k_t, width))


@given(st.data())
def test_on_any_verdicts_the_energy_search_finds_a_certified_boundary_of_the_path(data):
    of_s, of_t = data.draw(SPECTRUM), data.draw(SPECTRUM)
    m, n = len(of_s), len(of_t)
    width = min(m, n)
    path = [(or_whole(a, width, m), or_whole(b, width, n)) for a, b in exact_path(of_s, of_t)] + [(m, n)]
    path = list(dict.fromkeys(path))
    passing = data.draw(st.sets(st.sampled_from(path))) | {(m, n)}
    found = search_energy(lambda *pair: pair in passing, m, n, tensor(of_s), tensor(of_t))
    at = path.index((found.k_s, found.k_t))
    assert path[at] in passing
    assert at == 0 or path[at - 1] not in passing


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 5), (5, 1)])
def test_a_layer_of_width_one_needs_one_dimension_where_all_passes(m, n):
    found = search(lambda *_: True, m, n)
    assert (found.k_s, found.k_t, found.r) == (1, 1, 1)


@given(st.data())
def test_a_cheaper_verdict_changes_the_cost_and_not_the_answer(data):
    """A no of the cheap verdict is final: the boundary stays certified, and needs no more full verdicts."""
    m, n = data.draw(st.integers(2, 40)), data.draw(st.integers(2, 40))
    first_s, first_t = data.draw(st.integers(1, min(m, n))), data.draw(st.integers(1, min(m, n)))
    slack = data.draw(st.integers(0, 3))
    full: list[tuple[int, int]] = []

    def passes(k_s: int, k_t: int) -> bool:
        full.append((k_s, k_t))
        return k_s >= first_s and k_t >= first_t

    plain, plain_cost = search(passes, m, n), len(full)
    full.clear()
    found = search(passes, m, n, lambda k_s, k_t: k_s >= first_s - slack and k_t >= first_t - slack)
    assert found == plain
    if slack == 0:
        assert len(full) <= 3
        assert len(full) <= plain_cost
