"""The pictures that answer, as Vega-Lite: from the rows that they show to a specification.

Every one reads the data set ``rows``, of which the page gives it those that were asked for, and rings the mark ``at``.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from .figures.frontier import METHODS
from .figures.style import AMBER, BLACK, BLUE, epsilon_colours
from .points import AFTER, LAYER_WORDS, NETWORK_WORDS
from .tables import METHOD_NAMES

Spec = dict[str, Any]
INK = "currentColor"
"""The page's, whether it is light or dark."""
CHOSEN = "datum.id === at"
USED = "utilization r / min(m, n), %"
PHONE = 420
"""Pictures narrower than this have fewer ticks and columns, and smaller marks."""
STAR = "M0,-1L.23,-.31L.95,-.31L.36,.12L.59,.81L0,.38L-.59,.81L-.36,.12L-.95,-.31L-.23,-.31Z"
SHAPES = {
    "independent": "circle",
    "cumulative": "triangle-down",
    "joint": STAR,
    "params": "square",
    "flops": "diamond",
    "latency": "cross",
    "all": "triangle-up",
}
"""As the marks of ``figures.frontier``."""
CONFIG = {
    "background": "transparent",
    "font": 'system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif',
    "view": {"stroke": None},
    "axis": {
        **{f"{part}Color": INK for part in ("label", "title", "domain", "tick", "grid")},
        **{f"{part}Opacity": 0.45 for part in ("domain", "tick")},
        "gridOpacity": 0.12,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
    },
    "legend": {
        "labelColor": INK,
        "titleColor": INK,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "orient": "bottom",
        "labelLimit": 200,
        "layout": {"bottom": {"direction": "vertical", "anchor": "start", "margin": 8}},
    },
}


def utilization(layers: pd.DataFrame) -> Spec:
    """One network, layer by layer: a line for each tolerance, and its mean dashed."""
    axis = {"labelAngle": -90, "labelLimit": 110, "labelOverlap": "greedy", "grid": False}
    x = {"field": "place", "type": "ordinal", "sort": None, "title": None, "axis": axis}
    y = _number("used", USED) | {"scale": {"domain": [0, 100]}}
    tolerances = epsilon_colours(layers.tolerance.astype(float).unique().tolist())
    words = "'ε = ' + datum.label + ' points'"
    colour = _colour("tolerance", {f"{epsilon:g}": colour for epsilon, colour in tolerances.items()}, words)
    mean = _number("used", USED) | {"aggregate": "mean"}
    return _chart(
        [
            {"mark": {"type": "rule", "strokeDash": [5, 4], "aria": False}, "encoding": {"y": mean, "color": colour}},
            {"mark": {"type": "line", "strokeWidth": 2, "aria": False}, "encoding": {"x": x, "y": y, "color": colour}},
            _points({"x": x, "y": y, "color": colour, "stroke": _ringed({"value": None})}, LAYER_WORDS, filled=True),
        ],
        height=300,
    )


def spread(layers: pd.DataFrame) -> Spec:
    """Every network beside the others: a mark for each layer, the first on top, and a bar at their mean."""
    network = {"field": "network", "type": "nominal", "sort": None, "axis": None, "scale": {"padding": 0}}
    x = _number("used", USED) | {"scale": {"domain": [0, 100]}, "axis": _ticks(10)}
    legend = {"title": "layer", "values": [0, 1], "labelExpr": "datum.value ? 'last' : 'first'", "gradientLength": 120}
    depth = _number("depth") | {"scale": {"range": [BLUE, AMBER], "domain": [0, 1], "interpolate": "lab"}}
    down = _number("depth") | {"scale": {"range": [22, 42], "domain": [0, 1]}}
    marks = {"x": x, "y": network, "yOffset": down, "color": depth | {"legend": legend}}
    mean = [{"aggregate": [{"op": "mean", "field": "used", "as": "mean"}], "groupby": ["network"]}]
    name = "datum.network + ': ' + format(datum.mean, '.0f') + '%'"
    text = {"type": "text", "align": "left", "color": INK, "fontSize": 12, "dx": 2}
    named = {"y": network | {"bandPosition": 0.2}, "x": {"datum": 0, "title": USED}, "text": {"field": "name"}}
    rule = {"type": "rule", "strokeWidth": 3, "color": INK, "aria": False}
    bar = {
        "x": _number("mean", USED),
        "y": network | {"bandPosition": 0.4},
        "y2": {"field": "network", "bandPosition": 0.94},
    }
    return _chart(
        [
            {"transform": [*mean, {"calculate": name, "as": "name"}], "mark": text, "encoding": named},
            {"transform": mean, "mark": rule, "encoding": bar},
            _points(marks | {"stroke": _ringed({"value": None})}, LAYER_WORDS, filled=True),
        ],
        height=300,
        usermeta={"step": 50},
    )


