"""W' = P_S W P_T, and weights that are put in place for a while and always put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .layers import Layer
from .moments import Moments
from .subspaces import Subspace, output_principal, principal


def bases(layer: Layer, moments: Moments, dimensions: int | None = None) -> tuple[Subspace, Subspace]:
    """The principal subspaces of a layer's inputs and outputs, from uncentred moments.

    Of the inputs so many dimensions, or all m; of the outputs min(m, n), which hold all that they do.
    """
    second = moments.second
    return principal(second, dimensions), output_principal(second, layer.weight())


def projected(weight: Tensor, inputs: Subspace, outputs: Subspace, k_s: int, k_t: int) -> Tensor:
    """W' = P_S W P_T (Garg et al. 2024), float64, (g, m, n).

    A side whose k is the whole width (m or n) is left as it is: its projector is the identity.

    Args:
        weight: W, (g, m, n).
        inputs: principal subspace of C_S; it need not hold more than min(m, n) dimensions.
        outputs: principal subspace of C_T.
        k_s: dimensions kept of the inputs.
        k_t: dimensions kept of the outputs.
    """
    result = weight.to(inputs.vectors.device, torch.float64)
    if k_s < weight.shape[-2]:
        basis = inputs.top(k_s)  # (g, m, k_s)
        result = basis @ (basis.mT @ result)
    if k_t < weight.shape[-1]:
        basis = outputs.top(k_t)  # (g, n, k_t)
        result = (result @ basis) @ basis.mT
    return result


@contextmanager
def replaced(weights: dict[Layer, Tensor], biases: dict[Layer, Tensor] | None = None) -> Iterator[None]:
    """Put the matrices (g, m, n) in place of the layers' weights, and vectors (g n,) in place of their biases.

    The originals come back whatever happens inside, to the bit: they are set aside, not copied.
    """
    originals = {layer: (layer.module.weight, layer.module.bias) for layer in weights}
    try:
        for layer, matrix in weights.items():
            layer.module.weight = nn.Parameter(layer.weight_from(matrix), requires_grad=False)
        for layer, bias in (biases or {}).items():
            layer.module.bias = nn.Parameter(bias.to(layer.module.weight), requires_grad=False)
        yield
    finally:
        for layer, (weight, own) in originals.items():
            layer.module.weight, layer.module.bias = weight, own
