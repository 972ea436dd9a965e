import hashlib
import json
from pathlib import Path

import pytest
import torch

from utilized_rank.base.files import file_hash
from utilized_rank.study.config import parse_study
from utilized_rank.study.provenance import parameter_hash, processor, provenance, tree_hash


@pytest.fixture
def project(tmp_path):
    """A project's code and one file of data."""
    for name in ("src/package/a.py", "src/b.py", "data/toy/notebooks/1_prepare.ipynb", "data/digits.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.fixture
def record(project, parameters):
    """A function that gives the project's record as it then is."""
    return lambda: provenance(parse_study(parameters), [project / "data" / "digits.bin"], project)


def test_the_hash_of_a_file_is_the_sha256_of_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"\0abc" * 100_000)
    assert file_hash(tmp_path / "a") == hashlib.sha256(b"\0abc" * 100_000).hexdigest()


def test_the_hash_of_a_tree_does_not_depend_on_order_or_place(project, tmp_path_factory):
    paths = [project / "src" / "b.py", project / "src" / "package" / "a.py"]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "src" / "package").mkdir(parents=True)
    copies = [elsewhere / path.relative_to(project) for path in paths]
    for path, copy in zip(paths, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    assert tree_hash(paths, project) == tree_hash(copies[::-1], elsewhere)


def test_the_hash_of_a_tree_depends_on_contents_and_names(project):
    paths = [project / "src" / "b.py", project / "data" / "digits.bin"]
    before = tree_hash(paths, project)
    paths[0].write_text("changed")
    changed = tree_hash(paths, project)
    renamed = tree_hash([paths[0].rename(project / "src" / "c.py"), paths[1]], project)
    assert len({before, changed, renamed}) == 3


def test_parameters_spelled_out_hash_as_their_defaults(parameters):
    before = parameter_hash(parse_study(parameters))
    parameters["seed"] = 0
    parameters["runs"]["vgg11"]["train"] |= {"lr": 1e-3, "augmentation": {}}
    assert parameter_hash(parse_study(parameters)) == before
    parameters["runs"]["vgg11"]["train"]["lr"] = 2e-3
    assert parameter_hash(parse_study(parameters)) != before


def test_the_record_is_json_and_the_same_each_time(record):
    assert json.loads(json.dumps(record())) == record()
    assert record()["packages"].keys() >= {"torch", "numpy", "timm"}
    assert record()["processor"] == processor() != ""


@pytest.mark.parametrize(
    ("changed", "entry"),
    [
        ("src/package/a.py", "code"),
        ("data/toy/notebooks/1_prepare.ipynb", "code"),
        ("data/digits.bin", "data"),
    ],
)
def test_a_change_of_code_or_data_shows_in_its_entry_alone(project, record, changed, entry):
    before = record()
    (project / changed).write_text("changed")
    assert [key for key, value in record().items() if value != before[key]] == [entry]


def test_a_change_of_parameters_shows(record, parameters):
    before = record()
    parameters["seed"] = 7
    assert [key for key, value in record().items() if value != before[key]] == ["parameters", "seed"]


@pytest.mark.parametrize(("able", "auto"), [(True, "bfloat16"), (False, "float32")])
def test_the_record_names_the_precision_of_each_part_as_it_is_on_this_processor(
    record, parameters, monkeypatch, able, auto
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": able}, raising=False)
    parameters["precision"], parameters["measure"]["precision"] = "float32", "auto"
    expected = {"training": "float32", "evaluation": "float32", "sums of second moments": "float64"}
    assert record()["precision"] == {**expected, "rank search": auto}
    parameters["precision"], parameters["measure"]["precision"] = "auto", "bfloat16"
    assert record()["precision"] == {**expected, "training": auto, "rank search": "bfloat16"}


def test_data_may_be_a_link_to_a_cache_elsewhere(project, record, tmp_path_factory):
    """As DVC leaves it where its cache has type symlink."""
    before = record()
    cached = tmp_path_factory.mktemp("cache") / "0123abcd"
    path = project / "data" / "digits.bin"
    path.rename(cached)
    path.symlink_to(cached)
    assert record() == before


def test_a_relative_root_gives_the_same_record(project, record, parameters, monkeypatch):
    expected = record()
    monkeypatch.chdir(project)
    assert provenance(parse_study(parameters), [Path("data/digits.bin")], Path()) == expected
