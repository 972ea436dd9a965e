"""The real pipeline, DVC and papermill and all, on a shrunken study."""

import re
import shutil
import sys

import matplotlib as mpl
import nbformat
import pytest
from running import STUDY, command, commit, contents, hashes, started, with_run, write_params
from written import library_apart

from utilized_rank.base.files import read_json, read_table
from utilized_rank.report import overview
from utilized_rank.report.figures import style


@pytest.fixture(scope="module")
def project(tiny_project):
    return tiny_project


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
        if page.name == "index.html":
            text, _ = library_apart(text)
        else:
            assert "<script" not in text
        for target in re.findall(r'(?:src|href)="([^"#]+)"', text):
            assert target.startswith("data:") or (page.parent / target).is_file(), (page, target)
    index = (report / "index.html").read_text()
    for figure in report.glob("figures/*.svg"):
        assert f'src="figures/{figure.name}"' in index
    assert len([*report.glob("notebooks/*.html")]) == 12
    browsable = {path.stem: path.read_text() for path in report.glob("notebooks/*.ipynb")}
    assert browsable.keys() == {path.stem for path in report.glob("notebooks/*.html")}
    assert "image/png" in browsable["measure-tiny_vgg"]
    assert not any("image/svg+xml" in text for text in browsable.values())
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
    for study in (path for path in (project / "reports").iterdir() if path.is_dir()):
        shutil.copytree(study, tmp_path / "reports" / study.name)
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


@pytest.mark.parametrize("name", ["prepare", "decompose-tiny_ssl"])
def test_an_executed_notebook_runs_again_from_its_own_folder(project, name):
    """nbval, lax: outputs are compared by the test of repeated stages, to the byte."""
    notebook = project / "data/tiny/executed" / f"{name}.ipynb"
    words = ["--nbval-lax", "--nbval-current-env", "-q", "-p", "no:cacheprovider", str(notebook)]
    command(project, sys.executable, "-m", "pytest", *words)


def test_another_study_runs_beside_the_first_with_a_lock_of_its_own_and_the_overview_has_both(project, folder_study):
    made = [f"{stage}@folder_resnet20" for stage in ("train", "measure", "decompose", "finetune")]
    ran, changed = folder_study
    assert ran == ["check", "prepare", *made, "report", "publish"]
    assert changed == {"study", "mine", "index.html", "claims.csv", "utilization.csv", "utilization.svg"}
    files = {path.name for path in (project / "reports/mine").iterdir()}
    assert {"params.yaml", "dvc.yaml", "dvc.lock", "index.html"} <= files
    overview_page = (project / "reports/index.html").read_text()
    assert 'href="tiny/index.html"' in overview_page
    assert 'href="mine/index.html"' in overview_page


def test_there_and_back_with_a_change_in_the_middle_nothing_is_computed_twice_and_no_byte_differs(
    project, folder_study
):
    command(project, "dvc", "repro")
    commit(project, "two studies")
    before = hashes(project, "reports", "data")
    changed = command(project, "dvc", "exp", "run", "-S", "runs.tiny_vgg.finetune.lr=0.002")
    assert started(changed) == ["check", "finetune@tiny_vgg", "report", "publish"]
    assert started(command(project, "dvc", "repro", "reports/mine/dvc.yaml")) == []
    back = command(project, "dvc", "exp", "run", "-S", "runs.tiny_vgg.finetune.lr=0.001")
    assert started(back) == ["publish"]
    assert hashes(project, "reports", "data") == before
    # Parameters and locks are as they were, too; but times are those of another execution.
    status = command(project, "git", "status", "--short").splitlines()
    assert [line for line in status if not line.endswith("latencies.html")] == []
    assert "up to date" in command(project, "dvc", "status")
    assert command(project, "dvc", "metrics", "diff", "HEAD") == ""  # DVC reads every study in git's revisions, too


def test_a_second_clone_gets_every_study_from_a_remote_and_runs_nothing(project, folder_study, tmp_path):
    commit(project, "what was run") if command(project, "git", "status", "--short") else None
    command(project, "dvc", "remote", "add", "--local", "--default", "shared", str(tmp_path / "remote"))
    command(project, "dvc", "push")
    command(tmp_path, "git", "clone", "--quiet", str(project), "clone")
    clone = tmp_path / "clone"
    command(clone, "dvc", "remote", "add", "--local", "--default", "shared", str(tmp_path / "remote"))
    command(clone, "dvc", "pull")
    assert "up to date" in command(clone, "dvc", "status")
    assert started(command(clone, "dvc", "repro")) == []
    assert started(command(clone, "dvc", "repro", "reports/mine/dvc.yaml")) == []
    networks = "data/tiny/train/tiny_vgg/network.safetensors"
    assert (clone / networks).read_bytes() == (project / networks).read_bytes()
    assert command(clone, "git", "status", "--short") == ""
