"""Convolutions and products with a matrix as they are called, with what was padded for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .modules import Sides

Amounts = tuple[int, int, int, int]
"""Pixels of padding: left, right, top, bottom (they may be negative)."""


@dataclass(frozen=True)
class Padding:
    """A call of ``torch.nn.functional.pad``."""

    inputs: Tensor
    amounts: Sequence[int]
    mode: str = "constant"
    value: float | None = None
    outputs: Tensor | None = None

    @property
    def around(self) -> Amounts:
        """The amounts of the image's sides."""
        left, right, top, bottom = [*self.amounts, 0, 0, 0, 0][:4]
        return left, right, top, bottom

    @property
    def kind(self) -> str:
        """A ``padding_mode`` of a convolution, or ``other``."""
        if any(self.amounts[4:]) or self.value:
            return "other"
        return "zeros" if self.mode == "constant" else self.mode


@dataclass(frozen=True)
class Product:
    """A convolution or a product with a matrix, as it was called."""

    inputs: Tensor
    weight: Tensor
    """As layers store it, (n, m) or (n, C, k_h, k_w)."""
    bias: Tensor | None = None
    how: dict[str, Any] | None = None
    """Stride, padding, dilation and groups of a convolution."""
    padding: Padding | None = None
    """What made the inputs."""


def _sides(value: int | Sequence[int]) -> Sides:
    down, across = (value, value) if isinstance(value, int) else [*value, *value][:2]
    return down, across


def _convolved(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Product:
    amounts = padding if isinstance(padding, str) else _sides(padding)
    how = {"stride": _sides(stride), "padding": amounts, "dilation": _sides(dilation), "groups": groups}
    return Product(input, weight, bias, how)


def _projected(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Product:
    return Product(input, weight, bias)


def _added(input: Tensor, mat1: Tensor, mat2: Tensor, **_: float) -> Product:
    return Product(mat1, _transposed(mat2), input)


def _multiplied(input: Tensor, *other: Tensor, **named: Tensor) -> Product:
    return Product(input, _transposed((*other, *named.values())[0]))


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.ndim > 1 else matrix


PRODUCTS: dict[Callable[..., Any], Callable[..., Product]] = {
    F.conv2d: _convolved,
    F.linear: _projected,
    torch.addmm: _added,
    Tensor.addmm: _added,
    **dict.fromkeys((torch.mm, torch.matmul, Tensor.mm, Tensor.matmul, Tensor.__matmul__), _multiplied),
}
"""What is watched, and how its arguments are read."""


class Watch(TorchFunctionMode):
    """Takes down every product that is called, and what was padded for it."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []
        self.paddings: list[Padding] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call it."""
        outputs = func(*args, **(kwargs or {}))
        if func is F.pad:
            self.paddings.append(Padding(*args, **{**(kwargs or {}), "outputs": outputs}))
        elif func in PRODUCTS:
            product = PRODUCTS[func](*args, **(kwargs or {}))
            made = next((padding for padding in self.paddings if padding.outputs is product.inputs), None)
            self.products.append(Product(product.inputs, product.weight, product.bias, product.how, made))
        return outputs
