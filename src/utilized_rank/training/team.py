"""Processes that train one network together, each on its part of every batch; one process is a team of its own.

Whoever starts several of them makes torch's process group; nothing else here asks how. Gradients are averaged over the
parts, which are of one size, so that a batch and a learning rate mean what they mean in one process. Batch norm sees a
part alone on processors, and the whole batch on GPUs (torch synchronises it there alone).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..base.sections import StudyError

Loss = Callable[[Tensor, Tensor], Tensor]
"""From a batch of training images as they are kept, and their labels, int64 (B,), to its mean loss, a scalar."""

Result = TypeVar("Result")


class Together(Protocol):
    """Starts a team."""

    def __call__(self, work: Callable[[], Result], batch_size: int) -> Result:
        """What a training gives in the first process: every one does the same work.

        Args:
            work: draws from this process's random numbers, and changes nothing here where others do it.
            batch_size: of the training, which a team has to divide.
        """


def alone(work: Callable[[], Result], batch_size: int) -> Result:
    """A :class:`Together` of this process."""
    return work()


def size() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which one this is: the first, 0, keeps what others read."""
    return dist.get_rank() if size() > 1 else 0


def parts(batches: Iterable[Tensor], batch_size: int) -> list[Tensor]:
    """What of each batch is this process's.

    Raises:
        StudyError: they cannot be of one size.
    """
    if batch_size % size():
        raise StudyError(f"a batch of {batch_size} images has no equal parts for {size()} processes")
    return [batch[rank() :: size()] for batch in batches]


def agreed(values: Tensor) -> Tensor:
    """The values of the first."""
    if size() > 1:
        there = values.to(_device())
        dist.broadcast(there, 0)
        values = there.to(values.device)
    return values


def mean(value: Tensor) -> Tensor:
    """Of the values of all."""
    if size() > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= size()
    return value


def set_apart(generator: torch.Generator) -> None:
    """Give every process but the first random numbers of its own: images change in each its own way."""
    if rank():
        seed = int(torch.randint(2**62, (), generator=generator)) + rank()
        generator.manual_seed(seed)
        torch.manual_seed(seed)


def in_step(loss: Loss, modules: nn.ModuleList) -> Loss:
    """The loss, after whose backward pass all processes have the same gradients.

    Args:
        loss: of a part of a batch.
        modules: all that it calls; those that are trained begin with the weights of the first process.
    """
    if size() == 1:
        return loss
    if _device().type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(modules)
    # Static: that some weights have no gradient (self-supervision ignores the classifier) is found out once.
    return DistributedDataParallel(_Step(loss, modules), static_graph=True)


class _Step(nn.Module):
    """A loss as a module: what averages gradients knows parameters by their module."""

    def __init__(self, loss: Loss, modules: nn.ModuleList) -> None:
        super().__init__()
        self.loss, self.trained = loss, modules

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.loss(images, labels)


def _device() -> torch.device:
    """Where tensors lie that processes exchange."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
