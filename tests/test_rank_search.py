from collections.abc import Callable
from fractions import Fraction
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utilized_rank.ranks.rank_search import Passes, Ranks, energy_path, search, search_energy, search_utilized, smallest
from utilized_rank.ranks.subspaces import energy_rank

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
def with_guesses(draw, cases) -> tuple[int, int, Passes, Passes]:
    """A guess beside the verdict, wrong at some pairs: it may pass what fails, and fail what passes."""
    m, n, passes = draw(cases)
    wrong = draw(st.sets(st.tuples(st.integers(1, m), st.integers(1, n))))
    if draw(st.booleans()):
        wrong = {(a, b) for a in range(1, m + 1) for b in range(1, n + 1)} - wrong
    return m, n, passes, lambda *pair: passes(*pair) != (pair in wrong)


@given(with_guesses(arbitrary()))
def test_with_guesses_the_boundaries_are_certified_all_the_same(case):
    m, n, passes, likely = case
    assert_certified(passes, m, n, search(passes, m, n, likely))


@given(with_guesses(monotone()))
def test_with_guesses_the_smallest_ranks_are_the_same_where_passing_is_monotone(case):
    m, n, passes, likely = case
    assert search(passes, m, n, likely) == search(passes, m, n)


VERDICTS = st.lists(st.booleans(), max_size=40)


@given(st.data(), VERDICTS, st.integers(-3, 3))
def test_a_guess_that_errs_both_ways_leads_to_a_boundary_whose_two_sides_were_asked(data, verdicts, low):
    """Any verdicts and any guesses, and no verdict is asked twice, nor that of an end."""
    high = low + len(verdicts) + 1
    guesses = data.draw(st.lists(st.booleans(), min_size=len(verdicts), max_size=len(verdicts)))
    asked: dict[int, bool] = {}

    def passes(k: int) -> bool:
        assert k not in asked
        asked[k] = verdicts[k - low - 1]
        return asked[k]

    k = smallest(passes, low, high, lambda k: guesses[k - low - 1])
    assert low < k <= high
    assert k == high or asked[k]
    assert k - 1 == low or not asked[k - 1]
    assert all(low < k < high for k in asked)


@given(VERDICTS, st.randoms(use_true_random=False))
def test_guesses_that_change_from_one_time_to_the_next_end_the_search_all_the_same(verdicts, random):
    high = len(verdicts) + 1
    k = smallest(lambda k: verdicts[k - 1], 0, high, lambda _: random.random() < 0.5)
    assert k == high or verdicts[k - 1]
    assert k == 1 or not verdicts[k - 2]


@given(st.integers(1, 200), st.data())
def test_where_verdicts_are_monotone_no_guess_changes_the_answer(high, data):
    first = data.draw(st.integers(1, high))
    guesses = data.draw(st.lists(st.booleans(), min_size=high, max_size=high))
    assert smallest(lambda k: k >= first, 0, high, lambda k: guesses[k]) == first


@given(st.integers(1, 200), st.data())
def test_a_right_guess_saves_all_verdicts_but_those_on_the_boundary(high, data):
    """What fails is asked first; the ends are known."""
    first = data.draw(st.integers(1, high))
    asked: list[int] = []

    def passes(k: int) -> bool:
        asked.append(k)
        return k >= first

    assert smallest(passes, 0, high, lambda k: k >= first) == first
    assert asked == [k for k in (first - 1, first) if 0 < k < high]


@given(VERDICTS, st.integers(-5, 50), st.integers(-3, 3))
def test_from_any_start_a_boundary_is_certified_whatever_the_verdicts(verdicts, start, low):
    """No verdict is asked twice, nor that of an end."""
    high = low + len(verdicts) + 1
    asked: dict[int, bool] = {}

    def passes(k: int) -> bool:
        assert low < k < high
        assert k not in asked
        asked[k] = verdicts[k - low - 1]
        return asked[k]

    k = smallest(passes, low, high, start=start)
    assert k == high or asked[k]
    assert k - 1 == low or not asked[k - 1]


@given(st.integers(1, 500), st.data())
def test_from_a_start_that_is_off_by_d_it_takes_about_2_log2_d_questions_more_than_two(high, data):
    first, start = data.draw(st.integers(1, high)), data.draw(st.integers(-10, 510))
    guesses = data.draw(st.lists(st.booleans(), min_size=high, max_size=high))
    asked: list[int] = []

    def passes(k: int) -> bool:
        asked.append(k)
        return k >= first

    assert smallest(passes, 0, high, start=start) == first
    off = abs(min(max(start, 1), max(1, high - 1)) - first)
    assert len(asked) <= 2 + 2 * off.bit_length()
    assert smallest(passes, 0, high, lambda k: guesses[k], start) == first


@given(st.integers(1, 200), st.data())
def test_right_guesses_from_any_start_leave_only_the_boundary_to_be_certified(high, data):
    first, start = data.draw(st.integers(1, high)), data.draw(st.integers(-10, 210))
    asked: list[int] = []

    def passes(k: int) -> bool:
        asked.append(k)
        return k >= first

    assert smallest(passes, 0, high, lambda k: k >= first, start) == first
    assert asked == [k for k in (first - 1, first) if 0 < k < high]


@given(with_guesses(arbitrary()), with_guesses(arbitrary()))
def test_a_prediction_however_wrong_leaves_the_boundaries_certified(case, other):
    m, n, passes, likely = case
    predicted = other[2]
    for guess in (None, likely):
        assert_certified(passes, m, n, search(passes, m, n, guess, predicted))


