"""Attention whose projections are linear layers that are called, so that they can be measured and replaced.

``torch.nn.MultiheadAttention`` keeps the projection of queries, keys and values in a raw parameter, multiplies
by its output projection without calling it, and in evaluation takes a fused path on which no hook is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from .modules import Attention


class Side(nn.Module):
    """Linear layers side by side, ``names``: their outputs, one after the other.

    Args:
        in_features: m.
        out_features: n, of all together.
        bias: whether they have one.
        names: of the layers, which have equal parts of n.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, names: tuple[str, ...]) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.names = names
        for name in names:
            self.add_module(name, nn.Linear(in_features, out_features // len(names), bias))

    @property
    def weight(self) -> Tensor:
        """All weights, (n, m), for a network that reads them in place of calling the module."""
        return torch.cat([cast(Tensor, self.get_submodule(name).weight) for name in self.names])

    @property
    def bias(self) -> Tensor | None:
        """All biases, (n,)."""
        biases = [cast(Tensor | None, self.get_submodule(name).bias) for name in self.names]
        return None if biases[0] is None else torch.cat(cast(list[Tensor], biases))

    def forward(self, x: Tensor) -> Tensor:
        """(..., m) to (..., n)."""
        return torch.cat([self.get_submodule(name)(x) for name in self.names], -1)


def explicit(network: nn.Module, split: bool) -> nn.Module:
    """Turn every ``nn.MultiheadAttention`` of ``network`` that attends to itself into linear layers that are called.

    Those that have keys of another width, added keys or zeros stay as they are.

    Args:
        network: changed in place, and given back; it computes the same.
        split: put a fused projection (a linear layer ``qkv``, as timm and :class:`Attention` name it) in three.
    """
    made: dict[nn.Module, nn.Module] = {}  # a module under two names stays one
    for parent, name, child in _children(network):
        if isinstance(child, nn.MultiheadAttention) and _is_plain(child):
            setattr(parent, name, made.setdefault(child, _called(child)))
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # it would hand its layers sequences of different lengths, to be fused
    for parent, name, child in _children(network) if split else []:
        if name == "qkv" and isinstance(child, nn.Linear) and child.out_features == 3 * child.in_features:
            setattr(parent, name, made.setdefault(child, _split(child, ("q", "k", "v"))))
    return network


def _children(network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            yield parent, name, child


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    added = attention.bias_k is not None or attention.add_zero_attn
    return attention.in_proj_weight is not None and not added


def _called(given: nn.MultiheadAttention) -> Attention:
    """The same attention, with the very parameters of the given one."""
    has_bias = given.in_proj_bias is not None
    made = Attention(given.embed_dim, given.num_heads, has_bias, given.dropout, given.batch_first)
    made.qkv.weight, made.proj.weight = given.in_proj_weight, given.out_proj.weight
    if has_bias:
        made.qkv.bias, made.proj.bias = given.in_proj_bias, given.out_proj.bias
    return made.train(given.training)


def _split(fused: nn.Linear, names: tuple[str, ...]) -> Side:
    """A linear layer in equal parts, with copies of its weights."""
    made = Side(fused.in_features, fused.out_features, fused.bias is not None, names).to(fused.weight)
    biases = [None] * len(names) if fused.bias is None else fused.bias.chunk(len(names))
    for name, weight, bias in zip(names, fused.weight.chunk(len(names)), biases, strict=True):
        part = cast(nn.Linear, made.get_submodule(name))
        part.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            part.bias = nn.Parameter(bias.detach().clone())
    return made.train(fused.training)
