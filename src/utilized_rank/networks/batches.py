"""Inputs of a network, of which a batch is at hand when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor


class Batches(Protocol):
    """Inputs (N, ...): a tensor, or what makes a part of them when it is asked for."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, which: Tensor | slice, /) -> Tensor:
        """Some of them."""

    def split(self, size: int, /) -> Iterable[Tensor]:
        """All of them, so many at a time."""
