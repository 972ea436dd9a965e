"""What a run anew gives, beside what is committed."""

import os
import shutil
import sys
import time
from itertools import permutations

import pandas as pd
import pytest
from committed import ROOT
from running import command, commit, write_params

from utilized_rank import cli
from utilized_rank.base.files import read_json, read_table, write_json, write_table
from utilized_rank.base.sections import StudyError
from utilized_rank.base.store import Store
from utilized_rank.report import summary, tables
from utilized_rank.report import verify as module
from utilized_rank.report.verify import verify
from utilized_rank.study.provenance import provenance

RAN = ["train-vgg11", "measure-vgg11", "decompose-vgg11"]
AN_HOUR_AGO = time.time() - 3600


def ran(store: Store, *stages: str) -> None:
    """Timings, as an execution leaves them."""
    for stage in stages:
        write_json(store.data("timings", f"{stage}.json"), {"seconds": 1.0})


def committed_study(study, store: Store, monkeypatch, **other: str) -> None:
    """All that a study has committed, an hour ago, on a machine that differs by ``other``."""
    steps = tables.steps(study, store)
    for name in ("dataset.safetensors", "splits.json"):
        store.data("prepare").mkdir(parents=True, exist_ok=True)
        store.data("prepare", name).write_text(name)
    images = [store.data("prepare", name) for name in ("dataset.safetensors", "splits.json")]
    record = provenance(study, images, store.root)
    for name, sheet in summary.sheets(study, store, record, steps).items():
        write_table(store.report("tables", f"{name}.csv"), sheet)
    write_json(store.report("summary.json"), summary.summary(study, store, steps))
    write_json(store.report("provenance.json"), record | other)
    (store.root / ".gitignore").write_text("data/\n")
    monkeypatch.setenv("GIT_COMMITTER_DATE", f"{AN_HOUR_AGO:.0f} +0000")
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "a")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "a@b")
    command(store.root, "git", "init", "--quiet")
    commit(store.root, "results")


@pytest.fixture
def here(studied, monkeypatch):
    """A study that is committed and ran again, in part, on the machine that made it."""
    committed_study(*studied, monkeypatch)
    ran(studied[1], *RAN)
    return studied


@pytest.fixture
def elsewhere(studied, monkeypatch):
    """The same on another machine."""
    committed_study(*studied, monkeypatch, vectors="AVX9")
    ran(studied[1], *RAN)
    return studied


def changed(store: Store, name: str, line: int, column: str, by: float) -> None:
    """One number of a table made anew."""
    path = store.report("results", name)
    table = read_table(path)
    at = table.index[line - 2]
    table[column] = table[column].astype(float)
    table.loc[at, column] += by
    table.to_csv(path, index=False, float_format="%.10g")
    ran(store, *RAN)


def test_what_ran_anew_and_gave_the_same_is_identical_and_what_did_not_run_does_not_count(here):
    study, store = here
    found = verify(study, store)
    assert found.beyond == []
    assert found.stages == sorted(RAN)
    cells = sum(read_table(store.report("results", f"{name}.csv")).size for name in RAN[1:])
    trained, measured = (read_json(store.report("results", f"{stage}-vgg11.json")) for stage in ("train", "measure"))
    cells += len(trained) + len(measured) - 2 + len(measured["mlu"]) + len(measured["left_out"])
    assert found.table["values"].sum() == found.table.identical.sum() == cells < found.values
    assert str(found) == (
        f"{cells} of {found.values:,} values of toy in HEAD were made anew, by decompose-vgg11, measure-vgg11, "
        "train-vgg11: identical"
    )


def test_results_from_before_their_commit_or_from_git_were_not_made_anew(here):
    study, store = here
    os.utime(store.report("results", "train-vgg11.json"), (AN_HOUR_AGO - 60,) * 2)
    assert "train-vgg11" not in verify(study, store).stages
    later = time.time() + 60  # as of `git checkout`, or of DVC's cache
    os.utime(store.report("results", "measure-vgg11.csv"), (later,) * 2)
    assert verify(study, store).stages == ["decompose-vgg11", "measure-vgg11"]
    shutil.rmtree(store.data("timings"))
    with pytest.raises(StudyError, match="no stage of toy ran here"):
        verify(study, store)


@pytest.mark.parametrize(
    ("name", "column", "by"),
    [("measure-vgg11.csv", "r", 1), ("decompose-vgg11.csv", "accuracy", 1e-8), ("measure-vgg11.csv", "k_s", 1)],
)
def test_on_the_same_machine_no_number_may_differ(here, name, column, by):
    study, store = here
    changed(store, name, 3, column, by)
    (said,) = verify(study, store).beyond
    assert f"results/{name}, line 3, {column}: " in said
    assert "no difference is expected" in str(verify(study, store))


