import base64
import io
import re
import shutil

import matplotlib as mpl
import nbformat
import numpy as np
import pandas as pd
import pytest
from committed import COMMITTED, LOCKED, ROOT, study_of
from matplotlib import pyplot as plt
from matplotlib.collections import PathCollection
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from written import RECORD, index, library_apart

from utilized_rank.base.files import read_json, read_table, write_table, write_text
from utilized_rank.base.store import Store
from utilized_rank.report import pages as report
from utilized_rank.report import summary, tables
from utilized_rank.report.figures import study as figures
from utilized_rank.report.figures import style
from utilized_rank.stages.notebooks import STAGES, executed_name, keys_of


def cells(page: str) -> list[list[str]]:
    """The body of a table, as text between the tags."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page.split("<tbody>")[1], re.DOTALL)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1234567, "1,234,567"),
        (0, "0"),
        (1234.5678, "1,234.57"),
        (-0.125, "-0.12"),
        (0.0, "0.00"),
        (0.005, "0.01"),
        (0.0049, "4.9e-03"),
        (-0.00012, "-1.2e-04"),
        (0.002, "2.0e-03"),
        (np.nan, ""),
        (None, ""),
        ("a < b & c", "a &lt; b &amp; c"),
        ("", ""),
    ],
)
def test_a_cell_shows_thousands_apart_two_decimals_and_what_is_smaller_as_a_power_of_ten(value, shown):
    """The column to its left makes the row's types differ, as in every table of the report."""
    assert cells(report.table_html(pd.DataFrame({"network": ["n"], "x": [value]}))) == [["n", shown]]


def test_more_digits_show_smaller_numbers_as_they_are():
    assert cells(report.table_html(pd.DataFrame({"x": [0.0049, 0.00004]}), digits=4)) == [["0.0049"], ["4.0e-05"]]


def test_whole_numbers_stay_whole_in_a_column_of_whole_numbers():
    table = pd.DataFrame({"images": [450, 12000], "accuracy": [99.0, 1e6]})
    assert cells(report.table_html(table)) == [["450", "99.00"], ["12,000", "1,000,000.00"]]


def test_headings_are_escaped_and_say_whether_their_column_is_of_numbers():
    page = report.table_html(pd.DataFrame({"a<b": ["x"], "MLU %": [1.0], "count": [1]}))
    heads = re.findall(r'<th class="(\w+)">(.*?)</th>', page)
    assert heads == [("text", "a&lt;b"), ("number", "MLU %"), ("number", "count")]


def test_a_name_that_repeats_that_of_the_row_above_is_dimmed():
    page = report.table_html(pd.DataFrame({"network": ["a", "a", "b", "a"], "x": [1, 2, 3, 4]}))
    assert re.findall(r'<tr class="(\w+)">', page) == ["first", "repeat", "first", "first"]


def test_the_index_shows_each_network_with_its_utilization_accuracy_and_what_fine_tuning_leaves(studied):
    study, store = studied
    page = index(study, store)
    cards = re.findall(r'<div class="card"><b>(.*?)</b>(.*?)<br><span>(.*?)</span>', page)
    for (value, label, detail), (key, run) in zip(cards, study.runs.items(), strict=True):
        trained, measured = tables.result(store, "train", key), tables.result(store, "measure", key)
        made = tables.rows(store, "finetune", key).query("method == 'optimal' and epsilon == 1").iloc[0]
        whole = tables.rows(store, "decompose", key).parameters[0]
        assert value == f"{100 * measured['mlu']['1']:.0f}%"
        assert label == run.label.replace("&", "&amp;")
        assert detail.startswith(f"{trained['test_accuracy']:.1f}% accurate")
        assert f"{made.parameters / whole:.0%} of its parameters" in detail
        assert detail.endswith(f"{made.change:+.1f} points")


def test_the_index_shows_every_sheet_to_the_last_row(studied):
    study, store = studied
    page = index(study, store)
    shown = re.findall(r"<table>\n.*?</table>", page, re.DOTALL)
    steps = tables.steps(study, store)
    sheets = summary.sheets(study, store, RECORD, steps)
    in_turn = ["table1-utilization", "repeats", "table3-training", "table2-compression", "table4-methods"]
    in_turn += ["table6-frontier", "frontier-seeds", "table5-settings"]
    assert set(in_turn) == set(sheets)
    assert [len(cells(table)) for table in shown] == [len(sheets[name]) for name in in_turn]


def test_repeats_comparisons_notes_and_cuts_are_shown_where_a_study_has_them(studied):
    study, store = studied
    assert "Over random numbers" in index(study, store)
    assert "ssl-vit.svg" in index(study, store)
    bare = study.model_copy(update={"repeats": {}, "comparisons": {}})
    page = index(bare, store)
    assert "Over random numbers" not in page
    assert "Kinds of training" not in page
    assert "<li>Cut:" not in page
    half = study.runs["vgg11"].model.model_copy(update={"width": 0.5})
    runs = study.runs | {"vgg11": study.runs["vgg11"].model_copy(update={"model": half})}
    data = study.data.model_copy(update={"limit": 1500})
    cut = study.model_copy(update={"notes": ["Cut: 2 < 3 epochs."], "runs": runs, "data": data})
    page = index(cut, store)
    assert "<li>Cut: 2 &lt; 3 epochs.</li>" in page
    assert "<li>Cut: VGG11 has 0.5 times the published network" in page
    assert "<li>Cut: only 1,500 images" in page


