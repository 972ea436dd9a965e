import json
from itertools import product

import numpy as np
import pandas as pd
import pytest
from committed import COMMITTED, LOCKED, ROOT, study_of

from utilized_rank.base.files import read_json, write_json, write_table
from utilized_rank.base.sections import StudyError
from utilized_rank.base.store import Store
from utilized_rank.report import tables, timings
from utilized_rank.report.settings import settings
from utilized_rank.report.summary import sheets as sheets_of
from utilized_rank.report.summary import summary as summary_of
from utilized_rank.study.config import parse_study

MACHINE = {"processor": "a processor", "system": "a system", "python": "3.11", "packages": {"torch": "2"}}


@pytest.fixture
def steps(studied):
    return tables.steps(*studied)


def sheets(study, store, record) -> tuple[dict[str, pd.DataFrame], dict]:
    """Every table of the report, and its summary, as its notebook computes them."""
    all_steps = tables.steps(study, store)
    return sheets_of(study, store, record, all_steps), summary_of(study, store, all_steps)


def row_of(store: Store, key: str, form: str, method: str, epsilon: float) -> pd.Series:
    """The one row of a run's result files that was made so."""
    both = [tables.rows(store, stage, key) for stage in ("decompose", "finetune")]
    found = pd.concat(both, ignore_index=True)
    at = found.epsilon.isna() if np.isnan(epsilon) else found.epsilon == epsilon
    (row,) = found[(found.form == form) & (found.method == method) & at].itertuples()
    return row


def bracketed(row) -> str:
    return f"{row.change:+.2f} [{row.change_low:+.2f}, {row.change_high:+.2f}]"


@pytest.mark.parametrize(
    ("pretrained", "method", "name"),
    [
        (None, "supervised", "supervised"),
        ({"method": "simclr"}, "linear", "SimCLR (self-supervised), linear probe"),
        ({"method": "mae"}, "supervised", "MAE (self-supervised), fine-tuned"),
        (
            {"method": "published", "supervision": "weakly supervised", "title": "SWAG"},
            "linear",
            "SWAG (weakly supervised), linear probe",
        ),
        (
            {"method": "checkpoint", "supervision": "supervised", "file": "a", "sha256": "b"},
            "as_given",
            "checkpoint (supervised), as given",
        ),
    ],
)
def test_how_a_network_was_trained_says_from_which_weights_with_which_labels(parameters, pretrained, method, name):
    run = parameters["runs"]["vit_linear"]
    run |= {"train": {"method": method}, "pretrained": "given" if pretrained else "none"}
    made = {"given": pretrained | {"model": run["model"]}} if pretrained else {}
    study = parse_study(parameters | {"pretrained": made, "runs": {"run": run}, "comparisons": {}})
    assert tables.training_name(study, study.runs["run"]) == name


def test_every_number_of_table_1_is_in_the_files_of_training_and_measurement(studied):
    study, store = studied
    table = tables.utilization(study, store)
    assert list(table.network) == [run.label for run in study.runs.values()]
    assert set(table["data set"]) == {study.title}
    for key, (_, row) in zip(study.runs, table.iterrows(), strict=True):
        trained, measured = tables.result(store, "train", key), tables.result(store, "measure", key)
        of_training = ("parameters", "test accuracy %", "test images")
        assert [row[name] for name in of_training] == [
            trained[name] for name in ("parameters", "test_accuracy", "test_images")
        ]
        mlu = {epsilon: row[tables.mlu_column(study, float(epsilon))] for epsilon in measured["mlu"]}
        assert mlu == {epsilon: 100 * value for epsilon, value in measured["mlu"].items()}
        assert (row["layers counted"], row["left out"]) == (measured["layers_counted"], len(measured["left_out"]))


@pytest.mark.parametrize("method", ["projection", "optimal", "svd"])
def test_every_number_of_table_2_is_in_the_files_of_decomposition_and_fine_tuning(studied, steps, method):
    study, store = studied
    key_of = {run.label: key for key, run in study.runs.items()}
    method_of = {name: key for key, name in tables.METHOD_NAMES.items()}
    table = tables.compression(steps, method)
    for _, shown in table.iterrows():
        key = key_of[shown.network]
        row = row_of(store, key, shown.step, method_of[shown.weights], shown["ε"])
        original = row_of(store, key, "original", "dense", np.nan)
        assert (shown["accuracy %"], shown["images"], shown.parameters) == (row.accuracy, row.images, row.parameters)
        assert shown["parameters kept %"] == pytest.approx(100 * row.parameters / original.parameters)
        assert (shown["MFLOPs"], shown["FLOPs kept %"]) == pytest.approx(
            (row.flops / 1e6, 100 * row.flops / original.flops)
        )
        assert shown["change, points [95%]"] == ("" if shown.step == "original" else bracketed(row))
    made = [("original", "dense", None), ("fine-tuned", "dense", None)]
    made += [(form, method, e) for form, e in product(["projected", "decomposed"], study.measure.epsilons)]
    made += [("fine-tuned", method, e) for e in study.measure.epsilons if method in study.decompose.finetuned]
    expected = {
        (label, step, "projection" if step == "projected" else weights, epsilon)
        for label, (step, weights, epsilon) in product(key_of, made)
    }
    shown = table.assign(weights=table.weights.map(method_of))[["network", "step", "weights", "ε"]]
    shown = [tuple(None if pd.isna(value) else value for value in row) for row in shown.itertuples(index=False)]
    assert set(shown) == expected
    assert len(shown) == len(expected)


