"""What a change of one layer's weight costs the whole network, from one backward pass over some inputs.

Kronecker-factored curvature (Martens and Grosse 2015, arXiv 1503.05671, section 3): for a layer with rows s and
outputs t = s W + b at positions p of an input, G = E[sum_p g_p^T g_p] is the second moment of the gradient g_p of
log p(y | x) with respect to t_p, y drawn from the network's own predictions. A change D of the weight then moves the
predictions by a divergence of about tr(D^T C D G) / 2 nats, C the second moment of s; positions, and inputs and
gradients, are taken as independent. It is a quadratic: right while the divergence is small.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map_only

from ..networks.batches import Batches, call, some_of
from ..networks.devices import device_of, placed, sums_on, truth
from ..networks.each import Each, in_turn, ordered
from ..networks.evaluation import class_dimension, logits_of, outputs
from ..networks.hooks import held
from .correlations import TERMS
from .layers import Layer

UNIFORM = 0.1
"""Part of a sample that is drawn alike from all inputs, however sure the network is of them."""


@dataclass(frozen=True)
class Sample:
    """Some of many inputs, each standing for others."""

    inputs: Batches
    weights: Tensor
    """What each counts for in a mean over all, float32 (N,): their sum is about 1."""
    logits: Tensor
    """What the network gives for them, float32 (N, ...), on its device."""


def sample(network: nn.Module, inputs: Batches, count: int) -> Sample:
    """So many inputs, most of them such as the network is least sure of: those decide what a change of it costs.

    A trained network is sure of nearly all that it was trained on, and the divergence lies in a few inputs. Drawn is in
    proportion to sqrt(1 - sum p^2), the size of the curvature's root in the logits, at even steps (systematic
    sampling: Madow 1949), and what is drawn counts for the inverse of its probability. Nothing is left to chance.

    Args:
        network: whose outputs are logits.
        inputs: to draw from.
        count: all of them where there are no more.
    """
    logits = outputs(network, inputs)
    if count >= len(inputs):
        return Sample(inputs, _alike(inputs), logits)
    classes = class_dimension(logits)
    unsure = (1 - logits.softmax(classes).square().sum(classes)).clamp_min(0).cpu()
    size = unsure.reshape(len(inputs), -1).double().mean(1).sqrt()
    expected = _inclusion((1 - UNIFORM) * size / size.sum().clamp_min(1e-300) + UNIFORM / len(inputs), count)
    steps = torch.cat([expected.new_zeros(1), expected.cumsum(0)]) + 0.5
    chosen = (steps[1:].floor() > steps[:-1].floor()).nonzero().flatten()
    weights = (1 / expected[chosen] / len(inputs)).float()
    return Sample(some_of(inputs, chosen), weights, logits[chosen.to(logits.device)])


def _alike(inputs: Batches) -> Tensor:
    return torch.full((len(inputs),), 1 / len(inputs))


def _inclusion(share: Tensor, count: int) -> Tensor:
    """Probabilities of being drawn that sum to ``count``, none above 1, in proportion to ``share`` below: (N,)."""
    surely = torch.zeros_like(share, dtype=torch.bool)
    while True:
        left = count - int(surely.sum())
        found = torch.where(surely, 1.0, left * share / share[~surely].sum())
        if not (found > 1).any():
            return found
        surely |= found > 1


Curvature = dict[str, Tensor]
"""G of each layer, by name: (g, n, n), float64, in nats over the square of the layer's outputs."""


CHUNK = 128
"""Inputs that are summed by themselves."""


@dataclass(frozen=True)
class Passes:
    """Passes forward and back over some inputs; see :func:`curvature`."""

    network: nn.Module
    layers: list[Layer]
    inputs: Batches
    weights: Tensor
    batch_size: int

    def over(self, some: slice) -> Curvature:
        """The sums over some of them."""
        there = sums_on(device_of(self.network.eval()))
        sums: Curvature = {}
        with torch.inference_mode(False), torch.enable_grad():
            for which in torch.arange(some.start, some.stop).split(self.batch_size):
                calls: list[tuple[Layer, GradientEdge]] = []
                batch = tree_map_only(Tensor, _ordinary, self.inputs[which])
                with held(layer.module.register_forward_hook(partial(_watch, layer, calls)) for layer in self.layers):
                    logits = logits_of(call(self.network, placed(batch, self.network)))
                # Signs of its own for each batch, so that they do not depend on who has the one before.
                signs = torch.Generator().manual_seed(int(which[0]))
                for layer, gradient in _gradients(logits, _root(logits, self.weights[which], signs), calls):
                    new = torch.zeros(layer.groups, layer.n, layer.n, dtype=torch.float64, device=there)
                    its = sums.setdefault(layer.name, new)
                    for rows in _rows(layer, gradient.float()).split(TERMS, 1):
                        its += (rows.mT @ rows).to(its)
        return sums


def curvature(
    network: nn.Module,
    layers: list[Layer],
    inputs: Batches,
    weights: Tensor | None = None,
    batch_size: int = 32,
    each: Each = in_turn,
) -> Curvature:
    """G of every layer that a gradient of the predictions reaches, in one pass forward and back.

    A layer that is called more than once (shared weights) adds up over its calls. Memory does not grow with the number
    of inputs. Of a network without a gradient nothing is given back.

    Args:
        network: whose outputs are logits: of classes (B, C), of sequences (B, L, C), or of pixels (B, C, H, W).
        layers: of the network.
        inputs: N of them; no labels are used.
        weights: what each counts for, (N,), as of a :class:`Sample`; all alike where it is None.
        batch_size: inputs at a time.
        each: where chunks of inputs are summed; their sums are added in order.
    """
    weights = _alike(inputs) if weights is None else weights
    size = max(1, CHUNK // batch_size) * batch_size
    firsts = range(0, len(inputs), size)
    chunks = {f"of inputs from {first}": slice(first, min(first + size, len(inputs))) for first in firsts}
    work = each(attrgetter("over"), Passes(network, layers, inputs, weights, batch_size))
    sums: Curvature = {}
    for chunk in ordered(work(chunks, "curvature", "chunk"), chunks):
        for name, its in chunk.items():
            sums[name] = sums[name] + its if name in sums else its
    return {name: its for name, its in sums.items() if truth(torch.isfinite(its).all())}


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


@torch.no_grad()
def _root(logits: Tensor, weights: Tensor, signs: torch.Generator) -> Tensor:
    """A random v for each prediction p with E[v v^T] = diag(p) - p^T p, the curvature of the divergence in the logits.

    v = sqrt(p) x - p (sqrt(p) . x) with random signs x. Labels drawn from p have the same expectation, v = e_y - p, but
    where a network is sure that is nearly always next to nothing, and now and then everything.
    """
    classes = class_dimension(logits)
    p = logits.float().softmax(classes)
    rooted = p.sqrt() * (2 * torch.randint(0, 2, p.shape, generator=signs).to(p) - 1)
    v = rooted - p * rooted.sum(classes, keepdim=True)
    predictions = logits[0].numel() // logits.shape[classes]  # of one input
    scale = (weights.to(v) / predictions).sqrt()
    return (v * scale.view(-1, *[1] * (v.ndim - 1))).to(logits)


def _gradients(logits: Tensor, seed: Tensor, calls: list[tuple[Layer, GradientEdge]]) -> list[tuple[Layer, Tensor]]:
    if not calls or not logits.requires_grad:
        return []
    try:
        found = torch.autograd.grad(logits, [edge for _, edge in calls], seed, allow_unused=True)
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
