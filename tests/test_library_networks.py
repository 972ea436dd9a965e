"""Networks of timm and torchvision from an image folder to a decomposed network on disk."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from running import COLOURS, EACH, picture
from torch import nn

from utilized_rank.base.files import write_network
from utilized_rank.compression.decomposition import Decomposition
from utilized_rank.datasets import prepare
from utilized_rank.datasets.data import Dataset
from utilized_rank.datasets.images import Files, Split, array
from utilized_rank.datasets.sections import Data
from utilized_rank.networks import cost
from utilized_rank.networks.evaluation import is_correct, outputs
from utilized_rank.stages import decompose, frontier, measure
from utilized_rank.study.sections import Frontier, Measure, Policy
from utilized_rank.training import loop as training
from utilized_rank.training import models
from utilized_rank.training.sections import Finetune, Model, Recipe, Train

TRAIN = {
    "linear": Train(method="linear", epochs=10, lr=0.01, batch_size=12),
    "supervised": Train(epochs=12, lr=3e-3, batch_size=12),  # random batch norms tell a frozen encoder nothing
}
TUNE = Recipe(epochs=1, lr=1e-3, batch_size=12)
# One image of the 12 in the search split is 8.3 points.
MEASURE = Measure(calibration_images=36, epsilons=[0.0, 25.0], precision="float32", memory=512)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A project with a folder of three classes of 20 images, each a plain colour under noise, of a size of its own."""
    root, draw = tmp_path_factory.mktemp("project"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        folder = root / "fruit" / "train" / name
        folder.mkdir(parents=True)
        for i in range(EACH):
            image = picture(colour, draw.integers(50, 130, 2), draw)
            image.save(folder / (f"{i}.jpg" if i % 2 else f"{i}.png"))
    return root


def prepared(root: Path, side: int) -> Dataset:
    data = Data(source="folder", dataset="fruit", image_size=side, search=0.2, test=0.2, workers=0)
    return prepare.build(data, 0, root)[0]


@dataclass
class Case:
    """A network, and how many of its layers count."""

    name: str
    side: int
    layers: int
    blocks: int | None = None
    qkv: str = "fused"
    train: str = "linear"
    criterion: str = "rank"

    def __str__(self) -> str:
        return f"{self.name}-{self.side}-{self.qkv}"


def vit(name: str, side: int, qkv: str = "fused", criterion: str = "rank") -> Case:
    """Two blocks between the patches and the classifier."""
    return Case(name, side, 1 + 2 * (4 if qkv == "fused" else 6) + 1, 2, qkv, criterion=criterion)


QUICK = [
    vit("timm/vit_tiny_patch16_224", 64),
    vit("timm/vit_tiny_patch16_224", 80, "split"),
    Case("timm/test_resnet", 72, 16, train="supervised"),
]
SLOW = [
    vit("torchvision/vit_b_16", 64),
    vit("torchvision/vit_b_16", 80, "split", "utilized"),
    vit("timm/vit_base_patch16_224", 80, "split", "utilized"),
    vit("torchvision/vit_l_16", 48, "fused", "utilized"),
    Case("torchvision/resnet50", 64, 54, train="supervised", criterion="utilized"),
]
CASES = [*QUICK, *(pytest.param(case, marks=pytest.mark.large) for case in SLOW)]


def named(case: Case) -> str:
    return str(case)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_librarys_network_is_measured_decomposed_tuned_and_reloaded(case, root, tmp_path):
    dataset = prepared(root, case.side)
    assert isinstance(dataset.splits["train"].images, Files) == (case.side > 64)
    model = Model(architecture=case.name, blocks=case.blocks)
    network, trained = given(case, model, dataset, tmp_path)
    inputs = dataset.inputs("test")
    torch.testing.assert_close(outputs(network, inputs), outputs(trained, inputs), rtol=1e-3, atol=1e-3)
    assert is_correct(network, inputs, dataset.labels("test")).mean() > 0.9

    how = MEASURE.model_copy(update={"qkv": case.qkv, "criterion": case.criterion})
    found = measure.measure(network, dataset, how)
    assert_counted(found, case)

    whole = Decomposition(network, found.layers, found.moments, inputs[:1])
    built = whole.build("optimal", 25.0)
    assert built.forms
    assert cost.parameters(built.network) < cost.parameters(network)
    assert cost.flops(built.network, inputs[:1]) < cost.flops(network, inputs[:1])
    before = {name: tensor.clone() for name, tensor in built.network.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    curve = training.train_supervised(built.network, dataset, TUNE, generator, "float32", "tuned")
    assert np.isfinite(curve.loss).all()
    pairs = [f"{name}.{i}.weight" for name in built.forms for i in (0, 1)]
    assert not any(torch.equal(built.network.state_dict()[pair], before[pair]) for pair in pairs)

    decompose.save(built, tmp_path / "small.safetensors")
    loaded = decompose.load(network, tmp_path / "small.safetensors")
    assert torch.equal(outputs(loaded, inputs), outputs(built.network, inputs))
    own = built.network.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.state_dict().items())


def given(case: Case, model: Model, dataset: Dataset, folder: Path) -> tuple[nn.Module, nn.Module]:
    """A trained network: as it is measured, from the disk, and as it was made."""
    torch.manual_seed(0)
    trained, how = models.build(model, dataset.shape, len(dataset.classes)), TRAIN[case.train]
    for method in (how.method, "as_given"):
        training.METHODS[method](trained, dataset, how, torch.Generator().manual_seed(0), "float32", case.name)
    write_network(folder / "network.safetensors", trained)
    return models.load(folder / "network.safetensors", model, dataset.shape, len(dataset.classes), case.qkv), trained


def assert_counted(found: measure.Measurement, case: Case) -> None:
    """Every layer has a rank at each tolerance, no more than its width, and none is left out."""
    table = found.layers
    assert table.layer.nunique() == case.layers
    assert len(table) == case.layers * len(MEASURE.epsilons)
    assert not found.left_out
    width = table[["m", "n"]].min(axis=1)
    assert table.r.between(1, width).all()
    assert table.utilization.between(0, 1, inclusive="right").all()
    looser = table.pivot(index="layer", columns="epsilon", values="r")
    assert looser[25.0].mean() <= looser[0.0].mean()


def test_images_that_stay_files_give_the_ranks_and_the_weights_that_they_give_as_an_array(root, tmp_path):
    files = prepared(root, 72)
    held = {name: Split(array(split.images), split.labels) for name, split in files.splits.items()}
    results = []
    for i, dataset in enumerate((files, dataclasses.replace(files, splits=held))):
        (folder := tmp_path / str(i)).mkdir()
        case = Case("timm/test_resnet", 72, 16)
        network, _ = given(case, Model(architecture=case.name), dataset, folder)
        results.append((network.state_dict(), measure.measure(network, dataset, MEASURE).layers))
    (weights, ranks), (same_weights, same_ranks) = results
    assert all(torch.equal(tensor, same_weights[name]) for name, tensor in weights.items())
    pd.testing.assert_frame_equal(ranks, same_ranks)


FAMILIES = {
    "reads weights that were replaced": ("edgenext_xx_small", {}, 64),
    "reads weights that were replaced, too": ("xcit_nano_12_p8_224", {"img_size": 32, "depth": 2}, 32),
    "makes tensors while it runs": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 56, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
        56,
    ),
}


@pytest.mark.parametrize(("name", "how", "side"), FAMILIES.values(), ids=FAMILIES)
def test_a_family_with_code_of_its_own_goes_through_measuring_and_compression(name, how, side):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=4, **how).eval()
    pixels = torch.randint(0, 256, (16, 3, side, side), generator=torch.Generator().manual_seed(0)).byte()
    split = Split(pixels, torch.arange(16) % 4)
    dataset = Dataset(dict.fromkeys(["train", "search", "test"], split), list("abcd"), [0.5] * 3, [0.3] * 3)
    measured = measure.measure(network, dataset, Measure(calibration_images=16, epsilons=[50.0], criterion="energy"))
    half = Policy(budget={"params": 0.7})
    asked = Frontier(
        methods=["compensated"], ranks=[half], losses="energy", images=16, finetune=Finetune(epochs=1, lr=1e-3)
    )
    compression = frontier.compression(network, measured.moments, dataset, asked, 512)
    choices = frontier.choices(compression, half, measured.layers)
    small = compression.build("compensated", choices)
    assert len(choices) > 5
    assert cost.parameters(small.network) <= 0.7 * cost.parameters(network)
    assert torch.isfinite(outputs(small.network, dataset.inputs("test"))).all()
