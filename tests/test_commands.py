"""The command line for networks of one's own: what it prints and writes, and how it refuses."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torchvision
from running import COLOURS, done, files, picture, refused, typed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import utilized_rank as ur
from utilized_rank.base.files import read_table
from utilized_rank.commands import compressing, folder, measuring
from utilized_rank.commands.models import IMAGENET, Preparation, named
from utilized_rank.datasets.folders import of_folder
from utilized_rank.datasets.sections import Data
from utilized_rank.ranks import measure as ranks
from utilized_rank.training import models
from utilized_rank.training.sections import Model

TRAIN, TEST = 16, 12
BICUBIC = {"interpolation": "bicubic"}
NETS = """
import torch
from torch import nn

def small():
    first = [nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU()]
    last = [nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3)]
    return nn.Sequential(*first, *last)

def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))

def maps():
    return nn.Conv2d(3, 3, 3)

def broken():
    network = small()
    nn.init.constant_(network[3].weight, float("nan"))
    return network

def dead():
    network = small()
    nn.init.constant_(network[5].bias, -1e9)
    return network

class Undecided(nn.Sequential):
    def forward(self, x):
        return super().forward(x if float(x.sum().detach()) > -1e9 else -x)

def undecided():
    return Undecided(*small())

def nothing():
    raise RuntimeError("no such thing\\nfor two reasons")
"""
SMALL = ("nets:small", "--checkpoint", "small.pth", "--data", "data", "--image-size", 32)
ONNX = ["--onnx"] if all(map(find_spec, ("onnxruntime", "onnxscript"))) else []
RESNET = ("resnet20", "--checkpoint", "resnet20.th", "--data", "data")


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Few images need no processes that decode them, and no test asks how long a network takes."""
    whole = compressing.cost.latencies
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressing.cost, "latencies", lambda networks, some, _: whole(networks, some, 0.02))
        patch.setenv("UTILIZED_RANK_DEVICE", "cpu")
        patch.setattr(folder, "Data", partial(Data, workers=0))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Images of three colours in train/ and test/, and two networks that were trained on them for some seconds."""
    place, draw = tmp_path_factory.mktemp("place"), np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("test", TEST)):
        for name, colour in COLOURS.items():
            (place / "data" / part / name).mkdir(parents=True)
            for i in range(count):
                image = picture(colour + draw.normal(0, 60, 3), (40, 36), draw)
                image.save(place / "data" / part / name / f"{i}.png")
    (place / "nets.py").write_text(NETS)
    held: dict = {}
    exec(NETS, held)
    inputs, labels, _, _ = prepared(place)
    for name, make in (
        ("small.pth", held["small"]),
        ("resnet20.th", lambda: models.build(Model(architecture="resnet20"), (3, 32, 32), 3)),
    ):
        torch.manual_seed(0)
        network = trained(make(), inputs, labels)
        tensors = {f"module.{key}": its for key, its in network.state_dict().items() if "num_batches" not in key}
        torch.save({"state_dict": tensors, "best_prec1": 9.0}, place / name)
    return place


def prepared(place: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels, of train/ and of test/, at 32 pixels."""
    data = Data(source="folder", dataset=str(place / "data"), image_size=32, workers=0)
    its = of_folder(data, *map(list, IMAGENET), train=None, held_out=999, halves=False)
    return its.inputs("train")[:], its.labels("train"), its.inputs("test")[:], its.labels("test")


