"""Front to back: each layer is fitted to what should flow out of it, from what does flow into it.

By the time a layer is replaced, those before it have been, so that its inputs differ from the original's.
Fitted to the original outputs from the inputs that it will really have, a layer makes up for errors before
it, and they do not pile up.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.grad import conv2d_weight

from ..networks.batches import Batches
from ..networks.devices import device_of, sums_on, truth
from ..networks.evaluation import received
from ..networks.suffix import Suffix, Traced, same_network
from ..ranks.layers import Layer, padding
from ..ranks.moments import Stream
from .lowrank import Fit

RIDGE = 1e-2
"""How strongly a fit is drawn towards the original weight, over the mean variance of its inputs."""
FAINT = 0.05
"""Channels that reach a sum scaled by less than so much of what is usual are not asked to make up for it."""


class Pairs:
    """Sums over the rows s that flow into a layer, with what the rows t that should come of it lack, in float64."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._stream = Stream(layer, None)
        self._cross = torch.zeros(
            layer.groups, layer.m, layer.n, dtype=torch.float64, device=sums_on(layer.module.weight.device)
        )
        self._total = self._cross.new_zeros(layer.groups * layer.n)
        self._lacks = False

    @torch.no_grad()
    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take in what the module receives, (B, ...), and what should come of it, without its bias."""
        self.take(inputs, outputs - _without_bias(self.layer, inputs))

    @torch.no_grad()
    def take(self, inputs: Tensor, lacking: Tensor | None) -> None:
        """Take in what the module receives, (B, ...), and what its outputs lack, t - s W; None where that is nothing.

        This is what is summed, and not t: where a layer need not change, no rounding makes it.
        """
        layer, module = self.layer, self.layer.module
        self._stream.add(inputs, len(inputs))
        if lacking is None:
            return
        self._lacks = True
        if isinstance(module, nn.Linear):
            rows, lacking = inputs.reshape(-1, layer.m), lacking.reshape(-1, layer.n)
            self._cross += (rows.mT @ lacking).to(self._cross)
            self._total += lacking.sum(0).to(self._total)
        else:
            # The products of patches and outputs are the gradient of a convolution's weight.
            padded, how = _padded(module, inputs)
            sums = conv2d_weight(padded, list(module.weight.shape), lacking, *how)
            self._cross += sums.to(self._cross).reshape(layer.groups, layer.n, layer.m).mT
            self._total += lacking.sum((2, 3)).to(self._total).sum(0)

    def fit(self, ridge: float = RIDGE) -> Fit:
        """The least squares fit of t from s, by a ridge regression towards the layer's weight W.

        M = W + (C + a I)^-1 K, with C the covariance of s, K that of s and t - s W, and a the ridge times the
        mean variance of s. Where t = s W it is W.
        """
        moments = self._stream.moments()
        mean, centred, count = moments.mean, moments.centred, max(1, moments.count)
        matrix = self.layer.weight().to(centred)
        outputs = (mean.unsqueeze(1) @ matrix).squeeze(1)
        if self._lacks:
            lacking = self._total.reshape(self.layer.groups, -1) / count
            cross = self._cross / count - mean.unsqueeze(2) * lacking.unsqueeze(1)
            amount = ridge * centred.diagonal(0, 1, 2).mean(-1, keepdim=True)
            amount = torch.where(amount > 0, amount, 1.0)  # where nothing varies there is nothing to fit, and W stays
            ridged = centred.clone()
            ridged.diagonal(0, 1, 2).add_(amount)
            matrix, outputs = matrix + _solved(ridged, cross), outputs + lacking
        return Fit(self.layer, matrix, centred, mean, outputs)


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """A^-1 B of a positive definite A (g, m, m) and B (g, m, n)."""
    root, failed = torch.linalg.cholesky_ex(matrix)
    if truth(failed.any()):  # moments summed in float32: what should be 0 can be farther below it
        return torch.linalg.solve(matrix, right)
    return torch.cholesky_solve(right, root)


def _padded(module: nn.Conv2d, inputs: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """Inputs for a convolution that pads with zeros alike on both sides; its stride, padding, dilation and groups."""
    plain: Any = module.padding
    if module.padding_mode != "zeros" or isinstance(plain, str):
        amounts, mode = padding(module)
        inputs, plain = F.pad(inputs, amounts, mode), (0, 0)
    return inputs, (module.stride, plain, module.dilation, module.groups)


@dataclass(frozen=True)
class Sum:
    """Where a layer's output is added to another value: a residual branch."""

    scale: Tensor
    """What each of its channels is multiplied with on the way there, (n,) or (1,)."""
    other: fx.Node
    """The value that it is added to; it does not depend on the layer."""


def residual(traced: Traced, node: fx.Node) -> Sum | None:
    """The sum that the output of ``node`` enters with at most its channels scaled; None where there is none."""
    behind = _behind(node)
    scale = torch.ones(1, device=device_of(traced.network))
    while len(node.users) == 1:
        user = next(iter(node.users))
        added = user.op == "call_function" and user.target in (operator.add, operator.iadd, torch.add)
        if added and not user.kwargs:
            others = [a for a in user.args if isinstance(a, fx.Node) and a not in behind]
            return Sum(scale, others[0]) if len(others) == 1 else None
        factor = _factor(traced, user, node)
        if factor is None:
            return None
        scale, node = scale * factor, user
    return None


