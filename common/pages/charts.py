"""Curves as SVG images inside a page: drawn by matplotlib, a data URI each, so that nothing is fetched or run."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.evaluation.over_optimisation import WINDOW
from common.pages.sections import Chart

# Okabe and Ito's palette, which is told apart with a colour vision deficiency; yellow is left out for white paper.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555")
_SMALLEST_SPAN = 1e-6  # of the axis, by its largest value
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "curves", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "#888888", "axes.grid": True, "grid.color": "#e8eaed",
    "xtick.color": "#424a53", "ytick.color": "#424a53", "axes.labelcolor": "#424a53",
}  # fmt: skip
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


class Curve(NamedTuple):
    """A metric of a run: its steps and its finite values, name and colour."""

    label: str
    colour: str
    steps: list[int]
    values: list[float]


class DrawnChart(NamedTuple):
    """A chart with what a run has of its curves, as an image and in words."""

    chart: Chart
    curves: list[Curve]
    image: str
    description: str


def draw_chart(chart: Chart, rows: Sequence[Mapping[str, Any]]) -> DrawnChart | None:
    """`chart` from metrics, a row each; None when `rows` have none of its curves."""
    curves = []
    for colour, (tag, label) in zip(PALETTE, chart.curves.items(), strict=False):
        points = [(row["step"], row[tag]) for row in rows if row.get(tag) is not None]
        if points:
            curves.append(Curve(label, colour, *map(list, zip(*points, strict=True))))
    if not curves:
        return None
    described = "; ".join(f"{curve.label} from {curve.values[0]:.4g} to {curve.values[-1]:.4g}" for curve in curves)
    return DrawnChart(chart, curves, _image(curves), f"{chart.title}: {described}")


def running_mean(values: Sequence[float], window: int = WINDOW) -> np.ndarray:
    """Mean of each value and those before it, at most `window` of them."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _widen_constant(axes: Axes) -> None:
    """A curve that does not move is drawn flat: its running mean's rounding would fill the axis otherwise."""
    low, high = axes.get_ylim()
    largest = max(abs(low), abs(high))
    if high - low < _SMALLEST_SPAN * largest:
        axes.set_ylim(low - largest / 2, high + largest / 2)


def _image(curves: Sequence[Curve]) -> str:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.7, 2.1), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            long = len(curve.values) >= 2 * WINDOW
            marker = "o" if len(curve.values) <= 3 else None
            faint = 0.3 if long else 1.0
            axes.plot(curve.steps, curve.values, color=curve.colour, lw=1.0, alpha=faint, marker=marker, ms=3)
            if long:
                axes.plot(curve.steps, running_mean(curve.values), color=curve.colour, lw=1.8)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _widen_constant(axes)
        stream = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(stream, metadata=_NO_METADATA)
    return f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"
