"""Two layers in place of one: where that can be, made, put in place, and given to a network again."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..networks.batches import call
from ..networks.devices import placed
from ..networks.exchange import shared, undisturbed
from ..ranks.layers import Layer, Weighted
from .lowrank import Factors


def pair(module: Weighted, form: str, rank: int, bias: bool) -> nn.Sequential:
    """Two layers in place of ``module``, in a form of :data:`FORMS`, with random weights."""
    like: dict[str, Any] = {"device": module.weight.device, "dtype": module.weight.dtype}
    if isinstance(module, nn.Linear):
        first: nn.Module = nn.Linear(module.in_features, rank, bias=False, **like)
        return nn.Sequential(first, nn.Linear(rank, module.out_features, bias, **like))
    groups, inner = module.groups, module.groups * rank
    how = {name: getattr(module, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    first_how, second_how = (how, {"kernel_size": 1}) if form == "channel" else (_one_way(how, 0), _one_way(how, 1))
    like |= {"groups": groups, "padding_mode": module.padding_mode}
    first = nn.Conv2d(module.in_channels, inner, bias=False, **first_how, **like)
    return nn.Sequential(first, nn.Conv2d(inner, module.out_channels, bias=bias, **second_how, **like))


def _one_way(how: dict[str, Any], way: int) -> dict[str, Any]:
    """A convolution's form along one side of the image: along the other it is 1 wide, and does nothing."""
    nothing = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
    return {
        name: value if isinstance(value, str) else tuple(value[i] if i == way else nothing[name] for i in range(2))
        for name, value in how.items()
    }


@torch.no_grad()
def factorized(layer: Layer, factors: Factors) -> nn.Sequential:
    """The two layers that compute what ``factors`` say."""
    module = layer.module
    bias = bias_of(layer, factors.bias)
    two = pair(module, factors.form, factors.rank, bias is not None)
    for its, matrix in zip(two, (factors.shared(), factors.second), strict=True):
        weight = cast(Tensor, its.weight)
        weight.copy_(matrix.mT.reshape(weight.shape))
    if bias is not None:
        cast(Tensor, two[1].bias).copy_(bias)
    two.requires_grad_(module.weight.requires_grad)
    return two.to(memory_format=torch.channels_last)


def bias_of(layer: Layer, added: Tensor | None) -> Tensor | None:
    """The layer's own bias and what is added to it, (g, n): (g n,), or None where it has neither."""
    own = layer.module.bias
    if added is None:
        return own
    return added.reshape(-1) if own is None else own.to(added) + added.reshape(-1)


def substitute(network: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Put ``modules`` in place of those of the same names, in ``network`` itself.

    A module that the network has under several names is replaced under all of them.
    """
    new = {network.get_submodule(name): module for name, module in modules.items()}
    for name, old in list(network.named_modules(remove_duplicate=False)):
        if old in new:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, new[old])


def form_of(two: nn.Sequential, factors: Factors) -> list[Any]:
    """What :func:`restructure` needs to make the two layers again: form, rank, and whether they have a bias."""
    return [factors.form, factors.rank, int(two[1].bias is not None)]


def restructure(network: nn.Module, forms: dict[str, list[Any]]) -> None:
    """Give ``network`` the form of a decomposed one, to load its weights into.

    Args:
        network: changed in place.
        forms: for each factorized layer what :func:`form_of` said.
    """
    found = {name: (network.get_submodule(name), *how) for name, how in forms.items()}
    pairs = {name: pair(m, form, rank, bool(bias)) for name, (m, form, rank, bias) in found.items()}
    substitute(network, {name: two.to(memory_format=torch.channels_last) for name, two in pairs.items()})


@torch.no_grad()
def indivisible(network: nn.Module, layers: list[Layer], batch: Any) -> dict[str, str]:
    """Why some of the layers cannot be put in two, by name.

    Args:
        network: not changed.
        layers: of it.
        batch: an example of what it is called with.
    """
    others = shared(network, {layer.name: layer.module for layer in layers})
    why = {name: f"its weight is also that of {', '.join(its)}" for name, its in others.items()}
    batch = placed(batch, network)

    def read(some: list[Layer]) -> list[Layer]:
        """Those without which the network cannot be run."""
        trial = copy.deepcopy(network)
        substitute(trial, {its.name: pair(its.module, "channel", 1, its.module.bias is not None) for its in some})
        try:
            call(trial, batch)
        except Exception:  # the network's own code, which may ask a layer for what two have not
            half = len(some) // 2
            return some if len(some) == 1 else read(some[:half]) + read(some[half:])
        return []

    with undisturbed(network):  # layers are made with random weights
        found = read([layer for layer in layers if layer.name not in why])
    return why | {layer.name: "the network does something else with it than call it" for layer in found}
