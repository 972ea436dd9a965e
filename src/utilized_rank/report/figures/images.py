"""What the images look like."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure


def samples(images: np.ndarray, titles: list[str]) -> Figure:
    """A row of images, uint8 (N, C, H, W) with one or three channels, each under its title."""
    figure, grid = plt.subplots(1, len(images), figsize=(0.95 * len(images), 1.3), squeeze=False)
    for axes, image, title in zip(grid[0], images, titles, strict=True):
        axes.imshow(image.transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(title, fontsize=10, loc="center")
        axes.set_axis_off()
    return figure
