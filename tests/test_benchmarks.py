"""The page of benchmarks follows from the measurements that lie beside it."""

import json

import pandas as pd
import pytest
from committed import AS_DRAWN
from matplotlib import pyplot as plt

from benchmarks import gpu, plain
from benchmarks.__main__ import NAMES, REPORT, draw, main
from utilized_rank.base.files import read_table
from utilized_rank.base.runtime import DEVICE

MEASURED = [name for name in NAMES if (REPORT / f"{name}.csv").is_file()]


def test_there_are_measurements():
    assert "search" in MEASURED


@AS_DRAWN
@pytest.mark.parametrize("name", MEASURED)
def test_figure_and_tables_follow_from_the_measurements(name):
    before = (REPORT / f"{name}.svg").read_bytes()
    part = draw(name)
    assert (REPORT / f"{name}.svg").read_bytes() == before
    assert part in (REPORT / "index.html").read_text()


@pytest.mark.parametrize("name", MEASURED)
def test_provenance_says_on_what_it_was_measured(name):
    record = json.loads((REPORT / f"{name}.json").read_text())
    assert {"data", "code", "seed", "threads", "processor", "packages"} <= record.keys()


def test_a_search_that_is_faster_gives_certified_boundaries_too():
    """As the report has them: no rank is missing, and the utilized rank is the smaller of the two."""
    layers: pd.DataFrame = read_table(REPORT / "search.csv").dropna(subset=["m"])
    assert (layers.r == layers[["k_s", "k_t", "m", "n"]].min(axis=1)).all()
    assert layers.groupby("search").layer.nunique().nunique() == 1


def test_an_unknown_benchmark_is_named(capsys):
    with pytest.raises(SystemExit, match="no benchmark 'serach'"):
        main(["serach"])


def test_the_gpus_benchmark_measures_every_work_where_it_runs(monkeypatch):
    monkeypatch.setenv(DEVICE, "cpu")
    for name, value in {"NETWORKS": ("test_resnet",), "BATCH": 4, "SIDE": 64, "COUNTS": {"cpu": 8}}.items():
        monkeypatch.setattr(gpu, name, value)
    table = gpu.measure(None)
    assert table.work.tolist() == ["forward", "moments", "search, all layers", "compensation, one layer"]
    assert (table.images_a_second > 0).all()
    assert table.ratio[0] == 1
    assert table.flops_a_second.notna().tolist() == [True, False, False, False]
    gpu.draw(table)
    plt.close("all")


def test_the_reference_is_no_part_of_the_package():
    assert plain.__name__.startswith("benchmarks.")
