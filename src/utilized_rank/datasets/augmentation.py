"""Random changes of training images, in batches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .sections import Augmentation


def cropped(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Each image (N, C, H, W) moved by up to so many pixels each way, exactly; black comes in from outside."""
    count, _, height, width = images.shape
    around = F.pad(images, 4 * [pixels])
    down, across = torch.randint(0, 2 * pixels + 1, (2, count, 1), generator=generator)
    # Chosen by the processor's generator, whatever the device: the same for all of them.
    rows = (down + torch.arange(height)).to(images.device)  # (N, H)
    columns = (across + torch.arange(width)).to(images.device)  # (N, W)
    some = torch.arange(count, device=images.device).view(-1, 1, 1)
    # Indices on both sides of a slice put what they choose first: (N, H, W, C).
    return around[some, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def augment(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Each image of a normalised batch (N, C, H, W) under its own random change.

    One resampling does translation, rotation, scale and flip; then contrast and noise.
    """
    count = len(images)

    def draw(largest: float) -> Tensor:  # uniform in [-largest, largest], (N,)
        return ((torch.rand(count, generator=generator) * 2 - 1) * largest).to(images.device)

    angle, scale = draw(math.radians(how.rotate)), 1 + draw(how.scale)
    mirrored = torch.rand(count, generator=generator) < 0.5 if how.flip else torch.zeros(count, dtype=torch.bool)
    mirror = torch.where(mirrored, -1.0, 1.0).to(images.device)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cos * mirror, -sin, draw(2 * how.shift)], 1)]
    rows += [torch.stack([sin * mirror, cos, draw(2 * how.shift)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)  # (N, H, W, 2)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    if how.contrast:
        images = images * (1 + draw(how.contrast)).view(-1, 1, 1, 1)
    if how.noise:
        images = images + how.noise * torch.randn(images.shape, generator=generator).to(images.device)
    return images


def views(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Each uint8 image (N, C, H, W) cut, its colours changed, as views of contrastive learning are (Chen et al. 2020).

    Returns float32 from 0 to 255. Of one channel, brightness and contrast alone change.
    """
    import kornia.augmentation as changes  # a second to import, and few studies need it

    channels, *size = images.shape[1:]
    strong, hue = 0.8 * how.colour, 0.2 * how.colour
    steps: list[torch.nn.Module] = []
    if how.smallest_part < 1:
        scale = (how.smallest_part, 1.0)
        steps.append(changes.RandomResizedCrop((size[0], size[1]), scale, cropping_mode="resample", p=1.0))
    if how.colour:
        steps.append(changes.ColorJitter(strong, strong, strong, hue, p=0.8))
    if how.grey:
        steps.append(changes.RandomGrayscale(p=how.grey))
    # It draws from torch's own generator, which must not depend on what else was drawn.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        coloured = images.float().expand(-1, 3, -1, -1) / 255
        changed: Tensor = torch.nn.Sequential(*steps)(coloured)
    return 255 * changed[:, :channels]
