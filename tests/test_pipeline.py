"""The real pipeline, DVC and papermill and all, on a shrunken study."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import nbformat
import pytest
from dvc.utils.serialize import dump_yaml
from ruamel.yaml import YAML

from utilized_rank.base.files import read_json, read_table
from utilized_rank.report import overview
from utilized_rank.report.figures import style
from utilized_rank.study.config import parse_study

ROOT = Path(__file__).parents[1]
VGG = {"architecture": "vgg11", "width": 0.0625}
TUNE = {"epochs": 2, "lr": 1e-3}
STUDY = {
    "name": "tiny",
    "title": "a shrunken study",
    "threads": 1,
    "data": {
        "source": "sklearn",
        "dataset": "digits",
        "image_size": 32,
        "search": 0.25,
        "test": 0.25,
        "limit": 64,
    },
    "pretrained": {"tiny_simclr": {"method": "simclr", "model": VGG, "epochs": 2, "batch_size": 16}},
    "runs": {
        "tiny_vgg": {"label": "VGG11", "model": VGG, "train": TUNE, "finetune": TUNE, "pretrained": "none"},
        "tiny_ssl": {
            "label": "VGG11, SSL",
            "model": VGG,
            "pretrained": "tiny_simclr",
            "train": {"method": "linear", **TUNE},
            "finetune": TUNE,
        },
    },
    "measure": {"calibration_images": 32, "epsilons": [7.0]},
    "decompose": {"methods": ["projection", "optimal", "svd"], "finetuned": ["optimal"], "sweep_points": 2},
    "frontier": {
        "tiny_vgg": {
            "methods": ["optimal", "compensated"],
            "ranks": [
                {"search": "cumulative", "epsilon": 7.0},
                {"search": "joint", "epsilon": 7.0},
                {"budget": {"params": 0.5}, "finetuned": ["compensated"]},
            ],
            "images": 32,
            "finetune": TUNE | {"lrs": [1e-2], "seeds": 2, "distillation": 0.5},
            "scratch": TUNE,
        }
    },
    "comparisons": {
        "tiny": {"label": "VGG11", "supervised": "tiny_vgg", "linear": "tiny_ssl", "finetuned": "tiny_ssl"}
    },
    "notes": ["Cut: two epochs."],
}


# DVC wants every parameter that a stage names to stand in params.yaml, defaults included.
STUDY = parse_study(STUDY).model_dump()


def with_run(name: str, **changes: object) -> dict:
    """The study with parts of one run replaced."""
    return STUDY | {"runs": STUDY["runs"] | {name: STUDY["runs"][name] | changes}}


def write_params(project: Path, study: dict) -> None:
    dump_yaml(project / "params.yaml", {"root": ".", "params": "params.yaml"} | study)  # to the bytes that DVC writes


def command(project: Path, *words: str, ok: bool = True) -> str:
    """Run a command of this environment in ``project``; its output, after checking its exit status."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=project, env=env, text=True, capture_output=True, check=False)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, output
    return output


def started(output: str) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", output)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but times, which another execution measures anew."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "latencies.html"]
    kept = [path.relative_to(folder) for path in files if "timings" not in path.parts]
    return {str(path): (folder / path).read_bytes() for path in kept}


def hashes(project: Path, *folders: str) -> dict[str, str]:
    """Of every file of some folders, as :func:`contents`: a difference is told by its name."""
    found = {f"{folder}/{name}": held for folder in folders for name, held in contents(project / folder).items()}
    return {name: hashlib.sha256(held).hexdigest() for name, held in found.items()}


def commit(project: Path, message: str) -> None:
    command(project, "git", "add", "--all")
    command(project, "git", "commit", "--quiet", "--message", message)