def test_the_index_says_in_which_precision_and_on_how_many_images_ranks_were_searched(studied):
    page = index(*studied)
    assert "bfloat16" in page
    assert "on 449 images held" in page
    assert "a &lt;processor&gt;" in page


def test_the_index_shows_latencies_where_there_are_some_and_no_empty_frame_where_there_are_none(studied):
    study, store = studied
    report.write_latencies(study, store)
    assert not store.report("latencies.html").exists()
    assert "latencies.html" not in index(study, store)
    made = tables.rows(store, "decompose", "vit")
    low_rank = made[made.form == "decomposed"]
    times = {"images": 64, "original": 0.0000012, "decomposed": 1.2345, "flops_kept": low_rank.flops / made.flops[0]}
    write_table(store.data("timings", "decompose-vit.csv"), low_rank[["epsilon", "method"]].assign(**times))
    shown = index(study, store)
    report.write_latencies(study, store)
    rows = cells(store.report("latencies.html").read_text())
    assert len(rows) == len(low_rank)
    assert rows[0][0] == "ViT &amp; labels"
    assert rows[0][4:6] == ["1.2e-03", "1,234.50"]
    assert index(study, store) == shown
    assert '<iframe src="latencies.html"' in shown
    assert '<a href="latencies.html">' in shown


def test_a_notebook_that_is_to_be_browsed_has_its_pictures_as_png_and_all_else_as_it_was(tmp_path):
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="10"><rect width="20" height="10" fill="red"/></svg>'
    )
    picture = new_output("display_data", {"image/svg+xml": svg, "text/plain": "<Figure>"})
    printed = new_output("stream", name="stdout", text="a line")
    executed = new_notebook(cells=[new_markdown_cell("$r$"), new_code_cell("1", outputs=[printed, picture])])
    nbformat.write(executed, tmp_path / "executed.ipynb")
    made = report.browsable(tmp_path / "executed.ipynb")
    shown = made.cells[1].outputs[1].data
    image = Image.open(io.BytesIO(base64.b64decode(shown.pop("image/png"))))
    assert image.size == (30, 15)
    assert image.convert("RGB").getcolors() == [(30 * 15, (255, 0, 0))]
    assert shown == {"text/plain": "<Figure>"}
    del executed.cells[1].outputs[1].data["image/svg+xml"]
    assert made == executed


def test_pages_are_published_as_they_were_written(studied):
    study, store = studied
    page = index(study, store)
    write_text(store.data("pages", "notebooks", "train-vit.html"), "a page")
    report.publish(study, store)
    assert store.report("index.html").read_text() == page
    assert store.report("notebooks", "train-vit.html").read_text() == "a page\n"
    assert store.report("results").is_dir()


@pytest.mark.parametrize("count", [1, 11, 14])
def test_figure_3_has_a_mark_for_every_network_however_many(count):
    rows = pd.DataFrame(
        {
            "label": [f"network {i}" for i in range(count)],
            "epsilon": 1.0,
            "change": np.linspace(-3, 1, count),
            "change_low": -4.0,
            "change_high": 2.0,
            "parameters_kept": np.linspace(0.1, 0.9, count),
            "flops_kept": 0.5,
        }
    )
    with mpl.rc_context():
        style.use()
        axes = figures.frontier(rows).axes[0]
        marks = [c for c in axes.collections if isinstance(c, PathCollection)]
        found = np.concatenate([mark.get_offsets() for mark in marks])
        plt.close("all")
    np.testing.assert_allclose(found, rows[["parameters_kept", "change"]])


@pytest.mark.parametrize("name", LOCKED)
def test_the_committed_index_follows_from_the_committed_results(name, tmp_path):
    committed, again = Store(name, ROOT), Store(name, tmp_path)
    shutil.copytree(committed.report("results"), again.report("results"))
    if committed.report("latencies.html").is_file():
        shutil.copy(committed.report("latencies.html"), again.report())
    study = study_of(name)
    made = [(stage, key) for stage in STAGES if stage != "report" for key in keys_of(study, stage)]
    links = [
        {
            "title": report.STAGE_TITLES[stage] + (f": {key}" if key else ""),
            "href": f"notebooks/{executed_name(stage, key)}.html",
        }
        for stage, key in made
    ]
    page = index(study, again, links, read_json(committed.report("provenance.json")))
    assert library_apart(page)[0] == library_apart(committed.report("index.html").read_text())[0]
    names = {executed_name(stage, key) for stage, key in made}
    there = {path.name for path in committed.report("notebooks").iterdir()}
    assert there == {f"{name}.{kind}" for name in names for kind in ("html", "ipynb")}


@pytest.mark.parametrize("name", COMMITTED)
def test_the_committed_index_and_overview_are_of_the_same_numbers(name):
    study, store = study_of(name), Store(name, ROOT)
    used = read_table(ROOT / "reports" / "utilization.csv").query("study == @name")
    table = tables.utilization(study, store).set_index("network")
    assert len(used) == len(table) * len(study.measure.epsilons)
    for row in used.itertuples():
        assert table[tables.mlu_column(study, row.epsilon)][row.network] == pytest.approx(100 * row.mlu)


def test_the_device_stands_beside_the_precision_and_another_than_the_processor_says_what_repeats(studied):
    study, store = studied
    precision = tables.result(store, "measure", next(iter(study.runs)))["search_precision"]
    for device, warned in {"cpu": False, "cuda (a card)": True}.items():
        page = index(study, store, record=RECORD | {"device": device})
        assert f"in {precision} on {device}. Each answer" in page
        assert ("gradients of\n  adaptive pooling" in page) == warned
