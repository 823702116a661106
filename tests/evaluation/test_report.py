"""What people read: text from logs cannot act on the page, and the table's figures are the report's."""

from __future__ import annotations

import html
import re
import unicodedata
from html.parser import HTMLParser

import markdown
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.evaluation import report as reports
from common.evaluation.summary import CORPUS_MEASURES, MEASURES

HOSTILE = "shoes | `rm` <script>alert('x')</script> [a](http://x.y) *b* _c_ ![i](u) &amp; # \\| ~~d~~\n| --- |\r\n> e"


class PageText(HTMLParser):
    """Tags and cell texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.in_cell = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.cells.append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.cells[-1] += data


def rendered_cell(text: str) -> PageText:
    """The page that a Markdown table with `text` in one cell becomes."""
    table = f"| a | b |\n| --- | --- |\n| x{reports.escape(text)}x | after |"
    return PageText(markdown.markdown(table, extensions=["tables"]))


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
@example(HOSTILE)
@example("www.example.org https://example.org me@example.org")
@example("$x$ :smile: {{ a }} {% b %} </td>")
def test_any_text_is_only_shown(text: str) -> None:
    shown = "".join(char for char in text if unicodedata.category(char) != "Cf")
    expected = " ".join(re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", shown).split())
    escaped = reports.escape(text)
    assert html.unescape(escaped) == expected
    assert not re.search(r"[|`<>*_\[\]\\:/@$~!.(){}\n\r]", escaped)
    page = rendered_cell(text)
    assert page.tags == {"table", "thead", "tbody", "tr", "th", "td"}
    assert page.cells[2:] == [f"x{expected}x", "after"]


def test_escape_drops_what_no_file_can_hold() -> None:
    assert reports.escape("a\ud800b\u202ec") == "abc"
    assert reports.escape("a|b`c") == "a&#124;b&#96;c"


def estimate(value: float | None, spread: float | None = 0.1) -> dict:
    known = value is not None and spread is not None
    return {
        "value": value, "low": value - spread if known else None, "high": value + spread if known else None, "n": 7
    }


def make_report(systems: tuple[str, ...] = ("sft", "tppo"), beside: str | None = "greedy") -> dict:
    def metrics(base: float) -> dict:
        return {name: estimate(base + i / 100) for i, name in enumerate(MEASURES)} | {
            name: estimate(base, None) for name in CORPUS_MEASURES
        }

    def comparison(win: float) -> dict:
        shares = {"win": win, "tie": 0.3, "lose": 0.7 - win}
        return {
            **shares, "n": 7, "intervals": {name: estimate(share) for name, share in shares.items()},
            "differences": {name: estimate(0.2) for name in MEASURES},
        }

    pairs = [f"{later}_vs_{earlier}" for i, earlier in enumerate(systems) for later in systems[i + 1 :]]
    nested = {beside: None} if beside else {}
    return {
        "systems": {
            name: metrics(0.4 + i / 10) | {key: metrics(0.6 + i / 10) for key in nested}
            for i, name in enumerate(systems)
        },
        "references": {"gold": {**metrics(0.8), "tokens_per_response": estimate(None)}},
        "comparisons": {pair: comparison(0.5) | {key: comparison(0.4) for key in nested} for pair in pairs},
        "warnings": ["format errors rose"],
        "annotator": "lexical",
        "num_queries": 3,
        "data": {"split": "test", "examples": 7, "users": 6},
        "decoding": {"main": "sampled", "beside": beside, "temperature": 1.0},
        "seed": 0,
        "timings": {"sft": 12.345, "evaluation": 1.0},
    }


def test_the_final_table_is_aligned_and_ends_with_the_place_of_the_report() -> None:
    text = reports.render_terminal(make_report(), "outputs/run/report.md")
    lines = text.splitlines()
    assert lines[-1] == "report: outputs/run/report.md"
    assert "warning: format errors rose" in lines
    header = next(line for line in lines if line.startswith("sampled decoding"))
    row = next(line for line in lines if line.startswith("relevance rate"))
    assert re.split(r"\s{2,}", header) == ["sampled decoding", "sft", "tppo", "tppo - sft", "logged"]
    assert re.split(r"\s{2,}", row) == [
        "relevance rate", "0.400 [0.300, 0.500]", "0.500 [0.400, 0.600]", "+0.200 [+0.100, +0.300]", "0.800"
    ]
    for name in ("sft", "tppo", "logged"):
        assert row[header.index(name) - 1] == " " != row[header.index(name)]
    greedy = lines[lines.index(next(line for line in lines if line.startswith("greedy decoding"))) + 1]
    assert "0.600 [0.500, 0.700]" in greedy
    items = [re.split(r"\s{2,}", line) for line in lines if line.startswith("tppo vs sft")]
    assert [item[1:3] for item in items] == [
        ["sampled", "0.500 [0.400, 0.600]"], ["greedy", "0.400 [0.300, 0.500]"]
    ]
    assert max(map(len, lines)) <= 120


def test_undefined_figures_are_dashes() -> None:
    assert reports.format_estimate(estimate(None)) == "-"
    assert reports.format_estimate(estimate(0.5, None)) == "0.500"
    assert reports.format_estimate(estimate(-0.25, 0.05), signed=True) == "-0.250 [-0.300, -0.200]"


@pytest.mark.parametrize("systems", [("sft",), ("base", "sft", "tppo")])
def test_one_system_or_three(systems: tuple[str, ...]) -> None:
    report = make_report(systems, beside=None)
    text = reports.render_terminal(report, "r")
    pairs = re.findall(r"^(\w+ vs \w+) ", text, flags=re.MULTILINE)
    assert pairs == {1: [], 3: ["sft vs base", "tppo vs base", "tppo vs sft"]}[len(systems)]
    assert ("tppo - base" in text) is (len(systems) == 3)
    assert "greedy decoding" not in text + reports.render_markdown(report, [])


def test_hostile_text_in_examples_stays_in_its_cells() -> None:
    def row(response: str, finished: bool = True) -> dict:
        return {"response": response, "finished": finished, "queries": [2, 0], "words": [[1, 2], []]}

    shown = [
        {
            "id": HOSTILE, "history": [f"old {i}" for i in range(9)] + [HOSTILE], "targets": [HOSTILE],
            "responses": {"sft": row("red | shoes\n"+"<b>`x`</b>"), "tppo": row("hat |\n", finished=False)},
        }
    ]
    shown[0]["responses"]["tppo"].update(queries=[1], words=[[1]])
    text = reports.render_markdown(make_report(), shown)
    page = PageText(markdown.markdown(text, extensions=["tables"]))
    assert page.tags <= {"h1", "h2", "h3", "p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "strong"}
    assert page.cells[-6:] == [
        "sft", "tppo", "red | shoes 2 (1, 2)", "hat | 1 (1)", "<b>`x`</b> 0 ()", "(cut off)"
    ]
    assert "old 5" in text and "old 4" not in text  # the last five searches
    assert "- format errors rose" in text
    assert "| sft | 12.3 |" in text
