"""Results that are not as they were written are named, and never taken for whole."""

import csv
import io
import shutil

import pytest
from committed import COMMITTED, ROOT
from hypothesis import assume, given
from hypothesis import strategies as st

from utilized_rank.base.files import Damaged, read_json, read_table
from utilized_rank.base.store import Store
from utilized_rank.report import overview, tables
from utilized_rank.stages import hours
from utilized_rank.study.results import RESULTS, ROWS, SUMMARY, Beyond

RESULT_FILES = [path for name in COMMITTED for path in sorted(Store(name, ROOT).report("results").iterdir())]
TABLES = [path for path in RESULT_FILES if path.suffix == ".csv" and not path.name.endswith(".ranks.csv")]
RECORDS = [path for path in RESULT_FILES if path.suffix == ".json"]
OF_DIGITS = [path for path in TABLES if path.is_relative_to(ROOT / "reports/digits") and path.stat().st_size > 50]


def stage_of(path) -> str:
    return path.name.partition("-")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


def read(folder, path, content: bytes):
    """A file of results with another content, read as its stage's."""
    there = folder / path.name
    there.write_bytes(content)
    stage = stage_of(path)
    return read_table(there, ROWS[stage]) if path.suffix == ".csv" else read_json(there, RESULTS[stage])


def damage(folder, path, content: bytes) -> str | None:
    """What is said of a file of results with another content; None: it is taken for whole."""
    try:
        read(folder, path, content)
    except Damaged as error:
        return str(error)
    return None


