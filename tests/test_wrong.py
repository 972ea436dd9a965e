"""What can't be meant, and machines that give out: one message each that says what, and nothing is written."""

from __future__ import annotations

import copy
import errno
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dvc.utils.serialize import dump_yaml
from PIL import Image
from running import done, files, refused

from utilized_rank.commands import compressing, folder
from utilized_rank.datasets import images
from utilized_rank.datasets.images import decoded
from utilized_rank.datasets.sections import Data

REMOVED = object()

Change = dict[str, Any]
"""Values of parameters by their dotted names; ``REMOVED`` takes one away."""

FRONTIER: dict[str, Any] = {
    "methods": ["optimal", "compensated"],
    "ranks": [{"search": "joint", "epsilon": 1.0}],
    "finetune": {"epochs": 1, "lr": 0.01},
}


def with_ranks(*ranks: dict[str, Any], **others: Any) -> Change:
    return {"frontier": {"vgg11": FRONTIER | {"ranks": [*ranks]} | others}}


STEMMED = {"architecture": "vit", "dim": 96, "heads": 3, "stem": "convolutions"}
HALF = {"budget": {"params": 0.5}}
JOINT = {"search": "joint", "epsilon": 1.0}
PARAMETERS: list[tuple[Change, str]] = [
    # unknown keys
    ({"sede": 1}, "unknown key sede; did you mean 'seed'?"),
    ({"measure.epsilon": [1.0]}, "unknown key measure.epsilon; did you mean 'epsilons'?"),
    ({"runs.vgg11.train.epoch": 3}, "unknown key runs.vgg11.train.epoch; did you mean 'epochs'?"),
    ({"runs.vgg11.model.patchsize": 4}, "unknown key runs.vgg11.model.patchsize; did you mean 'patch_size'?"),
    ({"data.imagesize": 32}, "unknown key data.imagesize; did you mean 'image_size'?"),
    ({"decompose.method": ["svd"]}, "unknown key decompose.method; did you mean 'methods'?"),
    ({"runs.vgg11.train.augmentation": {"rotation": 3}}, "train.augmentation.rotation; did you mean 'rotate'?"),
    # missing
    ({"runs": REMOVED}, "runs is missing"),
    ({"measure": REMOVED}, "measure is missing"),
    ({"data.dataset": REMOVED}, "data.dataset is missing"),
    ({"runs.vgg11.finetune.lr": REMOVED}, "runs.vgg11.finetune.lr is missing"),
    # wrong types
    ({"seed": "zero"}, "seed is 'zero'"),
    ({"seed": 1.5}, "seed is 1.5"),
    ({"threads": None}, "threads is None"),
    ({"runs": ["vgg11"]}, "runs is ['vgg11']"),
    ({"measure.epsilons": 1.0}, "measure.epsilons is 1.0"),
    ({"measure.epsilons": ["one"]}, "measure.epsilons.0 is 'one'"),
    ({"data": "digits"}, "data is 'digits'"),
    ({"notes": "cut"}, "notes is 'cut'"),
    ({"runs.vgg11.label": 11}, "runs.vgg11.label is 11"),
    ({"runs.vgg11.train.epochs": True}, "runs.vgg11.train.epochs is True"),
    ({"runs.vgg11.train.epochs": 2.0}, "runs.vgg11.train.epochs is 2.0"),
    ({"runs.vgg11.train.epochs": "2"}, "runs.vgg11.train.epochs is '2'"),
    ({"runs.vgg11.train.lr": "fast"}, "runs.vgg11.train.lr is 'fast'"),
    ({"runs.vgg11.train.lr": True}, "runs.vgg11.train.lr is True"),
    ({"runs.vgg11.train.augmentation": {"flip": "sometimes"}}, "augmentation.flip is 'sometimes'"),
    # out of range
    ({"runs": {}}, "runs is {}"),
    ({"seed": -1}, "seed is -1"),
    ({"threads": 0}, "threads is 0"),
    ({"data.image_size": 4}, "data.image_size is 4"),
    ({"data.search": 0}, "data.search is 0"),
    ({"data.search": -0.2}, "data.search is -0.2"),
    ({"data.search": 10.5}, "data.search: 10.5 is neither a fraction, below 1, nor a whole number"),
    ({"data.test": 1.5}, "data.test: 1.5 is neither a fraction, below 1, nor a whole number"),
    ({"data.test": 0}, "data.test is 0"),
    ({"data.crop": 0}, "data.crop is 0"),
    ({"data.crop": 1.2}, "data.crop is 1.2"),
    ({"data.workers": -1}, "data.workers is -1"),
    ({"data.limit": 0}, "data.limit is 0"),
    ({"measure.epsilons": [-1.0]}, "measure.epsilons.0 is -1.0"),
    ({"measure.epsilons": [101.0]}, "measure.epsilons.0 is 101.0"),
    ({"measure.epsilons": [float("nan")]}, "measure.epsilons.0 is nan"),
    ({"measure.memory": 0}, "measure.memory is 0"),
    ({"measure.rows": 0}, "measure.rows is 0"),
    ({"measure.calibration_images": 0}, "measure.calibration_images is 0"),
    ({"runs.vgg11.train.epochs": 0}, "runs.vgg11.train.epochs is 0"),
    ({"runs.vgg11.train.lr": 0}, "runs.vgg11.train.lr is 0"),
    ({"runs.vgg11.train.lr": float("inf")}, "runs.vgg11.train.lr is inf"),
    ({"runs.vgg11.train.lr": float("nan")}, "runs.vgg11.train.lr is nan"),
    ({"runs.vgg11.model.blocks": 0}, "runs.vgg11.model.blocks is 0"),
    ({"decompose.latency_images": 0}, "decompose.latency_images is 0"),
    ({"decompose.sweep_images": 0}, "decompose.sweep_images is 0"),
    ({"runs.vgg11.train.batch_size": 1}, "runs.vgg11.train.batch_size is 1"),
    ({"runs.vgg11.train.label_smoothing": 1.0}, "runs.vgg11.train.label_smoothing is 1.0"),
    ({"runs.vgg11.model.width": 0}, "runs.vgg11.model.width is 0"),
    ({"runs.vgg11.train.augmentation": {"shift": 0.6}}, "augmentation.shift is 0.6"),
    ({"decompose.sweep_points": 1}, "decompose.sweep_points is 1"),
    ({"decompose.methods": []}, "decompose.methods is []"),
    ({"pretrained.simclr_vit.temperature": 0}, "pretrained.simclr_vit.temperature is 0"),
    ({"pretrained.simclr_vit.mask_ratio": 1.0}, "pretrained.simclr_vit.mask_ratio is 1.0"),
    # not one of what there is
    ({"precision": "float8"}, "precision is 'float8'"),
    ({"measure.precision": "float16"}, "measure.precision is 'float16'"),
    ({"data.source": "imagenet"}, "data.source is 'imagenet'"),
    ({"data.dataset": "digit"}, "sklearn has no 'digit'; did you mean 'digits'?"),
    ({"measure.criterion": "ranks"}, "measure.criterion is 'ranks'"),
    ({"measure.qkv": "both"}, "measure.qkv is 'both'"),
    ({"runs.vgg11.train.optimizer": "adam"}, "runs.vgg11.train.optimizer is 'adam'"),
    ({"runs.vgg11.train.method": "none"}, "runs.vgg11.train.method is 'none'"),
    ({"runs.vgg11.model.architecture": "vgg12"}, "there is no 'vgg12'; did you mean 'vgg11'?"),
    ({"decompose.methods": ["svd", "pca"]}, "decompose.methods.1 is 'pca'"),
    ({"decompose.objective": "size"}, "decompose.objective is 'size'"),
    ({"pretrained.simclr_vit.method": "dino"}, "pretrained.simclr_vit.method is 'dino'"),
    # names
    ({"name": "raw"}, "name: raw is taken"),
    ({"name": "my study"}, "name is 'my study'"),
    ({"name": "../elsewhere"}, "name is '../elsewhere'"),
    ({"name": ""}, "name is ''"),
    ({"name": "a.b"}, "name is 'a.b'"),
    ({"name": "benchmarks"}, "name: benchmarks is taken"),
    ({"runs.a/b": "vgg11"}, "runs.a/b"),
    ({"pretrained.none": "simclr_vit"}, "pretrained.none is taken"),
    # what does not go together
    ({"measure.epsilons": [1.0, 1.0]}, "epsilons [1.0, 1.0] names one twice"),
    ({"runs.vit_linear.label": "VGG11"}, "2 of them have the label 'VGG11'"),
    ({"runs.vgg11.pretrained": "simclr"}, "there is no 'simclr'; did you mean 'simclr_vit'?"),
    ({"runs.vgg11.pretrained": "simclr_vit"}, "simclr_vit was made with another model"),
    ({"runs.vgg11.train.method": "linear"}, "runs.vgg11.pretrained is none, so train.method must be supervised"),
    ({"data.image_size": 16}, "data.image_size must be at least 32, not 16"),
    ({"runs.vit.model": STEMMED | {"patch_size": 6}}, "patch_size 6 is no power of two"),
    ({"pretrained.simclr_vit.model": STEMMED, "pretrained.simclr_vit.method": "mae"}, "method: mae hides patches"),
    ({"data.image_size": 36}, "patch_size 8 does not divide data.image_size 36"),
    ({"runs.vit_linear.model.heads": 5}, "dim 96 is not a multiple of heads 5"),
    ({"runs.vgg11.model.mean": (0.5,)}, "mean and std belong together"),
    ({"data.search": 0.5, "data.test": 0.5}, "search + test must leave something to train on"),
    ({"decompose.finetuned": ["svd"], "decompose.methods": ["optimal"]}, "finetuned names ['svd']"),
    ({"pretrained.simclr_vit.url": "https://a.b/c"}, "url belongs to method: checkpoint"),
    ({"pretrained.simclr_vit.file": "a.pt"}, "file and sha256 belong to method: checkpoint"),
    ({"pretrained.simclr_vit.supervision": "supervised"}, "supervision belongs to method: checkpoint and published"),
    ({"comparisons.vit.linear": "vit_lin"}, "there is no 'vit_lin'; did you mean 'vit_linear'?"),
    ({"comparisons.vit.supervised": "vgg11"}, "its runs do not share one model"),
    ({"repeats.two": {"label": "two", "runs": ["vgg11", "vgg11"]}}, "runs ['vgg11', 'vgg11'] names one twice"),
    ({"repeats.two": {"label": "two", "runs": ["vgg11", "vit_linear"]}}, "differ in more than their labels"),
    # beyond the paper
    ({"frontier": {"vgg12": FRONTIER}}, "frontier: there is no 'vgg12'; did you mean 'vgg11'?"),
    (with_ranks({"search": "independent", "epsilon": 3.25}), "a tolerance that measure.epsilons does not name"),
    (with_ranks({"search": "joint"}), "search and epsilon belong together"),
    (with_ranks({"serach": "joint", "epsilon": 1.0}), "key frontier.vgg11.ranks.0.serach; did you mean 'search'?"),
    (with_ranks(JOINT | {"weights": "projection"}), "weights is projection, which methods does not build"),
    (with_ranks(JOINT | {"search": "cumulative", "weights": "projection"}), "cumulative cuts one matrix at every rank"),
    (with_ranks({"epsilon": 1.0}), "search and epsilon belong together"),
    (with_ranks({}), "give either search and epsilon, or budget"),
    (with_ranks(JOINT | HALF), "give either search and epsilon, or budget"),
    (with_ranks({"budget": {"params": 0.5, "flops": 0.5}}), "a budget is of one kind, not of 2"),
    (with_ranks({"budget": {}}), "a budget is of one kind, not of 0"),
    (with_ranks({"budget": {"size": 0.5}}), "budget.size is 'size'"),
    (with_ranks({"budget": {"params": 1.0}}), "budget.params is 1.0"),
    (with_ranks(HALF | {"finetuned": ["svd"]}), "finetuned names ['svd'], which methods does not build"),
    (with_ranks(HALF, HALF), "ranks has params-0.5 2 times"),
    (with_ranks(HALF, forms=["spatial"]), "forms needs channel"),
    (with_ranks(), "ranks is []"),
    (with_ranks(HALF, finetune={"epochs": 1, "lr": 0.1, "distillation": 2}), "distillation is 2"),
]


