"""The images that a command works on, and what is written beside its numbers."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..base.runtime import device_name
from ..datasets.data import Dataset
from ..datasets.folders import of_folder
from ..datasets.sections import Data
from .models import Preparation

SEED = 0


def images(
    folder: Path, how: Preparation, device: torch.device, *, train: int | None, held_out: int, halves: bool
) -> Dataset:
    """The images of a folder, on a device; arguments as of :func:`utilized_rank.datasets.folders.of_folder`."""
    sizes: dict[str, Any] = {"image_size": how.side, "crop": how.crop, "interpolation": how.interpolation}
    data = Data(source="folder", dataset=str(folder), **sizes)
    its = of_folder(data, list(how.mean), list(how.std), train=train, held_out=held_out, halves=halves, seed=SEED)
    return its.on(device)


def provenance(
    model: str, checkpoint: Path | None, folder: Path, how: Preparation, device: torch.device
) -> dict[str, Any]:
    """What a number came from."""
    return {
        "model": model,
        "checkpoint": None if checkpoint is None else checkpoint.name,
        "data": folder.name,
        "images": vars(how),
        "seed": SEED,
        "device": device.type if device.type == "cpu" else f"{device.type} ({device_name(device)})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("utilized-rank", "torch")},
    }