def _behind(node: fx.Node) -> set[fx.Node]:
    """The node and all that depend on it."""
    found, new = {node}, [node]
    while new:
        users = [user for user in new.pop().users if user not in found]
        found.update(users)
        new += users
    return found


def _factor(traced: Traced, user: fx.Node, node: fx.Node) -> Tensor | None:
    """What ``user`` multiplies each channel of ``node`` with, in evaluation mode; None where it does anything else."""
    if user.op == "call_module":
        module = traced.network.get_submodule(str(user.target))
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            scale = (module.running_var + module.eps).rsqrt()
            return scale * module.weight.detach() if module.affine else scale
        return torch.ones(1, device=device_of(traced.network)) if isinstance(module, nn.Identity | nn.Dropout) else None
    if user.op == "call_function" and user.target in (operator.mul, torch.mul):  # timm's LayerScale
        gains = [a for a in user.args if isinstance(a, fx.Node) and a is not node and a.op == "get_attr"]
        gain = traced.attribute(gains[0]) if gains else None
        return gain.detach() if isinstance(gain, Tensor) and gain.ndim == 1 else None
    return None


class Compensation:
    """Fits layers to the original's outputs, from the inputs that a network of replaced layers delivers.

    Args:
        network: the original, never changed.
        small: a copy of it, whose layers are being replaced from front to back.
        images: calibration inputs, (N, ...); no labels are used.
        memory: MiB that the values that flow into a layer may take.
        batch_size: images at a time.
    """

    def __init__(
        self, network: nn.Module, small: nn.Module, images: Batches, memory: int = 2048, batch_size: int = 64
    ) -> None:
        batches = torch.arange(len(images)).split(batch_size)
        traced = Traced(network.eval())
        self._original = Suffix(traced, images, batches, memory * 2**19)
        self._small = Suffix(traced.through(small.eval()), images, batches, memory * 2**19)
        self._apart = False
        """Whether the two networks differ by now; what flows is the same until then, and computed once."""

    @torch.no_grad()
    def fit(self, layer: Layer) -> Fit:
        """What a layer of the original should become, those before it being replaced already (or not at all)."""
        if not self._apart and not same_network(self._original.traced.network, self._small.traced.network):
            self._apart = True
            self._small.start_from(self._original)
        pairs = Pairs(layer)
        for inputs, lacking in self._flows(layer):
            pairs.take(inputs, lacking)
        return pairs.fit()

    def _flows(self, layer: Layer) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What flows into a layer, and what its outputs then lack, batch by batch."""
        original, small = self._original, self._small
        before = original.flow(layer.name)
        after = small.flow(layer.name) if self._apart else before
        node = original.traced.node(layer.name)
        if before is None or after is None or node is None or node.target != layer.name:
            yield from self._hooked(layer)
            return
        source = cast(fx.Node, node.args[0])
        if not self._apart:
            for values in before:
                yield original.value(source, values), None
            return
        into = residual(original.traced, node)
        scale = None if into is None else _by_channel(layer, _inverse(into.scale))
        for values, its in zip(before, after, strict=True):
            changed = small.value(source, its)
            lacking = _without_bias(layer, original.value(source, values) - changed)
            if into is not None:
                missing = (original.value(into.other, values) - small.value(into.other, its)) * scale
                if _adds_to(missing, lacking):
                    lacking += missing
            yield changed, lacking

    def _hooked(self, layer: Layer) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The same of a network that cannot be run in parts: from whole passes, without regard to residual branches."""
        original, small = self._original.traced.network, self._small.traced.network
        for batch in self._original.batches:
            images = self._original.images[batch]
            inputs = received(original, [layer.module], images)
            if not self._apart:
                yield from ((old, None) for _, old in inputs)
                continue
            changed = received(small, [small.get_submodule(layer.name)], images)
            for (_, old), (_, new) in zip(inputs, changed, strict=True):
                yield new, _without_bias(layer, old - new)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale for each channel, damped where the scale is faint."""
    faint = FAINT * scale.square().mean().sqrt()
    return scale / (scale.square() + faint.square()).clamp_min(1e-30)


def _by_channel(layer: Layer, values: Tensor) -> Tensor:
    """Values (n,) as they go with the module's outputs: channels are the last dimension of a linear layer's."""
    return values if isinstance(layer.module, nn.Linear) else values.view(-1, 1, 1)


def _adds_to(values: Tensor, outputs: Tensor) -> bool:
    """Whether values go with the module's outputs as they are, which may themselves be one value for all places."""
    pairs = zip(reversed(values.shape), reversed(outputs.shape), strict=False)
    return values.ndim <= outputs.ndim and all(size in (1, whole) for size, whole in pairs)


def _without_bias(layer: Layer, inputs: Tensor) -> Tensor:
    """S W, as the module gives it: (B, ...)."""
    module = layer.module
    if isinstance(module, nn.Linear):
        return F.linear(inputs, module.weight)
    padded, how = _padded(module, inputs)
    return F.conv2d(padded, module.weight, None, *how)
