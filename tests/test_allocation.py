from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utilized_rank.compression import allocation
from utilized_rank.compression.allocation import Allocation, Options


def layers_of(draws: list[list[tuple[int, float]]], unit: int = 1) -> list[Options]:
    return [
        Options(np.array([unit * c for c, _ in draw], dtype=np.int64), np.array([loss for _, loss in draw]))
        for draw in draws
    ]


OPTION = st.tuples(st.integers(0, 40), st.floats(0, 10, allow_nan=False))
LAYERS = st.lists(st.lists(OPTION, min_size=1, max_size=5), min_size=1, max_size=4)


def brute_force(layers: list[Options], budget: int) -> float:
    losses = [
        sum(options.losses[k] for options, k in zip(layers, chosen, strict=True))
        for chosen in product(*(range(len(options.costs)) for options in layers))
        if sum(options.costs[k] for options, k in zip(layers, chosen, strict=True)) <= budget
    ]
    return float(min(losses))


@given(LAYERS, st.data(), st.sampled_from([1, 16]))
def test_no_other_choice_within_the_budget_loses_less(draws, data, unit):
    layers = layers_of(draws, unit)
    most = sum(int(options.costs.max()) for options in layers)
    allocated = Allocation(layers, most)
    budget = data.draw(st.integers(allocated.least, most))
    chosen = allocated.within(budget)
    assert allocated.cost(chosen) <= budget
    assert allocated.loss(chosen) == pytest.approx(brute_force(layers, budget), abs=1e-9)


@given(LAYERS, st.data())
def test_costs_that_are_rounded_up_keep_the_budget(draws, data):
    layers = layers_of(draws, 1009)
    most = sum(int(options.costs.max()) for options in layers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "CELLS", 50)
        allocated = Allocation(layers, most)
    budget = data.draw(st.integers(allocated.least, most))
    chosen = allocated.within(budget)
    assert allocated.cost(chosen) <= budget
    # A layer is rounded up by less than a cell: so much more budget could not have served better.
    cell = -(-(most - allocated.least) // 50)
    spare = budget - cell * (len(layers) + 1)
    if spare >= allocated.least:
        assert allocated.loss(chosen) <= brute_force(layers, spare) + 1e-9


def test_with_the_whole_budget_nothing_is_lost():
    layers = layers_of([[(5, 0.0), (2, 1.0)], [(7, 0.0), (1, 3.0)]])
    allocated = Allocation(layers, 12)
    assert allocated.within(12) == [0, 0]
    assert allocated.within(allocated.least) == [1, 1]


def test_a_layer_of_one_option_takes_it():
    assert Allocation(layers_of([[(5, 2.0)]]), 9).within(9) == [0]


@pytest.mark.parametrize("call", ["new", "within"])
def test_a_budget_below_the_cheapest_options_is_refused(call):
    layers = layers_of([[(5, 0.0), (2, 1.0)]])
    with pytest.raises(ValueError, match="cheapest options cost 2, over the budget of 1"):
        Allocation(layers, 1) if call == "new" else Allocation(layers, 5).within(1)


def test_of_equally_good_choices_the_cheaper_is_taken():
    assert Allocation(layers_of([[(9, 1.0), (4, 1.0), (2, 3.0)]]), 9).within(9) == [1]
