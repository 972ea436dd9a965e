"""Run a network from one of its layers on: what comes before the layer is computed once and kept.

The network is traced into a graph (torch.fx). What a layer's output can reach is its suffix; the
values that the suffix takes from elsewhere (the layer's input, a shortcut around it) are its frontier.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .batches import Batches
from .cost import flops_of
from .devices import device_of, free_memory, placed, truth
from .evaluation import logits_of

FEW = 4
"""Images that show whether a network can be run in parts."""
Values = tuple[Any, ...]
"""The values of some nodes of the graph, for one batch of images."""


@dataclass(frozen=True)
class Step:
    """One node of a graph, to be computed after others."""

    node: fx.Node
    compute: Callable[..., Any]
    done: list[fx.Node]
    """What no later step reads."""

    def take(self, known: dict[fx.Node, Any]) -> None:
        """Compute the node from the values that are known."""
        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), known.__getitem__)
        known[self.node] = self.compute(*args, **kwargs)


class Part:
    """Some nodes of a graph as a function, from the values of ``sources`` to those of ``targets``.

    The nodes are interpreted one by one: to generate code for them, as torch.fx would, takes longer than a layer.
    """

    def __init__(self, traced: Traced, sources: Sequence[fx.Node], targets: Sequence[fx.Node]) -> None:
        self._traced, self.sources, self.targets = traced, sources, targets

    @cached_property
    def nodes(self) -> list[fx.Node]:
        """Those that are computed, in the graph's order: none that lies behind the sources."""
        needed: set[fx.Node] = set()
        open_nodes = [t for t in self.targets if t not in self.sources]
        while open_nodes:
            node = open_nodes.pop()
            if node not in needed:
                needed.add(node)
                open_nodes += [n for n in node.all_input_nodes if n not in self.sources]
        return [node for node in cast(fx.Graph, self._traced.graph).nodes if node in needed]

    @cached_property
    def steps(self) -> list[Step]:
        """The same with what computes them."""
        last = {source: node for node in self.nodes for source in node.all_input_nodes}
        done: dict[fx.Node, list[fx.Node]] = {node: [] for node in self.nodes}
        for source, node in last.items():
            if source not in self.targets:
                done[node].append(source)
        return [Step(node, self._traced.computing(node), done[node]) for node in self.nodes]

    def reads(self, nodes: Sequence[fx.Node]) -> bool:
        """Whether the value of any of ``nodes`` is needed."""
        return any(n in nodes for n in self.targets) or any(n in nodes for m in self.nodes for n in m.all_input_nodes)

    def __call__(self, *values: Any) -> Values:
        """The values of ``targets`` from those of ``sources``."""
        known = dict(zip(self.sources, values, strict=True))
        for step in self.steps:
            step.take(known)
            for node in step.done:
                del known[node]
        return tuple(known[target] for target in self.targets)