def frontier(networks: pd.DataFrame) -> Spec:
    """Change of accuracy against what is kept: hollow before training, full after it, with paired 95% intervals."""
    kept = {"calculate": "cost == 'flops' ? datum.flops : datum.parameters", "as": "kept"}
    x = _number("kept", "kept, % of the original") | {"scale": {"domain": [0, 105]}, "axis": _ticks(10)}
    points = {"type": "symlog", "constant": 1, "nice": False, "zero": True, "padding": 10}
    ticks = [-80, -40, -20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5]
    axis = {"values": ticks, "labelExpr": "datum.value ? format(datum.value, '+~g') : '0'"}
    title = "change of test accuracy, points"
    y = _number("change", title) | {"scale": points, "axis": axis}
    shown = [method for method in METHODS if METHOD_NAMES[method] in set(networks.weights)]
    colour = _colour("weights", {METHOD_NAMES[method]: METHODS[method].replace(BLACK, INK) for method in shown})
    kinds = {kind: shape for kind, shape in SHAPES.items() if kind in set(networks.kind)}
    shape = {
        "field": "kind",
        "type": "nominal",
        "scale": {"domain": list(kinds), "range": list(kinds.values())},
        "legend": _legend() | {"symbolFillColor": "transparent", "symbolStrokeColor": INK},
    }
    full = {"condition": {"test": f"datum.step === '{AFTER}'", "value": 1}, "value": 0}
    bars = {"x": x, "y": _number("low", title), "y2": {"field": "high"}, "color": colour}
    marks = {"x": x, "y": y, "stroke": _ringed(colour), "fill": colour, "fillOpacity": full, "shape": shape}
    spec = _chart(
        [
            {"mark": {"type": "rule", "color": INK, "opacity": 0.6, "aria": False}, "encoding": {"y": {"datum": 0}}},
            {"mark": {"type": "rule", "opacity": 0.5, "aria": False}, "encoding": bars},
            _points(marks, NETWORK_WORDS),
        ],
        height=380,
    )
    spec["params"].append({"name": "cost", "value": "parameters"})
    return spec | {"transform": [kept]}


def _chart(layer: list[Spec], **size: Any) -> Spec:
    """What all have in common: as wide as the page lets them; as high as said, or by a step for each network."""
    return {
        "width": "container",
        **size,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"name": "rows"},
        "params": [{"name": "at", "value": -1}],
        "layer": layer,
        "config": CONFIG,
    }


def _points(encoding: Spec, words: list[str], filled: bool = False) -> Spec:
    """A mark for each row, that tells ``words`` of it; the one that is chosen is larger."""
    tooltip = [{"field": word, "type": "nominal"} for word in words]
    size = {"condition": {"test": CHOSEN, "value": 330}, "value": {"expr": f"width < {PHONE} ? 45 : 80"}}
    mark = {"type": "point", "filled": filled, "strokeWidth": 1.6, "opacity": 0.9}
    return {"mark": mark, "encoding": {**encoding, "size": size, "tooltip": tooltip}}


def _ringed(otherwise: Spec) -> Spec:
    """A stroke in the page's ink where keys or a tap have chosen the mark."""
    return {"condition": {"test": CHOSEN, "value": INK}, **otherwise}


def _number(field: str, title: str | None = None) -> Spec:
    return {"field": field, "type": "quantitative", "title": title}


def _ticks(count: int) -> Spec:
    """About so many; half of them on a phone."""
    return {"tickCount": {"expr": f"width < {PHONE} ? {count // 2} : {count}"}}


def _colour(field: str, colours: dict[str, str], words: str = "datum.label") -> Spec:
    scale = {"domain": list(colours), "range": list(colours.values())}
    return {"field": field, "type": "nominal", "scale": scale, "legend": _legend() | {"labelExpr": words}}


def _legend() -> Spec:
    """Beneath the picture; in columns, of which there are few on a phone."""
    columns = {"expr": f"width < {PHONE} ? 2 : 7"}
    return {"title": None, "direction": "horizontal", "columns": columns, "symbolOpacity": 1}
