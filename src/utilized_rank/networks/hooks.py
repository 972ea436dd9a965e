"""Hooks that are taken off again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def held(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that were set: they stay for as long as the context lasts."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
