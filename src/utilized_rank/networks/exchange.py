"""Modules in the places of others, where the network still computes the same."""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .batches import call
from .devices import device_of

AGREE = 1e-3
"""How far outputs of a network may lie apart, over the largest of them: its layers add up."""


def undisturbed(network: nn.Module) -> AbstractContextManager[None]:
    """Random numbers go on afterwards as if nothing had been drawn."""
    device = device_of(network)
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def shared(network: nn.Module, modules: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Those of some modules whose parameters others have, too, and which: a copy of such a weight is one more."""
    owners: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, module in network.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter].append(name)
    others = {
        name: [of for its in module.parameters() for of in owners[its] if not f"{of}.".startswith(f"{name}.")]
        for name, module in modules.items()
    }
    return {name: found for name, found in others.items() if found}


def run(network: nn.Module, batch: Any) -> Any:
    """What a network gives for a batch; what it draws at random is the same each time."""
    torch.manual_seed(0)
    return call(network, batch)


def same(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether two tensors are alike, to a part of the largest entry; on the meta device, whether their shapes are."""
    if one.shape != other.shape or one.is_meta or not one.numel():
        return one.shape == other.shape
    if not other.is_floating_point():
        return torch.equal(one, other)
    tolerance = max(tolerance, 4 * torch.finfo(other.dtype).eps)
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


def put(network: nn.Module, modules: dict[nn.Module, nn.Module]) -> None:
    """Put modules in the places of others (old to new), under all of their names."""
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):
            if child in modules:
                setattr(parent, name, modules[child])


def put_where_same(
    network: nn.Module, modules: dict[nn.Module, nn.Module], batch: Any, expected: Any
) -> list[nn.Module]:
    """Put modules in the places of others; give back, and put back, those with which the network is not the same.

    Halves are tried where the whole fails.

    Args:
        network: changed in place, in evaluation mode.
        modules: old to new.
        batch: what it is tried on.
        expected: what it gave for that, by :func:`run`.
    """
    put(network, modules)
    if not modules or _gives(network, batch, expected):
        return []
    put(network, {new: old for old, new in modules.items()})
    olds = list(modules)
    if len(olds) == 1:
        return olds
    halves = olds[: len(olds) // 2], olds[len(olds) // 2 :]
    tried = [{old: modules[old] for old in half} for half in halves]
    return [old for half in tried for old in put_where_same(network, half, batch, expected)]


def _gives(network: nn.Module, batch: Any, expected: Any) -> bool:
    try:
        outputs = run(network, batch)
    except Exception:  # the network's own code, which may ask a layer for what another does not have
        return False
    pairs = zip(tree_leaves(outputs), tree_leaves(expected), strict=True)
    return all(same(one, other, AGREE) for one, other in pairs if isinstance(other, Tensor))
