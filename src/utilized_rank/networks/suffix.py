"""Run a network from one of its layers on: what comes before the layer is computed once and kept.

The network is traced into a graph (torch.fx). What a layer's output can reach is its suffix; the
values that the suffix takes from elsewhere (the layer's input, a shortcut around it) are its frontier.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from inspect import signature
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from .batches import Batches
from .cost import flops_of
from .devices import device_of, free_memory, placed, truth
from .evaluation import logits_of

FEW = 4
"""Images that show whether a network can be run in parts."""
Values = tuple[Any, ...]
"""The values of some nodes of the graph, for one batch of images."""


class Traced:
    """A network as a graph, or as one opaque piece where it cannot be traced."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.graph: fx.Graph | None
        own = set(vars(network))
        try:
            self.graph = fx.Tracer().trace(network)
        except Exception:  # tracing runs the network's own code, which may raise anything on proxies
            self.graph = None
        # Tensors that the network's code makes are left on it by the tracer: they belong to the graph.
        self.constants = {name: vars(network).pop(name) for name in set(vars(network)) - own}

    def through(self, network: nn.Module) -> Traced:
        """The same graph through the modules of ``network``, which has some of its own under the same names."""
        other = copy.copy(self)
        other.network = network
        return other

    def attribute(self, node: fx.Node) -> Any:
        """What a node reads from the network, or from the graph's own constants."""
        name = str(node.target)
        return self.constants[name] if name in self.constants else attrgetter(name)(self.network)

    @property
    def traced(self) -> bool:
        """Whether layers can be run on their own."""
        return self.graph is not None

    def node(self, name: str) -> fx.Node | None:
        """The one call of module ``name``, or of the module around it that was not traced into."""
        if self.graph is None:
            return None
        calls = [n for n in self.graph.nodes if n.op == "call_module" and f"{name}.".startswith(f"{n.target}.")]
        read = [n for n in self.graph.nodes if n.op == "get_attr" and n.target.startswith(f"{name}.")]
        return calls[0] if len(calls) == 1 and not read else None

    def frontier(self, name: str) -> list[fx.Node] | None:
        """The nodes that the suffix of layer ``name`` takes its inputs from; None where it has no suffix.

        That is so where the network could not be traced, calls the layer more than once, or reads its
        weight without calling it.
        """
        node = self.node(name)
        if node is None:
            return None
        suffix = {node: None}
        for later in cast(fx.Graph, self.graph).nodes:
            if any(source in suffix for source in later.all_input_nodes):
                suffix[later] = None
        sources = (source for inside in suffix for source in inside.all_input_nodes)
        # Parameters that the graph reads directly stay in the suffix: they cost nothing to read.
        return list(dict.fromkeys(s for s in sources if s not in suffix and s.op != "get_attr"))

    def images(self) -> list[fx.Node]:
        """The nodes of the network's inputs."""
        return [n for n in cast(fx.Graph, self.graph).nodes if n.op == "placeholder"]

    def logits(self) -> fx.Node:
        """The node of the network's output."""
        given: Any = next(n for n in reversed(cast(fx.Graph, self.graph).nodes) if n.op == "output").args[0]
        while not isinstance(given, fx.Node):  # as `logits_of` has it
            given = next(iter(given.values() if isinstance(given, dict) else given))
        return given

    def arguments(self, batch: Any) -> Values:
        """A batch as the network's arguments in their order, those that it leaves out at their defaults."""
        named = signature(self.network.forward)
        if isinstance(batch, dict):
            bound = named.bind(**batch)
        else:
            bound = named.bind(*batch) if isinstance(batch, tuple | list) else named.bind(batch)
        bound.apply_defaults()
        return bound.args

    def between(self, sources: Sequence[fx.Node], targets: Sequence[fx.Node]) -> fx.GraphModule:
        """A function from the values of ``sources`` to those of ``targets``, by the network's own modules.

        It computes no node that lies behind the sources.
        """
        needed: set[fx.Node] = set()
        open_nodes = [t for t in targets if t not in sources]
        while open_nodes:
            node = open_nodes.pop()
            if node not in needed:
                needed.add(node)
                open_nodes += [n for n in node.all_input_nodes if n not in sources]
        graph = fx.Graph()
        copies = {node: graph.placeholder(f"source_{i}") for i, node in enumerate(sources)}
        for node in cast(fx.Graph, self.graph).nodes:
            if node in needed:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
        graph.output(tuple(copies[t] for t in targets))
        vars(self.network).update(self.constants)  # where the module looks for them, and takes them from
        try:
            return fx.GraphModule(self.network, graph)
        finally:
            for name in self.constants:
                del vars(self.network)[name]


