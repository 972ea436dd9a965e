"""Layers that pad by themselves or compute their weight, as plain ones that are called with what is really multiplied.

TensorFlow's padding, standardised and normalised weights, weights that are stored transposed: each is a module with
a forward of its own around one convolution or matrix product. What is passed to that product is watched, and a plain
layer with that weight takes the module's place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from . import exchange
from .hooks import held
from .modules import SamePad, Sides, same_around
from .products import Amounts, Product, Watch

WEIGHTED = (nn.Linear, nn.Conv2d)
AGREE = 1e-5
"""How far outputs may lie apart, over the largest of them: of a layer, in float32."""
SCALE = -8.0
"""Inputs that a module is tried on beside its own are these times larger: what is not linear shows."""
NOTHING = "multiplies its input by nothing"


@dataclass(frozen=True)
class Run:
    """A module on one input, and the product inside."""

    inputs: Tensor
    outputs: Tensor
    product: Product


class Stays(Exception):
    """Why a module is not replaced."""


@torch.no_grad()
def plain(network: nn.Module, batch: Any) -> dict[str, str]:
    """Turn every layer that pads by itself or computes its weight into a plain one that is called, where that can be.

    That is: linear layers and two-dimensional convolutions with a forward of their own or a weight that is no
    parameter (normalised, parametrized, pruned), and modules without parts whose one matrix is multiplied by their
    input. One with zeros around its input that no convolution has of its own becomes two modules, and the layer is
    the second, ``conv``. Each is replaced only if it was called with one tensor, multiplies it once, by the same weight
    for different inputs, and the plain layer then gives its outputs; all together only if the network then gives
    its own. One whose parameters are another's, too, stays. On the meta device, where there are no values, what is
    called decides alone.

    Depthwise convolutions are among them: torch.fx cannot trace through what asks for the size of an image. The inside
    of ``nn.MultiheadAttention`` is not: see :func:`utilized_rank.networks.attention.explicit`, which goes before.

    Args:
        network: changed in place. It computes the same in evaluation; trained on, the weights themselves are learned.
        batch: an example of what it is called with, on its device: ``network(x)``, ``network(*x)`` of a tuple,
            ``network(**x)`` of a dict.

    Returns:
        Why those that could be meant stay as they are, by name.
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        # Some networks draw at random in evaluation, too.
        with exchange.undisturbed(network):
            candidates = {name: module for name, module in network.named_modules() if name and _is_meant(module)}
            for name in _inside(network, (nn.MultiheadAttention, ParametrizationList)):
                candidates.pop(name, None)
            if not candidates:
                return {}
            expected, inputs = _called(network, batch, list(candidates.values()))
            made, stay = _layers(candidates, inputs)
            for name, shared in exchange.shared(network, candidates).items():
                if made.pop(candidates[name], None) is not None:
                    stay[name] = _reason(candidates[name], f"its weight is also that of {', '.join(shared)}")
            for old, new in made.items():
                new.train(modes[old])
            refused = exchange.put_where_same(network, made, batch, expected)
    finally:
        for module, mode in modes.items():
            module.training = mode
    names = {module: name for name, module in candidates.items()}
    return stay | {names[old]: _reason(old, "the network does something else with it than call it") for old in refused}


def _is_meant(module: nn.Module) -> bool:
    if isinstance(module, WEIGHTED):
        is_own = type(module).forward not in (nn.Linear.forward, nn.Conv2d.forward)
        return is_own or "weight" not in module._parameters
    matrices = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 2]
    return len(matrices) == 1 and not any(module.children())