def _named(change: Change) -> str:
    return ", ".join(f"{name}: {'removed' if its is REMOVED else its!r}" for name, its in change.items())


def changed(parameters: dict[str, Any], change: Change) -> dict[str, Any]:
    """A copy of a study's parameters with some of them changed; a string in place of a section copies that one."""
    parameters = copy.deepcopy(parameters)
    for name, value in change.items():
        *parents, last = name.split(".")
        section = parameters
        for parent in parents:
            section = section.setdefault(parent, {})
        if value is REMOVED:
            del section[last]
        elif parents in (["runs"], ["pretrained"]) and isinstance(value, str):
            section[last] = copy.deepcopy(section[value])
        else:
            section[last] = value
    return parameters


STRANGE = """
import torch
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))

def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 2))

def uncounted():
    return nn.Sequential(nn.Flatten(), nn.ReLU())

def depthwise():
    return nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def three():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))

def infinite():
    network = flat()
    nn.init.constant_(network[3].bias, float("inf"))
    return network

def half():
    network = flat().half()
    nn.init.constant_(network[1].weight, 6e4)
    return network

class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = small()
        self.never = nn.Linear(4, 4)
        self.calls = 0

class Unreached(Other):
    def forward(self, x):
        return self.body(x)

class Counting(Other):
    def forward(self, x):
        self.calls += 1
        return self.calls * self.body(x)

class Remembering(Other):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x):
        x = self.body(x)
        self.seen += x.mean(0)
        return x + self.seen

class Dropping(Other):
    def forward(self, x):
        return self.body(nn.functional.dropout(x, 0.5))

class Failing(Other):
    def forward(self, x):
        raise RuntimeError("not today")

class Silent(Other):
    def forward(self, x):
        return None

class Two(Other):
    def forward(self, x, y):
        return self.body(x + y)
"""
IMAGES = 6


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Few images need no processes that decode them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UTILIZED_RANK_DEVICE", "cpu")
        patch.setattr(folder, "Data", partial(Data, workers=0))
        patch.setattr(compressing, "_latency", lambda *given: {"images": 1, "before_ms": 1.0, "after_ms": 1.0})
        yield


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A project without a study's files, images of two classes, and a module of networks."""
    draw = np.random.default_rng(0)
    for name in ("apple", "pear"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(IMAGES):
            pixels = draw.integers(0, 256, (12, 10, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "strange.py").write_text(STRANGE)
    (tmp_path / "conf").mkdir()
    return tmp_path


Said = Callable[[str, str, str], None]


@pytest.mark.parametrize(("change", "words"), PARAMETERS, ids=[_named(change) for change, _ in PARAMETERS])
def test_parameters_that_cannot_be_meant_are_named_with_their_value(parameters, place, call, said, change, words):
    dump_yaml(place / "params.yaml", changed(parameters, change))
    before = files(place)
    ended = call("plan")
    assert (ended.code, ended.out) == (2, "")
    lines = ended.err.splitlines()
    assert words in ended.err
    assert all(line.startswith("params.yaml: ") for line in lines)
    said("parameters", _named(change), ended.err)
    assert files(place) == before


UNREADABLE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "params.yaml: the study is None: "),
    "a list": (b"- vgg11", "params.yaml: the study is ['vgg11']: "),
    "no YAML": (
        b"name: [",
        "params.yaml is not valid YAML: expected the node content, but found '<stream end>' in line 1",
    ),
    "one key twice": (b"name: a\nname: b", 'params.yaml is not valid YAML: found duplicate key "name"'),
    "no text": (bytes(range(128, 160)), "params.yaml is not valid YAML: 'utf-8' codec can't decode byte 0x80"),
}


