import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utilized_rank.networks.intervals import Change, paired_change


def answers(both: int, lost: int, gained: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Which images two networks get right, with so many in each cell."""
    cells = [both, lost, gained, neither]
    return np.repeat([True, True, False, False], cells), np.repeat([True, False, True, False], cells)


def test_paired_change_is_the_interval_of_agresti_and_min():
    """100 images, 3 gained, 9 lost: (3.5 - 9.5) / 102 +- 1.96 sqrt(13 - 36 / 102) / 102."""
    change = paired_change(*answers(70, 9, 3, 18))
    margin = 1.959964 * math.sqrt(13 - 36 / 102) / 102
    assert change.points == pytest.approx(-6)
    assert change.low == pytest.approx(100 * (-6 / 102 - margin), abs=1e-4)
    assert change.high == pytest.approx(100 * (-6 / 102 + margin), abs=1e-4)
    assert (change.low, change.high) == pytest.approx((-12.716, 0.951), abs=1e-3)


@pytest.mark.parametrize("images", [1, 10, 1000])
def test_identical_predictions_change_by_zero_give_or_take_some(images):
    right = np.arange(images) % 3 == 0
    change = paired_change(right, right)
    assert change.points == 0
    assert change.low < 0 < change.high
    assert change.low == pytest.approx(-change.high)


CELLS = st.tuples(*[st.integers(0, 200)] * 4).filter(any)


@given(CELLS)
def test_the_interval_holds_the_observed_change_and_stays_within_bounds(cells):
    change = paired_change(*answers(*cells))
    assert -100 <= change.low <= change.points <= change.high <= 100


@given(CELLS)
def test_swapping_the_networks_turns_the_interval_round(cells):
    before, after = answers(*cells)
    there, back = paired_change(before, after), paired_change(after, before)
    assert back == Change(-there.points, pytest.approx(-there.high), pytest.approx(-there.low))


def test_more_confidence_is_a_wider_interval_and_more_images_a_narrower_one():
    few, many = answers(80, 8, 4, 8), answers(800, 80, 40, 80)
    width = [c.high - c.low for c in (paired_change(*few, 0.9), paired_change(*few), paired_change(*many))]
    assert width[2] < width[0] < width[1]


@pytest.mark.parametrize(
    ("images", "lost", "gained"),
    [(100, 0.05, 0.05), (200, 0.1, 0.02), (400, 0.02, 0.01), (1000, 0.3, 0.25)],
)
def test_the_interval_covers_the_true_change_as_often_as_it_says(images, lost, gained):
    rng, draws = np.random.default_rng(0), 2000
    cells = rng.multinomial(images, [0.4, lost, gained, 0.6 - lost - gained], size=draws)
    truth = 100 * (gained - lost)
    changes = [paired_change(*answers(*row)) for row in cells]
    covered = np.mean([change.low <= truth <= change.high for change in changes])
    assert 0.935 <= covered <= 0.985  # 0.95, three standard errors of the simulation, slightly conservative
