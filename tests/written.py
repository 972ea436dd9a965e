"""Pages of a study whose results are there already, as its notebook and the last stage write them."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from utilized_rank.base.files import write_json, write_table
from utilized_rank.base.store import Store
from utilized_rank.report import overview, pages, summary, tables
from utilized_rank.study.config import Study

RECORD = {"code": "a hash", "device": "cpu", "processor": "a <processor>", "system": "s", "python": "3"}
RECORD |= {"packages": {"torch": "2"}}


def index(study: Study, store: Store, links: Iterable[dict[str, str]] = (), record: dict = RECORD) -> str:
    """The index of a study's report, as its notebook writes it."""
    steps = tables.steps(study, store)
    tuned = tables.tuned(study, steps)
    epsilons = sorted(study.measure.epsilons)
    sheets = summary.sheets(study, store, record, steps)
    pages.write_index(study, store, sheets, list(links), record, tuned, epsilons[len(epsilons) // 2])
    return store.data("pages", "index.html").read_text()


def reports(made: Study, store: Store, titles: dict[str, str]) -> Path:
    """The same study under other names and titles, with all that the overview reads, and the overview; its folder."""
    steps = tables.steps(made, store)
    for name in titles.keys() - {made.name}:
        shutil.copytree(store.report(), Store(name, store.root).report())
    for name, title in titles.items():
        folder = Store(name, store.root).report()
        write_json(folder / "summary.json", summary.summary(made, store, steps))
        write_json(folder / "provenance.json", {"title": title})
        compared = tables.training_kinds(made, store, made.comparisons["vit"])
        write_table(folder / "results" / "ssl_vs_supervised-vit.csv", compared)
    overview.write(store.root)
    return store.root / "reports"


def library_apart(page: str) -> tuple[str, str]:
    """A page without the library that draws its pictures, and that library, which may be of another version."""
    (script,) = re.findall(r"<script>(\(\(\) => \{.*?)</script>", page, re.DOTALL)
    return page.replace(script, ""), script
