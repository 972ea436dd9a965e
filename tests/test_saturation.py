"""Layer saturation (Shenk et al. 2019, arXiv 1907.08589) as its authors' own package computes it."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import utilized_rank as ur

delve = pytest.importorskip("delve", reason="Delve computes layer saturation")
writers = pytest.importorskip("delve.writers", reason="Delve computes layer saturation")

ENERGY = 0.99


class Kept(writers.AbstractWriter):
    """What Delve finds stays here: it writes no file."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def resume_from_saved_state(self, initial_epoch: int) -> None: ...
    def save(self) -> None: ...
    def close(self) -> None: ...

    def add_scalar(self, name: str, value: float, **kwargs: object) -> None:
        self.values[name] = value

    def add_scalars(self, prefix: str, value_dict: dict[str, float], **kwargs: object) -> None:
        self.values |= value_dict


class Residual(nn.Module):
    """Convolutions with a stride, with a shortcut around two of them, and batch norms between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.one = nn.Conv2d(16, 24, 3, padding=1)
        self.two = nn.Conv2d(24, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 32, 2, stride=2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.two(self.one(x).relu())).relu()
        return self.head(self.down(x).relu().mean((2, 3)))


def perceptron() -> nn.Module:
    widths = [64, 48, 32, 24]
    layers = [part for m, n in pairwise(widths) for part in (nn.Linear(m, n), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(24, 10))


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


@pytest.fixture(params=[perceptron, Residual], ids=["MLP", "residual CNN"])
def trained(request, digits) -> nn.Module:
    torch.manual_seed(0)
    network = request.param()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(12):
        for images, labels in zip(*(part[:1200].split(100) for part in digits), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        assert (network(digits[0][1200:]).argmax(1) == digits[1][1200:]).float().mean() > 0.7
    return network


def by_delve(network: nn.Module, images: Tensor, folder: str) -> dict[str, tuple[float, int]]:
    """Saturation and intrinsic dimensionality of each layer; every position of a convolution is a sample.

    Delve 0.1.50 begins anew with every batch, so all images are one.
    """
    network, kept = copy.deepcopy(network), Kept()  # Delve leaves hooks and attributes behind
    tracker = delve.SaturationTracker(
        folder,
        kept,
        network,
        stats=["lsat", "idim"],
        conv_method="channelwise",
        sat_threshold=ENERGY,
        device="cpu",
    )
    with torch.no_grad():
        network(images)
    tracker.add_saturations()
    found = kept.values
    return {
        name: (found[f"eval-saturation_{name}"], found[f"eval-intrinsic-dimensionality_{name}"])
        for name in tracker.layers
    }


def test_the_centred_output_ranks_over_n_are_the_layer_saturation_that_delve_finds(trained, digits, tmp_path):
    """Delve counts the dimensions below the threshold, and one more only where those are more than 0.02 short of it."""
    images = digits[0][1200:]
    theirs = by_delve(trained, images, str(tmp_path))
    found = ur.measure(trained, calibration=images, energy=ENERGY, centred=True, rows=None)
    assert list(found.layers.layer) == list(theirs)
    for row in found.layers.itertuples():
        saturation, dimensions = theirs[row.layer]
        assert dimensions in (row.k_t - 1, row.k_t)
        assert abs(row.k_t / row.n - saturation) <= 1 / row.n + 1e-9
    assert (found.layers.k_t < found.layers.n).sum() >= 3
    assert (found.layers.k_t > 2).all()


def test_of_values_that_are_not_centred_the_mean_is_one_more_direction_that_delve_leaves_out(digits, tmp_path):
    """A mean far from zero holds nearly all of the variance about zero: one dimension, whatever the deviations."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 48, bias=False), nn.Linear(48, 32, bias=False)).eval()
    inputs = digits[0].flatten(1) + 10
    theirs = by_delve(network, inputs, str(tmp_path))
    values, deviations = (
        ur.measure(network, calibration=inputs, energy=ENERGY, centred=centred, rows=None).layers.set_index("layer").k_t
        for centred in (False, True)
    )
    for name, (_, dimensions) in theirs.items():
        assert values[name] == 1
        assert dimensions in (deviations[name] - 1, deviations[name])
        assert dimensions > 5
