"""Sampled responses as an image, for TensorBoard: each token on the colour of its reward. matplotlib, on the CPU."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from common.pages.colours import TEXT, hexadecimal
from common.pages.render import background, signed, visible_token
from common.pages.samples import LEGEND, Sample
from common.text import visible_line

# The page is a grid of character cells, in inches; a monospaced font of 10 points is 0.6 times as wide as high.
_COLUMNS = 110
_CELL = 0.6 * 10 / 72
_ROW = 0.36
_DPI = 100
_FONT = "DejaVu Sans Mono"  # comes with matplotlib
_QUIET = "#57606a"
_INDENT = 3


class _Piece(NamedTuple):
    """A text at a row and column of the grid, on a background `width` columns wide unless that is None."""

    row: float
    column: float
    text: str
    width: float | None = None
    reward: float = 0.0


def heat_map(samples: Sequence[Sample]) -> np.ndarray:
    """(height, width, 3), bytes: a legend, then each response after the newest event of its history."""
    pieces = list(_legend())
    row = 1.5
    for sample in samples:
        placed = list(_response(sample, row))
        pieces += placed
        row = placed[-1].row + 1.5
    figure = Figure(figsize=(_COLUMNS * _CELL, row * _ROW), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, _COLUMNS), ylim=(row, 0))
    axes.set_axis_off()
    for piece in pieces:
        _draw(axes, piece)
    with warnings.catch_warnings():
        # A script that the font lacks is drawn as boxes; the page shows it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _legend() -> Iterator[_Piece]:
    yield _Piece(0, 1, "reward of a token")
    for number, value in enumerate(LEGEND):
        yield _Piece(0, 20 + 7 * number, signed(value), 7, value)


def _response(sample: Sample, row: float) -> Iterator[_Piece]:
    after = " | ".join(visible_line(text) for _, text in sample.history[-3:])
    judged = "" if sample.verdict is None else f"   judge: {sample.relevant} of {len(sample.verdict.queries)} relevant"
    yield _Piece(row, 1, _cut(f"reward {signed(sample.reward)}{judged}   after: {after}", _COLUMNS - 2))
    for line in sample.lines:
        row += 1
        column = float(_INDENT)
        for token in line:
            text, starts_word = visible_token(token.text), token.text.startswith(" ")
            width = _cells(text) + 1.0
            column += 0.6 * (starts_word and column > _INDENT)
            if column + width > _COLUMNS - 1:
                row, column = row + 1, float(_INDENT)
            yield _Piece(row, column, text, width, token.reward)
            column += width


def _draw(axes: Axes, piece: _Piece) -> None:
    place = piece.column
    if piece.width is not None:
        colour = background(piece.reward)
        corner = (place, piece.row + 0.1)
        axes.add_patch(Rectangle(corner, piece.width, 0.8, facecolor=colour, edgecolor="white", lw=0.8))
        place += piece.width / 2
    # parse_math: a dollar sign in a query is no formula.
    axes.text(
        place, piece.row + 0.5, piece.text, family=_FONT, fontsize=10, va="center", parse_math=False,
        ha="left" if piece.width is None else "center", color=_QUIET if piece.width is None else hexadecimal(TEXT),
    )  # fmt: skip


def _cells(text: str) -> int:
    """Columns that `text` takes: two for a wide character, none for a combining one."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else not unicodedata.combining(char) for char in text)


def _cut(text: str, columns: int) -> str:
    return text if len(text) <= columns else f"{text[: columns - 1]}…"
