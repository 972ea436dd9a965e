"""What is measured: CIFAR-10 and a public ResNet-20 where they lie beside the project, else digits."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from utilized_rank.base.files import write_network
from utilized_rank.datasets import prepare
from utilized_rank.datasets.data import Dataset
from utilized_rank.datasets.images import Split
from utilized_rank.datasets.sections import Augmentation, Data
from utilized_rank.training import loop as training
from utilized_rank.training import models
from utilized_rank.training.sections import Model, Recipe

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
CIFAR10 = SHARED / "datasets" / "cifar10"
CHECKPOINT = SHARED / "checkpoints" / "cifar10_resnet20.safetensors"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
"""That the public ResNet-20 was trained with."""
SEED, THREADS, CALIBRATION = 0, 2, 2000

NETWORKS = {
    "ResNet-20": Model(architecture="resnet20"),
    "VGG11": Model(architecture="vgg11"),
    "ViT": Model(architecture="vit", dim=96, depth=6, heads=3, patch_size=8),
}
DEEPER = {"ResNet-44": Model(architecture="resnet44")}
"""Public ones that only their ranks are looked at of."""
PUBLIC = {"ResNet-20": CHECKPOINT, "ResNet-44": SHARED / "checkpoints" / "resnet44-014dd654.th"}
"""Weights, trained on CIFAR-10."""
EPOCHS = {"cifar10": {"VGG11": 2, "ViT": 6}, "digits": {"ResNet-20": 6, "VGG11": 3, "ViT": 40}}
"""Trained here, briefly: what is measured is time, but at ranks like those of a real network."""


@dataclass(frozen=True)
class Setting:
    """One data set, and a network of each kind for it."""

    name: str
    dataset: Dataset

    def network(self, name: str) -> nn.Module:
        """The network of this name in evaluation mode: public, or trained here and kept for the next time."""
        model, shape, classes = (NETWORKS | DEEPER)[name], self.dataset.shape, len(self.dataset.classes)
        epochs = EPOCHS[self.name].get(name)
        if epochs is None:
            network = models.build(model, shape, classes)
            models.start_from(network, models.tensors_of(PUBLIC[name]))
            return network.eval()
        path = ROOT / "data" / "benchmarks" / f"{self.name}-{model.architecture}-{epochs}.safetensors"
        if not path.is_file():
            network = models.build(model, shape, classes)
            recipe = Recipe(epochs=epochs, lr=2e-3, augmentation=Augmentation(shift=0.1))
            generator = torch.Generator().manual_seed(SEED)
            training.train_supervised(network, self.dataset, recipe, generator, "auto", name)
            write_network(path, network)
        return models.load(path, model, shape, classes)

    def public(self) -> list[str]:
        """The public networks whose weights are there."""
        return [name for name, path in PUBLIC.items() if path.is_file()]

    def search(self, count: int) -> tuple[Tensor, Tensor]:
        """Images and labels to search on; beyond the split's own number they come again, mirrored."""
        inputs, labels = self.dataset.inputs("search")[:], self.dataset.labels("search")
        if count > len(labels):
            inputs, labels = torch.cat([inputs, inputs.flip(3)]), torch.cat([labels, labels])
        return inputs[:count].contiguous(memory_format=torch.channels_last), labels[:count]

    def sizes(self) -> list[int]:
        """Numbers of search images: 5,000, 10,000 and 20,000, or as near as the data set comes."""
        whole_split = len(self.dataset.splits["search"])
        return [whole_split // 2, whole_split, 2 * whole_split]

    def calibration(self) -> Tensor:
        """Images for second moments, (N, C, H, W)."""
        return self.dataset.inputs("train")[:CALIBRATION].contiguous(memory_format=torch.channels_last)


def setting() -> Setting:
    """What is there, with threads and seeds fixed."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    if CHECKPOINT.is_file() and (CIFAR10 / "test.webp").is_file():
        return Setting("cifar10", _cifar10())
    return digits()


def digits() -> Setting:
    """Scikit-learn's digits, which are always there."""
    data = Data(source="sklearn", dataset="digits", image_size=32, search=0.3, test=0.1)
    return Setting("digits", prepare.build(data, SEED, ROOT)[0])


def cases(here: Setting, *small: str) -> Iterator[tuple[str, Setting]]:
    """Networks, each with its data: the public ones where they lie, and those of some names on digits."""
    if here.name == "cifar10":
        yield from ((name, here) for name in here.public())
    its = here if here.name == "digits" else digits()
    yield from ((name, its) for name in small)


def _cifar10() -> Dataset:
    """The 50,000 training images, and the 10,000 test images as search split: nothing here is a result on them."""
    spec = importlib.util.spec_from_file_location("unpack", CIFAR10 / "unpack.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(CIFAR10 / "unpack.py")
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    labels = json.loads((CIFAR10 / "labels.json").read_text())

    def split(name: str) -> Split:
        images = np.concatenate([unpack.tiles(CIFAR10 / sheet) for sheet in unpack.SHEETS[name]])
        return Split(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels[name]))

    return Dataset({"train": split("train"), "search": split("test")}, labels["classes"], MEAN, STD)
