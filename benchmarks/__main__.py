"""``python -m benchmarks [NAME ...]``: measure, write tables and figures to ``reports/benchmarks/``, and the page."""

from __future__ import annotations

import importlib
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch

from utilized_rank.base.files import read_json, read_table, write_json, write_table, write_text
from utilized_rank.base.runtime import processor
from utilized_rank.report.figures import style
from utilized_rank.report.pages import css, table_html
from utilized_rank.study.provenance import tree_hash

from .search import ranks_side_by_side
from .setting import CALIBRATION, CHECKPOINT, EPOCHS, ROOT, SEED, THREADS, setting

NAMES = (
    "search",
    "prediction",
    "growth",
    "moments",
    "eigenbases",
    "allocation",
    "deployment",
    "pipeline",
    "scale",
    "gpu",
)
REPORT = ROOT / "reports" / "benchmarks"


def run(name: str) -> None:
    """Measure one benchmark and write what it found, with its provenance."""
    here = setting()
    table = importlib.import_module(f"benchmarks.{name}").measure(here)
    write_table(REPORT / f"{name}.csv", table)
    write_json(REPORT / f"{name}.json", _provenance(here.name))


def _provenance(data: str) -> dict[str, Any]:
    code = [*ROOT.glob("src/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "data": data,
        "networks": "public ResNet-20" if CHECKPOINT.is_file() else "trained here",
        "epochs of those trained here": EPOCHS[data],
        "calibration images": CALIBRATION,
        "code": tree_hash(code, ROOT),
        "revision": revision.stdout.strip(),
        "seed": SEED,
        "threads": THREADS,
        "processor": processor(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "torchvision", "timm", "numpy", "scipy")},
    }


def draw(name: str) -> str:
    """The figure and the tables of one benchmark, as a part of the page."""
    module = importlib.import_module(f"benchmarks.{name}")
    table = read_table(REPORT / f"{name}.csv")
    style.use()
    style.save(module.draw(table), REPORT / f"{name}.svg")
    plt.close("all")
    # Some tables are shown as they were measured.
    shown: pd.DataFrame = module.summary(table) if hasattr(module, "summary") else table
    sheets = table_html(shown, title=module.TITLE)
    if name == "search":
        beside = "Ranks k_S, k_T side by side"
        sheets += f"<h3>{beside}</h3>" + table_html(ranks_side_by_side(table), title=beside)
    record = read_json(REPORT / f"{name}.json")
    return (
        f'<h2 id="{name}">{module.TITLE}</h2><p>{module.NOTE}</p>'
        f'<figure><a class="wide" href="{name}.svg"><img src="{name}.svg" alt="{module.TITLE}"></a></figure>{sheets}'
        f'<p class="note"><a href="{name}.csv">CSV</a>, <a href="{name}.json">provenance</a>: {record["data"]}, '
        f"{record['threads']} threads, {record['processor']}, torch {record['packages']['torch']}.</p>"
    )


def page(names: list[str]) -> str:
    """All benchmarks that have been measured, on one page."""
    parts = "\n".join(draw(name) for name in names)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Utilized rank: benchmarks</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{css()}</style></head><body><main><h1>What it costs, measured</h1>"
        f"<p>Times are of one machine at one moment: compare within a table. <code>make bench</code> measures anew.</p>"
        f"{parts}</main></body></html>"
    )


def main(names: list[str]) -> None:
    """Measure each in a process of its own, then write the page."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        sys.exit(f"there is no benchmark {unknown[0]!r} (known: {', '.join(NAMES)})")
    # Without a GPU that one would take hours, and say nothing.
    there = [name for name in NAMES if name != "gpu" or torch.cuda.is_available()]
    for name in names or there:
        print(f"== {name}", flush=True)
        subprocess.run(
            [sys.executable, "-c", f"from benchmarks.__main__ import run; run({name!r})"], check=True, cwd=ROOT
        )
    write_text(REPORT / "index.html", page([name for name in NAMES if Path(REPORT, f"{name}.csv").is_file()]))


if __name__ == "__main__":
    main(sys.argv[1:])