@pytest.mark.parametrize("wrong", UNREADABLE)
def test_a_file_that_holds_no_parameters_is_named(place, call, said, wrong):
    content, words = UNREADABLE[wrong]
    (place / "params.yaml").write_bytes(content)
    ended = call("plan")
    assert (ended.code, ended.out) == (2, "")
    assert words in ended.err
    assert len(ended.err.splitlines()) == 1
    said("parameters", f"params.yaml: {wrong}", ended.err)


def test_a_command_of_a_study_outside_of_a_project_says_so(place, call, said):
    message = refused(call("plan"))
    assert "no project in" in message
    said("command line", "plan, outside of a project", message)


# Images


def _each(place: Path, content: bytes, suffix: str = ".png") -> None:
    """All images of a class become these bytes."""
    for path in (place / "data" / "pear").iterdir():
        path.unlink()
        path.with_suffix(suffix).write_bytes(content)


def _cut(place: Path) -> None:
    _each(place, (place / "data" / "pear" / "0.png").read_bytes()[:60])


def _floats(place: Path) -> None:
    path = place / "nan.tiff"
    Image.fromarray(np.full((12, 12), np.nan, np.float32)).save(path)
    _each(place, path.read_bytes(), ".tiff")
    path.unlink()


def _huge(place: Path) -> None:
    path = place / "huge.png"
    Image.new("1", (20_000, 10_000)).save(path)
    _each(place, path.read_bytes())
    path.unlink()


