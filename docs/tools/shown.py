"""What the pages show beside text: tables, pictures, the command line."""

from __future__ import annotations

import contextlib
import shlex
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "reports" / "digits" / "results"


def table(frame: pd.DataFrame, digits: dict[str, str] | None = None) -> str:
    """A table as HTML, numbers at the right; ``digits`` has the format of columns that are not whole numbers."""
    formats = digits or {}

    def cell(name: str, value: Any) -> str:
        if isinstance(value, str):
            return f"<td>{escape(value)}</td>"
        text = "" if pd.isna(value) else format(value, formats.get(name, ","))
        return f'<td class="number">{text}</td>'

    head = "".join(f"<th>{escape(str(name))}</th>" for name in frame.columns)
    rows = ["".join(cell(*pair) for pair in row.items()) for row in frame.to_dict("records")]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def paper(figure: Any) -> str:
    """A figure of matplotlib, or the one that axes are of, to stand in a page."""
    import matplotlib.pyplot as plt

    from utilized_rank.report.figures import style

    figure = getattr(figure, "figure", figure)
    markup = style.markup(figure)
    plt.close(figure)
    return f'<div class="paper">{markup}</div>'


def help_of(*words: str) -> str:
    """What ``utilized-rank`` says with ``--help``."""
    return run(shlex.join(["utilized-rank", *words, "--help"]))


def run(line: str, folder: Path = ROOT) -> str:
    """What a line of the command ``utilized-rank`` prints, in a folder.

    Raises:
        RuntimeError: it fails.
    """
    from typer.testing import CliRunner

    from utilized_rank.cli import app

    with contextlib.chdir(folder):
        done = CliRunner().invoke(app, shlex.split(line)[1:], prog_name="utilized-rank")
    if done.exit_code:
        raise RuntimeError(f"{line}: {done.output} {done.exception}")
    return "\n".join(row.rstrip() for row in done.stdout.strip().splitlines())


def console(*lines: str, folder: Path = ROOT) -> str:
    """Lines of the command, broken at two blanks, with what each prints, as a block of Markdown."""
    broken = [line.replace("  ", " \\\n    ") for line in lines]
    shown = [f"$ {line}\n{run(its, folder)}\n" for line, its in zip(broken, lines, strict=True)]
    return "\n".join(["```console", *shown, "```"])


def photos(folder: Path, each: int = 30) -> None:
    """Write some of scikit-learn's digits as PNG files, a directory for each class."""
    pixels, labels = load_digits(return_X_y=True)
    for digit in range(10):
        here = folder / str(digit)
        here.mkdir(parents=True)
        for i, row in enumerate(pixels[labels == digit][:each]):
            Image.fromarray((row.reshape(8, 8) * 255 / 16).astype(np.uint8)).save(here / f"{i}.png")


def measured(run: str) -> pd.DataFrame:
    """The ranks of a network of the default study, at its largest tolerance."""
    found = pd.read_csv(RESULTS / f"measure-{run}.csv")
    return found[found.epsilon == found.epsilon.max()].reset_index(drop=True)


def pictures(found: pd.DataFrame, at: int) -> str:
    """Utilized rank in one picture: one layer's weight to scale, and all layers beside it.

    Args:
        found: a row a layer: layer, m, n, k_s, k_t, r, utilization.
        at: the row whose weight is drawn.
    """
    layer = found.iloc[at]
    before, after = layer.m * layer.n, layer.r * (layer.m + layer.n)
    left = (
        f"The weight of <code>{layer.layer}</code>, to scale, in the bases of the principal directions of its inputs "
        f"and outputs: W′ = P<sub>S</sub> W P<sub>T</sub> leaves the blue corner. As two layers of rank {layer.r} "
        f"it has {after / before:.0%} of its weights."
    )
    right = (
        "Every layer of the network: blue, the part r / min(m, n) of its rank that it uses. "
        f"Dashed, the mean layer utilization, {found.utilization.mean():.0%}."
    )
    return (
        f'<div class="pictures"><figure>{_weight(layer)}<figcaption>{left}</figcaption></figure>'
        f"<figure>{_layers(found)}<figcaption>{right}</figcaption></figure></div>"
    )


