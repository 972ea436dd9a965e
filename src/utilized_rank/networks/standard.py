"""Networks as all else here takes them: every layer is called, with what it really multiplies."""

from __future__ import annotations

from typing import Any

from torch import nn

from .attention import explicit
from .plain import plain


def standardize(network: nn.Module, batch: Any, split: bool = False) -> dict[str, str]:
    """Make attention explicit and layers plain where that can be, as :func:`explicit` and :func:`plain` say.

    Args:
        network: changed in place, in evaluation mode from now on; it computes the same.
        batch: an example of what it is called with, on its device.
        split: put fused projections of queries, keys and values in three.

    Returns:
        Why layers stay that do something else than multiply what they are called with, by name.
    """
    explicit(network, split).eval()
    return plain(network, batch)