def test_table_4_sets_each_method_before_and_after_beside_one_another(studied, steps):
    study, store = studied
    key_of = {run.label: key for key, run in study.runs.items()}
    method_of = {name: key for key, name in tables.METHOD_NAMES.items()}
    table = tables.methods(steps)
    assert len(table) == len(study.runs) * len(study.measure.epsilons) * len(study.decompose.methods)
    for _, shown in table.iterrows():
        key, method, epsilon = key_of[shown.network], method_of[shown.weights], shown["ε"]
        before = row_of(store, key, "decomposed", method, epsilon)
        original = row_of(store, key, "original", "dense", np.nan)
        assert shown["parameters kept %"] == pytest.approx(100 * before.parameters / original.parameters)
        assert (shown["before, %"], shown["images"]) == (before.accuracy, before.images)
        assert shown["change before, points [95%]"] == bracketed(before)
        if method in study.decompose.finetuned:
            after = row_of(store, key, "fine-tuned", method, epsilon)
            assert (shown["after, %"], shown["change after, points [95%]"]) == (after.accuracy, bracketed(after))
        else:
            assert np.isnan(shown["after, %"])
            assert shown["change after, points [95%]"] == ""


def test_table_3_has_the_mean_utilization_of_each_third_of_the_depth(studied):
    study, store = studied
    table = tables.by_training(study, store)
    comparison = study.comparisons["vit"]
    at = list(product(comparison.runs().values(), study.measure.epsilons))
    for (run, epsilon), (_, shown) in zip(at, table.iterrows(), strict=True):
        layers = tables.rows(store, "measure", run)
        used = 100 * layers[layers.epsilon == epsilon].utilization.to_numpy()
        assert shown["training"] == tables.training_name(study, study.runs[run])
        assert shown[["MLU %", "first third %", "middle third %", "last third %"]].tolist() == pytest.approx(
            [used.mean(), used[:3].mean(), used[3:5].mean(), used[5:].mean()]
        )
        assert shown["RankMe"] == tables.result(store, "measure", run)["rankme"]
        assert shown["test accuracy %"] == tables.result(store, "train", run)["test_accuracy"]


def test_repeats_have_the_mean_and_the_sample_standard_deviation(studied, steps):
    study, store = studied
    table = tables.repeats(study, store, steps).set_index("quantity")
    runs = study.repeats["vgg11"].runs
    expected = {"test accuracy %": [tables.result(store, "train", run)["test_accuracy"] for run in runs]}
    for epsilon in study.measure.epsilons:
        made = [row_of(store, run, "fine-tuned", "optimal", epsilon) for run in runs]
        before = [row_of(store, run, "original", "dense", np.nan).parameters for run in runs]
        mlu = [tables.result(store, "measure", run)["mlu"][f"{epsilon:g}"] for run in runs]
        expected |= {
            tables.mlu_column(study, epsilon): [100 * value for value in mlu],
            f"parameters kept % (ε = {epsilon:g})": [
                100 * row.parameters / whole for row, whole in zip(made, before, strict=True)
            ],
            f"change after fine-tuning, points (ε = {epsilon:g})": [row.change for row in made],
        }
    assert list(table.index) == list(expected)
    for quantity, values in expected.items():
        row = table.loc[quantity]
        assert (row.network, row.runs) == ("VGG11", len(runs))
        assert (row["mean"], row["standard deviation"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))


