"""What a change of one layer's weight costs the whole network, from one backward pass over some inputs.

Kronecker-factored curvature (Martens and Grosse 2015, arXiv 1503.05671, section 3): for a layer with rows s and
outputs t = s W + b at positions p of an input, G = E[sum_p g_p^T g_p] is the second moment of the gradient g_p of
log p(y | x) with respect to t_p, y drawn from the network's own predictions. A change D of the weight then moves the
predictions by a divergence of about tr(D^T C D G) / 2 nats, C the second moment of s; positions, and inputs and
gradients, are taken as independent. It is a quadratic: right while the divergence is small.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map_only

from ..networks.batches import Batches, call
from ..networks.devices import device_of, placed, sums_on
from ..networks.evaluation import class_dimension, logits_of
from ..networks.hooks import held
from .correlations import TERMS
from .layers import Layer

Curvature = dict[str, Tensor]
"""G of each layer, by name: (g, n, n), float64, in nats over the square of the layer's outputs."""


def curvature(network: nn.Module, layers: list[Layer], inputs: Batches, batch_size: int = 32) -> Curvature:
    """G of every layer that a gradient of the predictions reaches, in one pass forward and back over ``inputs``.

    A layer that is called more than once (shared weights) adds up over its calls. Memory does not grow with the number
    of inputs. Of a network without a gradient nothing is given back.

    Args:
        network: whose outputs are logits: of classes (B, C), of sequences (B, L, C), or of pixels (B, C, H, W).
        layers: of the network.
        inputs: no labels are used.
        batch_size: inputs at a time.
    """
    there = sums_on(device_of(network.eval()))
    draws = torch.Generator().manual_seed(0)
    sums: Curvature = {}
    predictions = 0
    with torch.inference_mode(False), torch.enable_grad():
        for batch in inputs.split(batch_size):
            calls: list[tuple[Layer, GradientEdge]] = []
            with held(layer.module.register_forward_hook(partial(_watch, layer, calls)) for layer in layers):
                logits = logits_of(call(network, placed(tree_map_only(Tensor, _ordinary, batch), network)))
            likelihood, drawn = _likelihood(logits, draws)
            predictions += drawn
            for layer, gradient in _gradients(likelihood, calls):
                new = torch.zeros(layer.groups, layer.n, layer.n, dtype=torch.float64, device=there)
                its = sums.setdefault(layer.name, new)
                for rows in _rows(layer, gradient.float()).split(TERMS, 1):
                    its += (rows.mT @ rows).to(its)
    return {name: its / predictions for name, its in sums.items()}


def _watch(layer: Layer, calls: list[tuple[Layer, GradientEdge]], _: nn.Module, args: Any, outputs: Tensor) -> Tensor:
    """Take down where the gradient of a module's outputs can be had, whatever is done to them in place later."""
    if outputs.requires_grad:
        calls.append((layer, get_gradient_edge(outputs)))
        return outputs
    start = outputs.detach().requires_grad_()  # nothing before it has a gradient
    calls.append((layer, get_gradient_edge(start)))
    return start.clone()


def _ordinary(values: Tensor) -> Tensor:
    """The same values, that a gradient can be taken through."""
    return values.clone() if values.is_inference() else values


def _likelihood(logits: Tensor, draws: torch.Generator) -> tuple[Tensor, int]:
    """Sum of log p(y | x), each y drawn from the prediction p, and how many there are."""
    classes = class_dimension(logits)
    log_p = logits.float().log_softmax(classes).movedim(classes, -1).flatten(0, -2)  # (predictions, C)
    y = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=draws).to(log_p.device)
    return log_p.gather(1, y).sum(), len(y)


def _gradients(likelihood: Tensor, calls: list[tuple[Layer, GradientEdge]]) -> list[tuple[Layer, Tensor]]:
    if not calls or not likelihood.requires_grad:
        return []
    try:
        found = torch.autograd.grad(likelihood, [edge for _, edge in calls], allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # the network's own code: a value that a gradient needs was overwritten, an operation has none
        return []
    return [(layer, gradient) for (layer, _), gradient in zip(calls, found, strict=True) if gradient is not None]


def _rows(layer: Layer, gradient: Tensor) -> Tensor:
    """The gradient of a module's outputs by positions: (g, N, n)."""
    if isinstance(layer.module, nn.Linear):
        return gradient.reshape(1, -1, layer.n)
    by_group = gradient.reshape(len(gradient), layer.groups, layer.n, -1)  # (B, g, n, L)
    return by_group.permute(1, 0, 3, 2).reshape(layer.groups, -1, layer.n)