def _linked(place: Path, target: str) -> None:
    for path in (place / "data" / "pear").iterdir():
        path.unlink()
        path.symlink_to(target)


def _folders(place: Path) -> None:
    for path in (place / "data" / "pear").iterdir():
        path.unlink()
        path.mkdir()


def _no_images(place: Path) -> None:
    shutil.rmtree(place / "data" / "pear")
    (place / "data" / "pear").mkdir()


def _a_file(place: Path) -> None:
    shutil.rmtree(place / "data")
    (place / "data").touch()


DATA: dict[str, tuple[Callable[[Path], None], str]] = {
    "images of no bytes": (lambda place: _each(place, b""), r"data/pear/\d.png is not a whole image"),
    "text in place of an image": (lambda place: _each(place, b"hello"), r"data/pear/\d.png is not a whole image"),
    "images cut short": (_cut, r"data/pear/\d.png is not a whole image"),
    "NaN for pixels": (_floats, r"data/pear/\d.tiff is not a whole image \(floating-point pixels"),
    "images of 200 megapixels": (_huge, r"data/pear/\d.png is not a whole image \(Image size \(200000000 pixels\)"),
    "links to nothing": (
        lambda place: _linked(place, "gone.png"),
        r"data/pear/\d.png is not a whole image \(.*No such",
    ),
    "links to themselves": (lambda place: _linked(place, "0.png"), r"pear/\d.png is not a whole image \(.*symbolic"),
    "folders named as images": (_folders, r"data/pear/\d.png is not a whole image \(.*Is a directory"),
    "a class without images": (_no_images, r"data/pear has no image \(.jpg"),
    "one class": (lambda place: shutil.rmtree(place / "data" / "pear"), r"data has 1 directories: .* two are needed"),
    "no class": (lambda place: [shutil.rmtree(its) for its in (place / "data").iterdir()], "data has 0 directories"),
    "no folder": (lambda place: shutil.rmtree(place / "data"), "data is no folder"),
    "a file for a folder": (_a_file, "data is no folder"),
}