@pytest.mark.parametrize(
    ("name", "line", "column", "within", "beyond"),
    [
        ("measure-vgg11.csv", 3, "r", 8, 9),  # of min(40, 32)
        ("measure-vgg11.csv", 3, "utilization", 0.249, 0.251),
        ("measure-vgg11.csv", 3, "m", 0, 1),
        ("decompose-vgg11.csv", 2, "accuracy", 0.5, 30),
        ("decompose-vgg11.csv", 4, "change", 0.5, 30),
        ("decompose-vgg11.csv", 2, "parameters", 0, 1),  # of the dense network
        ("decompose-vgg11.csv", 2, "images", 0, 1),
    ],
)
def test_elsewhere_each_kind_of_number_has_its_tolerance(elsewhere, name, line, column, within, beyond):
    study, store = elsewhere
    changed(store, name, line, column, within)
    found = verify(study, store)
    assert found.beyond == []
    assert found.table.within.sum() == (within > 0)
    changed(store, name, line, column, beyond - within)
    found = verify(study, store)
    (said,) = found.beyond
    assert f"results/{name}, line {line}, {column}: " in said
    assert found.table.beyond.sum() == 1


def test_a_low_rank_network_may_differ_in_size_by_a_quarter(elsewhere):
    study, store = elsewhere
    size = read_table(store.report("results", "decompose-vgg11.csv")).parameters[3]
    changed(store, "decompose-vgg11.csv", 5, "parameters", size // 4)
    assert verify(study, store).beyond == []
    changed(store, "decompose-vgg11.csv", 5, "parameters", 2)
    assert len(verify(study, store).beyond) == 1


def test_elsewhere_how_much_was_searched_is_held_to_nothing_and_a_word_to_all(elsewhere):
    study, store = elsewhere
    path = store.report("results", "measure-vgg11.json")
    record = read_json(path)
    write_json(path, record | {"evaluations": 10**6})
    ran(store, *RAN)
    assert verify(study, store).beyond == []
    write_json(path, record | {"search_precision": "float64"})
    ran(store, *RAN)
    (said,) = verify(study, store).beyond
    assert "search_precision: float64, and was bfloat16" in said


def test_a_record_that_is_cut_short_is_named(elsewhere):
    study, store = elsewhere
    path = store.report("results", "measure-vgg11.json")
    path.write_text(path.read_text()[:-9])
    ran(store, *RAN)
    with pytest.raises(StudyError, match=r"results/measure-vgg11\.json is no JSON"):
        verify(study, store)


def test_a_row_more_or_a_row_less_is_beyond(elsewhere):
    study, store = elsewhere
    path = store.report("results", "measure-vgg11.csv")
    table = read_table(path)
    for other in (table[:-1], pd.concat([table, table[-1:]])):
        write_table(path, other)
        ran(store, *RAN)
        assert len(verify(study, store).beyond) == table.shape[1]


def test_what_differs_in_the_provenance_is_why_a_difference_is_expected(elsewhere):
    study, store = elsewhere
    assert len(verify(study, store).other) == 1
    assert verify(study, store).other[0].endswith(", then AVX9)")
    changed(store, "measure-vgg11.csv", 3, "r", 1)
    assert "a difference is expected, as these differ: vectors (" in str(verify(study, store))


def test_tables_and_summary_count_where_the_report_ran(here):
    study, store = here
    ran(store, "report")
    found = verify(study, store)
    assert found.stages == sorted([*RAN, "report"])
    assert found.beyond == []


SEEDS = [f"fashion_vgg11_{seed}" for seed in (1, 2, 3)]


@pytest.mark.parametrize(("one", "other"), [*permutations(SEEDS, 2)])
def test_seeds_of_one_network_lie_within_the_tolerances(one, other):
    """Which is what they are set by: another machine finds no other network than another seed may."""
    store = Store("fashion_mnist", ROOT)
    for stage in ("train", "measure", "decompose", "finetune"):
        for path in store.report("results").glob(f"{stage}-{one}.*"):
            name, twin = f"results/{path.name}", path.with_name(path.name.replace(one, other))
            was, now = (module._values(name, its.read_text()) for its in (path, twin))
            for place in was | now:
                row = module._compared(was.get(place), now.get(place), 10_000)
                assert row["difference"] <= row["allowed"], (path.name, place, row)


@pytest.mark.parametrize("what", ["no git", "no clone", "no such revision"])
def test_without_git_a_clone_or_the_revision_it_says_so_in_one_line(here, monkeypatch, what):
    study, store = here
    if what == "no git":
        monkeypatch.setenv("PATH", "/nowhere")
    if what == "no clone":
        shutil.rmtree(store.root / ".git")
    with pytest.raises(StudyError, match="git is not installed" if what == "no git" else "in a clone") as said:
        verify(study, store, "v9" if what == "no such revision" else "HEAD")
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("differs", [False, True])
def test_the_exit_status_says_whether_all_is_within(here, parameters, monkeypatch, capsys, differs):
    _, store = here
    (store.root / "conf").mkdir()
    write_params(store.root, parameters)
    if differs:
        changed(store, "measure-vgg11.csv", 3, "r", 9)
    monkeypatch.chdir(store.root)
    monkeypatch.setattr(sys, "argv", ["utilized-rank", "verify"])
    with pytest.raises(SystemExit) as status:
        cli.entry()
    assert status.value.code == int(differs)
    assert ("beyond: " in capsys.readouterr().out) == differs
