"""Two layers in place of one: made, put in place, and given to a network again."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..networks.padded import ASKED
from ..ranks.layers import Layer, Weighted
from .lowrank import Factors, patch_sizes


class Pair(nn.Sequential):
    """Two layers in place of one: whoever asks for its weight, its bias or its sizes gets what the one would answer.

    Args:
        first: m to r.
        second: r to n.
        module: the one that they stand for; it is not kept.
    """

    __jit_unused_properties__ = ("weight", "bias")

    def __init__(self, first: nn.Module, second: nn.Module, module: Weighted) -> None:
        super().__init__(first, second)
        for name in ASKED:
            if hasattr(module, name):
                setattr(self, name, getattr(module, name))

    @property
    def weight(self) -> Tensor:
        """The product of both weights, in the shape of the one layer's."""
        first, second = cast(Tensor, self[0].weight), cast(Tensor, self[1].weight)
        if first.ndim == 2:
            return second @ first
        groups = cast(int, self.groups)
        first, second = (weight.unflatten(0, (groups, -1)) for weight in (first, second))  # (g, r, C, k_h, 1 or k_w)
        product = torch.einsum("gnrxy,grcij->gncixjy", second, first)  # one of i and x, and of j and y, is 1 long
        return product.flatten(5).flatten(3, 4).flatten(0, 1)

    @property
    def bias(self) -> Tensor | None:
        """The second layer's."""
        return cast(Tensor | None, self[1].bias)


def pair(module: Weighted, form: str, rank: int, bias: bool) -> Pair:
    """Two layers in place of ``module``, in a form of :data:`FORMS`, with random weights."""
    like: dict[str, Any] = {"device": module.weight.device, "dtype": module.weight.dtype}
    if isinstance(module, nn.Linear):
        first: nn.Module = nn.Linear(module.in_features, rank, bias=False, **like)
        return Pair(first, nn.Linear(rank, module.out_features, bias, **like), module)
    groups, inner = module.groups, module.groups * rank
    how = {name: getattr(module, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    first_how, second_how = (how, {"kernel_size": 1}) if form == "channel" else (_one_way(how, 0), _one_way(how, 1))
    like |= {"groups": groups, "padding_mode": module.padding_mode}
    first = nn.Conv2d(module.in_channels, inner, bias=False, **first_how, **like)
    return Pair(first, nn.Conv2d(inner, module.out_channels, bias=bias, **second_how, **like), module)


def _one_way(how: dict[str, Any], way: int) -> dict[str, Any]:
    """A convolution's form along one side of the image: along the other it is 1 wide, and does nothing."""
    nothing = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
    return {
        name: value if isinstance(value, str) else tuple(value[i] if i == way else nothing[name] for i in range(2))
        for name, value in how.items()
    }


@torch.no_grad()
def factorized(layer: Layer, factors: Factors) -> Pair:
    """The two layers that compute what ``factors`` say."""
    module = layer.module
    bias = bias_of(layer, factors.bias)
    two = pair(module, factors.form, factors.rank, bias is not None)
    first = factors.first
    if factors.form == "spatial":
        _, _, across = patch_sizes(layer)
        first = first.reshape(1, -1, across, factors.rank, across)[:, :, 0, :, 0]  # (1, C k_h, r)
    for its, matrix in zip(two, (first, factors.second), strict=True):
        weight = cast(Tensor, its.weight)
        weight.copy_(matrix.mT.reshape(weight.shape))
    if bias is not None:
        cast(Tensor, two[1].bias).copy_(bias)
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


def form_of(two: Pair, factors: Factors) -> list[Any]:
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
