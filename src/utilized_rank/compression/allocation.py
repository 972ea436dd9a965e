"""One budget over all layers: which option each layer takes, so that the whole loses least.

Nothing here knows of networks: a layer is a list of options, each with a cost and a loss. It is the
multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger 2004, chapter 11), solved by dynamic
programming over the cost: exactly where the costs have a large enough common divisor, and else with
costs rounded up, so that the budget is kept all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CELLS = 2**17
"""Steps into which a budget is cut at most: a layer's cost is rounded up by less than one of them."""


@dataclass(frozen=True)
class Options:
    """What one layer can become."""

    costs: np.ndarray
    """int64 (K,), in any unit that all layers share."""
    losses: np.ndarray
    """float64 (K,): what the network loses by each, to be added up over the layers."""


class Allocation:
    """The best choices for every budget up to ``most``.

    Args:
        layers: the options of each.
        most: the largest budget that will be asked for.

    Raises:
        ValueError: even the cheapest options cost more than ``most``.
    """

    def __init__(self, layers: Sequence[Options], most: int) -> None:
        self.layers = layers
        self.least = sum(int(options.costs.min()) for options in layers)
        """What the cheapest options cost."""
        if most < self.least:
            raise ValueError(f"the cheapest options cost {self.least}, over the budget of {most}")
        beyond = [options.costs - options.costs.min() for options in layers]
        common = int(np.gcd.reduce(np.concatenate(beyond))) if layers else 1
        self._unit = max(common, -(-(most - self.least) // CELLS), 1)
        self._steps = [-(-extra // self._unit) for extra in beyond]
        cells = (most - self.least) // self._unit + 1
        self._best = [int(np.lexsort((options.costs, options.losses))[0]) for options in layers]
        lowest = np.zeros(cells)  # the least loss of the layers so far, for each number of cells
        self._choices = []
        for options, steps in zip(layers, self._steps, strict=True):
            lowest, choice = _with(lowest, steps, options.losses)
            self._choices.append(choice)

    def within(self, budget: int) -> list[int]:
        """The option of each layer that together lose least and cost no more than ``budget``.

        Of equally good ones the cheaper. ``budget`` is between :attr:`least` and ``most``.

        Raises:
            ValueError: it is below the cheapest options.
        """
        if budget < self.least:
            raise ValueError(f"the cheapest options cost {self.least}, over the budget of {budget}")
        if self.cost(self._best) <= budget:  # rounded up, its costs might not fit
            return self._best
        left, chosen = (budget - self.least) // self._unit, []
        for choice, steps in zip(reversed(self._choices), reversed(self._steps), strict=True):
            chosen.append(int(choice[left]))
            left -= int(steps[chosen[-1]])
        return chosen[::-1]

    def cost(self, chosen: Sequence[int]) -> int:
        """What the options cost together."""
        return sum(int(options.costs[k]) for options, k in zip(self.layers, chosen, strict=True))

    def loss(self, chosen: Sequence[int]) -> float:
        """What the network loses by them, added up."""
        return sum(float(options.losses[k]) for options, k in zip(self.layers, chosen, strict=True))


def _with(lowest: np.ndarray, steps: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One layer more: the least loss for each number of cells, and the layer's option that gives it."""
    cells = len(lowest)
    least, choice = np.full(cells, np.inf), np.zeros(cells, dtype=np.int32)
    for k in np.argsort(steps, kind="stable"):
        step = int(steps[k])
        if step >= cells:
            break
        loss = lowest[: cells - step] + losses[k]
        better = loss < least[step:]
        least[step:][better] = loss[better]
        choice[step:][better] = k
    return least, choice
