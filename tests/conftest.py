"""Small networks, images and parameters that several test files share."""

import copy
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from PIL import Image
from running import call, folder_study, tiny_project  # noqa: F401  (fixtures)
from torch import Tensor, nn

from utilized_rank.base.files import write_json, write_table
from utilized_rank.base.store import Store
from utilized_rank.datasets.data import Dataset
from utilized_rank.datasets.images import Split
from utilized_rank.networks.each import Each, Work
from utilized_rank.study.config import Study, parse_study
from utilized_rank.study.sections import Frontier
from utilized_rank.training import models
from utilized_rank.training.sections import Model

# The same examples each time, however slow the machine.
settings.register_profile("seeded", deadline=None, derandomize=True)
settings.load_profile("seeded")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Side by side, a file's tests stay together, as they share what it makes; so do those of whole studies."""
    for item in items:
        whole = "tiny_project" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("studies" if whole else item.path.stem))
        if {"said", "record_property"} & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.told)


SHAPE, CLASSES = (3, 8, 8), 5

PARAMETERS = {
    "name": "toy",
    "title": "Toy",
    "data": {
        "source": "sklearn",
        "dataset": "digits",
        "image_size": 32,
        "search": 0.2,
        "test": 0.2,
    },
    "pretrained": {"simclr_vit": {"method": "simclr", "model": {"architecture": "vit"}, "epochs": 2}},
    "runs": {
        "vgg11": {
            "label": "VGG11",
            "model": {"architecture": "vgg11"},
            "train": {"epochs": 2},
            "finetune": {"epochs": 1, "lr": 0.01},
        },
        "vit_linear": {
            "label": "ViT",
            "model": {"architecture": "vit"},
            "pretrained": "simclr_vit",
            "train": {"method": "linear"},
            "finetune": {"epochs": 1, "lr": 0.01},
        },
    },
    "measure": {"calibration_images": 100, "epsilons": [0.0, 1.0]},
    "decompose": {"methods": ["projection", "optimal", "svd"], "finetuned": ["optimal"]},
    "comparisons": {
        "vit": {"label": "ViT", "supervised": "vit_linear", "linear": "vit_linear", "finetuned": "vit_linear"}
    },
}


@pytest.fixture
def parameters() -> dict:
    """The content of a valid params.yaml, to be changed at will."""
    return copy.deepcopy(PARAMETERS)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, headless: one for all, as a process has room for one of playwright's loops."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium: apt install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Commands set those of their study: of the tests after them, side by side, each would be slower by factors."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def said(
    record_property: Callable[[str, object], None], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str], None]:
    """Records a kind of mistake, what was wrong, and what is said of it, for ``reliability.messages``."""
    place = re.compile(rf"{re.escape(str(tmp_path_factory.getbasetemp()))}/[^/\s':;,)]+/?|\.\w+\.\w{{8}}/")

    def record(kind: str, wrong: str, message: str) -> None:
        assert message.strip()
        assert "Traceback" not in message
        shown = place.sub(lambda found: "" if found[0].endswith("/") else ".", message)
        for name, value in (("kind", kind), ("wrong", wrong), ("message", shown)):
            record_property(name, value)

    return record


@pytest.fixture
def elsewhere() -> Each:
    """An engine that goes from the last item to the first, each by a maker and with copies of its own."""

    def each(make: Callable[[Any], Callable[[Any], Any]], shared: Any) -> Work[Any, Any]:
        def work(items: Mapping[str, Any], title: str, unit: str) -> Iterator[tuple[str, Any]]:
            for name in reversed(items):
                yield name, make(copy.deepcopy(shared))(copy.deepcopy(items[name]))

        return work

    return each


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Residual(nn.Module):
    """A shortcut around two convolutions, with in-place ReLUs if asked for."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        out = self.conv2(self.relu(self.conv1(x)))
        return self.head(self.relu(out + x).mean((2, 3)))


class InPlaceOnShortcut(Residual):
    """The shortcut is changed in place after a convolution read it: running on from there twice differs."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.conv1(x)
        x = x.add_(1)
        return self.head(self.relu(self.conv2(self.relu(out)) + x).mean((2, 3)))


