"""Self-supervised pre-training: SimCLR (Chen et al. 2020), loss and projection head from lightly."""

from __future__ import annotations

import pandas as pd
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor, nn

from .config import Precision, Pretrained
from .data import Dataset, augment
from .models import classifier, read_checkpoint
from .training import fit


def initial_weights(
    network: nn.Module, dataset: Dataset, recipe: Pretrained, generator: torch.Generator, precision: Precision
) -> tuple[dict[str, Tensor], pd.DataFrame]:
    """The tensors that a run starts from, and the curve of making them (empty for a checkpoint).

    Raises:
        StudyError: the checkpoint is missing, or is another file.
    """
    if recipe.file is not None and recipe.sha256 is not None:
        return read_checkpoint(recipe.file, recipe.sha256), pd.DataFrame(columns=["epoch", "lr", "loss"])
    return pretrain_simclr(network, dataset, recipe, generator, precision)


class Encoder(nn.Module):
    """A network up to its features: what flows into its classifier, (N, C, H, W) to (N, D)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._features: list[Tensor] = []
        hook = classifier(network).register_forward_pre_hook
        self.hook = hook(lambda _, args: self._features.append(args[0]))

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to features (N, D)."""
        self.network(images)
        return self._features.pop()


def pretrain_simclr(
    network: nn.Module, dataset: Dataset, recipe: Pretrained, generator: torch.Generator, precision: Precision
) -> tuple[dict[str, Tensor], pd.DataFrame]:
    """Train ``network`` to give two augmentations of one image like features, without labels.

    Returns the tensors of the encoder (all but the classifier's) and the curve.
    """
    images = dataset.splits["train"].images
    head = classifier(network)
    projection = SimCLRProjectionHead(head.in_features, head.in_features, recipe.projection_dim)
    encoder, contrast = Encoder(network), NTXentLoss(recipe.temperature)

    def view(batch: Tensor) -> Tensor:
        return augment(dataset.normalised(images[batch]), recipe.augmentation, generator)

    def loss(batch: Tensor) -> Tensor:
        network.train()
        both = projection(encoder(torch.cat([view(batch), view(batch)])))  # (2 B, projection_dim)
        first, second = both.float().chunk(2)
        return contrast(first, second)

    own = {id(p) for p in head.parameters()}
    trained = [p for p in network.parameters() if id(p) not in own] + list(projection.parameters())
    try:
        curve = fit(trained, loss, len(images), recipe, generator, precision, title="SimCLR")
    finally:
        encoder.hook.remove()
    names = {name for name, module in network.named_modules() if module is head}
    kept = {k: v for k, v in network.state_dict().items() if k.rpartition(".")[0] not in names}
    return kept, curve
