"""Tables over all runs of a study, from the result files of its stages."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ..base.files import read_json, read_table
from ..base.store import Store
from ..study.config import Study
from ..study.results import RESULTS, ROWS
from ..study.sections import FROM_SCRATCH, Comparison, Run

METHOD_NAMES = {
    "dense": "dense",
    "projection": "P_S W P_T",
    "optimal": "optimum",
    "svd": "SVD of W",
    "compensated": "compensated",
    "scratch": "from random weights",
}
SEARCHED = {"train": "held out of training", "test": "half of the test images, which are not reported on"}
"""Search splits, by the images that they are of."""


def result(store: Store, stage: str, key: str) -> Any:
    """The metrics that a stage wrote for one run."""
    return read_json(store.report("results", f"{stage}-{key}.json"), RESULTS[stage])


def rows(store: Store, stage: str, key: str) -> pd.DataFrame:
    """The table that a stage wrote for one run."""
    return read_table(store.report("results", f"{stage}-{key}.csv"), ROWS[stage])


def training_name(study: Study, run: Run) -> str:
    """How a run's network was trained, in words."""
    if run.pretrained == FROM_SCRATCH:
        return "supervised"
    before = study.pretrained[run.pretrained]
    after = {"supervised": "fine-tuned", "linear": "linear probe", "as_given": "as given"}[run.train.method]
    return f"{before.name} ({supervision(study, run)}), {after}"


def supervision(study: Study, run: Run) -> str:
    """Where a run's features come from: labels, weaker ones, or none."""
    if run.pretrained == FROM_SCRATCH:
        return "supervised"
    return study.pretrained[run.pretrained].supervision or "self-supervised"


def searches_test(study: Study) -> bool:
    """Whether the search split of any run is of the test images: tables then say of each which it is."""
    return any(study.search_from(key) == "test" for key in study.runs)


def mlu_column(study: Study, epsilon: float) -> str:
    """The heading of a column of mean layer utilization, which says so where it is predicted."""
    return f"MLU % (ε = {epsilon:g}{', predicted' if study.measure.criterion == 'predicted' else ''})"


def utilization(study: Study, store: Store) -> pd.DataFrame:
    """Table 1: each network, its accuracy and its mean layer utilization at each epsilon."""
    table = []
    for key, run in study.runs.items():
        trained, measured = result(store, "train", key), result(store, "measure", key)
        mlu = {mlu_column(study, e): 100 * measured["mlu"][f"{e:g}"] for e in study.measure.epsilons}
        table.append(
            {
                "network": run.label,
                "data set": study.title,
                "training": training_name(study, run),
                "parameters": trained["parameters"],
                "test accuracy %": trained["test_accuracy"],
                "test images": trained["test_images"],
                **({"search split": SEARCHED[study.search_from(key)]} if searches_test(study) else {}),
                **mlu,
                "layers counted": measured["layers_counted"],
                "left out": len(measured["left_out"]),
            }
        )
    return pd.DataFrame(table)


def steps(study: Study, store: Store) -> pd.DataFrame:
    """Every network that was made of every run: original, projected, decomposed, fine-tuned.

    Columns as in ``decompose.assess``, with run and label, and with parameters and FLOPs as fractions
    of the original's (parameters_kept, flops_kept).
    """
    parts = []
    for key, run in study.runs.items():
        both = pd.concat([rows(store, "decompose", key), rows(store, "finetune", key)], ignore_index=True)
        original = both[both.form == "original"].iloc[0]
        both.insert(0, "run", key)
        both.insert(1, "label", run.label)
        both["parameters_kept"] = both.parameters / original.parameters
        both["flops_kept"] = both.flops / original.flops
        parts.append(both)
    return pd.concat(parts, ignore_index=True)


def best(study: Study) -> str:
    """The method whose networks the study's headline numbers are of: the optimum, where it is fine-tuned."""
    finetuned = study.decompose.finetuned
    return "optimal" if "optimal" in finetuned else finetuned[0]


def tuned(study: Study, all_steps: pd.DataFrame) -> pd.DataFrame:
    """The fine-tuned networks of the best method, one row a run and epsilon, as :func:`steps` gives them."""
    return all_steps[(all_steps.form == "fine-tuned") & (all_steps.method == best(study))]


def with_interval(table: pd.DataFrame) -> pd.Series:
    """Changes of accuracy as text: change, and its paired 95% interval in brackets."""
    text = [f"{row.change:+.2f} [{row.change_low:+.2f}, {row.change_high:+.2f}]" for row in table.itertuples()]
    return pd.Series(text, index=table.index).where(table.form != "original", "")


def compression(all_steps: pd.DataFrame, method: str) -> pd.DataFrame:
    """Table 2: accuracy, parameters and FLOPs at each step, for the weights of one method."""
    shown = all_steps[all_steps.method.isin(["dense", "projection", method])]
    shown = shown[~((shown.form == "decomposed") & (shown.method != method))]
    shown = shown[~((shown.form == "fine-tuned") & ~shown.method.isin([method, "dense"]))]
    return pd.DataFrame(
        {
            "network": shown.label,
            "ε": shown.epsilon,
            "step": shown.form,
            "weights": shown.method.map(METHOD_NAMES),
            "accuracy %": shown.accuracy,
            "images": shown.images,
            "change, points [95%]": with_interval(shown),
            "parameters": shown.parameters,
            "parameters kept %": 100 * shown.parameters_kept,
            "MFLOPs": shown.flops / 1e6,
            "FLOPs kept %": 100 * shown.flops_kept,
        }
    )