class DataDependent(Residual):
    """Control flow on the images' values, which torch.fx cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() > -1e9 else -x)


class Shared(nn.Module):
    """One linear layer called twice, and the same module under a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3 * 8 * 8, 12)
        self.block = nn.Linear(12, 12)
        self.alias = self.block
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1)).relu()
        return self.head(self.alias(self.block(x).relu()).relu())


def _model(**model: object) -> Callable[[], nn.Module]:
    return lambda: models.build(Model(**model), SHAPE, CLASSES)


class PooledVGG(nn.Module):
    """VGG11 on images enlarged to the size that its five poolings need."""

    def __init__(self) -> None:
        super().__init__()
        self.vgg = models.build(Model(architecture="vgg11", width=0.1), (3, 32, 32), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.vgg(F.interpolate(x, scale_factor=4.0))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "in_place": lambda: Residual(inplace=True),
    "in_place_on_shortcut": InPlaceOnShortcut,
    "data_dependent": DataDependent,
    "shared": Shared,
    "vgg11": PooledVGG,
    "resnet20": _model(architecture="resnet20", width=0.25),
    "vit": _model(architecture="vit", dim=24, depth=2, heads=3, patch_size=4),
}


@pytest.fixture
def make(images: Tensor) -> Callable[[str], nn.Module]:
    """A seeded network by its name in ``NETWORKS``, in evaluation mode."""

    def named(name: str) -> nn.Module:
        torch.manual_seed(0)
        network = NETWORKS[name]().eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):  # as after some training: no longer the identity
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
        with torch.no_grad():  # no class ahead of the others on average: predictions differ
            models.classifier(network).bias -= network(images).mean(0)
        return network

    return named


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    """(70, 3, 8, 8), every channel with its own mean."""
    return torch.randn(70, *SHAPE, generator=generator) + torch.tensor([0.5, -1.0, 2.0]).view(3, 1, 1)


CONVOLUTIONS: dict[str, dict] = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "1x1 strided": {"kernel_size": 1, "stride": 2},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "rectangular": {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 2), "dilation": (2, 1)},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "same": {"kernel_size": 3, "padding": "same"},
    "same, even kernel": {"kernel_size": (2, 4), "padding": "same"},
    "same, dilated": {"kernel_size": (3, 2), "padding": "same", "dilation": (2, 3)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "circular": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 2},
    "same, reflect": {"kernel_size": (4, 3), "padding": "same", "padding_mode": "reflect"},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "grouped, strided, dilated": {"kernel_size": 2, "stride": 2, "dilation": 2, "groups": 2, "bias": False},
    "grouped, same, circular": {
        "kernel_size": (3, 2),
        "padding": "same",
        "padding_mode": "circular",
        "groups": 2,
    },
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
}


