"""The network of the guide's examples: three convolutions and a linear layer, on scikit-learn's 8 x 8 digits."""

from __future__ import annotations

from collections import OrderedDict
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

Part = tuple[Tensor, Tensor]


def digits() -> tuple[Part, Part, Part]:
    """Images (N, 1, 8, 8) in [0, 1] and labels (N,), to train on, to search on, and to test on."""
    pixels, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    images = (pixels.float() / 16).reshape(-1, 1, 8, 8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, search, test = order.split([997, 400, 400])
    return (images[train], labels[train]), (images[search], labels[search]), (images[test], labels[test])


def untrained() -> nn.Sequential:
    """The network, with random weights."""
    torch.manual_seed(0)
    parts = {
        "conv1": nn.Conv2d(1, 32, 3, padding=1),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(32, 64, 3, padding=1),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "conv3": nn.Conv2d(64, 64, 3, padding=1),
        "relu3": nn.ReLU(),
        "pool3": nn.AdaptiveAvgPool2d(2),
        "flat": nn.Flatten(),
        "head": nn.Linear(256, 10),
    }
    return nn.Sequential(OrderedDict(parts))


def train(network: nn.Module, epochs: int, lr: float = 3e-3) -> nn.Module:
    """Train a network in place, by AdamW; it is in evaluation mode afterwards."""
    (images, labels), _, _ = digits()
    optimizer = torch.optim.AdamW(network.train().parameters(), lr)
    torch.manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    return network.eval()


@cache
def trained() -> nn.Module:
    """The network, trained for eight epochs: seconds."""
    return train(untrained(), 8)


def of_photos() -> nn.Module:
    """The same for images of three channels, as the command line reads them."""
    grey = nn.Conv2d(3, 1, 1, bias=False)
    nn.init.constant_(grey.weight, 1 / 3)
    return nn.Sequential(grey, trained()).eval()


@torch.inference_mode()
def accuracy(network: nn.Module, part: Part) -> float:
    """In percent."""
    images, labels = part
    return 100 * (network(images).argmax(1) == labels).double().mean().item()