@dataclass(frozen=True)
class Write:
    """A node that changes in place what others made."""

    node: fx.Node
    changed: frozenset[fx.Node]
    """Those whose values lie in the memory that it changes."""

    @property
    def alone(self) -> bool:
        """Whether nothing else reads what it changes, so that the order does not matter; no parameter is changed."""
        readers = {user for node in self.changed for user in node.users}
        return readers <= {self.node, *self.changed} and not any(node.op == "get_attr" for node in self.changed)


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

    def suffix(self, name: str) -> list[fx.Node] | None:
        """All nodes that the output of layer ``name`` can reach, itself first; None where it has no suffix.

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
        return list(suffix)

    def frontier(self, suffix: list[fx.Node]) -> list[fx.Node]:
        """The nodes that a suffix takes its inputs from."""
        inside = set(suffix)
        sources = dict.fromkeys(source for node in suffix for source in node.all_input_nodes)
        # Parameters that the graph reads directly stay in the suffix: they cost nothing to read.
        return [source for source in sources if source not in inside and source.op != "get_attr"]

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

    def between(self, sources: Sequence[fx.Node], targets: Sequence[fx.Node]) -> Part:
        """A function from the values of ``sources`` to those of ``targets``, by the network's own modules.

        It computes no node that lies behind the sources.
        """
        return Part(self, sources, targets)

    def computing(self, node: fx.Node) -> Callable[..., Any]:
        """What computes a node from its arguments."""
        if node.op == "call_module":
            return self.network.get_submodule(str(node.target))
        if node.op == "get_attr":
            return lambda: self.attribute(node)
        if node.op == "call_method":
            return lambda its, *args, **kwargs: getattr(its, str(node.target))(*args, **kwargs)
        return cast(Callable[..., Any], node.target)

    def watched(self, arguments: Values) -> tuple[Tensor, list[Write]]:
        """The network's output by the graph, and what is changed in place on the way there.

        Args:
            arguments: a batch, which may be changed too; not made in inference mode, where changes leave no trace.
        """
        part = self.between(self.images(), [self.logits()])
        known = dict(zip(part.sources, arguments, strict=True))
        alike = {node: {node} for node in known}  # nodes whose values lie in the same memory
        writes = []
        for step in part.steps:
            inputs = step.node.all_input_nodes
            versions = [_version(known[node]) for node in inputs]
            step.take(known)
            changed = [n for n, version in zip(inputs, versions, strict=True) if _version(known[n]) != version]
            if changed:
                writes.append(Write(step.node, frozenset().union(*(alike[n] for n in changed))))
            memory = _memory(known[step.node])
            together = {step.node}.union(*(alike[n] for n in inputs if memory & _memory(known[n])))
            alike.update(dict.fromkeys(together, together))
            for node in step.done:
                del known[node]
        return known[self.logits()], writes


def _version(value: Any) -> int:
    """A number that grows whenever the tensors of a value are changed in place."""
    return sum(v._version for v in tree_leaves(value) if isinstance(v, Tensor) and not v.is_inference())


def _memory(value: Any) -> set[int]:
    """Where the tensors of a value lie."""
    tensors = (v for v in tree_leaves(value) if isinstance(v, Tensor) and v.layout == torch.strided)
    return {v.untyped_storage()._cdata for v in tensors}


class Room:
    """What is left of the memory that values may be kept in: the device's own first, then the processor's."""

    def __init__(self, device: torch.device, budget: int) -> None:
        self._own, self._left = free_memory(device), budget

    @property
    def full(self) -> bool:
        """Whether nothing more can be kept."""
        return self._own <= 0 and self._left <= 0

    def keep(self, values: Values) -> Values | None:
        """The same values where they are kept; None where there is no room for them."""
        if self.full:
            return None
        size = sum(v.nbytes for v in values if isinstance(v, Tensor))
        if self._own >= size:
            self._own -= size
            return values
        self._own, self._left = 0, self._left - size
        return tree_map_only(Tensor, Tensor.cpu, values) if self._left >= 0 else None


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
        self.run: Part | None = None
        self._room = Room(self.device, budget)

    @torch.inference_mode()
    def move_to(self, name: str) -> None:
        """Make layer ``name`` the one from which :meth:`logits` runs, its weights being the unaltered ones.

        What was kept for an earlier layer is carried forward to this one.
        """
        for _ in self.flow(name) or ():
            if self._room.full:
                break

    @torch.inference_mode()
    def flow(self, name: str) -> Iterator[Values] | None:
        """The same, batch by batch as they are asked for, with the values of :attr:`sources`; None without a suffix.

        Each is computed once, and kept while there is room; batches that are not asked for are not kept.
        """
        suffix, earlier, kept = self.traced.suffix(name), self.sources, self.kept
        self.sources, self.kept, self.run = [], [None] * len(kept), None
        self.__dict__.pop("share", None)
        if suffix is None or not self._sound(suffix):
            return None
        self.sources = self.traced.frontier(suffix)
        self.run = self.traced.between(self.sources, [self.traced.logits()])
        self._room = Room(self.device, self.budget)
        return self._carried(earlier, kept)

    @torch.inference_mode()
    def _carried(self, earlier: list[fx.Node], kept: list[Values | None]) -> Iterator[Values]:
        """What was kept of the nodes ``earlier``, carried forward; it is let go of as it is."""
        images = self.traced.images()
        beside = [node for node in images if node not in earlier]
        forward, from_images = (self.traced.between(s, self.sources) for s in ([*earlier, *beside], images))
        reads_images = forward.reads(beside)
        for i, values in enumerate(kept):
            kept[i] = None
            if values is None:
                moved = from_images(*self._batch(i))
            else:
                batch = dict(zip(images, self._batch(i), strict=True)) if reads_images else dict.fromkeys(images)
                moved = forward(*self._here(values), *(batch[node] for node in beside))
            self.kept[i] = self._room.keep(moved)
            yield moved

    def value(self, node: fx.Node, values: Values) -> Any:
        """That of a node that the suffix reads: one of ``values``, those of :attr:`sources`, or a parameter."""
        return values[self.sources.index(node)] if node in self.sources else self.traced.attribute(node)

    def start_from(self, other: Suffix) -> None:
        """Take over what another suffix keeps, of a network that is the same up to there."""
        self.sources, self.kept = other.sources, list(other.kept)

    @cached_property
    def share(self) -> float:
        """FLOPs of running from the layer on, over those of the whole network: a mean over the batches."""
        if self.run is None or self.kept[0] is None:
            return 1.0
        kept = sum(value is not None for value in self.kept) / len(self.kept)
        whole, each = self._flops
        return 1 - kept + kept * sum(each[node] for node in self.run.nodes) / max(1, whole)

    @cached_property
    def _flops(self) -> tuple[int, dict[fx.Node, int]]:
        """FLOPs of the whole network for the first batch, and of each node that its output needs."""
        part = self.traced.between(self.traced.images(), [self.traced.logits()])
        known, each = dict(zip(part.sources, self._batch(0), strict=True)), {}
        for step in part.steps:
            each[step.node] = flops_of(step.take, known)
            for node in step.done:
                del known[node]
        return flops_of(self.traced.network, *self._batch(0)), each

    def _batch(self, index: int) -> Values:
        """The network's arguments, as the graph takes them."""
        return self._arguments(self.batches[index])

    def _arguments(self, which: Tensor) -> Values:
        batch = placed(self.images[which], self.traced.network)
        return tuple(map(_channels_last, self.traced.arguments(batch)))

    def _here(self, values: Values) -> Values:
        """What was kept, on the network's device."""
        return tree_map_only(Tensor, lambda v: v.to(self.device, non_blocking=True), values)

    def _sound(self, suffix: list[fx.Node]) -> bool:
        """Whether running from the layer on gives what the network gives, and leaves what was kept as it is.

        An operation in place could spoil it. Where all of them change what nothing else reads, the nodes can be run
        in any order, and may but leave the frontier alone; elsewhere it is tried.
        """
        if self._writes is None:
            return self._repeats(self.traced.frontier(suffix))
        inside = set(suffix)
        return all(write.node not in inside or write.changed <= inside for write in self._writes)

    @cached_property
    def _writes(self) -> list[Write] | None:
        """What is changed in place.

        None where the graph does not give what the network does, or anything else reads what is changed.
        """
        with torch.inference_mode(False), torch.no_grad():
            one, other = (tree_map_only(Tensor, torch.clone, self._few()) for _ in range(2))
            logits, writes = self.traced.watched(one)
            same = _close(logits, logits_of(self.traced.network(*other)))
        return writes if same and all(write.alone for write in writes) else None

    def _few(self) -> Values:
        return self._arguments(self.batches[0][:FEW])

    def _repeats(self, frontier: list[fx.Node]) -> bool:
        """Whether running in two parts gives what the network gives, and changes no value between: on a few images."""
        values = self.traced.between(self.traced.images(), frontier)(*self._few())
        before = [v.clone() for v in values if isinstance(v, Tensor)]
        (logits,) = self.traced.between(frontier, [self.traced.logits()])(*values)
        after = [v for v in values if isinstance(v, Tensor)]
        unchanged = all(truth((old == new).all()) for old, new in zip(before, after, strict=True))
        return unchanged and _close(logits, logits_of(self.traced.network(*self._few())))

    def logits(self, index: int) -> Tensor:
        """The network's output for batch ``index``, (B, classes)."""
        values = self.kept[index]
        if self.run is None or values is None:
            return logits_of(self.traced.network(*self._batch(index)))
        return cast(Tensor, self.run(*self._here(values))[0])


def _close(logits: Tensor, expected: Tensor) -> bool:
    return truth(torch.isclose(logits, expected, rtol=1e-4, atol=1e-4).all())


def _channels_last(value: Any) -> Any:
    """Images in the memory format in which convolutions are fastest."""
    if isinstance(value, Tensor) and value.ndim == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


@torch.no_grad()
def same_network(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks are of the same modules with the same weights."""
    kinds, others = ([(name, type(m)) for name, m in its.named_modules()] for its in (one, other))
    if kinds != others:
        return False
    mine, its = ([*network.parameters(), *network.buffers()] for network in (one, other))
    return len(mine) == len(its) and all(
        a.shape == b.shape and truth((a == b).all()) for a, b in zip(mine, its, strict=True)
    )
