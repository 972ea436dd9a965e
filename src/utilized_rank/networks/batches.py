"""Inputs of a network, of which a batch is at hand when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten


@runtime_checkable
class Batches(Protocol):
    """Inputs of a network, N of them: a tensor (N, ...), or what makes a part of them when it is asked for.

    A batch is a tensor, a tuple of a network's arguments, or a dictionary of them by name.
    """

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, which: Any, /) -> Any:
        """Some of them, by a slice or by indices, int64 (B,)."""

    def split(self, size: int, /) -> Iterable[Any]:
        """All of them, so many at a time."""


@dataclass(frozen=True)
class Arguments:
    """Inputs that are several tensors each: a tuple or a dictionary of tensors (N, ...)."""

    tensors: Any

    def __len__(self) -> int:
        return count(self.tensors)

    def __getitem__(self, which: Any) -> Any:
        return tree_map(lambda tensor: tensor[which], self.tensors)

    def split(self, size: int) -> Iterator[Any]:
        """All of them, so many at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]


def gathered(data: Any) -> Batches:
    """Inputs as :class:`Batches`: those that are stay as they are, an iterable of batches is read once and kept.

    Args:
        data: a tensor (N, ...), a tuple or dictionary of some, or an iterable of batches, such as a ``DataLoader``.

    Raises:
        ValueError: the iterable gives no batch.
    """
    if isinstance(data, Batches):
        return data
    if isinstance(data, tuple | dict):
        return Arguments(data)
    flat = [tree_flatten(batch) for batch in data]
    if not flat:
        raise ValueError("there is no batch to read")
    leaves = [torch.cat(parts) for parts in zip(*(leaves for leaves, _ in flat), strict=True)]
    whole = tree_unflatten(leaves, flat[0][1])
    return whole if isinstance(whole, Tensor) else Arguments(whole)


def some_of(inputs: Batches, which: Any) -> Batches:
    """Some of the inputs, by a slice or by indices, as inputs again: of such as have a ``part``, not read yet."""
    some = inputs.part(which) if hasattr(inputs, "part") else inputs[which]
    return some if isinstance(some, Batches) else Arguments(some)


def first(batch: Any, inputs: int) -> Any:
    """The first so many inputs of a batch."""
    return tree_map(lambda leaf: leaf[:inputs] if isinstance(leaf, Tensor) else leaf, batch)


def count(batch: Any) -> int:
    """How many inputs a batch has."""
    return len(next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)))


def call(network: nn.Module, batch: Any) -> Any:
    """What a network gives for a batch: a tensor, arguments in their order, or arguments by name."""
    if isinstance(batch, dict):
        return network(**batch)
    return network(*batch) if isinstance(batch, tuple | list) else network(batch)