def copied(folder: Path) -> Path:
    """The project as a clone of it would be, under git and DVC."""
    for name in ("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name in ("notebooks", "conf"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    (folder / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, folder / ".dvc")
    command(folder, "git", "init", "--quiet")
    command(folder, "git", "config", "user.name", "someone")
    command(folder, "git", "config", "user.email", "someone@localhost")
    commit(folder, "a clone")
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with the shrunken study in place, and every stage run."""
    folder = copied(tmp_path_factory.mktemp("project"))
    write_params(folder, STUDY)
    output = command(folder, "dvc", "repro")
    assert started(output)[0] == "check"
    return folder


def test_every_stage_leaves_its_results(project):
    results = {path.name for path in (project / "reports/tiny/results").iterdir()}
    runs = {f"{stage}-{run}" for stage in ("train", "measure", "decompose", "finetune") for run in STUDY["runs"]}
    others = {"pretrain-tiny_simclr", "ssl_vs_supervised-tiny", "frontier-tiny_vgg", "frontier-tiny_vgg.ranks"}
    assert {f"{name}.csv" for name in runs | others} <= results


def test_the_frontier_trains_the_dense_network_and_one_from_random_weights_beside_the_compressed_one(project):
    made = read_table(project / "reports/tiny/results/frontier-tiny_vgg.csv")
    tuned = made[made.form == "fine-tuned"].groupby(["method", "ranks"]).seed.max()
    assert tuned.to_dict() == {("compensated", "params-0.5"): 1, ("dense", "all"): 1, ("scratch", "params-0.5"): 0}
    assert set(made[made.form == "decomposed"].ranks) == {"cumulative-7", "joint-7", "params-0.5"}
    half = made[made.ranks == "params-0.5"].parameters
    assert half.nunique() == 1  # the same form for all
    assert half.iloc[0] <= made.parameters[0] / 2


def test_the_index_shows_every_figure_and_links_every_page_and_asks_no_other_host(project):
    report = project / "reports/tiny"
    for page in [project / "reports/index.html", *report.glob("*.html"), *report.glob("notebooks/*.html")]:
        text = page.read_text()
        assert "<script" not in text
        for target in re.findall(r'(?:src|href)="([^"#]+)"', text):
            assert target.startswith("data:") or (page.parent / target).is_file(), (page, target)
    index = (report / "index.html").read_text()
    for figure in report.glob("figures/*.svg"):
        assert f'src="figures/{figure.name}"' in index
    assert len([*report.glob("notebooks/*.html")]) == 12
    assert 'href="../index.html"' in index
    assert "<li>Cut: two epochs.</li>" in index
    assert "<li>Cut: only 64 images" in index


def test_latencies_lie_on_a_page_of_their_own_which_dvc_does_not_track(project):
    page = (project / "reports/tiny/latencies.html").read_text()
    assert [page.count(f">{run['label']}<") for run in STUDY["runs"].values()] == [3 + 2 * 3, 3]  # methods, ranks
    assert '<iframe src="latencies.html"' in (project / "reports/tiny/index.html").read_text()
    lock = (project / "dvc.lock").read_text()
    assert "latencies" not in lock
    assert "timings" not in lock


def test_every_stage_leaves_its_time_and_its_peak_of_memory(project):
    executed = {path.stem for path in (project / "data/tiny/executed").glob("*.ipynb")}
    timings = {path.stem: read_json(path) for path in (project / "data/tiny/timings").glob("*.json")}
    assert timings.keys() == executed
    assert all(took["seconds"] > 1 and 50 < took["peak_memory_mib"] < 50_000 for took in timings.values())


def test_the_overview_is_written_again_from_the_reports_alone(project, tmp_path):
    made = {path.name: path.read_bytes() for path in (project / "reports").iterdir() if path.is_file()}
    assert made.keys() == {"index.html", "utilization.svg", "utilization.csv", "claims.csv"}
    assert b'<a href="tiny/index.html">a shrunken study</a>, 2 networks' in made["index.html"]
    shutil.copytree(project / "reports/tiny", tmp_path / "reports/tiny")
    with mpl.rc_context():
        style.use()
        overview.write(tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "reports").iterdir() if path.is_file()} == made


def test_formulas_are_mathml(project):
    page = (project / "reports/tiny/notebooks/measure-tiny_vgg.html").read_text()
    assert page.count("<math") > 10
    assert "$" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)


def test_the_report_records_where_it_came_from(project):
    record = (project / "reports/tiny/provenance.json").read_text()
    for key in ("title", "code", "parameters", "data", "seed", "threads", "processor", "packages", "precision"):
        assert f'"{key}"' in record


def test_a_second_repro_does_nothing(project):
    assert started(command(project, "dvc", "repro")) == []


def test_stages_repeat_to_the_same_bytes(project):
    before = contents(project / "reports"), (project / "dvc.lock").read_text()
    stages = ["train@tiny_ssl", "measure@tiny_vgg", "decompose@tiny_ssl", "report", "publish"]
    command(project, "dvc", "repro", "--force", "--single-item", *stages)
    assert (contents(project / "reports"), (project / "dvc.lock").read_text()) == before
    shown = (project / "reports/tiny/latencies.html").read_text()
    for milliseconds in 1000 * read_table(project / "data/tiny/timings/decompose-tiny_ssl.csv").decomposed:
        assert f"<td>{milliseconds:,.2f}</td>" in shown


def test_a_changed_fine_tuning_rate_concerns_that_fine_tuning_alone(project):
    write_params(project, with_run("tiny_vgg", finetune=STUDY["runs"]["tiny_vgg"]["finetune"] | {"lr": 2e-3}))
    try:
        changed = re.findall(r"^(\S+):$", command(project, "dvc", "status"), re.MULTILINE)
        assert sorted(changed) == ["check", "finetune@tiny_vgg", "report"]  # and publish, when those have run
    finally:
        write_params(project, STUDY)


def test_a_mistyped_key_stops_the_first_stage_and_loses_nothing(project):
    before = contents(project / "reports")
    write_params(project, with_run("tiny_vgg", trian={}))
    try:
        output = command(project, "dvc", "repro", ok=False)
    finally:
        write_params(project, STUDY)
    assert "unknown key runs.tiny_vgg.trian; did you mean 'train'?" in output
    assert "Traceback" not in output
    assert started(output) == ["check"]
    assert contents(project / "reports") == before
    assert "run `utilized-rank check`" in command(project, "utilized-rank", "stage", "prepare", ok=False)
    command(project, "dvc", "repro")
    assert (project / "data/tiny/notebooks/1_prepare.ipynb").is_file()


def test_a_failing_cell_says_what_and_keeps_the_notebook(project):
    weights = project / "data/tiny/train/tiny_vgg/network.safetensors"
    aside = weights.rename(weights.with_suffix(".aside"))
    try:
        output = command(project, "utilized-rank", "stage", "measure", "tiny_vgg", ok=False)
    finally:
        aside.rename(weights)
    partial = project / "data/tiny/executed/measure-tiny_vgg.partial.ipynb"
    assert "measure failed: FileNotFoundError" in output
    assert "Traceback" not in output.split("measure failed")[1]
    assert partial.is_file()
    partial.unlink()


def test_results_of_a_run_that_left_the_study_go(project):
    stale = project / "reports/tiny/results/train-gone.json"
    stale.write_text("{}\n")
    assert "train-gone.json" in command(project, "utilized-rank", "check")
    assert not stale.exists()


def test_an_unknown_stage_or_run_is_named(project):
    assert "no stage 'trian'" in command(project, "utilized-rank", "stage", "trian", ok=False)
    assert "tiny_vgg" in command(project, "utilized-rank", "stage", "train", "nobody", ok=False)


def test_saving_a_notebook_with_outputs_changes_no_stage(project):
    path = project / "notebooks/3_train.ipynb"
    bare = path.read_text()
    notebook = nbformat.reads(bare, as_version=4)
    notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", text="saved\n")]
    nbformat.write(notebook, path)
    try:
        assert started(command(project, "dvc", "repro")) == ["check"]
    finally:
        path.write_text(bare)


@pytest.mark.parametrize("name", ["prepare", "measure-tiny_vgg", "ssl_vs_supervised-tiny", "decompose-tiny_ssl"])
def test_an_executed_notebook_runs_again_from_its_own_folder(project, name):
    """nbval, lax: outputs are compared by the test of repeated stages, to the byte."""
    notebook = project / "data/tiny/executed" / f"{name}.ipynb"
    words = ["--nbval-lax", "--nbval-current-env", "-q", "-p", "no:cacheprovider", str(notebook)]
    command(project, sys.executable, "-m", "pytest", *words)


@pytest.fixture(scope="module")
def beside(project):
    """Another study in the same project, laid out and run: its home, and the stages that ran."""
    other = STUDY | {
        "name": "other",
        "title": "another",
        "seed": 1,
        "frontier": {},
        "comparisons": {},
        "pretrained": {},
    }
    other["runs"] = {"tiny_vgg": STUDY["runs"]["tiny_vgg"]}
    with (project / "conf/study/other.yaml").open("w") as file:
        file.write("# @package _global_\n")
        YAML(typ="safe").dump(other, file)
    commit(project, "one study")
    before = hashes(project, "reports/tiny", "data/tiny")
    assert "dvc repro reports/other/dvc.yaml" in command(project, "utilized-rank", "study", "other")
    output = command(project, "dvc", "repro", "reports/other/dvc.yaml")
    assert hashes(project, "reports/tiny", "data/tiny") == before
    assert " dvc.lock" not in command(project, "git", "status", "--short")
    return project / "reports/other", [name.partition("dvc.yaml:")[2] for name in started(output)]


def test_another_study_runs_beside_the_first_with_a_lock_of_its_own_and_the_overview_has_both(project, beside):
    home, ran = beside
    made = [f"{stage}@tiny_vgg" for stage in ("train", "measure", "decompose", "finetune")]
    assert ran == ["check", "prepare", *made, "report", "publish"]
    assert {"params.yaml", "dvc.yaml", "dvc.lock", "index.html"} <= {path.name for path in home.iterdir()}
    overview_page = (project / "reports/index.html").read_text()
    assert 'href="tiny/index.html"' in overview_page
    assert 'href="other/index.html"' in overview_page
    new = command(project, "git", "status", "--short", "--untracked-files=all").splitlines()
    assert {line[3:].split("/")[1] for line in new} == {
        "other",
        "index.html",
        "claims.csv",
        "utilization.csv",
        "utilization.svg",
    }


def test_there_and_back_with_a_change_in_the_middle_nothing_is_computed_twice_and_no_byte_differs(project, beside):
    command(project, "dvc", "repro")
    commit(project, "two studies")
    before = hashes(project, "reports", "data")
    changed = command(project, "dvc", "exp", "run", "-S", "runs.tiny_vgg.finetune.lr=0.002")
    assert started(changed) == ["check", "finetune@tiny_vgg", "report", "publish"]
    assert started(command(project, "dvc", "repro", "reports/other/dvc.yaml")) == []
    back = command(project, "dvc", "exp", "run", "-S", "runs.tiny_vgg.finetune.lr=0.001")
    assert started(back) == ["publish"]
    assert hashes(project, "reports", "data") == before
    # Parameters and locks are as they were, too; but times are those of another execution.
    status = command(project, "git", "status", "--short").splitlines()
    assert [line for line in status if not line.endswith("latencies.html")] == []
    assert "up to date" in command(project, "dvc", "status")
    assert command(project, "dvc", "metrics", "diff", "HEAD") == ""  # DVC reads every study in git's revisions, too


def test_a_second_clone_gets_every_study_from_a_remote_and_runs_nothing(project, beside, tmp_path):
    commit(project, "what was run") if command(project, "git", "status", "--short") else None
    command(project, "dvc", "remote", "add", "--local", "--default", "shared", str(tmp_path / "remote"))
    command(project, "dvc", "push")
    command(tmp_path, "git", "clone", "--quiet", str(project), "clone")
    clone = tmp_path / "clone"
    command(clone, "dvc", "remote", "add", "--local", "--default", "shared", str(tmp_path / "remote"))
    command(clone, "dvc", "pull")
    assert "up to date" in command(clone, "dvc", "status")
    assert started(command(clone, "dvc", "repro")) == []
    assert started(command(clone, "dvc", "repro", "reports/other/dvc.yaml")) == []
    networks = "data/tiny/train/tiny_vgg/network.safetensors"
    assert (clone / networks).read_bytes() == (project / networks).read_bytes()
    assert command(clone, "git", "status", "--short") == ""
