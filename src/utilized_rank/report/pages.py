"""Pages that need no network: executed notebooks as HTML, and the index with figures and tables."""

from __future__ import annotations

import base64
import html
import io
import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import nbformat
import pandas as pd
import vl_convert
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from PIL import Image
from pygments.formatters import HtmlFormatter

from ..base.files import write_text
from ..base.store import Store
from ..stages.notebooks import STAGES, executed_name, keys_of
from ..study.config import Study
from .figures import style
from .figures.frontier import latency
from .interactive import SECURITY, Chart, library, of_study
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
    """The style of every page: ours, and the colours of code, on light and on dark."""
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("xcode", "github-dark"))
    return (
        TEMPLATES / "style.css"
    ).read_text() + f"{light}\n@media screen and (prefers-color-scheme: dark) {{ {dark} }}"


def render(template: str, charts: list[Chart], **values: Any) -> str:
    """A page from its template: with charts, and the library that draws them, once."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    script = (TEMPLATES / "charts.js").read_text()
    of_charts = {"charts": charts, "library": library(), "script": script, "security": SECURITY}
    return environment.get_template(template).render(css=css(), **of_charts, **values)


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


def browsable(path: Path) -> NotebookNode:
    """An executed notebook with PNG for its pictures: GitHub shows notebooks, and drops text and marks of an SVG."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            svg = output.get("data", {}).pop("image/svg+xml", None)
            if svg:
                output.data["image/png"] = base64.b64encode(_png(svg)).decode()
    return notebook


def _png(svg: str) -> bytes:
    """A picture in 256 colours, which are a third of the bytes."""
    picture, small = Image.open(io.BytesIO(vl_convert.svg_to_png(svg, scale=1.5))), io.BytesIO()
    picture.convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    return small.getvalue()


def write_notebook_pages(study: Study, store: Store) -> list[dict[str, str]]:
    """Render every executed notebook but the report's own; returns what the index links: title, href.

    Beside each lies the notebook itself, as :func:`browsable`.
    """
    links = []
    for stage in STAGES:
        for key in keys_of(study, stage) if stage != "report" else []:
            name = executed_name(stage, key)
            title = STAGE_TITLES[stage] + (f": {key}" if key else "")
            executed = store.data("executed", f"{name}.ipynb")
            write_text(store.data("pages", "notebooks", f"{name}.html"), notebook_page(executed, title))
            write_text(store.data("pages", "notebooks", f"{name}.ipynb"), nbformat.writes(browsable(executed)))
            links.append({"title": title, "href": f"notebooks/{name}.html"})
    return links


def table_html(table: pd.DataFrame, digits: int = 2, title: str = "Table") -> str:
    """A table as HTML: numbers to ``digits`` decimals, whole ones with thousands apart.

    A network's name that repeats that of the row above is dimmed, so that its rows read as a group. A table that is
    wider than the page scrolls by itself, by keys too; ``title`` says to a screen reader what it is.
    """
    head = "".join(f'<th class="{_kind(table[column])}">{html.escape(str(column))}</th>' for column in table.columns)
    body, above = [], None
    for row in table.itertuples(index=False):
        group = "repeat" if row[0] == above else "first"
        body.append(f'<tr class="{group}">' + "".join(_cell(value, digits) for value in row) + "</tr>")
        above = row[0]
    rows = "\n".join(body)
    box = f'<div class="scroll" tabindex="0" role="group" aria-label="{html.escape(title)}">'
    return f"{box}<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"


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
    page = render(
        "index.html.j2",
        of_study(store, {key: run.label for key, run in study.runs.items()}, epsilon),
        study=study,
        table=table_html,
        search_precision=result(store, "measure", next(iter(study.runs)))["search_precision"],
        search_images=result(store, "train", next(iter(study.runs)))["search_images"],
        device=record["device"],
        cards=_cards(study, sheets["table1-utilization"], tuned, epsilon),
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
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{css()}</style></head><body><main><h1>Latency</h1>{picture}{table_html(table)}</main></body></html>"
        )
        write_text(store.report("latencies.html"), page)


def _cards(study: Study, utilization: pd.DataFrame, tuned: pd.DataFrame, epsilon: float) -> list[dict[str, str]]:
    """The headline of each network."""
    at = tuned[tuned.epsilon == epsilon].set_index("label")
    return [
        {
            "value": f"{row[mlu_column(study, epsilon)]:.0f}%",
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
