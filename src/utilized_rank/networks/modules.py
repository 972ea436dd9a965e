"""Layers that torch.nn has not, of torch alone: a folder of a compressed network holds a copy of this file.

Each is made from plain values, by the names that it keeps them under.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

Sides = tuple[int, int]
"""Along the height and the width of an image."""


class Attention(nn.Module):
    """What an ``nn.MultiheadAttention`` computes, by linear layers ``qkv`` and ``proj``; no weights are given back.

    Args:
        width: of queries, keys, values and outputs, D.
        heads: of the attention.
        bias: whether both layers have one.
        dropout: of the attention's weights, in training.
        batch_first: whether a sequence is (B, L, D) rather than (L, B, D).

    Raises:
        NotImplementedError: a call with queries other than keys and values (they have no common projection).
    """

    def __init__(self, width: int, heads: int, bias: bool, dropout: float, batch_first: bool) -> None:
        super().__init__()
        self.width, self.heads, self.bias = width, heads, bias
        self.dropout, self.batch_first = dropout, batch_first
        self.qkv = nn.Linear(width, 3 * width, bias)
        self.proj = nn.Linear(width, width, bias)
        # What a transformer's layer asks before it takes its fused path, which would not call these layers.
        self.in_proj_bias = None
        self._qkv_same_embed_dim = False

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


def same_amounts(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's padding "SAME" along one side, before and after: ceil(size / stride) outputs, less before."""
    total = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def same_around(size: tuple[int, int], kernel: Sides, stride: Sides, dilation: Sides) -> tuple[int, int, int, int]:
    """The same on all sides of an image of this height and width: left, right, top, bottom."""
    down, across = (same_amounts(size[i], kernel[i], stride[i], dilation[i]) for i in (0, 1))
    return *across, *down


def same_padded(x: Tensor, kernel: Sides, stride: Sides, dilation: Sides) -> Tensor:
    """(B, C, H, W) with zeros around it, by :func:`same_around`."""
    return F.pad(x, same_around((x.shape[-2], x.shape[-1]), kernel, stride, dilation))


fx.wrap("same_padded")  # it depends on the size: one node of a graph


class SamePad(nn.Module):
    """Pads images (B, C, H, W) as TensorFlow does for a convolution, by amounts that depend on their size."""

    def __init__(self, kernel: Sides, stride: Sides, dilation: Sides) -> None:
        super().__init__()
        self.kernel, self.stride, self.dilation = kernel, stride, dilation

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H + ..., W + ...)."""
        return same_padded(x, self.kernel, self.stride, self.dilation)