@pytest.mark.parametrize("wrong", DATA)
def test_images_that_cannot_be_meant_are_named(place, call, said, wrong):
    spoil, words = DATA[wrong]
    spoil(place)
    before = files(place)
    message = refused(call("measure", "strange:flat", "--data", "data", "--image-size", 8, "--out", "out"))
    assert files(place) == before
    _told(words, message)
    said("images", wrong, message)


def _told(words: str, message: str) -> None:
    assert re.search(words, message), message


def test_a_link_to_an_image_elsewhere_is_that_image(place):
    path = place / "data" / "pear" / "0.png"
    expected = decoded(path, 8, 1.0)
    path.rename(place / "elsewhere.png")
    path.symlink_to(place / "elsewhere.png")
    assert torch.equal(decoded(path, 8, 1.0), expected)


# Networks


NETWORKS: dict[str, str] = {
    "uncounted": "no layer of the network counts: it has none",
    "depthwise": r"no layer of the network counts: 0 \(.*depthwise",
    "infinite": r"layer 3 gave values that are not finite \(NaN or Inf\)",
    "half": r"layer 3 received values that are not finite \(NaN or Inf\)",
    "Counting": "the network gives other values when it is called again with the same inputs",
    "Remembering": "the network gives other values when it is called again with the same inputs",
    "Dropping": "the network gives other values when it is called again with the same inputs",
    "Failing": r"the network does not take inputs of shape \(1, 3, 8, 8\): not today",
    "Silent": r"the network does not take inputs of shape \(1, 3, 8, 8\): ",
    "Two": r"the network does not take inputs of shape \(1, 3, 8, 8\): .*missing 1 required positional argument: 'y'",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_cannot_be_measured_are_told_why(place, call, said, name):
    before = files(place)
    ended = call("measure", f"strange:{name}", "--data", "data", "--image-size", 8, "--out", "out")
    message = refused(ended)
    assert files(place) == before
    _told(NETWORKS[name], message)
    said("networks", name, message)


SCORED: dict[str, str] = {
    "three": "strange:three tells 3 classes apart, and data has 2 directories",
    "Failing": "strange:Failing does not take images of 8 x 8 pixels: not today",
    "Silent": "strange:Silent does not take images of 8 x 8 pixels: ",
    "Counting": "the network gives other values when it is called again",
    "half": r"layer 3 received values that are not finite",
}


@pytest.mark.parametrize(
    "command", [("measure", "--epsilon", 1), ("compress", "--params", 0.6)], ids=lambda its: its[0]
)
@pytest.mark.parametrize("name", SCORED)
def test_networks_whose_accuracy_cannot_be_taken_are_told_why(place, call, said, name, command):
    before = files(place)
    word, *how = command
    message = refused(call(word, f"strange:{name}", "--data", "data", "--image-size", 8, *how, "--out", "out"))
    assert files(place) == before
    _told(SCORED[name], message)
    said("networks", f"{name}, {word}", message)


def test_a_layer_that_no_input_reaches_is_left_out_with_the_reason(place, call):
    out = done(call("measure", "strange:Unreached", "--data", "data", "--image-size", 8))
    assert "never: its module is never called" in out
    assert "RankMe" not in out  # it would be the classifier


# Machines


@contextmanager
def _no_file_beyond(size: int) -> Iterator[None]:
    """A disk on which no file, nor shared memory, has room for more bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


MEASURE = ("measure", "strange:flat", "--data", "data", "--image-size", 8, "--out", "out")
COMPRESS = ("compress", "strange:flat", "--data", "data", "--image-size", 8, "--params", 0.6, "--out", "out")


@pytest.mark.parametrize(
    ("words", "room", "file"),
    [(MEASURE, 100, "utilization.json"), (MEASURE, 4000, "utilization.svg"), (COMPRESS, 4000, "network.safetensors")],
    ids=["json", "svg", "safetensors"],
)
def test_a_disk_that_fills_up_is_told_with_the_file_and_nothing_is_left(place, call, said, words, room, file):
    before = files(place)
    with _no_file_beyond(room):
        message = refused(call(*words))
    assert files(place) == before
    _told(rf"{file}.*|.*{file}", message)
    _told("File too large", message)
    said("machines", f"no file may be larger than {room} bytes ({words[0]})", message)


def _fails(error: int, name: str | None = None) -> Callable[..., Any]:
    def failing(*given: object, **how: object) -> Any:
        raise OSError(error, os.strerror(error), *([name] if name else []))

    return failing


CALLS: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "the disk is full when a file is made sure of": (
        os,
        "fsync",
        _fails(errno.ENOSPC),
        r"No space left on device: '.*utilization\.json'",
    ),
    "an error of the disk": (os, "fsync", _fails(errno.EIO), r"Input/output error: '.*utilization\.json'"),
    "a read-only disk": (tempfile, "mkdtemp", _fails(errno.EROFS, "reports"), "Read-only file system: 'reports'"),
    "too many open files": (tempfile, "mkstemp", _fails(errno.EMFILE, "utilization.json"), "Too many open files"),
    "a quota is used up": (Path, "replace", _fails(errno.EDQUOT), r"quota exceeded: '.*utilization\.json'"),
}


@pytest.mark.parametrize("wrong", CALLS)
def test_a_file_that_cannot_be_written_is_told_and_nothing_is_left(place, call, said, monkeypatch, wrong):
    module, name, failing, words = CALLS[wrong]
    before = files(place)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing)
        message = refused(call(*MEASURE))
    assert files(place) == before
    _told(words, message)
    said("machines", wrong, message)


def test_a_folder_of_results_that_cannot_be_written_to_is_told_first(place, call, said, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != place)
    message = refused(call(*MEASURE))
    _told(r"out cannot be made: .* cannot be written to$", message)
    said("machines", "a folder that cannot be written to", message)


def _decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are decoded by two processes, and not kept."""
    monkeypatch.setattr(folder, "Data", partial(Data, workers=2))


def test_where_no_process_can_be_started_it_is_told(place, call, said, monkeypatch):
    _decoding(monkeypatch)
    monkeypatch.setattr(os, "fork", _fails(errno.EAGAIN))
    message = refused(call(*MEASURE))
    _told(r"data: 2 processes cannot decode its images \(.*temporarily unavailable\): .*data\.workers to 0$", message)
    said("machines", "no process can be started", message)


def test_where_there_is_no_shared_memory_it_is_told(place, call, said, monkeypatch):
    _decoding(monkeypatch)
    monkeypatch.setattr(images, "PATIENCE", 2)
    with _no_file_beyond(100):
        message = refused(call(*MEASURE))
    _told(
        r"data: 2 processes cannot decode its images \(DataLoader timed out after 2 seconds\): .*data\.workers to 0$",
        message,
    )
    said("machines", "no shared memory", message)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "mps:3"])
def test_a_device_that_is_not_there_is_told_with_the_variable(place, call, said, monkeypatch, device):
    monkeypatch.setenv("UTILIZED_RANK_DEVICE", device)
    message = refused(call(*MEASURE))
    assert "UTILIZED_RANK_DEVICE: " in message
    assert device in message
    said("machines", f"UTILIZED_RANK_DEVICE={device}", message)


def test_a_cache_that_cannot_be_written_is_told(place, call, said, monkeypatch):
    (place / "cache").touch()
    monkeypatch.setenv("TORCH_HOME", str(place / "cache"))
    words = ("measure", "torchvision/shufflenet_v2_x0_5", "--data", "data", "--out", "out")
    message = refused(call(*words))
    _told("shufflenet_v2_x0_5.* cannot be downloaded", message)
    said("machines", "a cache that is no folder", message)


def test_one_thread_finds_what_two_find(place, call):
    found = {}
    for count in (1, 2):
        torch.set_num_threads(count)
        torch.manual_seed(0)  # the module's network has random weights
        found[count], _ = done(call(*MEASURE[:-2])).split("RankMe")  # sums of which differ in their last digits
    assert found[1] == found[2]