def test_settings_list_every_parameter_what_was_looked_at_and_the_hardware(studied):
    study, store = studied
    table = settings(study, store, MACHINE | {"code": "a hash"})
    assert table.parameter.is_unique
    listed = dict(zip(table.parameter, table.value, strict=True))
    assert (listed["data.limit"], listed["measure.rows"], listed["runs.vgg11.finetune.lr"]) == ("null", "4", "0.01")
    assert listed["measure.epsilons"] == "[0.0, 1.0]"

    def leaves(value, name=""):
        inside = isinstance(value, dict) and value
        return [leaf for key, item in value.items() for leaf in leaves(item, f"{name}.{key}")] if inside else [name[1:]]

    assert set(leaves(study.model_dump())) == {name for name in listed if not name.startswith("found: ")}
    for key in study.runs:
        trained, measured = tables.result(store, "train", key), tables.result(store, "measure", key)
        found = f"found: runs.{key}"
        assert listed[f"{found}.evaluations of the rank search"] == str(measured["evaluations"])
        assert listed[f"{found}.calibration images"] == str(measured["calibration_images"])
        assert listed[f"{found}.search images"] == str(measured["search_images"])
        assert listed[f"{found}.test images"] == str(trained["test_images"])
        assert listed[f"{found}.precision of the rank search"] == measured["search_precision"]
        passes = float(listed[f"{found}.passes of the search split"])
        assert passes == pytest.approx(measured["passes_of_the_search_split"], abs=0.05)
    assert listed["found: machine.processor"] == "a processor"
    assert listed["found: machine.packages.torch"] == "2"
    assert "found: machine.code" not in listed
    assert not any(name.endswith((".search split", "tolerances")) for name in listed)


def test_tolerances_that_nobody_named_have_a_row_among_the_settings(studied):
    study, store = studied
    measure = study.measure.model_copy(update={"epsilons": []}).resolved(61)
    table = settings(study.model_copy(update={"measure": measure}), store, MACHINE).set_index("parameter").value
    assert table["measure.epsilons"] == "[1.64, 2.0]"
    assert table["found: tolerances"] == "[1.64, 2.0]: by default [1.0, 2.0], none finer than one search image"


def test_tables_say_of_each_run_which_its_search_split_is_where_they_differ(studied):
    study, store = studied
    given = study.pretrained["simclr_vit"].model_copy(update={"method": "published", "supervision": "supervised"})
    halved = study.data.model_copy(update={"search_from": "test"})
    of_test = study.model_copy(update={"pretrained": {"simclr_vit": given}, "data": halved})
    for which in (study, study.model_copy(update={"data": halved})):
        assert "search split" not in tables.utilization(which, store)
    table = tables.utilization(of_test, store).set_index("network")["search split"]
    found = settings(of_test, store, MACHINE).set_index("parameter").value
    for key, run in of_test.runs.items():
        expected = "half of the test images" if run.pretrained == "simclr_vit" else "held out of training"
        assert table[run.label].startswith(expected)
        assert found[f"found: runs.{key}.search split"].startswith(expected)


def test_the_summary_is_the_headline_numbers_with_labels_and_intervals(studied, steps):
    study, store = studied
    summary = summary_of(study, store, steps)
    assert json.loads(json.dumps(summary)) == summary
    for key, run in study.runs.items():
        whole = row_of(store, key, "original", "dense", np.nan)
        made = {f"{e:g}": row_of(store, key, "fine-tuned", "optimal", e) for e in study.measure.epsilons}
        assert summary[key] == {
            "label": run.label,
            "training": tables.training_name(study, run),
            "supervision": "supervised" if run.pretrained == "none" else "self-supervised",
            "test_accuracy": tables.result(store, "train", key)["test_accuracy"],
            "mlu": tables.result(store, "measure", key)["mlu"],
            "finetuned": {
                epsilon: {
                    "parameters_kept": row.parameters / whole.parameters,
                    "flops_kept": row.flops / whole.flops,
                    "change": row.change,
                    "change_low": row.change_low,
                    "change_high": row.change_high,
                }
                for epsilon, row in made.items()
            },
        } | ({"frontier": summary[key]["frontier"]} if key in study.frontier else {})


def test_the_summary_of_a_run_with_a_frontier_has_every_network_of_it(studied, steps):
    study, store = studied
    found = summary_of(study, store, steps)["vgg11"]["frontier"]
    made = tables.rows(store, "frontier", "vgg11")
    first = made[(made.form != "original") & (made.seed.isna() | (made.seed == 0))]
    assert {(m, r, f) for m, its in found.items() for r, steps in its.items() for f in steps} == set(
        first[["method", "ranks", "form"]].itertuples(index=False, name=None)
    )
    for row in first.itertuples():
        assert found[row.method][row.ranks][row.form] == {
            "parameters_kept": row.parameters / made.parameters[0],
            "flops_kept": row.flops / made.flops[0],
            "change": row.change,
            "change_low": row.change_low,
            "change_high": row.change_high,
        }


def kept(store: Store, stage: str, key: str, at: str) -> float:
    """Of the FLOPs of a run's original, in the low-rank network of one choice of ranks that was made by SVD."""
    made = tables.rows(store, stage, key)
    return made.query(f"form == 'decomposed' and method == 'svd' and {at}").flops.item() / made.flops[0]