def training_kinds(study: Study, store: Store, comparison: Comparison) -> pd.DataFrame:
    """One row a kind of training and epsilon: kind, run, epsilon, mlu, first, middle, last, rankme, accuracy.

    first, middle and last are the mean utilization of the layers in each third of the depth.
    """
    table = []
    for kind, key in comparison.runs().items():
        measured, trained, layers = (
            result(store, "measure", key),
            result(store, "train", key),
            rows(store, "measure", key),
        )
        for epsilon in study.measure.epsilons:
            used = layers[layers.epsilon == epsilon].utilization.reset_index(drop=True)
            third = pd.Series(used.index * 3 // len(used)).map({0: "first", 1: "middle", 2: "last"})
            table.append(
                {
                    "kind": kind,
                    "run": key,
                    "epsilon": epsilon,
                    "mlu": used.mean(),
                    **used.groupby(third).mean().to_dict(),
                    "rankme": measured["rankme"],
                    "accuracy": trained["test_accuracy"],
                    "images": trained["test_images"],
                }
            )
    return pd.DataFrame(table)


def by_training(study: Study, store: Store) -> pd.DataFrame:
    """Table 3: supervised against self-supervised, for every comparison of the study."""
    parts = []
    for comparison in study.comparisons.values():
        table = training_kinds(study, store, comparison)
        parts.append(
            pd.DataFrame(
                {
                    "network": comparison.label,
                    "training": [training_name(study, study.runs[run]) for run in table.run],
                    "ε": table.epsilon,
                    "MLU %": 100 * table.mlu,
                    "first third %": 100 * table["first"],
                    "middle third %": 100 * table["middle"],
                    "last third %": 100 * table["last"],
                    "RankMe": table.rankme,
                    "test accuracy %": table.accuracy,
                    "images": table.images,
                }
            )
        )
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def repeats(study: Study, store: Store, all_steps: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over runs that differ in their random numbers alone: one row a quantity."""
    table = []
    low_rank = tuned(study, all_steps)
    for group in study.repeats.values():
        trained = [result(store, "train", run)["test_accuracy"] for run in group.runs]
        measured = [result(store, "measure", run)["mlu"] for run in group.runs]
        quantities = {"test accuracy %": trained}
        for epsilon in study.measure.epsilons:
            at = low_rank[(low_rank.epsilon == epsilon) & low_rank.run.isin(group.runs)]
            quantities |= {
                mlu_column(study, epsilon): [100 * mlu[f"{epsilon:g}"] for mlu in measured],
                f"parameters kept % (ε = {epsilon:g})": [100 * kept for kept in at.parameters_kept],
                f"change after fine-tuning, points (ε = {epsilon:g})": list(at.change),
            }
        for name, values in quantities.items():
            found = pd.Series(values)
            table.append(
                {
                    "network": group.label,
                    "quantity": name,
                    "runs": len(found),
                    "mean": found.mean(),
                    "standard deviation": found.std(),
                }
            )
    return pd.DataFrame(table)


def methods(all_steps: pd.DataFrame) -> pd.DataFrame:
    """Table 4: the same ranks with each method's weights, before and after fine-tuning."""
    low_rank = all_steps[all_steps.method != "dense"]
    before = low_rank[low_rank.form == "decomposed"]
    after = low_rank[low_rank.form == "fine-tuned"].set_index(["run", "epsilon", "method"])
    keys = list(zip(before.run, before.epsilon, before.method, strict=True))
    trained_on = after.reindex(keys).reset_index()
    return pd.DataFrame(
        {
            "network": before.label.to_numpy(),
            "ε": before.epsilon.to_numpy(),
            "weights": before.method.map(METHOD_NAMES).to_numpy(),
            "parameters kept %": 100 * before.parameters_kept.to_numpy(),
            "before, %": before.accuracy.to_numpy(),
            "change before, points [95%]": with_interval(before).to_numpy(),
            "after, %": trained_on.accuracy.to_numpy(),
            "change after, points [95%]": with_interval(trained_on).where(trained_on.accuracy.notna(), "").to_numpy(),
            "images": before.images.to_numpy(),
        }
    )


def frontier(study: Study, store: Store) -> pd.DataFrame:
    """Table 6: every choice of ranks and kind of weights of the runs that have a frontier, before and after training.

    Of several seeds the first; :func:`frontier_seeds` has them all.
    """
    parts = []
    for key in study.frontier:
        made = rows(store, "frontier", key)
        original = made[made.form == "original"].iloc[0]
        shown = made[made.seed.fillna(0) == 0]
        parts.append(
            pd.DataFrame(
                {
                    "network": study.runs[key].label,
                    "ranks": shown.ranks,
                    "weights": shown.method.map(METHOD_NAMES),
                    "step": shown.form,
                    "accuracy %": shown.accuracy,
                    "change, points [95%]": with_interval(shown),
                    "search split %": shown.search_accuracy,
                    "parameters kept %": 100 * shown.parameters / original.parameters,
                    "FLOPs kept %": 100 * shown.flops / original.flops,
                    "learning rate": shown.lr,
                    "images": shown.images,
                }
            )
        )
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def frontier_seeds(study: Study, store: Store) -> pd.DataFrame:
    """Mean and standard deviation, over random numbers, of the change after fine-tuning: one row a network."""
    parts = []
    for key in study.frontier:
        made = rows(store, "frontier", key)
        if made.seed.max() > 0:
            change = made[made.form == "fine-tuned"].groupby(["ranks", "method"], sort=False).change
            table = change.agg(["count", "mean", "std"]).reset_index()
            parts.append(
                pd.DataFrame(
                    {
                        "network": study.runs[key].label,
                        "ranks": table.ranks,
                        "weights": table.method.map(METHOD_NAMES),
                        "seeds": table["count"],
                        "mean change, points": table["mean"],
                        "standard deviation": table["std"],
                    }
                )
            )
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