def _weight(layer: Any) -> str:
    scale = 230 / max(layer.m, layer.n)
    m, n, k_s, k_t, r = (scale * of for of in (layer.m, layer.n, layer.k_s, layer.k_t, layer.r))
    x, y, first = 64, 48, 240
    second = first + r + 10
    end = x + n
    middle = y + m / 2
    sub = '<tspan dy="3" font-size="9">{}</tspan><tspan dy="-3"> = {}</tspan>'
    told = f"Weight of {layer.m} by {layer.n}, of which a corner of {layer.k_s} by {layer.k_t} is used"
    return f"""<svg viewBox="0 0 360 330" role="img" aria-label="{told}">
<text x="{x + n / 2}" y="16" text-anchor="middle">W</text>
<text class="quiet" x="{x + n / 2}" y="40" text-anchor="middle">n = {layer.n}</text>
<g transform="rotate(-90 {x - 10} {middle})">
<text class="quiet" x="{x - 10}" y="{middle}" text-anchor="middle">m = {layer.m:,}</text></g>
<rect class="unused" x="{x}" y="{y}" width="{n}" height="{m}"/>
<rect class="used" x="{x}" y="{y}" width="{k_t}" height="{k_s}"/>
<path class="line" d="M{x + k_t + 2} {y + k_s / 2} H{end + 10}"/>
<text x="{end + 14}" y="{y + k_s / 2 + 1}">k{sub.format("S", layer.k_s)}</text>
<text x="{end + 14}" y="{y + k_s / 2 + 18}">k{sub.format("T", layer.k_t)}</text>
<text x="{end + 14}" y="{y + k_s / 2 + 38}">r = {layer.r}</text>
<path class="line" d="M{end + 24} {middle} H{first - 28} m-7 -5 l7 5 l-7 5"/>
<text x="{first}" y="16">two layers</text>
<rect class="used" x="{first}" y="{y}" width="{r}" height="{m}"/>
<rect class="used" x="{second}" y="{y}" width="{n}" height="{r}"/>
<text class="quiet" x="{second}" y="{y + r + 18}">rank r = {layer.r}</text>
<text x="{x + n / 2}" y="{y + m + 24}" text-anchor="middle">{layer.m * layer.n:,} weights</text>
<text x="{first}" y="{y + m + 24}">{layer.r * (layer.m + layer.n):,} weights</text>
</svg>"""


def _layers(found: pd.DataFrame) -> str:
    left, whole, step = 86, 190, min(28, 270 / len(found))
    mean = left + whole * found.utilization.mean()
    bottom = 34 + step * len(found)
    rows = [
        f'<text class="quiet" x="{left - 8}" y="{y + step / 2 + 1}" text-anchor="end">{row.layer}</text>'
        f'<rect class="unused" x="{left}" y="{y}" width="{whole}" height="{step - 10}"/>'
        f'<rect class="used" x="{left}" y="{y}" width="{whole * row.utilization}" height="{step - 10}"/>'
        f'<text class="quiet" x="{left + whole + 8}" y="{y + step / 2 + 1}">{row.r} of {min(row.m, row.n)}</text>'
        for row, y in zip(found.itertuples(), (40 + step * i for i in range(len(found))), strict=True)
    ]
    told = "Utilization of every layer, with numbers beside the bars"
    return f"""<svg viewBox="0 0 360 330" role="img" aria-label="{told}">
<text x="{left}" y="16">utilization, layer by layer</text>
{"".join(rows)}
<path class="line" stroke-dasharray="4 3" d="M{mean} 30 V{bottom + 8}"/>
<text x="{mean}" y="{bottom + 24}" text-anchor="middle">MLU {found.utilization.mean():.0%}</text>
</svg>"""
