import re
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML as Yaml

from utilized_rank.base.files import write_json
from utilized_rank.base.sections import StudyError
from utilized_rank.base.store import main_root
from utilized_rank.stages.layout import check_pipeline, lay_out
from utilized_rank.study.homes import compose, load_study, project_root, study_home
from utilized_rank.study.opened import open_study

ROOT = Path(__file__).parents[1]
OWN = re.search(r"```yaml\n(# @package _global_.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
STUDIES = sorted(path.stem for path in (ROOT / "conf" / "study").glob("*.yaml"))
YAML = """
name: toy
title: Toy
data: {source: sklearn, dataset: digits, image_size: 32, search: 0.2, test: 2e-1}
runs:
  vgg11:
    label: VGG11
    model: {architecture: vgg11}
    train: {epochs: 1, lr: 1e-3}
    finetune: {epochs: 1, lr: 5e-4}
measure: {calibration_images: 10, epsilons: [1]}
decompose: {methods: [svd], finetuned: [svd]}
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "params.yaml").write_text(YAML)
    (tmp_path / "conf").mkdir()
    return tmp_path


@pytest.fixture
def laid_out(tmp_path):
    """A project with a study of an image folder beside the default one."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "conf" / "study" / "mine.yaml").write_text(OWN)
    lay_out(tmp_path, "mine")
    return tmp_path


def test_scientific_notation_is_a_number_as_in_dvc(project):
    study = load_study(project)
    assert study.runs["vgg11"].train.lr == 0.001
    assert study.data.test == 0.2


def test_the_project_is_found_from_a_folder_inside_it(project, monkeypatch):
    (project / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(project / "deep" / "er")
    assert project_root() == project
    assert study_home(project) == project


def test_outside_of_a_project_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError, match=r"no project in .* or above it"):
        project_root()


def test_a_missing_file_is_a_study_error(tmp_path):
    with pytest.raises(StudyError, match=r"params\.yaml cannot be read"):
        load_study(tmp_path)


@pytest.mark.parametrize("text", ["runs: [", "seed: 1\nseed: 2\n"], ids=["syntax", "key given twice"])
def test_broken_yaml_is_a_study_error(project, text):
    (project / "params.yaml").write_text(text)
    with pytest.raises(StudyError, match=r"params\.yaml is not valid YAML"):
        load_study(project)


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("", "digits"),
        ("notebooks", "digits"),
        ("reports/mine", "mine"),
        ("data/mine/executed", "mine"),
        ("data", "digits"),
    ],
)
def test_the_working_directory_says_which_study_is_meant(laid_out, monkeypatch, where, name):
    (laid_out / where).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(laid_out / where)
    study, store = open_study()
    assert (study.name, store.study, store.root) == (name, name, laid_out)
    assert open_study("mine")[0].name == "mine"
    assert open_study("digits")[0].name == "digits"


def test_a_study_that_is_not_laid_out_or_not_there_is_named(laid_out):
    with pytest.raises(StudyError, match=r"study cifar10 is not laid out yet: run `utilized-rank study cifar10`"):
        study_home(laid_out, "cifar10")
    with pytest.raises(StudyError, match=r"there is no study 'mime'; did you mean 'mine'\?"):
        study_home(laid_out, "mime")


def test_a_home_holds_the_parameters_and_a_copy_of_the_pipeline(laid_out):
    home = laid_out / "reports" / "mine"
    assert sorted(path.name for path in home.iterdir()) == ["dvc.yaml", "params.yaml"]
    assert (home / "dvc.yaml").read_bytes() == (ROOT / "dvc.yaml").read_bytes()
    assert load_study(home).model_dump() == compose("mine", laid_out)[0].model_dump()
    values = Yaml(typ="safe").load((home / "params.yaml").read_text())
    assert (home / values["root"]).resolve() == laid_out.resolve()
    assert laid_out / values["params"] == home / "params.yaml"


