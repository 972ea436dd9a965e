"""Decomposed networks of a study: kept as files, and looked at."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

from ..base.files import read_tensors, write_network
from ..compression.decomposition import Decomposed
from ..compression.pairs import restructure
from ..networks import cost
from ..networks.batches import Batches
from ..networks.evaluation import is_correct
from ..networks.intervals import paired_change


def save(decomposed: Decomposed, path: Path) -> None:
    """Write a decomposed network, with its form in the file's header."""
    write_network(path, decomposed.network, {"forms": decomposed.forms})


def load(network: nn.Module, path: Path) -> nn.Module:
    """A copy of ``network`` in the form and with the weights that :func:`save` wrote."""
    tensors, described = read_tensors(path)
    result = copy.deepcopy(network)
    restructure(result, described["forms"])
    result.load_state_dict(tensors)
    return result.eval()


def assess(network: nn.Module, inputs: Batches, labels: Tensor, reference: np.ndarray, **about: Any) -> dict[str, Any]:
    """One row of a results table: accuracy, its change against ``reference`` and what the network costs.

    Args:
        network: to be looked at.
        inputs: normalised test images, (N, C, H, W).
        labels: int64 (N,).
        reference: bool (N,), the images that the reference network gets right.
        about: further columns.
    """
    right = is_correct(network, inputs, labels)
    change = paired_change(reference, right)
    return {
        **about,
        "accuracy": 100 * float(right.mean()),
        "images": len(right),
        "change": change.points,
        "change_low": change.low,
        "change_high": change.high,
        "parameters": cost.parameters(network),
        "flops": cost.flops(network, inputs[:1]),
    }


def latency(original: nn.Module, decomposed: nn.Module, images: Tensor) -> dict[str, float]:
    """How long both networks take for ``images``, in seconds, and the FLOPs of the second over those of the first."""
    before, after = cost.latencies([original, decomposed.eval()], images)
    kept = cost.flops(decomposed, images[:1]) / cost.flops(original, images[:1])
    return {"images": len(images), "original": before, "decomposed": after, "flops_kept": kept}


def results_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows of :func:`assess`; the epsilon of a network that has none is missing."""
    table = pd.DataFrame(rows)
    return table.astype({"epsilon": float})
