"""Pages that need no network: executed notebooks as HTML, and the index with figures and tables."""

from __future__ import annotations

import html
import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import nbformat
import pandas as pd
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from ..base.files import write_text
from ..base.store import Store
from ..stages.notebooks import STAGES, executed_name, keys_of
from ..study.config import Study
from .figures import style
from .figures.frontier import latency
from .tables import mlu_column, result
from .timings import latencies, timed

TEMPLATES = Path(str(files("utilized_rank.report") / "templates"))
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(?!\s)([^$\n]+?)(?<!\s)\$", re.DOTALL)
STAGE_TITLES = {
    "prepare": "Data and splits",
    "pretrain": "Self-supervised pre-training",
    "train": "Training",
    "measure": "Utilized rank",
    "ssl_vs_supervised": "Self-supervised against supervised",
    "decompose": "Projection and decomposition",
    "finetune": "Fine-tuning",
    "frontier": "Beyond the paper",
    "report": "Report",
}


def css() -> str:
    """The style of every page: ours, and the colours of code."""
    return (TEMPLATES / "style.css").read_text() + HtmlFormatter(style="xcode").get_style_defs(".highlight")


def notebook_page(path: Path, title: str) -> str:
    """An executed notebook as one HTML page, pictures and formulas inside, no script, no other host."""
    notebook = nbformat.read(path, as_version=4)
    formulas: list[str] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = FORMULA.sub(lambda match: _set_aside(match, formulas), cell.source)
    exporter = HTMLExporter(
        template_name="notebook",
        extra_template_basedirs=[str(TEMPLATES)],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    resources = {"study_css": css(), "metadata": {"name": title}}
    page, _ = exporter.from_notebook_node(notebook, resources=resources)
    # MathML goes in last: Markdown would read the * and _ of a formula as emphasis.
    return re.sub(r"@@formula(\d+)@@", lambda match: formulas[int(match[1])], page)


def _set_aside(match: re.Match[str], formulas: list[str]) -> str:
    block, inline = match.groups()
    formulas.append(convert(block or inline, display="block" if block else "inline"))
    return f"@@formula{len(formulas) - 1}@@"


def write_notebook_pages(study: Study, store: Store) -> list[dict[str, str]]:
    """Render every executed notebook but the report's own; returns what the index links: title, href."""
    links = []
    for stage in STAGES:
        for key in keys_of(study, stage) if stage != "report" else []:
            name = executed_name(stage, key)
            title = STAGE_TITLES[stage] + (f": {key}" if key else "")
            page = notebook_page(store.data("executed", f"{name}.ipynb"), title)
            write_text(store.data("pages", "notebooks", f"{name}.html"), page)
            links.append({"title": title, "href": f"notebooks/{name}.html"})
    return links


def table_html(table: pd.DataFrame, digits: int = 2) -> str:
    """A table as HTML: numbers to ``digits`` decimals, whole ones with thousands apart.

    A network's name that repeats that of the row above is dimmed, so that its rows read as a group.
    """
    head = "".join(f'<th class="{_kind(table[column])}">{html.escape(str(column))}</th>' for column in table.columns)
    body, above = [], None
    for row in table.itertuples(index=False):
        group = "repeat" if row[0] == above else "first"
        body.append(f'<tr class="{group}">' + "".join(_cell(value, digits) for value in row) + "</tr>")
        above = row[0]
    rows = "\n".join(body)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def _kind(column: pd.Series) -> str:
    return "number" if pd.api.types.is_numeric_dtype(column) else "text"


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, str):
        return f'<td class="text">{html.escape(value)}</td>'
    if pd.isna(value):
        return "<td></td>"
    if isinstance(value, int):
        return f"<td>{value:,}</td>"
    if 0 < abs(value) < 0.5 * 10**-digits:
        return f"<td>{value:.1e}</td>"
    return f"<td>{value:,.{digits}f}</td>"


def write_index(
    study: Study,
    store: Store,
    sheets: dict[str, pd.DataFrame],
    links: list[dict[str, str]],
    record: dict[str, Any],
    tuned: pd.DataFrame,
    epsilon: float,
) -> None:
    """Write ``index.html``.

    Args:
        study: its parameters.
        store: its folders.
        sheets: the tables by name.
        links: the notebooks' pages.
        record: the provenance.
        tuned: the decomposed, fine-tuned networks, rows of ``tables.steps``.
        epsilon: the tolerance of Figure 2.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("index.html.j2").render(
        study=study,
        css=css(),
        table=table_html,
        search_precision=result(store, "measure", next(iter(study.runs)))["search_precision"],
        search_images=result(store, "train", next(iter(study.runs)))["search_images"],
        device=record["device"],
        cards=_cards(sheets["table1-utilization"], tuned, epsilon),
        sheets=sheets,
        epsilon=epsilon,
        notebooks=links,
        timed=store.report("latencies.html").is_file() or len(latencies(study, store)) > 0,
        provenance=_flat(record),
    )
    write_text(store.data("pages", "index.html"), page)


def publish(study: Study, store: Store) -> None:
    """Copy the pages to where git keeps them, and write the one of latencies beside them."""
    shutil.copytree(store.data("pages"), store.report(), dirs_exist_ok=True)
    write_latencies(study, store)


def write_latencies(study: Study, store: Store) -> None:
    """Write ``latencies.html``, which the index shows; nothing where nothing was timed here.

    A page of its own: it differs from one execution to the next, and the index must not.
    """
    table, compared = latencies(study, store), timed(study, store)
    if len(table):
        picture = style.markup(latency(compared)) if len(compared) else ""
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Latency</title>'
            f"<style>{css()}</style></head><body>{picture}{table_html(table)}</body></html>"
        )
        write_text(store.report("latencies.html"), page)


def _cards(utilization: pd.DataFrame, tuned: pd.DataFrame, epsilon: float) -> list[dict[str, str]]:
    """The headline of each network."""
    at = tuned[tuned.epsilon == epsilon].set_index("label")
    return [
        {
            "value": f"{row[mlu_column(epsilon)]:.0f}%",
            "label": row["network"],
            "detail": f"{row['test accuracy %']:.1f}% accurate; decomposed to {at.parameters_kept[row['network']]:.0%} "
            f"of its parameters and fine-tuned: {at.change[row['network']]:+.1f} points",
        }
        for _, row in utilization.iterrows()
    ]


def _flat(record: dict[str, Any]) -> list[tuple[str, str]]:
    """A record as lines: nested entries joined."""
    return [
        (key, ", ".join(f"{name} {item}" for name, item in value.items()) if isinstance(value, dict) else str(value))
        for key, value in record.items()
    ]
