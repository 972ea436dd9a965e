"""The README's own-images section, word for word: a folder, a study file of five lines, one command."""

import re
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from running import COLOURS, EACH, README, ROOT, command, copied, started

from utilized_rank.base.files import read_json, read_table
from utilized_rank.base.store import Store
from utilized_rank.datasets import data
from utilized_rank.datasets.sources import DEBIAN
from utilized_rank.study.homes import load_study


@pytest.fixture(scope="module")
def project(tiny_project, folder_study) -> Path:
    return tiny_project


@pytest.fixture
def store(project) -> Store:
    return Store("mine", project)


def test_the_report_of_the_readme_is_there_and_shows_the_network(project):
    index = re.search(r"the report is `([^`]+)`", README)[1]
    page = (project / index).read_text()
    assert "<h1>Utilized rank of trained networks: My images</h1>" in page
    assert "ResNet-20" in page
    unscripted = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    for target in re.findall(r'(?:src|href)="([^"#]+)"', unscripted):
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
    command(project, "git", "rm", "-r", "--force", "--quiet", "conf/study/large.yaml", "reports/large")


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