def test_laying_out_again_composes_anew_and_says_what_changed(laid_out):
    before = (laid_out / "reports" / "mine" / "params.yaml").read_bytes()
    assert lay_out(laid_out, "mine") == (laid_out / "reports" / "mine", [])
    assert (laid_out / "reports" / "mine" / "params.yaml").read_bytes() == before
    (laid_out / "conf" / "study" / "mine.yaml").write_text(OWN + "seed: 7\n")
    assert lay_out(laid_out, "mine")[1] == ["seed: 0 -> 7"]
    assert load_study(laid_out / "reports" / "mine").seed == 7


def test_the_default_study_is_laid_out_at_the_root(laid_out):
    before = (laid_out / "params.yaml").read_bytes()
    assert lay_out(laid_out, "digits") == (laid_out, [])
    assert (laid_out / "params.yaml").read_bytes() == before
    assert not (laid_out / "reports" / "digits").exists()


def test_a_parameter_set_by_dvc_and_set_back_leaves_no_trace(laid_out):
    from dvc.utils.hydra import apply_overrides

    for path in (laid_out / "params.yaml", laid_out / "reports" / "mine" / "params.yaml"):
        before = path.read_bytes()
        apply_overrides(str(path), ["seed=5"])
        assert path.read_bytes() != before
        apply_overrides(str(path), ["seed=0"])
        assert path.read_bytes() == before


def test_a_copy_of_another_study_under_a_new_name_is_refused(laid_out, monkeypatch):
    shutil.copytree(laid_out / "reports" / "mine", laid_out / "reports" / "other")
    monkeypatch.chdir(laid_out)
    with pytest.raises(
        StudyError, match=r"reports/other/params\.yaml says name: mine .*: run `utilized-rank study other`"
    ):
        open_study("other")


def test_a_study_file_that_was_copied_and_not_renamed_is_refused(laid_out):
    shutil.copy(laid_out / "conf/study/mine.yaml", laid_out / "conf/study/other.yaml")
    with pytest.raises(StudyError, match=r"conf/study/other\.yaml says name: mine, but a study is named as its file"):
        lay_out(laid_out, "other")
    assert not (laid_out / "reports" / "other").exists()


def test_a_study_file_that_hydra_cannot_read_is_named(laid_out):
    (laid_out / "conf/study/mine.yaml").write_text("defaults: [nowhere, _self_]\n")
    with pytest.raises(StudyError, match=r"conf/study/mine\.yaml cannot be composed"):
        compose("mine", laid_out)


def test_a_pipeline_that_is_not_the_projects_any_more_is_refused(laid_out):
    check_pipeline(laid_out, laid_out)
    check_pipeline(laid_out, laid_out / "reports" / "mine")
    (laid_out / "dvc.yaml").write_text("stages: {}\n")
    with pytest.raises(StudyError, match=r"reports/mine/dvc\.yaml is not as dvc\.yaml: run `utilized-rank study mine`"):
        check_pipeline(laid_out, laid_out / "reports" / "mine")


@pytest.mark.parametrize("named", [True, False])
def test_tolerances_that_nobody_named_are_there_as_soon_as_images_are_split(laid_out, monkeypatch, named):
    monkeypatch.chdir(laid_out / "reports" / "mine")
    if named:
        (laid_out / "conf/study/mine.yaml").write_text(OWN + "measure: {epsilons: [5.0]}\n")
        lay_out(laid_out, "mine")
    assert open_study()[0].measure.epsilons == ([5.0] if named else [])
    splits = {"train": [], "search": [*range(61)], "test": [], "test_searched": [*range(50)]}
    write_json(laid_out / "data/mine/prepare/splits.json", splits)
    measure = open_study()[0].measure
    assert (measure.epsilons, measure.by_default) == (([5.0], False) if named else ([2.0], True))