@given(with_guesses(monotone()), with_guesses(arbitrary()))
def test_a_prediction_however_wrong_changes_no_rank_where_passing_is_monotone(case, other):
    m, n, passes, likely = case
    predicted = other[2]
    expected = search(passes, m, n)
    for guess in (None, likely):
        assert search(passes, m, n, guess, predicted) == expected
        assert search_utilized(passes, m, n, guess, predicted).r == min(
            expected.k_s_alone, expected.k_t_alone, min(m, n)
        )


@given(monotone())
def test_a_right_prediction_leaves_at_most_two_verdicts_a_boundary(case):
    """And one whether both sides pass together as they are."""
    m, n, passes = case
    asked: set[tuple[int, int]] = set()

    def logged(k_s: int, k_t: int) -> bool:
        asked.add((k_s, k_t))
        return passes(k_s, k_t)

    search(logged, m, n, predicted=passes)
    assert len(asked) <= 2 * 3 + 1


@given(with_guesses(arbitrary()))
def test_the_utilized_search_finds_a_certified_boundary_with_one_side_whole(case):
    m, n, passes, likely = case
    for guess in (None, likely):
        found = search_utilized(passes, m, n, guess)
        assert passes(found.k_s, found.k_t)
        assert found.k_s == m or found.k_t == n
        assert found.r == min(found.k_s, found.k_t)
        narrow, wide = (found.k_t_alone, found.k_s_alone) if n <= m else (found.k_s_alone, found.k_t_alone)
        alone = {"narrow": lambda k: passes(m, k) if n <= m else passes(k, n)}
        alone["wide"] = lambda k: passes(k, n) if n <= m else passes(m, k)
        assert alone["narrow"](narrow)
        assert narrow == 1 or not alone["narrow"](narrow - 1)
        if wide is None:  # the wider side needs as much at least
            assert found.r == narrow
            assert narrow == 1 or not alone["wide"](narrow - 1)
        else:
            assert found.r == wide < narrow
            assert alone["wide"](wide)
            assert wide == 1 or not alone["wide"](wide - 1)


@given(with_guesses(monotone()))
def test_the_utilized_rank_is_the_smaller_of_the_two_sides_where_passing_is_monotone(case):
    m, n, passes, likely = case
    both = search(passes, m, n)
    expected = min(both.k_s_alone, both.k_t_alone, m, n)
    for guess in (None, likely):
        found = search_utilized(passes, m, n, guess)
        assert found.r == expected
        assert found.k_s_alone in (None, both.k_s_alone)
        assert found.k_t_alone in (None, both.k_t_alone)


@pytest.mark.parametrize(
    ("need_s", "need_t", "m", "n", "expected"),
    [
        (2, 3, 9, 4, Ranks(2, 4, 2, 3, 2)),
        (3, 3, 9, 4, Ranks(9, 3, None, 3, 3)),
        (8, 3, 9, 4, Ranks(9, 3, None, 3, 3)),
        (9, 4, 9, 4, Ranks(9, 4, None, 4, 4)),
        (2, 3, 4, 9, Ranks(2, 9, 2, None, 2)),
        (3, 2, 4, 9, Ranks(4, 2, 3, 2, 2)),
        (4, 9, 4, 9, Ranks(4, 9, 4, None, 4)),
        (1, 1, 5, 5, Ranks(5, 1, None, 1, 1)),
    ],
)
def test_the_utilized_search_by_hand(need_s, need_t, m, n, expected):
    assert search_utilized(lambda k_s, k_t: k_s >= need_s and k_t >= need_t, m, n) == expected


@given(st.data())
def test_the_utilized_search_asks_of_the_wider_side_only_below_the_rank_of_the_other(data):
    m, n = data.draw(WIDTHS)
    need_s, need_t = data.draw(st.integers(1, m)), data.draw(st.integers(1, n))
    asked: list[tuple[int, int]] = []

    def passes(k_s: int, k_t: int) -> bool:
        asked.append((k_s, k_t))
        return k_s >= need_s and k_t >= need_t

    found = search_utilized(passes, m, n)
    assert all((a == m) != (b == n) for a, b in asked)  # one side is projected
    narrow = found.k_t_alone if n <= m else found.k_s_alone
    assert all((a if n <= m else b) < narrow for a, b in asked if (b == n if n <= m else a == m))


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
    wrong = data.draw(st.sets(st.sampled_from(path)))
    passes = lambda *pair: pair in passing  # noqa: E731
    for likely in (None, lambda *pair: passes(*pair) != (pair in wrong)):
        found = search_energy(passes, m, n, tensor(of_s), tensor(of_t), likely)
        at = path.index((found.k_s, found.k_t))
        assert path[at] in passing
        assert at == 0 or path[at - 1] not in passing


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 5), (5, 1)])
def test_a_layer_of_width_one_needs_one_dimension_where_all_passes(m, n):
    found = search(lambda *_: True, m, n)
    assert (found.k_s, found.k_t, found.r) == (1, 1, 1)


@given(st.data())
def test_right_guesses_change_the_cost_and_not_the_answer(data):
    """Two verdicts a side, and one on both."""
    m, n = data.draw(st.integers(2, 40)), data.draw(st.integers(2, 40))
    first_s, first_t = data.draw(st.integers(1, min(m, n))), data.draw(st.integers(1, min(m, n)))
    asked: list[tuple[int, int]] = []

    def passes(k_s: int, k_t: int) -> bool:
        asked.append((k_s, k_t))
        return k_s >= first_s and k_t >= first_t

    plain = search(passes, m, n)
    asked.clear()
    assert search(passes, m, n, lambda k_s, k_t: k_s >= first_s and k_t >= first_t) == plain
    assert len(asked) <= 5