@pytest.fixture(params=CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def convolution(request: pytest.FixtureRequest) -> nn.Conv2d:
    """4 channels to 8, one of every kind."""
    torch.manual_seed(0)
    return nn.Conv2d(4, 8, **request.param)


@pytest.fixture
def maps(generator: torch.Generator) -> Tensor:
    """What flows into ``convolution``, (3, 4, 7, 6)."""
    return torch.randn(3, 4, 7, 6, generator=generator) + 0.3


def _amounts(size: int, dilation: int, padding: int | str) -> tuple[int, int]:
    """Pixels of padding before and after, as torch documents them."""
    total = dilation * (size - 1) if padding == "same" else 0 if padding == "valid" else 2 * padding
    return total // 2, total - total // 2


@pytest.fixture
def patches_by_loop() -> Callable[[nn.Conv2d, Tensor], np.ndarray]:
    """The patches of a convolution, pixel by pixel, from the definition: (g, N, m), float64."""
    modes = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}

    def patches(conv: nn.Conv2d, inputs: Tensor) -> np.ndarray:
        (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
        ph, pw = (conv.padding,) * 2 if isinstance(conv.padding, str) else conv.padding
        around = ((0, 0), (0, 0), _amounts(kh, dh, ph), _amounts(kw, dw, pw))
        x = np.pad(inputs.double().numpy(), around, mode=modes[conv.padding_mode])
        count, channels, height, width = x.shape
        per_group = channels // conv.groups
        tops = range(0, height - dh * (kh - 1), sh)
        lefts = range(0, width - dw * (kw - 1), sw)
        return np.array(
            [
                [
                    [
                        x[image, group * per_group + c, top + dh * i, left + dw * j]
                        for c, i, j in product(range(per_group), range(kh), range(kw))
                    ]
                    for image, top, left in product(range(count), tops, lefts)
                ]
                for group in range(conv.groups)
            ]
        )

    return patches


def toy_dataset(seed: int = 0) -> Dataset:
    """Grey 8 x 8 images of two classes, told apart by which half is brighter."""
    generator = torch.Generator().manual_seed(seed)

    def split(count: int) -> Split:
        labels = torch.arange(count) % 2
        pixels = torch.randint(0, 100, (count, 1, 8, 8), generator=generator)
        pixels[labels == 0, :, :4] += 80
        pixels[labels == 1, :, 4:] += 80
        return Split(pixels.byte(), labels)

    splits = {"train": split(96), "search": split(40), "test": split(40)}
    return Dataset(splits, ["up", "down"], [0.35], [0.2])


@pytest.fixture
def dataset() -> Dataset:
    return toy_dataset()


@pytest.fixture
def studied(tmp_path, parameters) -> tuple[Study, Store]:
    return toy_study(tmp_path, parameters)


def toy_study(root: Path, parameters: dict) -> tuple[Study, Store]:
    """A study of five networks, two of them repeats, and its result files: every number in them drawn at random."""
    runs, toy_vit = parameters["runs"], parameters["runs"]["vit_linear"]
    runs |= {
        "vgg11_again": runs["vgg11"] | {"label": "VGG11, again"},
        "vit": {**toy_vit, "label": "ViT & labels", "pretrained": "none", "train": {}},
        "vit_finetuned": {**toy_vit, "label": "ViT, tuned", "train": {"epochs": 3}},
    }
    kinds = {"supervised": "vit", "linear": "vit_linear", "finetuned": "vit_finetuned"}
    parameters["comparisons"]["vit"] |= kinds
    parameters["repeats"] = {"vgg11": {"label": "VGG11", "runs": ["vgg11", "vgg11_again"]}}
    parameters["frontier"] = {
        "vgg11": {
            "methods": ["svd", "compensated"],
            "ranks": [{"search": "joint", "epsilon": 1}, {"budget": {"params": 0.5}, "finetuned": ["compensated"]}],
            "finetune": {"epochs": 1, "lr": 0.01, "seeds": 3},
        }
    }
    study = parse_study(parameters)
    store, draw = Store(study.name, root), np.random.default_rng(0)
    for key in study.runs:
        trained, measured, layers, decomposed, tuned = _results(study, draw)
        write_json(store.report("results", f"train-{key}.json"), trained)
        write_json(store.report("results", f"measure-{key}.json"), measured)
        write_table(store.report("results", f"measure-{key}.csv"), layers)
        write_table(store.report("results", f"decompose-{key}.csv"), decomposed)
        write_table(store.report("results", f"finetune-{key}.csv"), tuned)
    for key, asked in study.frontier.items():
        write_table(store.report("results", f"frontier-{key}.csv"), _frontier(asked, draw))
    return study, store


def _results(study: Study, draw: np.random.Generator) -> tuple:
    """What train, measure, decompose and finetune write for one run."""
    epsilons, methods = study.measure.epsilons, study.decompose.methods
    trained = {
        "test_accuracy": draw.uniform(50, 100),
        "test_images": 450,
        "search_accuracy": draw.uniform(50, 100),
        "search_images": 449,
        "parameters": int(draw.integers(10**4, 10**6)),
        "flops": int(draw.integers(10**6, 10**8)),
    }
    names = [f"blocks.{i}" for i in range(7)]
    layers = pd.DataFrame(
        [
            {
                "layer": name,
                "m": 40,
                "n": 32,
                "groups": 1,
                "epsilon": epsilon,
                "k_s": r + 1,
                "k_t": r,
                "k_s_alone": r + 1,
                "k_t_alone": r,
                "r": r,
                "utilization": r / 32,
            }
            for epsilon in epsilons
            for name, r in zip(names, draw.integers(1, 33, len(names)).tolist(), strict=True)
        ]
    )
    measured = {
        "mlu": {f"{epsilon:g}": layers[layers.epsilon == epsilon].utilization.mean() for epsilon in epsilons},
        "rankme": draw.uniform(1, 32),
        "layers_counted": len(names),
        "left_out": {"depthwise": "its groups are single channels"},
        "search_precision": "bfloat16",
        "calibration_images": 100,
        "search_images": 449,
        "evaluations": int(draw.integers(100, 999)),
        "passes_of_the_search_split": draw.uniform(1, 99),
    }

    def assessed(form: str, method: str, epsilon: float | None) -> dict:
        return {"form": form, "method": method, "epsilon": epsilon, **_assessment(draw)}

    decomposed = [assessed("original", "dense", None)]
    for epsilon in epsilons:
        decomposed += [assessed("projected", "projection", epsilon)]
        decomposed += [assessed("decomposed", method, epsilon) for method in methods]
    tuned = [assessed("fine-tuned", "dense", None)]
    tuned += [assessed("fine-tuned", method, e) for e in epsilons for method in study.decompose.finetuned]
    return trained, measured, layers, pd.DataFrame(decomposed), pd.DataFrame(tuned)


def _assessment(draw: np.random.Generator) -> dict:
    """What ``decompose.assess`` finds of a network."""
    low, change, high = np.sort(draw.uniform(-9, 3, 3))
    interval = {"change": change, "change_low": low, "change_high": high}
    costs = {"parameters": int(draw.integers(10**3, 10**6)), "flops": int(draw.integers(10**5, 10**8))}
    return {"accuracy": draw.uniform(50, 100), "images": 450, **interval, **costs}


def _frontier(asked: Frontier, draw: np.random.Generator) -> pd.DataFrame:
    """What the frontier writes for one run."""
    made = [("original", "dense", "all", None)]
    made += [("decomposed", method, policy.name, None) for policy in asked.ranks for method in asked.methods]
    tuned = [("dense", "all"), *((method, policy.name) for policy in asked.ranks for method in policy.finetuned)]
    made += [("fine-tuned", *about, seed) for about in tuned for seed in range(asked.finetune.seeds)]
    rows = []
    for form, method, ranks, seed in made:
        about = {"form": form, "method": method, "ranks": ranks}
        beside = {"lr": 0.01, "seed": seed} if form == "fine-tuned" else {"search_accuracy": draw.uniform(50, 100)}
        rows.append(about | _assessment(draw) | beside)
    return pd.DataFrame(rows).astype({"seed": "Int64"})


def _kinds(picture: Image.Image) -> dict[str, tuple[Image.Image, dict]]:
    """One picture in every form that a file may have: by the file's name, what is saved and how."""
    grey = picture.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    palette = picture.quantize(8)
    last = palette.getpixel((picture.width - 1, picture.height - 1))
    faded = picture.copy()
    faded.putalpha(Image.linear_gradient("L").resize(picture.size))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned a quarter clockwise
    return {
        "colour.png": (picture, {}),
        "colour.jpg": (picture, {"quality": 95}),
        "grey.png": (grey, {}),
        "grey.jpg": (grey, {"quality": 95}),
        "deep.png": (deep, {}),
        "palette.png": (palette, {"transparency": last}),
        "faded.png": (faded, {}),
        "turned.jpg": (picture.transpose(Image.Transpose.ROTATE_90), {"exif": turned, "quality": 95}),
    }


@pytest.fixture
def kinds() -> Callable[[Image.Image], dict[str, tuple[Image.Image, dict]]]:
    """Gives one picture in every form that a file may have: by the file's name, what is saved and how."""
    return _kinds


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes so many images of each class under a part of data/raw/fruit, no two of one size; gives that folder."""
    draw = np.random.default_rng(0)

    def write(part: str = "train", folder: str = "data/raw/fruit", **counts: int) -> Path:
        root = tmp_path / folder
        for name, count in counts.items():
            (root / part / name).mkdir(parents=True)
            for i, kind in zip(range(count), cycle(_kinds(Image.new("RGB", (8, 8)))), strict=False):
                pixels = draw.integers(0, 256, (*draw.integers(4, 12, 2), 3)).astype(np.uint8)
                size = (40 + 3 * i, 100 - 2 * i)
                saved, how = _kinds(Image.fromarray(pixels).resize(size))[kind]
                saved.save(root / part / name / f"{i:03d}{Path(kind).suffix}", **how)
        return root

    return write
