"""What a user gives: a network, loaders, a score; refused in one line where it can't be meant."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..networks.batches import Batches, call, count, gathered
from ..networks.devices import placed, truth
from ..networks.evaluation import Labelled, Score, logits_of
from ..networks.standard import standardize


class InputError(ValueError):
    """What was given cannot be measured or made smaller: the message says what, and what to do."""


def standard(network: nn.Module, batch: Any) -> tuple[nn.Module, dict[str, str]]:
    """A copy of ``network`` as all else here takes it, and why some of its layers stay as they are.

    Args:
        network: never changed.
        batch: what it is called with.

    Raises:
        InputError: it cannot be copied, does not take the batch, or gives something else at a second call.
    """
    try:
        made = copy.deepcopy(network).eval()
    except Exception as error:  # torch refuses tensors of a graph, modules may refuse anything
        raise InputError(f"the network cannot be copied ({line(error)})") from None
    try:
        with torch.inference_mode():
            given, again = (logits_of(call(made, placed(batch, made))) for _ in range(2))
    except Exception as error:  # the network's own code
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
        raise InputError(f"the network does not take inputs of shape {shapes}: {line(error)}") from None
    if not truth(torch.isclose(again, given, rtol=1e-2, atol=1e-4, equal_nan=True).all()):
        raise InputError(
            "the network gives other values when it is called again with the same inputs: it keeps state, or draws at "
            "random, and what is found would be chance; make its evaluation mode do neither"
        )
    return made, standardize(made, placed(batch, made))


def line(told: object) -> str:
    """The first line of what an error, or a value, says."""
    return (str(told).strip().splitlines() or [type(told).__name__])[0]


def inputs_of(data: Any, network: nn.Module, what: str) -> Batches:
    """The inputs of a network, their labels left away; arguments as of :func:`parts`."""
    return parts(data, network, what)[0]


def labelled(data: Any, network: nn.Module, what: str) -> Labelled:
    """Inputs and their labels; arguments as of :func:`parts`.

    Raises:
        InputError: there are no labels, or all are the same.
    """
    if isinstance(data, Labelled):
        inputs, labels = data.inputs, data.labels
    else:
        inputs, found = parts(data, network, what)
        if found is None:
            raise InputError(f"{what} gives no labels: give pairs (inputs, labels), or score=, a function of a network")
        labels = found
    if len(labels.unique()) < 2:
        raise InputError(f"all labels of {what} are {labels[0].item()}: an accuracy needs two classes")
    return Labelled(inputs, labels)


def parts(data: Any, network: nn.Module, what: str) -> tuple[Batches, Tensor | None]:
    """Inputs, and their labels where they have some.

    Args:
        data: inputs (a tensor, a tuple or dictionary of tensors), pairs of inputs and labels, or an iterable of
            batches of either, such as a ``DataLoader``; in a dictionary, ``labels`` are the labels.
        network: that is to take them: one that needs two arguments is given pairs as they are.
        what: they are called in a message.

    Raises:
        InputError: there is no batch, or none of tensors that go together.
    """
    if isinstance(data, Labelled):
        return data.inputs, data.labels
    none = f"{what} gave no batch (an iterator can be read once only: give a list or a DataLoader)"
    if isinstance(data, Batches) and not isinstance(data, str):
        if not len(data):
            raise InputError(none)
        return data, None
    takes_pairs = _needed(network) >= 2
    batches = [data] if isinstance(data, tuple | Mapping) else _read(data, what)
    pairs = [_divided(batch, takes_pairs) for batch in batches]
    for its, _ in pairs:
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(its)):
            raise InputError(f"{what} gives batches of {type(its).__name__}: a network is called with tensors")
    if not pairs or not count(pairs[0][0]):
        raise InputError(none)
    try:
        inputs = gathered(pairs[0][0] if len(pairs) == 1 else [its for its, _ in pairs])
    except (RuntimeError, ValueError) as error:
        raise InputError(f"batches of {what} do not go together (a pair is a tuple): {line(error)}") from None
    labels = [its for _, its in pairs if its is not None]
    if not labels or len(labels) < len(pairs):
        return inputs, None
    if sum(map(len, labels)) != len(inputs):
        raise InputError(f"{what} gives {len(inputs)} inputs, and {sum(map(len, labels))} labels")
    return inputs, torch.cat(labels).long()


def _needed(network: nn.Module) -> int:
    """How many arguments a network does not do without."""
    named = inspect.signature(network.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(its.default is its.empty and its.kind in kinds for its in named)


def _read(data: Any, what: str) -> Iterator[Any]:
    if not isinstance(data, Iterable):
        raise InputError(f"{what} is of {type(data).__name__}: give a tensor, or an iterable of batches (a DataLoader)")
    yield from data


def _divided(batch: Any, takes_pairs: bool) -> tuple[Any, Tensor | None]:
    """The inputs of a batch, and its labels."""
    if isinstance(batch, Mapping):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch.get("labels")
        return inputs, labels if _are_labels(labels) else None
    if isinstance(batch, tuple | list) and len(batch) == 2 and _are_labels(batch[1]):
        inputs, labels = batch
        if not (takes_pairs and isinstance(inputs, Tensor)):
            return tuple(inputs) if isinstance(inputs, list) else inputs, labels
    if isinstance(batch, list):
        batch = tuple(batch)
    return (batch[0], None) if isinstance(batch, tuple) and len(batch) == 1 else (batch, None)


def _are_labels(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1 and not value.is_floating_point()


def check_tolerance(epsilon: float) -> None:
    """Refuse what is no tolerated loss.

    Raises:
        InputError: it is below 0, or no number.
    """
    if not 0 <= epsilon < math.inf:
        raise InputError(f"epsilon={epsilon:g} is no tolerated loss: it is 0 or more")


def checked(score: Score) -> Score:
    """The same score, whose values are numbers.

    Raises:
        InputError: (where it is called) what it gives is none.
    """
    if isinstance(score, Labelled):
        return score

    def number(network: nn.Module) -> float:
        value = score(network)
        try:
            return float(value)
        except (TypeError, ValueError):
            raise InputError(f"score gave {line(value)}: it must give a number, the higher the better") from None

    return number


def check_start(score: Score, network: nn.Module) -> None:
    """Refuse a score that says nothing of the unaltered network.

    Raises:
        InputError: it is not finite.
    """
    if isinstance(score, Labelled):
        return
    with torch.inference_mode():
        value = score(network)
    if not math.isfinite(value):
        raise InputError(f"the score of the unaltered network is {value}: nothing can be compared with it")