def test_an_experiment_in_a_folder_of_its_own_belongs_to_the_project_that_dvc_was_called_in(tmp_path, monkeypatch):
    alone = tmp_path / ".dvc" / "tmp" / "exps" / "standalone" / "a"
    assert main_root(alone) == alone
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert main_root(alone) == tmp_path
    assert main_root(tmp_path) == tmp_path
    assert main_root(tmp_path / "elsewhere") == tmp_path / "elsewhere"


@pytest.mark.parametrize("name", STUDIES)
def test_every_path_of_a_study_lies_inside_the_project(name):
    study = compose(name, ROOT)[0]
    paths = [study.data.dataset] if study.data.source == "folder" else []
    paths += [made.file for made in study.pretrained.values() if made.file is not None]
    for path in paths:
        assert not Path(path).is_absolute()
        assert (ROOT / path).resolve().is_relative_to((ROOT / "data" / "raw").resolve()), path
    assert all(made.url for made in study.pretrained.values() if made.file is not None)


def test_every_study_with_a_home_is_as_it_is_composed_and_run_by_the_one_pipeline():
    homes = [ROOT, *(path.parent for path in ROOT.glob("reports/*/params.yaml"))]
    for home in homes:
        name = load_study(home).name
        assert (home / "params.yaml").read_text() == compose(name, ROOT, home.relative_to(ROOT))[1], (
            f"utilized-rank study {name}"
        )
        check_pipeline(ROOT, home)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_of_the_project_is_valid_and_bears_its_files_name(name):
    study = compose(name, ROOT)[0]
    assert study.name == name
    assert study.pretrained.keys() >= {run.pretrained for run in study.runs.values()} - {"none"}
    assert {run.pretrained for run in study.runs.values()} >= study.pretrained.keys()  # none is made in vain


def test_a_study_is_composed_whatever_params_yaml_holds(tmp_path):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "params.yaml").write_text("name: another")
    assert compose("digits", tmp_path)[0] == compose("digits", ROOT)[0]
    assert (tmp_path / "params.yaml").read_text() == "name: another"


def test_a_study_that_does_not_exist_suggests_one_that_does():
    with pytest.raises(StudyError, match=r"^conf/study has no 'fashion_mnst'; did you mean 'fashion_mnist'\?$"):
        compose("fashion_mnst", ROOT)[0]
    with pytest.raises(StudyError, match=re.escape(f"conf/study has no 'xyzzy' (known: {', '.join(STUDIES)})")):
        compose("xyzzy", ROOT)[0]


@pytest.mark.parametrize("test", [0.2, None], ids=["a part of the images", "test images of its own"])
def test_the_five_lines_of_the_readme_are_a_study(tmp_path, test):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    lines = OWN if test is not None else OWN.replace(", test: 0.2", "")
    assert (len(OWN.splitlines()), lines == OWN) == (5, test is not None)
    (tmp_path / "conf" / "study" / "mine.yaml").write_text(lines)
    mine, folder = compose("mine", tmp_path)[0], compose("folder", tmp_path)[0]
    own = {"name": "mine", "title": "My images"}
    data = folder.data.model_copy(update={"dataset": "data/raw/mine", "test": test})
    assert mine == folder.model_copy(update=own | {"data": data})


def test_a_study_file_overrides_networks_and_says_what_is_wrong_with_it(tmp_path):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    file = tmp_path / "conf" / "study" / "mine.yaml"
    model = "runs: {folder_resnet20: {model: {architecture: timm/resnet18}}}\n"
    file.write_text(OWN + model)
    assert compose("mine", tmp_path)[0].runs["folder_resnet20"].model.architecture == "timm/resnet18"
    file.write_text(OWN.replace("test: 0.2", "test: 1.2") + model.replace("timm/resnet18", "resnet18"))
    with pytest.raises(StudyError) as caught:
        compose("mine", tmp_path)[0]
    places = sorted(line.split(": ")[1] for line in str(caught.value).splitlines())
    assert places == ["data.test", "runs.folder_resnet20.model.architecture"]
