"""Attention whose projections are linear layers that are called, so that they can be measured and replaced.

``torch.nn.MultiheadAttention`` keeps the projection of queries, keys and values in a raw parameter, multiplies
by its output projection without calling it, and in evaluation takes a fused path on which no hook is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """What an ``nn.MultiheadAttention`` computes, by linear layers ``qkv`` and ``proj``; no weights are given back.

    Raises:
        NotImplementedError: a call with queries other than keys and values (they have no common projection).
    """

    def __init__(self, given: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = given.num_heads
        self.batch_first = given.batch_first
        self.dropout = given.dropout
        self.qkv = nn.Linear(given.embed_dim, 3 * given.embed_dim, bias=given.in_proj_bias is not None)
        self.proj = nn.Linear(given.embed_dim, given.embed_dim, bias=given.out_proj.bias is not None)
        self.qkv.weight, self.proj.weight = given.in_proj_weight, given.out_proj.weight
        if given.in_proj_bias is not None:
            self.qkv.bias, self.proj.bias = given.in_proj_bias, given.out_proj.bias
        # What a transformer's layer asks before it takes its fused path, which would not call these layers.
        self.in_proj_bias = None
        self._qkv_same_embed_dim = False
        self.train(given.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Arguments as of ``nn.MultiheadAttention``; the result (B, L, D) as its, and None for the weights."""
        if query is not key or key is not value:
            raise NotImplementedError("attention of one sequence to another has no common projection to measure")
        x = query if self.batch_first else query.transpose(0, 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = None if attn_mask is None else _added(attn_mask, q.dtype)
        if mask is not None and mask.ndim == 3:
            mask = mask.unflatten(0, (-1, self.heads))  # from (B H, L, L)
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q.dtype)[:, None, None]
            mask = padding if mask is None else mask + padding
        # As nn.MultiheadAttention has it, is_causal is a hint about the mask that comes with it.
        out = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        out = self.proj(out.transpose(1, 2).flatten(2))
        return out if self.batch_first else out.transpose(0, 1), None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores; in a mask of truth values, True means left out."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf) if mask.dtype == torch.bool else mask


class Side(nn.Module):
    """Linear layers side by side: their outputs, one after the other."""

    def __init__(self, fused: nn.Linear, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        biases = [None] * len(names) if fused.bias is None else fused.bias.chunk(len(names))
        for name, weight, bias in zip(names, fused.weight.chunk(len(names)), biases, strict=True):
            part = nn.Linear(fused.in_features, len(weight), bias=bias is not None)
            part.weight = nn.Parameter(weight.detach().clone())
            if bias is not None:
                part.bias = nn.Parameter(bias.detach().clone())
            self.add_module(name, part)

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
            setattr(parent, name, made.setdefault(child, Attention(child)))
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # it would hand its layers sequences of different lengths, to be fused
    for parent, name, child in _children(network) if split else []:
        if name == "qkv" and isinstance(child, nn.Linear) and child.out_features == 3 * child.in_features:
            setattr(parent, name, made.setdefault(child, Side(child, ("q", "k", "v"))))
    return network


def _children(network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            yield parent, name, child


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    added = attention.bias_k is not None or attention.add_zero_attn
    return attention.in_proj_weight is not None and not added