def test_latencies_are_those_that_were_timed_here_of_the_networks_that_are_reported(studied):
    study, store = studied
    assert timings.latencies(study, store).empty
    share = kept(store, "decompose", "vit", "epsilon == 1")
    timed = {"epsilon": 1.0, "method": "svd", "images": 64, "original": 0.02, "decomposed": 0.015, "flops_kept": share}
    other = timed | {"method": "optimal"}  # whose FLOPs are not those: of a network that another change has made
    write_table(store.data("timings", "decompose-vit.csv"), pd.DataFrame([timed, other]))
    (row,) = timings.latencies(study, store).to_dict("records")
    assert row == {
        "network": "ViT & labels",
        "ranks": "ε = 1",
        "weights": "SVD of W",
        "images at a time": 64,
        "original, ms": pytest.approx(20),
        "decomposed, ms": pytest.approx(15),
        "time kept %": pytest.approx(75),
        "FLOPs kept %": pytest.approx(100 * share),
    }


def test_every_number_of_table_6_is_in_the_files_of_the_frontier(studied):
    study, store = studied
    made, table = tables.rows(store, "frontier", "vgg11"), tables.frontier(study, store)
    first = made[made.seed.isna() | (made.seed == 0)]
    assert len(table) == len(first) == 1 + 2 * 2 + 2  # original; ranks and methods; dense and compensated, trained on
    for (_, shown), row in zip(table.iterrows(), first.itertuples(), strict=True):
        assert (shown.ranks, shown.weights, shown.step) == (row.ranks, tables.METHOD_NAMES[row.method], row.form)
        assert (shown["accuracy %"], shown["images"]) == (row.accuracy, row.images)
        assert shown["change, points [95%]"] == ("" if row.form == "original" else bracketed(row))
        assert shown["parameters kept %"] == pytest.approx(100 * row.parameters / made.parameters[0])
        assert shown["FLOPs kept %"] == pytest.approx(100 * row.flops / made.flops[0])


def test_seeds_of_fine_tuning_are_summed_up_by_mean_and_standard_deviation(studied):
    study, store = studied
    made = tables.rows(store, "frontier", "vgg11").query("form == 'fine-tuned'")
    dense, compensated = tables.frontier_seeds(study, store).to_dict("records")
    for row, method in ((dense, "dense"), (compensated, "compensated")):
        changes = made[made.method == method].change.to_numpy()
        assert (row["weights"], row["seeds"]) == (method, 3)
        assert row["mean change, points"] == pytest.approx(changes.mean())
        assert row["standard deviation"] == pytest.approx(changes.std(ddof=1))


def test_accuracy_is_set_against_the_time_that_was_taken_here(studied):
    study, store = studied
    assert timings.timed(study, store).empty
    times = {"ranks": "params-0.5", "method": "svd", "images": 64, "original": 0.02, "decomposed": 0.015}
    times["flops_kept"] = kept(store, "frontier", "vgg11", "ranks == 'params-0.5'")
    write_table(store.data("timings", "frontier-vgg11.csv"), pd.DataFrame([times]))
    (row,) = timings.timed(study, store).to_dict("records")
    made = tables.rows(store, "frontier", "vgg11")
    its = made[(made.method == "svd") & (made.ranks == "params-0.5")].iloc[0]
    assert row["time_kept"] == pytest.approx(0.75)
    assert (row["label"], row["change"], row["form"]) == ("VGG11", its.change, "decomposed")


def test_only_tables_that_have_rows_are_written(studied, steps):
    study, store = studied
    record = {"code": "a hash", **MACHINE}
    every = set(sheets_of(study, store, record, steps))
    plain = study.model_copy(update={"frontier": {}, "repeats": {}, "comparisons": {}})
    fewer = {"repeats", "table3-training", "table6-frontier", "frontier-seeds"}
    assert fewer < every
    assert set(sheets_of(plain, store, record, steps)) == every - fewer


def test_two_runs_of_one_label_are_refused_since_no_table_could_tell_them_apart(parameters):
    parameters["runs"]["vit_linear"]["label"] = parameters["runs"]["vgg11"]["label"]
    with pytest.raises(StudyError, match="label"):
        parse_study(parameters)


@pytest.mark.parametrize("name", COMMITTED)
def test_the_committed_tables_and_summary_follow_from_the_committed_results(name, tmp_path):
    committed, again = Store(name, ROOT), Store(name, tmp_path)
    record = read_json(committed.report("provenance.json"))
    found, summary = sheets(study_of(name), committed, record)
    assert {path.stem for path in committed.report("tables").iterdir()} == set(found)
    if name not in LOCKED:
        del found["table5-settings"]
    for sheet, table in found.items():
        write_table(again.report("tables", f"{sheet}.csv"), table)
        as_committed = committed.report("tables", f"{sheet}.csv").read_bytes()
        assert again.report("tables", f"{sheet}.csv").read_bytes() == as_committed, sheet
    write_json(again.report("summary.json"), summary)
    assert again.report("summary.json").read_bytes() == committed.report("summary.json").read_bytes()