def trained(network: nn.Module, inputs: Tensor, labels: Tensor) -> nn.Module:
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for _ in range(6):
        for rows in torch.randperm(len(inputs)).split(16):
            loss = nn.functional.cross_entropy(network(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def network_of(place: Path, name: str = "small.pth") -> nn.Module:
    held: dict = {}
    exec(NETS, held)
    network = held["small"]() if name == "small.pth" else models.build(Model(architecture="resnet20"), (3, 32, 32), 3)
    network.load_state_dict(models.tensors_of(place / name), strict=False)
    return network.eval()


# Measure


@pytest.mark.parametrize("how", [{"energy": 0.99}, {"energy": 0.9}, {"epsilon": 5.0}], ids=str)
def test_measure_finds_what_the_library_finds_and_writes_it(place, call, tmp_path, how):
    train, _, test, labels = prepared(place)
    network = network_of(place)
    expected = ur.measure(network, (test, labels), train, **how)
    ((option, value),) = how.items()
    asked = [] if value == 0.99 else [f"--{option}", value]  # 0.99 of the variance goes without saying
    out = done(call("measure", *SMALL, *asked, "--out", tmp_path / "out"))
    assert repr(expected) in out
    assert f"written: {tmp_path / 'out'}" in out
    assert files(tmp_path) == {"out", *(f"out/utilization.{kind}" for kind in ("json", "csv", "svg"))}
    table = read_table(tmp_path / "out" / "utilization.csv")
    pd.testing.assert_frame_equal(table, expected.layers, check_dtype=False)
    record = json.loads((tmp_path / "out" / "utilization.json").read_text())
    assert record["mlu"] == pytest.approx(table.utilization.mean(), abs=1e-9)
    assert record["mlu"] == expected.mlu
    assert record[option] == value
    assert [row["layer"] for row in record["layers"]] == list(table.layer)
    with torch.inference_mode():
        spectrum = torch.linalg.svdvals(network[:-1](train).double())
    shares = spectrum / spectrum.sum()
    rank_me = math.exp(-sum(share * math.log(share) for share in shares.tolist() if share > 0))
    assert record["rank_me"] == pytest.approx(rank_me, rel=1e-3)
    assert f"RankMe of the features: {rank_me:.1f}" in out
    assert "<svg" in (tmp_path / "out" / "utilization.svg").read_text()


def test_a_measured_number_says_what_it_came_from(call, tmp_path):
    done(call("measure", *SMALL, "--images", 9, "--out", tmp_path / "deep" / "out"))
    record = json.loads((tmp_path / "deep" / "out" / "utilization.json").read_text())
    origin = record["provenance"]
    assert record["calibration"] == 9
    assert (origin["model"], origin["checkpoint"], origin["data"]) == ("nets:small", "small.pth", "data")
    assert origin["images"] == {"side": 32, "crop": 1.0, "mean": list(IMAGENET[0]), "std": list(IMAGENET[1])} | {
        "interpolation": "bicubic"
    }
    assert origin["versions"]["torch"] == version("torch")
    assert origin["device"] == "cpu"


def test_without_out_a_published_checkpoint_is_measured_and_nothing_written(place, call):
    """Names begin with ``module.``, and batches are not counted, as in the ResNets that are published for CIFAR."""
    before = files(place)
    out = done(call("measure", *RESNET))
    assert len(re.findall(r"^ *(?:layer|conv|linear).*%$", out, re.MULTILINE)) == 20
    assert re.search(r"^MLU \d+\.\d%, at 0\.99 of the variance of 48 inputs$", out, re.MULTILINE)
    assert files(place) == before


LIBRARY = {
    "timm/test_resnet": lambda classes: timm.create_model("test_resnet", num_classes=classes),
    "timm/test_vit": lambda classes: timm.create_model("test_vit", num_classes=classes, img_size=64),
    "torchvision/shufflenet_v2_x0_5": lambda classes: torchvision.models.shufflenet_v2_x0_5(num_classes=classes),
}


@pytest.mark.parametrize("classes", [3, 1000])
@pytest.mark.parametrize("name", LIBRARY)
def test_a_librarys_network_takes_a_checkpoint_of_as_many_classes_as_that_has(call, tmp_path, name, classes):
    torch.manual_seed(0)
    network = LIBRARY[name](classes).eval()
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    its = ("measure", name, "--checkpoint", tmp_path / "a.safetensors", "--data", "data", "--image-size", 64)
    assert "MLU " in done(call(*its, "--images", 4, "--energy", 0.9))
    with_labels = call(*its, "--images", 4, "--held-out", 4, "--epsilon", 100)
    if classes == 3:
        assert "within 100 points of" in done(with_labels)
    else:
        told = rf"{name} tells 1000 classes apart, and data has 3 directories: give --checkpoint"
        assert re.match(told, refused(with_labels))


def test_a_network_without_a_linear_layer_takes_a_checkpoint(call, tmp_path):
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "a.pth")
    its = ("--checkpoint", tmp_path / "a.pth", "--data", "data", "--image-size", 32, "--images", 2)
    out = done(call("measure", "torchvision/squeezenet1_1", *its))
    assert "classifier.1" in out
    assert "RankMe" not in out


PREPARED = {
    "timm/test_vit": Preparation(160, 0.95, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "timm/vit_tiny_patch16_224": Preparation(224, 0.9, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "timm/resnet18.a1_in1k": Preparation(224, 0.95, *IMAGENET),
    "torchvision/shufflenet_v2_x0_5": Preparation(224, 224 / 256, *IMAGENET, "bilinear"),
    "torchvision/mobilenet_v2": Preparation(224, 224 / 232, *IMAGENET, "bilinear"),
    "resnet20": Preparation(32, 1.0, *IMAGENET),
}


@pytest.mark.parametrize(("name", "expected"), PREPARED.items(), ids=PREPARED)
def test_images_are_prepared_as_the_network_was_trained(name, expected):
    its = named(name, None, {}, classes=3)
    assert its.preparation == expected
    held: dict = {}
    exec(its.imports.replace("import architectures", "from utilized_rank.training import architectures"), held)
    eval(its.expression, held).load_state_dict(its.network.state_dict())


def test_what_is_said_of_the_preparation_comes_first(call, tmp_path):
    said = ("--image-size", 40, "--crop", 0.5, "--mean", "0.1,0.2,0.3", "--std", "1, 2, 3")
    done(call("measure", *SMALL[:-2], *said, "--out", tmp_path / "out"))
    origin = json.loads((tmp_path / "out" / "utilization.json").read_text())["provenance"]
    assert origin["images"] == {"side": 40, "crop": 0.5, "mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]} | {
        "interpolation": "bicubic"
    }


RESNETS = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.7}


@pytest.mark.parametrize(("name", "millions"), RESNETS.items(), ids=RESNETS)
def test_he_et_als_residual_networks_have_their_layers_and_parameters(name, millions):
    network = named(name, None, {}, classes=10).network
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == int(name.removeprefix("resnet"))
    assert (len(layers) - 2) % 6 == 0
    digits = 1 if millions > 1 else 2
    assert round(sum(its.numel() for its in network.parameters()) / 1e6, digits) == millions


def test_an_interruption_prints_the_layers_that_are_done(call, monkeypatch):
    left = iter(range(2))
    whole = ranks.energy_ranks

    def interrupted(*given: object) -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(ranks, "energy_ranks", interrupted)
    out = done(call("measure", *SMALL))
    assert re.search(r"^ +0 +12×3×3×3 .*\n +3 +24×12×3×3 .*\n\nMLU", out, re.MULTILINE)
    assert "5: the search was interrupted before it" in out


def test_features_that_are_all_zero_have_no_rank(call, tmp_path):
    out = done(call("measure", "nets:dead", *SMALL[3:], "--out", tmp_path / "out"))
    assert "RankMe" not in out
    assert json.loads((tmp_path / "out" / "utilization.json").read_text())["rank_me"] is None


# Compress and load


@pytest.fixture(scope="module")
def smaller(place, tmp_path_factory) -> Path:
    """The ResNet-20 with half of its parameters, as an ONNX file, too, where there are packages for that."""
    out = tmp_path_factory.mktemp("smaller") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert typed(["compress", *RESNET, "--params", "0.5", "--out", str(out), *ONNX, "--export"]) == 0
    return out


def test_a_smaller_network_comes_with_what_was_done(smaller, place):
    assert files(smaller.parent) == {
        "out",
        *(f"out/{name}" for name in ("README.md", "architectures.py", "compression.json", "layers.json")),
        *(f"out/network.{kind}" for kind in ("safetensors", "pt2", *(["onnx"] if ONNX else []))),
    }
    record = json.loads((smaller / "compression.json").read_text())
    network = network_of(place, "resnet20.th")
    before, after = record["parameters"]
    assert before == sum(its.numel() for its in network.parameters())
    assert after == sum(its.numel() for name, its in load_file(smaller / "network.safetensors").items() if own(name))
    assert after <= before / 2
    assert record["flops"][1] < record["flops"][0]
    _, _, test, labels = prepared(place)
    with torch.inference_mode():
        right = int((network(test).argmax(1) == labels).sum())
    accuracy = record["accuracy"]
    assert right > 0.6 * len(labels)  # it was trained
    assert accuracy["images"] == len(labels) == 3 * TEST
    assert accuracy["before"] == pytest.approx(100 * right / len(labels))
    change, low, high = accuracy["change"]
    assert change == pytest.approx(accuracy["after"] - accuracy["before"])
    assert low <= change <= high
    assert record["latency"]["before_ms"] > 0 < record["latency"]["after_ms"]
    assert record["finetuned"] is None
    assert record["budget"] == {"params": 0.5}
    assert record["provenance"]["checkpoint"] == "resnet20.th"
    assert all(record[kind]["off"] < 1e-4 for kind in ["export", *(["onnx"] if ONNX else [])])
    about = (smaller / "README.md").read_text()
    for part in (
        f"{before:,} to {after:,}",
        f"of {len(labels):,} images",
        "network.pt2",
        *(["network.onnx"] if ONNX else []),
    ):
        assert part in about


def own(name: str) -> bool:
    return not name.endswith(("running_mean", "running_var", "num_batches_tracked"))


BY_HAND = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "utilized_rank":
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
sys.path.insert(0, "")
{block}
import numpy as np
import torch
from pathlib import Path
from PIL import Image

images, labels = [], []
for label, folder in enumerate(sorted(Path({test!r}).iterdir())):
    for file in sorted(folder.iterdir()):
        image = Image.open(file).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((32, 32), Image.Resampling.BICUBIC, box, reducing_gap=3)
        images.append((np.asarray(image) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225))
        labels.append(label)
images = np.stack(images).transpose(0, 3, 1, 2).astype(np.float32)
with torch.inference_mode():
    found = network(torch.from_numpy(images)).argmax(1).numpy()
np.savez({out!r}, images=images, found=found, right=found == np.array(labels))
"""


@pytest.fixture(scope="module")
def by_hand(smaller, place, tmp_path_factory) -> dict[str, np.ndarray]:
    """Images prepared by hand, and what a process that knows nothing of this package makes of them."""
    (block,) = re.findall(r"```python\n(.*?)```", (smaller / "README.md").read_text(), re.DOTALL)
    out = tmp_path_factory.mktemp("hand") / "found.npz"
    code = BY_HAND.format(block=block, test=str(place / "data" / "test"), out=str(out))
    subprocess.run([sys.executable, "-I", "-c", code], cwd=smaller, check=True)
    return dict(np.load(out))


def test_a_smaller_network_is_as_accurate_as_it_says_where_nobody_knows_this_package(smaller, by_hand):
    said = json.loads((smaller / "compression.json").read_text())["accuracy"]
    assert len(by_hand["right"]) == said["images"]
    assert by_hand["right"].sum() == round(said["after"] * said["images"] / 100, 6)


def batches(by_hand: dict[str, np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and what was said of them, in batches of more than one size."""
    for rows in np.array_split(np.arange(len(by_hand["images"])), [1, 8]):
        yield by_hand["images"][rows], by_hand["found"][rows]


def test_the_onnx_file_says_the_same_of_every_image(smaller, by_hand):
    onnxruntime = pytest.importorskip("onnxruntime", reason="it comes with the extra export")
    pytest.importorskip("onnxscript", reason="it comes with the extra export")
    session = onnxruntime.InferenceSession(smaller / "network.onnx", providers=["CPUExecutionProvider"])
    for images, found in batches(by_hand):
        assert (session.run(None, {session.get_inputs()[0].name: images})[0].argmax(1) == found).all()


def test_the_exported_network_says_the_same_of_every_image(smaller, by_hand):
    exported = torch.export.load(smaller / "network.pt2").module()
    for images, found in batches(by_hand):
        assert (exported(torch.from_numpy(images)).argmax(1).numpy() == found).all()


def test_a_folder_is_checked_against_what_it_says(smaller, call):
    out = done(call("load", smaller, "--data", "data"))
    record = json.loads((smaller / "compression.json").read_text())
    loads, accuracy = out.splitlines()
    assert loads.endswith(f"layers in two, {record['parameters'][1]:,} parameters: loads")
    assert accuracy == f"accuracy {record['accuracy']['after']:.2f}% of {3 * TEST} images: as it says"
    assert done(call("load", smaller)).splitlines() == [loads]


@pytest.fixture
def copied(smaller, tmp_path) -> Path:
    return Path(shutil.copytree(smaller, tmp_path / "copied"))


def test_weights_that_were_changed_are_noticed(copied, call):
    tensors = load_file(copied / "network.safetensors")
    tensors["linear.weight"] = tensors["linear.weight"].roll(1, 0).contiguous()
    save_file(tensors, copied / "network.safetensors")
    assert "SHA-256 is another" in refused(call("load", copied))
    done = json.loads((copied / "compression.json").read_text())
    del done["sha256"]
    (copied / "compression.json").write_text(json.dumps(done))
    assert call("load", copied).code == 0
    told = refused(call("load", copied, "--data", "data"))
    assert re.search(r"copied says \d+\.\d\d% accuracy, and has \d+\.\d\d% of 36 images$", told)


def test_a_file_of_weights_cut_short_is_noticed(copied, call):
    weights = copied / "network.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "SHA-256 is another" in refused(call("load", copied))


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("layers.json", '{"linear": ["Linear", {"x": 1}]}', "is of another network than ResNet"),
        ("layers.json", "{", "is no folder of a smaller network"),
        ("compression.json", "{", "is no folder of a smaller network"),
        ("compression.json", "[]", r"\(compression\.json does not say what was done\)"),
    ],
)
def test_a_file_that_somebody_changed_ends_in_one_line(copied, call, file, content, told):
    (copied / file).write_text(content)
    assert re.search(told, refused(call("load", copied)))