def _inside(network: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[str]:
    for name, module in network.named_modules():
        if isinstance(module, kinds):
            yield from (f"{name}.{part}" if name else part for part, _ in module.named_modules() if part)


def _reason(module: nn.Module, why: object) -> str:
    return f"{type(module).__name__}: {why}"


def _called(network: nn.Module, batch: Any, modules: list[nn.Module]) -> tuple[Any, dict[nn.Module, Tensor | None]]:
    """What the network gives, and what each module is first called with; None where that is not one tensor."""
    seen: dict[nn.Module, Tensor | None] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_one = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        if not is_one:
            seen[module] = None
        elif module not in seen:
            seen[module] = args[0].clone()  # the network may change it in place later on

    with held(module.register_forward_pre_hook(look, with_kwargs=True) for module in modules):
        return exchange.run(network, batch), seen


def _layers(
    candidates: dict[str, nn.Module], inputs: dict[nn.Module, Tensor | None]
) -> tuple[dict[nn.Module, nn.Module], dict[str, str]]:
    """The layers in place of modules, and why the others stay."""
    made: dict[nn.Module, nn.Module] = {}
    stay: dict[str, str] = {}
    for name, module in candidates.items():
        if any(module in old.modules() for old in made):
            continue
        try:
            made[module] = _layer(module, inputs)
        except Stays as why:
            if isinstance(module, WEIGHTED) or str(why) != NOTHING:
                stay[name] = _reason(module, why)
    return made, stay


def _layer(module: nn.Module, inputs: dict[nn.Module, Tensor | None]) -> nn.Module:
    """The plain layer that gives what ``module`` does.

    Raises:
        Stays: there is none.
    """
    if module not in inputs:
        raise Stays("is not called" if isinstance(module, WEIGHTED) else NOTHING)
    x = inputs[module]
    if x is None:
        raise Stays("is called with something else than one tensor")
    first = _watched(module, x)
    runs = [first, *(_watched(module, other) for other in _others(first))]
    if not all(exchange.same(first.product.weight, run.product.weight, AGREE) for run in runs):
        raise Stays("its weight depends on its input")
    layer = _linear(module, first.product) if first.product.how is None else _convolution(module, runs)
    for run in runs:
        if not exchange.same(layer(run.inputs), run.outputs, AGREE):
            raise Stays("computes something beside its product")
    return layer


def _watched(module: nn.Module, x: Tensor) -> Run:
    """Run a module alone.

    Raises:
        Stays: it does not multiply its input once.
    """
    try:
        with Watch() as seen:
            outputs = module(x)
    except Exception as error:  # the module's own code, which may refuse what the network does not give it
        raise Stays(f"refuses an input ({error})") from error
    if not seen.products:
        raise Stays(NOTHING)
    if len(seen.products) > 1:
        raise Stays(f"multiplies {len(seen.products)} times")
    product = seen.products[0]
    if product.weight.ndim != (2 if product.how is None else 4) or not isinstance(outputs, Tensor):
        raise Stays("multiplies by something else than one matrix")
    if not _is_of(product, x):
        raise Stays("multiplies something else than its input")
    return Run(x, outputs, product)


def _is_of(product: Product, x: Tensor) -> bool:
    """Whether it may be ``x`` that is multiplied, as far as shapes tell."""
    if product.how is None:
        return x.ndim > 0 and product.inputs.shape[-1] == x.shape[-1] and product.inputs.numel() == x.numel()
    return x.shape == (product.inputs if product.padding is None else product.padding.inputs).shape


def _others(run: Run) -> list[Tensor]:
    """Other inputs: of every size that a padding could depend on, larger so that none is too small."""
    x = run.inputs * SCALE
    if run.product.how is None:
        return [x]
    return [F.pad(x, (0, more, 0, more), "replicate") for more in range(1, max(2, *run.product.how["stride"]))]


def _convolution(module: nn.Module, runs: list[Run]) -> nn.Module:
    """The convolution inside, with its padding if it can have it, or else after that.

    Raises:
        Stays: no known rule pads so.
    """
    product = runs[0].product
    weight, how = product.weight, dict(cast(dict[str, Any], product.how))
    if any(run.product.how != how for run in runs):
        raise Stays("is another convolution at another size")
    kernel = (weight.shape[2], weight.shape[3])
    kind, around = _padding(runs)
    pad: nn.Module | None = None
    if _can_be_own(around, how["padding"], kind):
        left, _, top, _ = around[0]
        how["padding"] = tuple(own + more for own, more in zip(how["padding"], (top, left), strict=True))
    elif any(map(any, around)):
        if kind != "zeros":
            raise Stays("pads with something else than zeros")
        pad, kind = _pad(runs, around, SamePad(kernel, how["stride"], how["dilation"])), "zeros"
    channels = weight.shape[1] * how["groups"]
    conv = nn.Conv2d(channels, len(weight), kernel, **how, padding_mode=cast(Any, kind), device="meta")
    _fill(conv, module, product)
    return conv if pad is None else nn.Sequential(OrderedDict(pad=pad, conv=conv))


def _padding(runs: list[Run]) -> tuple[str, list[Amounts]]:
    """With what an input is padded, one kind or ``other``, and by how much at each size."""
    paddings = [run.product.padding for run in runs]
    kinds = {padding.kind for padding in paddings if padding is not None and any(padding.amounts)} or {"zeros"}
    around = [(0, 0, 0, 0) if padding is None else padding.around for padding in paddings]
    return kinds.pop() if len(kinds) == 1 else "other", around


def _can_be_own(around: list[Amounts], own: Sides | str, kind: str) -> bool:
    """Whether a convolution that pads by ``own`` can do the rest by itself: as much on both sides, at every size."""
    left, right, top, bottom = around[0]
    is_even = left == right >= 0 and top == bottom >= 0 and len({*around}) == 1
    return is_even and not isinstance(own, str) and (kind == "zeros" or (kind != "other" and not any(own)))


def _pad(runs: list[Run], around: list[Amounts], same: SamePad) -> nn.Module:
    if len({*around}) == 1:
        return nn.ZeroPad2d(around[0])
    for run, amounts in zip(runs, around, strict=True):
        size = (run.inputs.shape[-2], run.inputs.shape[-1])
        if same_around(size, same.kernel, same.stride, same.dilation) != amounts:
            raise Stays("pads by a rule of its own")
    return same


def _linear(module: nn.Module, product: Product) -> nn.Linear:
    n, m = product.weight.shape
    linear = nn.Linear(m, n, device="meta")
    _fill(linear, module, product)
    return linear


def _fill(layer: nn.Linear | nn.Conv2d, module: nn.Module, product: Product) -> None:
    """Give ``layer`` a copy of the weight and bias that ``module`` multiplied by and added."""
    weight, bias = product.weight, product.bias
    if bias is None:  # it may be added afterwards: the outputs tell
        bias = cast(Tensor | None, getattr(module, "bias", None))
    if bias is not None and bias.numel() != len(weight):
        raise Stays("adds something else than a bias")
    # A weight that is computed has lost the memory format of the one that is stored.
    like = next((stored for stored in module.parameters() if stored.shape == weight.shape), weight.contiguous())
    is_learned = any(parameter.requires_grad for parameter in module.parameters())
    layer.weight = nn.Parameter(torch.empty_like(like, dtype=weight.dtype).copy_(weight), is_learned)
    layer.bias = None if bias is None else nn.Parameter(bias.detach().reshape(-1).clone(), is_learned)