class Suffix:
    """Runs batches of images through a network from one layer on.

    Args:
        traced: the network.
        images: all inputs of the network, (N, ...).
        batches: which of them each batch has, int64 (B,).
        budget: bytes of the processor's memory that the kept values may take, beside what is free on the network's
            device; batches over it are computed from the images.
    """

    def __init__(self, traced: Traced, images: Batches, batches: Sequence[Tensor], budget: int) -> None:
        self.traced = traced
        self.device = device_of(traced.network)
        self.images = images
        self.batches = batches
        self.budget = budget
        self.sources: list[fx.Node] = []
        self.kept: list[Values | None] = [None] * len(batches)
        self.run: Callable[..., Values] | None = None

    @torch.inference_mode()
    def move_to(self, name: str) -> None:
        """Make layer ``name`` the one from which :meth:`logits` runs, its weights being the unaltered ones.

        What was kept for an earlier layer is carried forward to this one.
        """
        frontier = self.traced.frontier(name)
        if frontier is None:
            self._keep_nothing()
            return
        images = self.traced.images()
        forward = self.traced.between([*self.sources, *images], frontier)
        from_images = self.traced.between(images, frontier)
        placeholders = [node for node in forward.graph.nodes if node.op == "placeholder"]
        reads_images = any(node.users for node in placeholders[len(self.sources) :])
        own, left = free_memory(self.device), self.budget
        for i, values in enumerate(self.kept):
            self.kept[i] = None
            if own > 0 or left > 0:
                if values is None:
                    moved = from_images(*self._batch(i))
                else:
                    beside = self._batch(i) if reads_images else (None,) * len(images)
                    moved = forward(*self._here(values), *beside)
                size = sum(v.nbytes for v in moved if isinstance(v, Tensor))
                if own >= size:
                    own -= size
                    self.kept[i] = moved
                else:
                    own, left = 0, left - size
                    self.kept[i] = tree_map_only(Tensor, Tensor.cpu, moved) if left >= 0 else None
        self.sources = frontier
        self.run = self.traced.between(frontier, [self.traced.logits()])
        self.__dict__.pop("share", None)
        if not self._repeats(from_images):
            self._keep_nothing()

    @cached_property
    def share(self) -> float:
        """FLOPs of running from the layer on, over those of the whole network: a mean over the batches."""
        values = self.kept[0]
        if self.run is None or values is None:
            return 1.0
        kept = sum(value is not None for value in self.kept) / len(self.kept)
        from_here = flops_of(self.run, *self._here(values)) / max(1, flops_of(self.traced.network, *self._first))
        return 1 - kept + kept * from_here

    def reader(self, nodes: Sequence[fx.Node]) -> Callable[[int], Values]:
        """From a batch's index to the values of ``nodes``, none of which lies behind the layer."""
        onward = self.traced.between(self.sources, nodes)
        from_images = self.traced.between(self.traced.images(), nodes)

        def values(index: int) -> Values:
            kept = self.kept[index]
            return cast(Values, from_images(*self._batch(index)) if kept is None else onward(*self._here(kept)))

        return values

    @cached_property
    def _first(self) -> Values:
        return self._batch(0)

    def _batch(self, index: int) -> Values:
        """The network's arguments, as the graph takes them."""
        batch = placed(self.images[self.batches[index]], self.traced.network)
        return tuple(map(_channels_last, self.traced.arguments(batch)))

    def _here(self, values: Values) -> Values:
        """What was kept, on the network's device."""
        return tree_map_only(Tensor, lambda v: v.to(self.device, non_blocking=True), values)

    def _keep_nothing(self) -> None:
        self.sources, self.kept, self.run = [], [None] * len(self.batches), None
        self.__dict__.pop("share", None)

    def _repeats(self, from_images: fx.GraphModule) -> bool:
        """Whether running gives what the network gives, and leaves what was kept as it is: seen on a few images.

        An operation in place could spoil it.
        """
        few = tree_map_only(Tensor, lambda v: v[:FEW], self._first)
        values = from_images(*few)
        before = [v.clone() for v in values if isinstance(v, Tensor)]
        logits = cast(Callable[..., Values], self.run)(*values)[0]
        expected = logits_of(self.traced.network(*few))
        same = truth(torch.isclose(logits, expected, rtol=1e-4, atol=1e-4).all())
        after = [v for v in values if isinstance(v, Tensor)]
        return same and all(truth((old == new).all()) for old, new in zip(before, after, strict=True))

    def logits(self, index: int) -> Tensor:
        """The network's output for batch ``index``, (B, classes)."""
        values = self.kept[index]
        if self.run is None or values is None:
            return logits_of(self.traced.network(*self._batch(index)))
        return cast(Tensor, self.run(*self._here(values))[0])


def _channels_last(value: Any) -> Any:
    """Images in the memory format in which convolutions are fastest."""
    if isinstance(value, Tensor) and value.ndim == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value