def test_a_folder_of_another_size_than_it_says_is_noticed(copied, call):
    record = json.loads((copied / "compression.json").read_text())
    record["parameters"][1] += 1
    (copied / "compression.json").write_text(json.dumps(record))
    assert re.search(r"says [\d,]+ parameters, and has [\d,]+$", refused(call("load", copied)))


@pytest.mark.parametrize(
    "asked",
    [
        {"flops": 0.6},
        {"params": 0.7, "method": "svd"},
        {"epsilon": 10.0},
        {"params": 0.5, "finetune-epochs": 1},
    ],
    ids=str,
)
def test_every_budget_is_kept_and_said(call, tmp_path, asked):
    words = [word for name, value in asked.items() for word in (f"--{name}", value)]
    out = done(call("compress", *SMALL, *words, "--out", tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "compression.json").read_text())
    for name, key in (("flops", "flops"), ("params", "parameters")):
        before, after = record[key]
        assert after <= asked.get(name, 1.0) * before
        assert f"{before:,} to {after:,} ({after / before:.1%})" in out
    chosen = "epsilon" in asked or "finetune-epochs" in asked
    assert record["accuracy"]["images"] == (3 * TEST // 2 if chosen else 3 * TEST)
    assert record["method"] == asked.get("method", "compensated")
    assert ("fine-tuned for 1 epochs" in out) == ("finetune-epochs" in asked) == (record["finetuned"] is not None)
    (change, low, high) = record["accuracy"]["change"]
    assert f"{change:+.2f} points, 95% interval [{low:+.2f}, {high:+.2f}]" in out
    assert done(call("load", tmp_path / "out", "--model", "nets:small", "--data", "data")).endswith("as it says\n")


# Compare


@pytest.fixture(scope="module")
def measured(place, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        other = (*SMALL, "--mean", "0.3,0.3,0.3")
        for name, words in {"a": other, "b": SMALL, "c": (*SMALL, "--energy", 0.9), "d": RESNET}.items():
            assert typed(["measure", *map(str, words), "--out", str(made / name)]) == 0
    return made


def test_two_networks_of_one_architecture_are_compared_layer_by_layer(measured, call):
    out = done(call("compare", measured / "a", measured / "b"))
    one, other = (read_table(measured / name / "utilization.csv") for name in "ab")
    for i in range(len(one)):
        difference = f"{other.utilization[i] - one.utilization[i]:+.1%}"
        row = [str(one.layer[i]), f"{one.utilization[i]:.1%}", f"{other.utilization[i]:.1%}", difference]
        assert re.search(r"^ *" + r" +".join(map(re.escape, row)) + "$", out, re.MULTILINE)
    assert "a: nets:small" in out
    assert "tolerances" not in out
    rank_me = [json.loads((measured / name / "utilization.json").read_text())["rank_me"] for name in "ab"]
    assert re.search(rf"RankMe +{rank_me[0]:.1f} +{rank_me[1]:.1f}", out)


def test_other_tolerances_are_said(measured, call):
    assert "measured at different tolerances" in done(call("compare", measured / "b", measured / "c"))


def test_other_architectures_are_compared_by_their_means_alone_and_drawn(measured, call, tmp_path):
    out = done(call("compare", measured / "b", measured / "d", "--out", tmp_path / "both.svg"))
    assert re.search(r"layers +4 +20", out)
    assert "difference" not in out
    assert (tmp_path / "both.svg").read_text().count("<svg") == 1
    assert files(tmp_path) == {"both.svg"}


def test_folders_of_one_name_are_told_apart_and_one_folder_is_not_compared_with_itself(measured, call, tmp_path):
    shutil.copytree(measured / "c", tmp_path / "b")
    out = done(call("compare", measured / "b", tmp_path / "b"))
    assert f"{tmp_path / 'b'}: nets:small" in out
    assert refused(call("compare", measured / "b", measured / "b")).endswith("are one folder: name two")
    assert "utilization.json" in refused(call("compare", measured / "b", tmp_path))
    for content, told in {"{": "is no JSON", "{}": "is none that"}.items():
        (tmp_path / "b" / "utilization.json").write_text(content)
        assert told in refused(call("compare", measured / "b", tmp_path / "b"))


# Help and doctor


def test_doctor_says_what_this_machine_offers(call):
    lines = done(call("doctor")).splitlines()
    facts = {line[:22].strip(): line[22:] for line in lines}
    assert facts["devices"].startswith("cpu")
    assert facts["torch"] == version("torch")
    assert facts["timm"] == version("timm")
    assert facts["threads"].startswith(str(torch.get_num_threads()))
    for name in ("processor", "memory", "free disk here", "dvc on the path", "torchvision's weights"):
        assert facts[name]


@pytest.mark.parametrize("command", ["measure", "compress", "compare", "load", "doctor"])
def test_the_help_of_a_command_has_an_example_of_options_that_it_has(call, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "200")
    shown = " ".join(done(call(command, "--help")).split())
    (example,) = re.findall(rf"Example: (utilized-rank {command}.*?) [╭]", shown)
    rest = shown.replace(example, "")
    assert all(option in rest for option in re.findall(r"--[a-z-]+", example))


def test_help_waits_for_neither_torch_nor_pandas():
    code = """
import sys
sys.argv = ["utilized-rank", "--help"]
from utilized_rank import command
try:
    command()
finally:
    print(sorted({"torch", "pandas"} & set(sys.modules)))
"""
    told = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout
    assert told.splitlines()[-1] == "[]"
    for command in ("measure", "compress", "compare", "load", "doctor"):
        assert f" {command} " in told


def test_a_stage_waits_for_neither_torch_nor_pandas_before_its_kernel_does():
    code = "import sys, utilized_rank.stages.notebooks; print(sorted({'torch', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout == "[]\n"


# Refusals


@pytest.fixture(scope="module")
def mistaken(place) -> Iterator[Path]:
    """Beside what is right, what is wrong."""
    wrong = place / "wrong"
    (wrong / "empty").mkdir(parents=True)
    shutil.copytree(place / "data" / "train" / "red", wrong / "one" / "red")
    shutil.copytree(place / "data" / "train", wrong / "without")
    (wrong / "without" / "violet").mkdir()
    shutil.copytree(place / "data" / "train", wrong / "cut")
    for image in (wrong / "cut").rglob("*.png"):
        image.write_bytes(image.read_bytes()[:500])
    shutil.copytree(place / "data", wrong / "four")
    for part in ("train", "test"):
        shutil.copytree(wrong / "four" / part / "red", wrong / "four" / part / "violet")
    (wrong / "page.pth").write_text("<!doctype html><title>404</title>")
    (wrong / "page.safetensors").write_text("<!doctype html><title>404</title>")
    vgg = models.build(Model(architecture="vgg11"), (3, 32, 32), 3)
    torch.save(vgg.state_dict(), wrong / "vgg11.pth")
    yield wrong
    shutil.rmtree(wrong)


def at(folder: str, of: tuple = RESNET) -> tuple:
    return tuple(f"wrong/{folder}" if word == "data" else word for word in of)


def with_weights(file: str, name: str = "resnet20") -> tuple:
    return (name, "--checkpoint", file, "--data", "data")


MEASURED = {
    "one of ours, nearly": (("resnet21", *RESNET[1:]), r"there is no network 'resnet21'; did you mean 'resnet\d+'\?"),
    "nothing like it": (("qqq", *RESNET[1:]), r"there is no network 'qqq' \(known: .*resnet110.*timm/NAME"),
    "of timm": (("timm/resnet1", *RESNET[1:]), r"timm has no 'resnet1': did you mean .*resnet18"),
    "of timm, without weights": (("timm/test_vitt", "--data", "data"), r"timm has no .*did you mean test_vit"),
    "of torchvision": (("torchvision/resnet9", *RESNET[1:]), r"torchvision has no 'resnet9': did you mean .*resnet18"),
    "no module": (("nowhere:small", "--data", "data"), r"nowhere:small cannot be made \(No module named 'nowhere'\)"),
    "no function": (("nets:tiny", "--data", "data"), r"nets:tiny cannot be made \(module 'nets' has no attribute"),
    "no function at all": ((":tiny", "--data", "data"), r":tiny cannot be made \(Empty module name\)"),
    "a function that fails": (("nets:nothing", "--data", "data"), r"nets:nothing cannot be made \(no such thing\):"),
    "a function of arguments": (("json:loads", "--data", "data"), r"json:loads cannot be made \(.* missing 1 required"),
    "no network": (("os:getcwd", "--data", "data"), r"os:getcwd gives no torch\.nn\.Module, but str"),
    "no weights": (("resnet20", "--data", "data"), r"nobody publishes weights for resnet20: give --checkpoint FILE"),
    "missing": (with_weights("gone.pth"), r"gone\.pth is not there, or is no file"),
    "a folder for a checkpoint": (with_weights("data"), r"data is not there, or is no file"),
    "unreadable": (with_weights("wrong/page.pth"), r"checkpoint wrong/page\.pth cannot be read: it is none of torch's"),
    "unreadable, too": (
        with_weights("wrong/page.safetensors"),
        r"wrong/page\.safetensors is no whole safetensors file \(",
    ),
    "of another depth": (
        with_weights("resnet20.th", "resnet32"),
        r"checkpoint resnet20\.th does not fit the network: layer1\.3\.conv1\.weight is missing; "
        r"layer1\.3\.bn1\.weight is missing; layer1\.3\.bn1\.bias is missing, and \d+ more",
    ),
    "of another library": (
        with_weights("resnet20.th", "torchvision/shufflenet_v2_x0_5"),
        r"does not fit the network: [^;]*; [^;]*; [^;]*, and \d+ more",
    ),
    "no images": (at("gone"), r"wrong/gone is no folder: give one with a directory of images for each class"),
    "an empty folder": (at("empty"), r"wrong/empty has 0 directories: each is a class, and two are needed"),
    "one class": (at("one"), r"wrong/one has 1 directories: each is a class, and two are needed"),
    "a class without images": (at("without"), r"wrong/without/violet has no image \("),
    "a broken image": (at("cut"), r"wrong/cut/\w+/\d+\.png is not a whole image"),
    "more classes": (
        (*at("four", SMALL), "--epsilon", 1),
        r"nets:small tells 3 classes apart, and wrong/four has 4 directories: give --checkpoint",
    ),
    "too small": (
        (*with_weights("wrong/vgg11.pth", "vgg11"), "--image-size", 16),
        r"the network does not take inputs of shape \(1, 3, 16, 16\): ",
    ),
    "too small, searched": (
        (*with_weights("wrong/vgg11.pth", "vgg11"), "--image-size", 16, "--epsilon", 1),
        r"vgg11 does not take images of 16 x 16 pixels: ",
    ),
    "of another size": (
        ("nets:flat", "--data", "data", "--image-size", 40, "--epsilon", 1),
        r"nets:flat does not take images of 40 x 40 pixels: mat1 and mat2",
    ),
    "maps for scores": (
        ("nets:maps", "--data", "data", "--image-size", 32, "--epsilon", 1),
        r"nets:maps gives \(1, 3, 30, 30\) for an image",
    ),
    "NaN": (("nets:broken", "--data", "data", "--image-size", 32), r"layer \S+ received values that are not finite"),
    "no such device": ((*RESNET, "--device", "cuda:99"), r"this machine, as torch sees it, has no cuda:99"),
    "no such kind of device": ((*RESNET, "--device", "gpu"), r"there is no kind of device 'gpu' \(auto, cpu, "),
    "two means": ((*RESNET, "--mean", "0.5,0.5"), r"--mean 0\.5,0\.5: it takes three numbers apart by commas"),
    "no means": ((*RESNET, "--mean", "a,b,c"), r"--mean a,b,c: it takes three numbers"),
    "no deviation": ((*RESNET, "--std", "1,0,1"), r"--std 1,0,1: it takes three numbers"),
    "not a number": ((*RESNET, "--std", "1,nan,1"), r"--std 1,nan,1: it takes three numbers"),
    "too much energy": ((*RESNET, "--energy", 1.5), r"energy=1\.5 is no fraction: it lies above 0, up to 1"),
    "two tolerances": ((*SMALL, "--energy", 0.9, "--epsilon", 1), r"give epsilon=.* or energy=.*not both"),
    "any loss": ((*SMALL, "--epsilon", "inf"), r"epsilon=inf is no tolerated loss"),
    "out is not empty": ((*RESNET, "--out", "data"), r"data is not an empty folder: name another, or empty it"),
    "out is a file": ((*RESNET, "--out", "nets.py"), r"nets\.py is not an empty folder"),
    "out is in a file": ((*RESNET, "--out", "nets.py/a/b"), r"nets\.py/a/b cannot be made: \S+nets\.py is no folder"),
}


@pytest.mark.parametrize("wrong", MEASURED)
def test_a_mistake_ends_measure_in_one_line_and_nothing_is_written(place, mistaken, call, said, wrong):
    words, told = MEASURED[wrong]
    asked = words if "--out" in words else (*words, "--out", "out")
    before = files(place)
    message = refused(call("measure", *asked))
    assert re.search(told, message)
    said("command line", f"measure: {wrong}", message)
    assert files(place) == before


COMPRESSED = {
    "too little": ((*SMALL, "--params", 0.01), r"a budget of 1\.0% cannot be kept: the smallest network costs \d+"),
    "more than all": ((*SMALL, "--params", 1.5), r"params=1\.5: the part that may remain lies between 0 and 1"),
    "not a number": ((*SMALL, "--flops", "nan"), r"flops=nan: the part that may remain lies between 0 and 1"),
    "two budgets": ((*SMALL, "--params", 0.5, "--flops", 0.5), r"give one of params=, flops= and latency= .* epsilon="),
    "no budget": (SMALL, r"give one of params=, flops= and latency= .* epsilon="),
    "any loss": ((*SMALL, "--epsilon", "inf"), r"epsilon=inf is no tolerated loss"),
    "no learning rate": ((*SMALL, "--params", 0.5, "--lr", 0), r"--lr 0 is no learning rate"),
    "more classes": (
        (*at("four", SMALL), "--params", 0.5),
        r"nets:small tells 3 classes apart, and wrong/four has 4 directories",
    ),
    "too small": (
        (*with_weights("wrong/vgg11.pth", "vgg11"), "--image-size", 16, "--params", 0.5),
        r"vgg11 does not take images of 16 x 16 pixels: ",
    ),
    "NaN": (("nets:broken", "--data", "data", "--image-size", 32, "--params", 0.5), r"values that are not finite"),
    "out is not empty": ((*SMALL, "--params", 0.5, "--out", "data"), r"data is not an empty folder"),
}


@pytest.mark.parametrize("wrong", COMPRESSED)
def test_a_mistake_ends_compress_in_one_line_and_nothing_is_written(place, mistaken, call, said, wrong):
    words, told = COMPRESSED[wrong]
    asked = words if "--out" in words else (*words, "--out", "out")
    before = files(place)
    message = refused(call("compress", *asked))
    assert re.search(told, message)
    said("command line", f"compress: {wrong}", message)
    assert files(place) == before


@pytest.mark.parametrize("missing", ["onnxruntime", "onnxscript"])
def test_packages_that_an_onnx_file_needs_are_missed_before_anything_is_computed(place, call, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, "onnxruntime", sys)  # there, if it is not the one that is missing
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(compressing, "named", None)
    before = files(place)
    ended = call("compress", *SMALL, "--params", 0.5, "--onnx", "--out", "out")
    assert refused(ended) == f"--onnx needs {missing}: pip install 'utilized-rank[export]'"
    assert files(place) == before


WRITTEN = {"README.md", "compression.json", "layers.json", "nets.py", "network.safetensors"}


@pytest.fixture
def kept(place) -> Iterator[Path]:
    """Where a smaller network goes; taken away afterwards."""
    yield place / "new" / "out"
    shutil.rmtree(place / "new")


def test_an_exported_network_that_computes_something_else_is_refused_and_the_smaller_one_kept(kept, call, monkeypatch):
    monkeypatch.setattr(compressing, "SAME", -1.0)
    ended = call("compress", *SMALL, "--params", 0.5, "--export", "--out", "new/out")
    assert ended.said[-1].startswith("written: new/out, but the exported network is off by ")
    assert ended.code == 2
    assert {path.name for path in kept.iterdir()} == WRITTEN


@pytest.mark.parametrize("option", ["--export", *ONNX])
def test_a_network_that_cannot_be_exported_is_kept_and_the_reason_said(kept, call, option):
    ended = call("compress", "nets:undecided", *SMALL[3:], "--params", 0.7, option, "--out", "new/out")
    told = r"written: new/out, but the network cannot be exported.*: Could not guard on data-dependent"
    assert re.match(told, ended.said[-1])
    assert ended.code == 2
    assert {path.name for path in kept.iterdir()} == WRITTEN


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(place, call, monkeypatch):
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device", "utilization.csv")

    monkeypatch.setattr(measuring, "write_table", full)
    before = files(place)
    assert "No space left on device" in refused(call("measure", *SMALL, "--out", "new/out"))
    assert files(place) == before


def test_published_weights_that_are_out_of_reach_are_said_to_be(call, monkeypatch, tmp_path):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    ended = call("measure", "torchvision/shufflenet_v2_x0_5", "--data", "data")
    assert ended.code == 2
    assert "Traceback" not in ended.err
    told = ended.said[-1]
    assert re.search(r"are in no cache, and cannot be downloaded .*connect to a network once, .*--checkpoint", told)


def test_what_is_typed_wrongly_ends_in_the_usage_and_the_same_status(call):
    for words, told in (
        (("measure",), "Missing"),
        (("measure", *RESNET, "--criterion", "best"), "'best'"),
        (("measure", *RESNET, "--image-size", 4), "--image-size"),
        (("compress", *SMALL, "--params", 0.5), "--out"),
        (("compres",), "compres"),
    ):
        ended = call(*words)
        assert ended.code == 2
        assert told in ended.err


def test_the_command_itself_ends_with_that_status(place, tmp_path):
    words = [sys.executable, "-m", "utilized_rank.cli", "measure", "resnet21", "--data", "data"]
    ended = subprocess.run(words, cwd=place, text=True, capture_output=True, check=False)
    assert ended.returncode == 2
    assert re.fullmatch(r"there is no network 'resnet21'; did you mean 'resnet\d+'\?\n", ended.stderr)
