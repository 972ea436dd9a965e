"""The table of shared/reference/METHOD.md: a public ResNet-20 on CIFAR-10, end to end. Two minutes."""

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from utilized_rank.base.files import read_tensors
from utilized_rank.compression.decomposition import Decomposition
from utilized_rank.networks import cost
from utilized_rank.networks.evaluation import is_correct
from utilized_rank.ranks.layers import countable
from utilized_rank.ranks.moments import input_moments
from utilized_rank.ranks.projection import bases
from utilized_rank.ranks.subspaces import energy_rank
from utilized_rank.training import models
from utilized_rank.training.sections import Model

SHARED = Path(__file__).parents[2] / "shared"
CIFAR10 = SHARED / "datasets" / "cifar10"
CHECKPOINT = SHARED / "checkpoints" / "cifar10_resnet20.safetensors"
CALIBRATION, TEST = 2000, 5000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHECKPOINT.is_file() and (CIFAR10 / "test.webp").is_file()),
        reason=f"needs the public checkpoint and CIFAR-10 in {SHARED}",
    ),
]

# Energy: MLU, weights kept, accuracy (%) of P_S W P_T, of the optimum and of the SVD of W, and its spread.
TABLE = {
    0.99: (0.788, 0.920, {"projection": 85.1, "optimal": 90.4, "svd": 84.5}, 1.5),
    0.97: (0.651, 0.753, {"projection": 76.0, "optimal": 87.6, "svd": 68.0}, 4.0),
    0.95: (0.560, 0.645, {"projection": 45.3, "optimal": 62.7, "svd": 26.5}, 6.0),
}


def first_images(sheet: str, count: int) -> Tensor:
    """The first images of a sheet, normalised as the checkpoint was trained, (count, 3, 32, 32)."""
    spec = importlib.util.spec_from_file_location("unpack", CIFAR10 / "unpack.py")
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    pixels = torch.from_numpy(unpack.tiles(CIFAR10 / sheet)[:count].copy()).permute(0, 3, 1, 2)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    network = models.build(Model(architecture="resnet20"), (3, 32, 32), 10)
    kept_random = models.start_from(network, read_tensors(CHECKPOINT)[0])
    assert all(name.endswith("num_batches_tracked") for name in kept_random)
    return network.eval()


@pytest.fixture(scope="module")
def accuracy():
    """Of a network on the test images, in percent."""
    images = first_images("test.webp", TEST)
    labels = torch.tensor(json.loads((CIFAR10 / "labels.json").read_text())["test"][:TEST])
    return lambda network: 100 * float(is_correct(network, images, labels).mean())


@pytest.fixture(scope="module")
def decomposition(network) -> Decomposition:
    """At the ranks r = min(k_S(e), k_T(e)) of each energy threshold e, which stands in for the epsilon."""
    layers = countable(network).layers
    moments = input_moments(network, layers, first_images("train_1.webp", CALIBRATION).split(500))
    rows = []
    for layer in layers:
        s, t = bases(layer, moments[layer.name])
        for energy in TABLE:
            k_s, k_t = energy_rank(s.values, energy), energy_rank(t.values, energy)
            rows.append({"layer": layer.name, "epsilon": energy, "k_s": k_s, "k_t": k_t})
    return Decomposition(network, pd.DataFrame(rows), moments, first_images("test.webp", 1))


def test_the_unaltered_network_is_as_accurate_as_its_authors_say(network, accuracy):
    assert accuracy(network) == pytest.approx(91.64, abs=1)


@pytest.mark.parametrize("energy", TABLE)
def test_utilization_and_weights_kept(network, decomposition, energy):
    mlu, kept, _, _ = TABLE[energy]
    targets = decomposition.targets(energy)
    found = sum(target.rank / target.layer.width for target in targets) / len(targets)
    assert found == pytest.approx(mlu, abs=0.01)
    small = decomposition.build("svd", energy).network
    assert cost.parameters(small) / cost.parameters(network) == pytest.approx(kept, abs=0.01)


@pytest.mark.parametrize("energy", TABLE)
def test_accuracy_without_fine_tuning(decomposition, accuracy, energy):
    _, _, expected, spread = TABLE[energy]
    found = {method: accuracy(decomposition.build(method, energy).network) for method in expected}
    assert found == pytest.approx(expected, abs=spread)
    assert found["optimal"] > max(found["projection"], found["svd"])
