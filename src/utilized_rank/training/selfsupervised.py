"""Self-supervised pre-training: SimCLR (Chen et al. 2020) and MAE (He et al. 2022), with lightly's parts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from lightly.models import utils
from lightly.models.modules import (
    MaskedVisionTransformerDecoderTIMM,
    MaskedVisionTransformerTIMM,
    SimCLRProjectionHead,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..base.journal import NOTHING_KEPT, Journal
from ..base.sections import StudyError
from ..datasets.data import Dataset
from ..networks.precision import Precision
from . import team
from .loop import fit
from .models import classifier, published, read_checkpoint
from .sections import Pretrained
from .team import Together


def initial_weights(
    network: nn.Module,
    dataset: Dataset,
    recipe: Pretrained,
    generator: torch.Generator,
    precision: Precision,
    root: Path,
    journal: Journal = NOTHING_KEPT,
    together: Together = team.alone,
) -> tuple[dict[str, Tensor], pd.DataFrame]:
    """The tensors that a run starts from, and the curve of making them (empty where they are given).

    Args:
        network: of that architecture; trained where weights are made here.
        dataset: what it is trained on.
        recipe: how weights are made, or where they are.
        generator: of random numbers.
        precision: of the arithmetic.
        root: that the path of a given file is relative to.
        journal: where it goes on after an interruption.
        together: starts the processes that make them.

    Raises:
        StudyError: given weights cannot be had, or the network has no tokens to mask.
    """
    uncurved = pd.DataFrame(columns=["epoch", "lr", "loss"])
    if recipe.file is not None and recipe.sha256 is not None:
        return read_checkpoint(root / recipe.file, recipe.sha256, recipe.url), uncurved
    if recipe.method == "published":
        return published(recipe.model, recipe.weights, dataset.shape, len(dataset.classes)), uncurved
    return together(partial(_made, network, dataset, recipe, generator, precision, journal), recipe.batch_size)


def _made(
    network: nn.Module, dataset: Dataset, recipe: Pretrained, *how: Any
) -> tuple[dict[str, Tensor], pd.DataFrame]:
    curve = {"simclr": pretrain_simclr, "mae": pretrain_mae}[recipe.method](network, dataset, recipe, *how)
    return encoder_tensors(network), curve


def encoder_tensors(network: nn.Module) -> dict[str, Tensor]:
    """All tensors but the classifier's."""
    head = classifier(network)
    names = {name for name, module in network.named_modules() if module is head}
    return {k: v for k, v in network.state_dict().items() if k.rpartition(".")[0] not in names}


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
    network: nn.Module,
    dataset: Dataset,
    recipe: Pretrained,
    generator: torch.Generator,
    precision: Precision,
    journal: Journal = NOTHING_KEPT,
) -> pd.DataFrame:
    """Train ``network`` to give two augmentations of one image like features, without labels; returns the curve."""
    head = classifier(network)
    projection = SimCLRProjectionHead(head.in_features, head.in_features, recipe.projection_dim).to(head.weight.device)
    encoder, contrast = Encoder(network), NTXentLoss(recipe.temperature, gather_distributed=True)

    def view(images: Tensor) -> Tensor:
        return dataset.augmented(images, recipe.augmentation, generator)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        network.train()
        both = projection(encoder(torch.cat([view(images), view(images)])))  # (2 B, projection_dim)
        first, second = both.float().chunk(2)
        return contrast(first, second)

    own = {id(p) for p in head.parameters()}
    trained = [p for p in network.parameters() if id(p) not in own] + list(projection.parameters())
    try:
        train, whole = dataset.splits["train"], [network, projection]
        return fit(trained, loss, train, recipe, generator, precision, title="SimCLR", modules=whole, journal=journal)
    finally:
        encoder.hook.remove()


def pretrain_mae(
    network: nn.Module,
    dataset: Dataset,
    recipe: Pretrained,
    generator: torch.Generator,
    precision: Precision,
    journal: Journal = NOTHING_KEPT,
) -> pd.DataFrame:
    """Train ``network``, one of timm's vision transformers, so that hidden patches follow from those it sees.

    The loss is the mean squared error of the hidden patches' pixels, each patch normalised by its own mean and
    variance (He et al. 2022, section 4.1). Returns the curve.

    Raises:
        StudyError: the network has no square patches, or ``mask_ratio`` hides all of them.
    """
    vit = cast(Any, network)
    if not isinstance(network, VisionTransformer) or vit.num_prefix_tokens != 1:
        raise StudyError(
            f"MAE hides patches of a vision transformer with one class token, as timm builds it; "
            f"{type(network).__name__} is none"
        )
    (side, _), width = vit.patch_embed.patch_size, vit.embed_dim
    encoder = MaskedVisionTransformerTIMM(vit, weight_initialization="skip", pos_embed_initialization="skip")
    patches = vit.patch_embed.num_patches
    if int(patches * (1 - recipe.mask_ratio)) == 0:
        raise StudyError(
            f"mask_ratio {recipe.mask_ratio:g} hides all of {patches} patches: lower it, or cut more patches"
        )
    heads = vit.blocks[0].attn.num_heads
    decoder = nn.ModuleDict(
        {
            "embed": nn.Linear(width, width),
            "tokens": MaskedVisionTransformerDecoderTIMM(
                patches, width, recipe.decoder_depth, heads, vit.num_prefix_tokens
            ),
            "pixels": nn.Linear(width, side**2 * dataset.shape[0]),
        }
    ).to(dataset.device)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        network.train()
        changed = dataset.augmented(images, recipe.augmentation, generator)
        size = (len(images), encoder.sequence_length)
        seen, hidden = utils.random_token_mask(size, recipe.mask_ratio, device=dataset.device)
        tokens = decoder["embed"](encoder.encode(changed, idx_keep=seen))
        full = utils.repeat_token(decoder["tokens"].mask_token, size)
        full = utils.set_at_index(full, seen, tokens.type_as(full))
        guessed = decoder["pixels"](utils.get_at_index(decoder["tokens"](full), hidden))
        pixels = utils.get_at_index(utils.patchify(changed, side), hidden - vit.num_prefix_tokens)
        return F.mse_loss(guessed.float(), utils.normalize_mean_var(pixels))

    own = {id(p) for p in classifier(network).parameters()}
    trained = [p for p in network.parameters() if id(p) not in own] + list(decoder.parameters())
    train, whole = dataset.splits["train"], [encoder, decoder]
    return fit(trained, loss, train, recipe, generator, precision, title="MAE", modules=whole, journal=journal)
