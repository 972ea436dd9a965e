import json
import re

import numpy as np
import pandas as pd
import pytest
import vl_convert

from utilized_rank.base.files import write_table
from utilized_rank.report import interactive, points, tables
from utilized_rank.report.figures import frontier, style

LABELS = {"vgg11": "VGG11", "vit": "ViT & labels"}


@pytest.fixture
def drawn(studied):
    """The charts of a study, by name."""
    study, store = studied
    labels = {key: run.label for key, run in study.runs.items()}
    return {chart.name: chart for chart in interactive.of_study(store, labels, 1.0)}


def test_layers_are_those_that_were_measured_and_say_their_shape_and_ranks(studied):
    _, store = studied
    measured = tables.rows(store, "measure", "vgg11").assign(groups=[1, 4] * 7)
    write_table(store.report("results", "measure-vgg11.csv"), measured)
    shown = points.layers(store, LABELS)
    mine = shown[shown.network == "VGG11"]
    np.testing.assert_allclose(mine.used, 100 * measured.utilization, atol=0.005)
    assert len(shown) == 2 * len(measured)
    assert mine["shape"].tolist() == ["40 × 32", "40 × 32, 4 groups"] * 7
    assert mine.r.tolist() == [f"{r} of 32" for r in measured.r]
    assert mine.k_S.tolist() == [f"{k}" for k in measured.k_s]
    np.testing.assert_allclose(mine.depth, np.tile(np.linspace(0, 1, 7), 2), atol=0.0005)
    assert mine.tolerance.tolist() == ["0"] * 7 + ["1"] * 7


def test_networks_are_all_of_tables_2_4_and_6_before_and_after_training_of_the_first_seed(studied):
    _, store = studied
    shown = points.networks(store, LABELS)
    made = [tables.rows(store, stage, key) for key in LABELS for stage in ("decompose", "finetune")]
    beyond = tables.rows(store, "frontier", "vgg11")
    made.append(beyond[beyond.seed.fillna(0) == 0])
    every = pd.concat(made)
    expected = every[every.form.isin(["decomposed", "fine-tuned"])]
    np.testing.assert_allclose(np.sort(shown.change), np.sort(expected.change), atol=0.0005)
    assert shown["listed in"].value_counts().to_dict() == {"Table 4": 16, "Table 6": 6, "Table 2": 2}


def test_costs_are_parts_of_the_original_and_intervals_stand_beside_changes(studied):
    _, store = studied
    made = tables.rows(store, "decompose", "vit")
    shown = points.networks(store, {"vit": "ViT"}).query("method == 'svd' and tolerance == '1'").iloc[0]
    row = made.query("method == 'svd' and epsilon == 1 and form == 'decomposed'").iloc[0]
    assert shown.parameters == pytest.approx(100 * row.parameters / made.parameters[0], abs=0.0005)
    assert shown.flops == pytest.approx(100 * row.flops / made.flops[0], abs=0.0005)
    assert shown["95% interval"] == f"[{row.change_low:+.2f}, {row.change_high:+.2f}]"
    assert shown["change of accuracy"] == f"{row.change:+.2f} points"
    assert shown.step == "before training"


def test_the_dense_network_has_no_weights_or_tolerance_to_be_filtered_by(studied):
    _, store = studied
    shown = points.networks(store, LABELS)
    dense = shown[shown.weights == "dense"]
    assert len(dense) == 3
    assert dense[["method", "tolerance"]].isna().all(axis=None)
    assert shown[shown.weights != "dense"][["method", "tolerance"]].notna().all(axis=None)
    assert set(shown.tolerance.dropna()) == {"0", "1", points.BUDGET}


def test_every_choice_has_rows_and_the_first_picture_is_not_empty(drawn):
    for chart in drawn.values():
        shown = chart.rows
        for choice in chart.choices:
            if not choice.signal:
                assert set(choice.values) - {""} == set(chart.rows[choice.name].dropna())
                shown = shown[(shown[choice.name] == choice.chosen) | (choice.chosen == "")]
            assert choice.chosen in choice.values
        assert len(shown) > 1


def test_the_first_network_of_a_page_is_one_that_has_a_frontier(studied):
    study, store = studied
    write_table(store.report("results", "frontier-vit.csv"), tables.rows(store, "frontier", "vgg11"))
    store.report("results", "frontier-vgg11.csv").unlink()
    charts = interactive.of_study(store, {key: run.label for key, run in study.runs.items()}, 1.0)
    assert {choice.chosen for chart in charts for choice in chart.choices if choice.name == "network"} == {
        "ViT & labels"
    }


def test_what_stands_in_a_page_cannot_end_its_script_and_is_all_there(drawn):
    chart = drawn["frontier"]
    chart.rows.loc[0, "network"] = "</script><!-- & 'quoted'"
    text = chart.content()
    assert "<" not in text
    read = json.loads(text)
    assert len(read["rows"]) == len(chart.rows)
    assert dict(zip(read["columns"], read["rows"][0], strict=True))["network"] == "</script><!-- & 'quoted'"
    assert set(chart.words) <= set(read["columns"])


def test_the_library_is_one_script_that_is_the_same_each_time():
    script = interactive.library()
    assert "vegaEmbed" in script
    assert "</script" not in script
    assert "<!--" not in script
    interactive.library.cache_clear()
    assert interactive.library() == script


@pytest.mark.parametrize("name", ["layers", "spread", "frontier"])
def test_a_picture_is_valid_and_has_only_the_colours_of_the_figures(drawn, name):
    spec = drawn[name].spec
    vl_convert.vegalite_to_vega(spec)
    used = set(re.findall(r"#[0-9a-fA-F]{6}", json.dumps(spec)))
    assert used <= {*style.SERIES, style.GREY, style.BLACK}
    assert used or name == "frontier"


def test_marks_and_colours_of_the_frontier_are_those_of_its_figure(drawn):
    marks = drawn["frontier"].spec["layer"][-1]["encoding"]
    assert set(marks["shape"]["scale"]["domain"]) <= set(frontier.KINDS)
    colours = dict(zip(*(marks["fill"]["scale"][part] for part in ("domain", "range")), strict=True))
    for method, colour in frontier.METHODS.items():
        if method != "scratch":
            shown = colours[tables.METHOD_NAMES[method]]
            assert shown == ("currentColor" if method == "dense" else colour)
