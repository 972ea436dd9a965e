"""Make anyone's network smaller."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import nn

from ..compression.compressor import Compression
from ..compression.costs import COSTS, Choices
from ..compression.losses import LOSSES
from ..compression.lowrank import METHODS
from ..networks import cost, exchange
from ..networks.devices import placed
from ..networks.evaluation import Score
from ..ranks.measure import inputs_of as flows_of
from .folders import RECORD, different, layers_of
from .given import InputError, check_start, check_tolerance, inputs_of, standard
from .measuring import goal_of

Method = Literal["compensated", "optimal", "svd", "projection"]


def compress(
    network: nn.Module,
    calibration: Any,
    *,
    params: float | None = None,
    flops: float | None = None,
    latency: float | None = None,
    epsilon: float | None = None,
    search: Any = None,
    score: Score | None = None,
    method: Method = "compensated",
    losses: Literal["curvature", "divergence", "energy"] = "curvature",
    loss_inputs: int = 128,
    rows: int | None = 4,
    memory: int = 2048,
    batch_size: int = 128,
    progress: bool = True,
) -> nn.Module:
    """A smaller copy of ``network``: of layers that can spare it, two (``nn.Sequential``) stand in place of one.

    How much is kept is said by one of ``params``, ``flops``, ``latency`` and ``epsilon``. No training is done.

    Args:
        network: never changed.
        calibration: inputs that weights are fitted to, as of :func:`utilized_rank.measure`; no labels are used.
        params: part of the parameters that may remain, between 0 and 1.
        flops: part of the floating point operations.
        latency: part of the time, as measured on this machine.
        epsilon: the smallest network whose score stays within it, all layers together, on ``search``.
        search: inputs and labels, as of :func:`utilized_rank.measure`.
        score: any function of a network, the higher the better, in place of the accuracy on ``search``.
        method: of the weights: ``compensated`` (each layer, front to back, fitted to the original's outputs from the
            inputs that the smaller network delivers), ``optimal`` (each by itself), ``svd`` (of W), ``projection``
            (P_S W P_T).
        losses: what a budget adds up: the divergence of the predictions, from their ``curvature`` and measured where
            the budget cuts, or measured throughout (``divergence``); or the ``energy`` of the layers' outputs.
        loss_inputs: how many inputs divergences are taken on, most of them such as the network is unsure of.
        rows: that a layer's moment is taken over, as a multiple of its width m; all where it is None.
        memory: MiB that intermediate values may take.
        batch_size: inputs at a time.
        progress: show how far it is.

    Returns:
        A network in evaluation mode, of torch's own modules and those of ``network``. What was done stands in its
        attribute ``utilized_rank``, which :func:`utilized_rank.save` writes out.

    Raises:
        InputError: what was given cannot be made smaller, or not so small; says what to do.
    """
    if method not in ("compensated", *METHODS):
        raise InputError(f"there is no method {method!r} (compensated, {', '.join(METHODS)})")
    if losses not in LOSSES:
        raise InputError(f"there are no losses {losses!r} ({', '.join(LOSSES)})")
    kind, amount = _asked(params=params, flops=flops, latency=latency, epsilon=epsilon)
    goal = goal_of(network, search, score) if kind == "epsilon" else None
    inputs = inputs_of(calibration, network, "calibration")
    its, stay = standard(network, inputs[:1])
    if goal is not None:
        check_start(goal, its)
    flows = flows_of(its, inputs, rows, batch_size)
    with exchange.undisturbed(its):  # layers are made with random weights
        made = Compression(
            its,
            flows.moments,
            inputs,
            goal,
            losses=losses,
            loss_inputs=loss_inputs,
            memory=memory,
            progress=progress,
        )
        left_whole = flows.left_out | stay | made.left_whole
        if not made.layers:
            raise InputError(f"no layer of the network can be put in two: {left_whole or 'it has none'}")
        choices = _choices(made, kind, amount, method)
        small = made.build(method, choices).network
        _put_back(network, its, small, placed(inputs[:1], small), choices)
    setattr(small, RECORD, _record(network, small, inputs[:1], {kind: amount}, method, choices, left_whole))
    return small


def _asked(**budgets: float | None) -> tuple[str, float]:
    given = [(kind, amount) for kind, amount in budgets.items() if amount is not None]
    if len(given) != 1:
        raise InputError("give one of params=, flops= and latency= (the part that may remain) or epsilon= (a loss)")
    ((kind, amount),) = given
    if kind != "epsilon" and not 0 < amount < 1:
        raise InputError(f"{kind}={amount:g}: the part that may remain lies between 0 and 1")
    check_tolerance(amount)
    return kind, amount


def _choices(made: Compression, kind: str, amount: float, method: str) -> Choices:
    if kind not in COSTS:
        return made.joint(method, amount).choices
    try:
        return made.within(kind, amount)
    except ValueError as error:
        raise InputError(str(error)) from None


@torch.no_grad()
def _put_back(network: nn.Module, its: nn.Module, small: nn.Module, batch: Any, choices: Choices) -> None:
    """Give ``small`` back the modules of ``network`` that were made plain in vain: no part of them is in two."""
    names = [name for name in different(network, its) if not any(f"{at}.".startswith(f"{name}.") for at in choices)]
    old = {small.get_submodule(name): copy.deepcopy(network.get_submodule(name)).eval() for name in names}
    exchange.put_where_same(small, old, batch, exchange.run(small, batch))


def _record(
    network: nn.Module,
    small: nn.Module,
    one: Any,
    budget: dict[str, float],
    method: str,
    choices: Choices,
    left_whole: dict[str, str],
) -> dict[str, Any]:
    """What was done, as JSON takes it."""
    return {
        "method": method,
        "budget": budget,
        "parameters": [cost.parameters(network), cost.parameters(small)],
        "flops": [cost.flops(copy.deepcopy(network), one), cost.flops(small, one)],
        "ranks": {name: list(way) for name, way in choices.items()},
        "left_whole": left_whole,
        "layers": layers_of(network, small),
    }
