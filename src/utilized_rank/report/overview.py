"""All studies beside one another: what the paper claims, and what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..base.files import read_json, read_table, write_table, write_text
from ..base.store import Store
from ..study.results import SUMMARY, Kind, Record
from .figures import style
from .figures.study import overview as figure
from .interactive import of_studies
from .pages import render, table_html

UPHELD, NOT_UPHELD, UNTESTABLE = "upheld", "not upheld", "not testable here"
HALF, LOSS, UP_TO = 0.5, 0.2, 0.7
"""The paper's abstract: half of the parameters, points lost after fine-tuning, utilization after self-supervision."""


@dataclass(frozen=True)
class Study:
    """What one study's report says."""

    name: str
    title: str
    runs: dict[str, dict[str, Any]]
    """As in ``tables.summary``."""
    comparisons: pd.DataFrame
    """As in ``tables.training_kinds``, of all comparisons."""

    def labels(self) -> dict[str, str]:
        """Of its runs, by key."""
        return {key: run["label"] for key, run in self.runs.items()}


def studies(root: Path) -> list[Study]:
    """Every study that has a report, by name."""
    found = []
    for path in sorted(root.glob("reports/*/summary.json")):
        store = Store(path.parent.name, root)
        compared = [
            read_table(file, Kind).assign(comparison=file.stem)
            for file in sorted(store.report("results").glob("ssl_vs_supervised-*.csv"))
        ]
        found.append(
            Study(
                store.study,
                read_json(store.report("provenance.json"), Record)["title"],
                read_json(path, SUMMARY),
                pd.concat(compared, ignore_index=True) if compared else pd.DataFrame(),
            )
        )
    return found


def utilizations(found: list[Study]) -> pd.DataFrame:
    """One row a study, run and tolerance: study, title, network, training, supervised, epsilon, mlu, accuracy."""
    return pd.DataFrame(
        [
            {
                "study": study.name,
                "title": study.title,
                "network": run["label"],
                "training": run["training"],
                "supervised": run["supervision"] == "supervised",
                "epsilon": float(epsilon),
                "mlu": mlu,
                "accuracy": run["test_accuracy"],
            }
            for study in found
            for run in study.runs.values()
            for epsilon, mlu in run["mlu"].items()
        ]
    )


def claims(found: list[Study]) -> pd.DataFrame:
    """What the abstract says, what was measured, and the verdict: one row a claim."""
    used = utilizations(found)
    rows = [_fraction(used), _imagenet(found), _compression(found), *_self_supervision(found, used)]
    return pd.DataFrame(rows, columns=["the paper's abstract", "measured here", "verdict"])


def _fraction(used: pd.DataFrame) -> tuple[str, str, str]:
    loosest = used.groupby("study").epsilon.transform("max")
    shown = used[used.supervised & (used.epsilon == loosest)]
    at = shown.mlu
    tolerances = " or ".join(f"{epsilon:g}" for epsilon in sorted(shown.epsilon.unique()))
    measured = (
        f"MLU {100 * at.min():.0f} to {100 * at.max():.0f}%, median {100 * at.median():.0f}%, of {len(at)} networks "
        f"trained with labels, each at the largest ε of its study ({tolerances} points)"
    )
    verdict = UPHELD if at.max() < HALF else NOT_UPHELD
    return "Trained networks use a fraction of their space (here: less than half, each of them).", measured, verdict


def _imagenet(found: list[Study]) -> tuple[str, str, str]:
    claim = "ViT-B/16 on ImageNet uses 35%, ViT-L/16 20% (here: to 5 points)."
    runs = next((study.runs for study in found if study.name == "imagenet"), None)
    if runs is None:
        need = "needs ImageNet's images, published weights, and days on two cores: conf/study/imagenet.yaml runs it"
        return claim, need, UNTESTABLE
    mlu = {name: list(runs[name]["mlu"].values()) for name in ("imagenet_vit_b16", "imagenet_vit_l16")}
    near = all(
        any(abs(100 * value - paper) <= 5 for value in mlu[name])
        for name, paper in (("imagenet_vit_b16", 35), ("imagenet_vit_l16", 20))
    )
    text = "; ".join(f"{runs[name]['label']} {100 * min(of):.0f} to {100 * max(of):.0f}%" for name, of in mlu.items())
    return claim, text, UPHELD if near else NOT_UPHELD


def _compression(found: list[Study]) -> tuple[str, str, str]:
    claim = f"Half of the parameters and fewer cost less than {LOSS:g} points after fine-tuning."
    networks = [run["finetuned"].values() for study in found for run in study.runs.values()]
    small = [[made for made in of if made["parameters_kept"] <= HALF] for of in networks]
    tried = [of for of in small if of]
    held = [of for of in tried if any(made["change"] > -LOSS for made in of)]
    sure = [of for of in tried if any(made["change_low"] > -LOSS for made in of)]
    if not tried:
        return claim, f"none of {len(networks)} networks was cut to half or less", UNTESTABLE
    measured = (
        f"{len(tried)} of {len(networks)} networks were cut to half or less; {len(held)} of them lost less than "
        f"{LOSS:g} points at some tolerance, {len(sure)} with a 95% interval that excludes more"
    )
    return claim, measured, UPHELD if len(held) == len(tried) else NOT_UPHELD


def _self_supervision(found: list[Study], used: pd.DataFrame) -> list[tuple[str, str, str]]:
    claim = "Self-supervised pre-training raises utilization"
    pairs = []
    for study in found:
        for _, at in study.comparisons.groupby(["comparison", "epsilon"]) if len(study.comparisons) else []:
            mlu = at.set_index("kind").mlu
            pairs += [(kind, mlu[kind] > mlu["supervised"]) for kind in ("linear", "finetuned")]
    none = ("no study compares a network with its self-supervised twin", UNTESTABLE)
    rows = []
    for kind, words in (("linear", "of a frozen encoder"), ("finetuned", "after fine-tuning on the labels")):
        higher = [above for which, above in pairs if which == kind]
        measured = f"higher than with labels alone in {sum(higher)} of {len(higher)} networks and tolerances"
        verdict = (measured, UPHELD if all(higher) else NOT_UPHELD) if higher else none
        rows.append((f"{claim}, {words}.", *verdict))
    beyond = used[~used.supervised].mlu
    verdict = none
    if len(beyond):
        measured = f"at most {100 * beyond.max():.0f}%, in networks much smaller than the paper's"
        verdict = (measured, UPHELD if beyond.max() >= UP_TO else NOT_UPHELD)
    rows.append((f"It rises up to {UP_TO:.0%}.", *verdict))
    return rows


def write(root: Path) -> None:
    """Write ``reports/index.html``, its figure and its tables, from the reports that lie there."""
    found = studies(root)
    used, verdicts = utilizations(found), claims(found)
    folder = root / "reports"
    style.save(figure(used), folder / "utilization.svg")
    write_table(folder / "utilization.csv", used)
    write_table(folder / "claims.csv", verdicts)
    page = render(
        "overview.html.j2",
        of_studies({study.title: (Store(study.name, root), study.labels()) for study in found}),
        studies=found,
        claims=table_html(verdicts, title="Claim by claim"),
        benchmarks=(folder / "benchmarks" / "index.html").is_file(),
    )
    write_text(folder / "index.html", page)
