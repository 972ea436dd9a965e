"""The README's own-images section, word for word: a folder, a study file of five lines, one command."""

import re
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML
from test_pipeline import ROOT, command, copied, started

from utilized_rank.base.files import read_json, read_table
from utilized_rank.base.store import Store
from utilized_rank.datasets import data
from utilized_rank.datasets.sources import DEBIAN
from utilized_rank.study.homes import load_study

README = (ROOT / "README.md").read_text().split("### Your own images")[1].split("\n## ")[0]
COLOURS = {"blue": (30, 60, 200), "green": (40, 180, 60), "red": (210, 50, 40)}
EACH = 20
QUICKER = [
    "runs.folder_resnet20.train.epochs=10",
    "+runs.folder_resnet20.train.batch_size=12",
    "runs.folder_resnet20.finetune.epochs=2",
    "decompose.sweep_points=2",
    "threads=1",
]


def picture(colour: tuple[int, int, int], draw: np.random.Generator) -> Image.Image:
    """A plain colour under noise, of a size of its own."""
    height, width = draw.integers(40, 130, 2)
    pixels = np.array(colour) + draw.normal(0, 25, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def own_images(folder: Path) -> None:
    """Three classes of 20 images, PNG and JPEG; one image is grey-scale, one transparent."""
    draw = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(EACH):
            image = picture(colour, draw)
            if (name, i) == ("blue", 0):
                image = image.convert("L")
            if (name, i) == ("red", 0):
                image.putalpha(Image.linear_gradient("L").resize(image.size))
            image.save(folder / name / (f"{i}.jpg" if i % 2 else f"{i}.png"))


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """What the README says, done: the images, the study file, the command (and what makes it quicker)."""
    folder = copied(tmp_path_factory.mktemp("folder"))
    where = re.search(r"dataset: ([\w/]+)", README)[1]
    own_images(folder / where / "train")
    file, block = re.search(r"`(conf/study/\w+\.yaml)`.*?```yaml\n(.*?)```", README, re.DOTALL).groups()
    assert len(block.splitlines()) == 5
    (folder / file).write_text(block)
    (study,) = re.findall(r"`make repro STUDY=(\w+)`", README)
    command(folder, "utilized-rank", "study", study)  # as make does, and then `dvc repro` of it
    pipeline, params = f"reports/{study}/dvc.yaml", f"reports/{study}/params.yaml"
    quicker = [word for change in QUICKER for word in ("--set-param", f"{params}:{change}")]
    output = command(folder, "dvc", "exp", "run", pipeline, *quicker)
    assert started(output)[-1] == f"{pipeline}:publish"
    # One image of the 12 in the search split is 8.3 points: the default tolerances are finer.
    assert "tolerances are 8.34 points in place of 1 and 2: one of the 12 search images is worth 8.33" in output
    return folder


@pytest.fixture
def store(project) -> Store:
    return Store("mine", project)


def test_the_report_of_the_readme_is_there_and_shows_the_network(project):
    index = re.search(r"the report is `([^`]+)`", README)[1]
    page = (project / index).read_text()
    assert "<h1>Utilized rank of trained networks: My images</h1>" in page
    assert "ResNet-20" in page
    for target in re.findall(r'(?:src|href)="([^"#]+)"', page):
        assert ((project / index).parent / target).is_file(), target
    assert "My images" in (project / "reports/index.html").read_text()


def test_the_study_is_the_folder_study_but_for_the_five_lines_and_the_changes(project):
    study = load_study(project / "reports/mine")
    assert (study.name, study.title, study.data.source, study.data.test) == ("mine", "My images", "folder", 0.2)
    assert study.measure.epsilons == []
    folder = YAML(typ="safe").load((ROOT / "conf/study/folder.yaml").read_text())
    assert study.runs.keys() == folder["runs"].keys()
    assert study.data.image_size == folder["data"]["image_size"]


def test_images_of_every_kind_are_split_evenly_by_class_and_each_is_in_one_split(store):
    dataset = data.load(store)
    assert dataset.classes == list(COLOURS)
    assert dataset.shape == (3, 64, 64)
    counts = {name: Counter(split.labels.tolist()) for name, split in dataset.splits.items()}
    shares = {"train": 12, "search": 4, "test": 4}
    assert counts == {name: dict.fromkeys(range(3), count) for name, count in shares.items()}
    splits = read_json(store.data("prepare", "splits.json"))
    assert sorted(chain.from_iterable(splits.values())) == list(range(3 * EACH))
    grey = [image for split in dataset.splits.values() for image in split.images if (image == image[:1]).all()]
    assert len(grey) == 1
    light = [split.images.float().mean((2, 3))[split.labels == 2] for split in dataset.splits.values()]
    assert sum(int((means.min(1).values > 80).sum()) for means in light) == 1  # the transparent one, on white


def test_the_network_learns_what_a_clear_colour_tells_and_is_measured_and_decomposed(store):
    result = read_json(store.report("results", "train-folder_resnet20.json"))
    assert (result["test_images"], result["search_images"]) == (12, 12)
    assert result["test_accuracy"] > 75
    mlu = read_json(store.report("results", "measure-folder_resnet20.json"))["mlu"]
    assert all(0 < used < 1 for used in mlu.values())
    tuned = read_table(store.report("results", "finetune-folder_resnet20.csv"))
    assert list(tuned.epsilon.dropna()) == [8.34]
    settings = read_table(store.report("tables", "table5-settings.csv")).set_index("parameter").value
    assert settings["found: tolerances"] == "[8.34]: by default [1.0, 2.0], none finer than one search image"


def test_an_experiment_in_a_folder_of_its_own_sees_images_that_are_decoded_when_they_are_needed(project):
    """As those of a queue: what git ignores is not there."""
    mine = (project / "conf/study/mine.yaml").read_text()
    large = mine.replace("name: mine", "name: large").replace("data: {", "data: {image_size: 72, ")
    (project / "conf/study/large.yaml").write_text(large)
    command(project, "utilized-rank", "study", "large")
    command(project, "git", "add", "conf/study/large.yaml", "reports/large")
    changes = ["--set-param", "reports/large/params.yaml:runs.folder_resnet20.train.epochs=1"]
    output = command(project, "dvc", "exp", "run", "--temp", "reports/large/dvc.yaml:train@folder_resnet20", *changes)
    assert [name.rpartition(":")[2] for name in started(output)] == ["check", "prepare", "train@folder_resnet20"]
    assert not (project / "data/large").exists()


@pytest.mark.parametrize(("study", "dataset"), [("fashion_mnist", "FashionMNIST"), ("cifar10", "CIFAR10")])
def test_a_source_out_of_reach_stops_the_first_stage_with_one_paragraph(tmp_path, monkeypatch, study, dataset):
    """No network, no files; and where Debian's package is installed, code that looks for it elsewhere."""
    folder = copied(tmp_path)
    code = folder / "src/utilized_rank/datasets/sources.py"
    assert str(DEBIAN) in code.read_text()
    code.write_text(code.read_text().replace(str(DEBIAN), str(tmp_path / "nowhere")))
    monkeypatch.setenv("PYTHONPATH", str(folder / "src"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    command(folder, "utilized-rank", "study", study)
    output = command(folder, "dvc", "repro", f"reports/{study}/dvc.yaml", ok=False)
    assert started(output)[-1] == f"reports/{study}/dvc.yaml:prepare"
    (told,) = [line for line in output.splitlines() if f"{dataset} cannot be reached" in line]
    ways = ["an image folder", "torchvision's files", "a download by torchvision", "Connect to a network once"]
    ways += ["Debian's package dataset-fashion-mnist (it is not installed)"] if study == "fashion_mnist" else []
    assert all(way in told for way in ways)
    assert "Traceback" not in output
    assert not [path for path in folder.glob("data/raw/**/*") if path.is_file()]