def text_of(rows: list[list[str]]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().encode()


def test_what_is_committed_is_as_it_should_be():
    for path in TABLES:
        assert list(read_table(path, ROWS[stage_of(path)])) == path.read_text().splitlines()[0].split(",")
    for path in RECORDS:
        read_json(path, RESULTS[stage_of(path)])
    for name in COMMITTED:
        read_json(Store(name, ROOT).report("summary.json"), SUMMARY)


@given(path=st.sampled_from(OF_DIGITS), data=st.data())
def test_a_table_cut_short_within_a_row_is_named(folder, path, data):
    whole = path.read_bytes()
    kept = data.draw(st.integers(0, len(whole) - 1))
    assume(not whole[:kept].endswith(b"\n"))
    with pytest.raises(Damaged, match=path.name):
        read(folder, path, whole[:kept])


@given(path=st.sampled_from(OF_DIGITS), data=st.data())
def test_a_byte_less_is_named_or_changes_one_cell_to_another_of_its_kind(folder, path, data):
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    less = whole[:at] + whole[at + 1 :]
    before = read(folder, path, whole)
    told = damage(folder, path, less)
    assert told is None or (path.name in told and "\n" not in told)
    if told is None:
        after = read(folder, path, less)
        assert list(after) == list(before)
        assert (after.dtypes == before.dtypes).all()
        assert (after.fillna(0) != before.fillna(0)).sum(axis=None) <= 1


@pytest.mark.parametrize(
    "path", [path for path in OF_DIGITS if stage_of(path) == "measure"], ids=lambda path: path.stem
)
def test_of_a_rank_and_its_utilization_no_digit_is_lost_unseen(folder, path):
    header, *rows = csv.reader(path.open())
    for column in ("r", "utilization"):
        at = header.index(column)
        for number, row in enumerate(rows):
            less = [*row[:at], row[at][:-1], *row[at + 1 :]]
            with pytest.raises(Damaged, match=rf"{path.name}, line {number + 2}: "):
                read(folder, path, text_of([header, *rows[:number], less, *rows[number + 1 :]]))


WRONG = ["", "word", "nan", "inf", "-inf", "1;2"]


@given(path=st.sampled_from(OF_DIGITS), wrong=st.sampled_from(WRONG), data=st.data())
def test_what_is_no_number_in_place_of_one_is_named_with_its_line_and_column(folder, path, wrong, data):
    header, *rows = csv.reader(path.open())
    whole = read_table(path).select_dtypes("number").dropna(axis=1)
    column, number = data.draw(st.sampled_from(list(whole))), data.draw(st.integers(0, len(rows) - 1))
    assume(wrong or column not in ("search_accuracy", "k_s_alone", "k_t_alone"))  # which not every row has
    rows[number][header.index(column)] = wrong
    with pytest.raises(Damaged, match=rf"{path.name}, line {number + 2}: {column} .*dvc repro"):
        read(folder, path, text_of([header, *rows]))


@pytest.mark.parametrize("path", OF_DIGITS, ids=lambda path: path.stem)
def test_a_column_that_is_missing_twice_there_or_unknown_is_named(folder, path):
    rows = list(csv.reader(path.open()))
    fields = ROWS[stage_of(path)].model_fields
    for at, name in enumerate(rows[0]):
        if fields[name].is_required():
            with pytest.raises(Damaged, match=rf"0 columns '{name}'"):
                read(folder, path, text_of([[*row[:at], *row[at + 1 :]] for row in rows]))
        with pytest.raises(Damaged, match=rf"2 columns '{name}'"):
            read(folder, path, text_of([[*row, row[at]] for row in rows]))
        other = [[*rows[0][:at], "speed", *rows[0][at + 1 :]], *rows[1:]]
        with pytest.raises(Damaged, match=r"unknown column 'speed'"):
            read(folder, path, text_of(other))


@given(path=st.sampled_from(RECORDS), data=st.data())
def test_a_record_cut_short_or_without_a_key_or_with_a_word_for_a_number_is_named(folder, path, data):
    whole = path.read_text()
    with pytest.raises(Damaged, match=path.name):
        read(folder, path, whole[: data.draw(st.integers(0, len(whole) - 3))].encode())
    key = data.draw(st.sampled_from(sorted(read_json(path))))
    with pytest.raises(Damaged, match=f"{path.name}: {key}"):
        read(folder, path, whole.replace(f'"{key}"', '"another"').encode())
    content = read_json(path)
    if isinstance(content[key], float):
        for wrong, told in (('"ten"', "'ten'"), ("NaN", "nan"), ("null", "None")):
            with pytest.raises(Damaged, match=rf"{path.name}: {key} is {told}: "):
                read(folder, path, whole.replace(f'"{key}": {content[key]}', f'"{key}": {wrong}').encode())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 columns 'form'"),
        (b"\xff\xfe", "is no table"),
        (b'form,"method\n', "is no table"),
    ],
    ids=["empty", "no text", "an open quote"],
)
def test_what_is_no_table_at_all_is_named(tmp_path, content, said):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(Damaged, match=said):
        read_table(tmp_path / "a.csv", Beyond)


def test_a_damaged_result_reaches_no_table_of_a_report(studied):
    study, store = studied
    path = store.report("results", "decompose-vit.csv")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(Damaged, match=r"decompose-vit\.csv is cut short"):
        tables.steps(study, store)


@pytest.mark.parametrize("name", ["summary.json", "provenance.json", "results/ssl_vs_supervised-vit.csv"])
def test_a_damaged_report_reaches_no_overview(tmp_path, name):
    shutil.copytree(ROOT / "reports/digits", tmp_path / "reports/digits")
    assert len(overview.studies(tmp_path)) == 1
    path = tmp_path / "reports/digits" / name
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(Damaged, match=name):
        overview.studies(tmp_path)


def test_a_benchmark_with_a_word_for_a_rate_is_named(tmp_path):
    path = tmp_path / hours.BENCHMARK
    path.parent.mkdir(parents=True)
    path.write_text("device,kind,network,work,flops_a_second\na card,cuda,vit,forward,fast\n")
    with pytest.raises(Damaged, match="line 2: flops_a_second is 'fast'"):
        hours._benchmarked(path)
