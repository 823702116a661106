"""How a report is read: report.md for people, and the final table for the terminal.

Both are made from the dictionary that becomes report.json. Text from logs and models is data: in report.md every
character of it that Markdown or HTML could act on is written as a character reference.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from common.text import split_queries, visible_line

LABELS = {
    "relevance_rate": "relevance rate",
    "unique_relevance_rate": "relevance, no repeats",
    "mean_word_score": "word score (0..2)",
    "recall": "recall of next queries",
    "recall_new": "recall, new ones",
    "recall_repeated": "recall, repeated ones",
    "token_f1": "token F1",
    "copy_rate": "copied from history",
    "duplicate_rate": "duplicates in the list",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "words_per_query": "words a query",
    "tokens_per_response": "tokens a response",
    "format_error_rate": "format errors",
}
SHOWN_HISTORY = 5
_ABSENT = "-"
_TERMINAL_WIDTH = 100
_PLAIN_ASCII = frozenset(" ,-")


def escape(text: str) -> str:
    """One line of Markdown (and HTML) that shows `text` and does nothing else, in a table cell too.

    White space and control characters become single spaces; invisible format characters (which could reverse the
    line) and lone surrogates (which no file can hold) are left out; other ASCII marks become character references.
    """
    return "".join(_reference(char) for char in visible_line(text))


class Table(NamedTuple):
    """A table as texts; a row begins with its name."""

    title: str
    header: list[str]
    rows: list[list[str]]


def report_tables(report: Mapping[str, Any]) -> list[Table]:
    """The tables of a report, the main decoding's first. They hold no text from logs."""
    tables = []
    for decoding, metrics in _by_decoding(report).items():
        header, rows = _metric_rows(report, decoding, metrics)
        tables.append(Table(f"{decoding.capitalize()} decoding", ["", *header], rows))
    parts = [("Item by item", _comparison_rows(report))] if report["comparisons"] else []
    if report.get("judge"):
        parts.append(("The judge's two templates", _relevance_rows(report["judge"])))
        if report["judge"]["comparisons"]["sentence"]:
            parts.append(("Its verdicts on pairs of lists", _verdict_rows(report["judge"])))
    timings = [[stage, f"{seconds:.1f}"] for stage, seconds in report["timings"].items()]
    parts.append(("Time", [["stage", "seconds"], *timings]))
    return tables + [Table(title, header, rows) for title, (header, *rows) in parts]


def setting(report: Mapping[str, Any]) -> str:
    """A sentence on what was evaluated and how."""
    data = report["data"]
    return (
        f"{data['examples']} examples of {data['users']} users ({data['split']}), "
        f"{report['num_queries']} queries each; "
        f"judge: {report['annotator']}; sampling temperature {report['decoding']['temperature']}; "
        f"seed {report['seed']}; brackets: 95 % intervals over users."
    )


def format_estimate(estimate: Mapping[str, Any], signed: bool = False) -> str:
    """`0.540 [0.512, 0.568]`, with a sign for differences; the interval or all of it left out where undefined."""
    sign = "+" if signed else ""
    if estimate["value"] is None:
        return _ABSENT
    value = format(estimate["value"], f"{sign}.3f")
    if estimate["low"] is None:
        return value
    return f"{value} [{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]"


def render_terminal(report: Mapping[str, Any], location: str) -> str:
    """The final table: a column a system and the last system's gain over the first, with 95 % intervals.

    It holds no text from logs. Its last line names `location`, where the whole report lies.
    """
    names = list(report["systems"])
    blocks = [textwrap.fill(setting(report), _TERMINAL_WIDTH)]
    for decoding, metrics in _by_decoding(report).items():
        header, rows = _metric_rows(report, decoding, metrics)
        blocks.append("\n".join(_align([[f"{decoding} decoding", *header], *rows])))
    if len(names) > 1:
        blocks.append("\n".join(_align(_comparison_rows(report))))
    if report.get("judge"):
        blocks += ["\n".join(_align(_relevance_rows(report["judge"])))]
        if report["judge"]["comparisons"]["sentence"]:
            blocks += ["\n".join(_align(_verdict_rows(report["judge"])))]
    blocks += [textwrap.fill(f"warning: {warning}", _TERMINAL_WIDTH) for warning in report["warnings"]]
    return "\n\n".join([*blocks, f"report: {location}"])


def render_markdown(report: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> str:
    """The text of report.md.

    `shown` holds examples to print: `{"id", "history": [text], "targets": [text], "responses": {system: row}}` with
    rows of `summary.score_rows`.
    """
    parts = [f"# Evaluation: {escape(', '.join(report['systems']))}", setting(report)]
    if report["warnings"]:
        parts += ["## Warnings", "\n".join(f"- {warning}" for warning in report["warnings"])]
    for decoding, metrics in _by_decoding(report).items():
        header, rows = _metric_rows(report, decoding, metrics)
        parts += [f"## {decoding.capitalize()} decoding", _table(["", *header], rows)]
    if report["comparisons"]:
        header, *rows = _comparison_rows(report)
        parts += [
            "## Item by item",
            "An item is won by more relevant queries in its list; the last column is the paired difference of "
            "relevance rates.",
            _table(header, rows),
        ]
    if report.get("judge"):
        parts += _judge_parts(report["judge"])
    timings = [[stage, f"{seconds:.1f}"] for stage, seconds in report["timings"].items()]
    parts += ["## Time", _table(["stage", "seconds"], timings)]
    if shown:
        parts += [
            "## Examples",
            "Drawn at random. After each query stands its score (0..2), then the scores of its words.",
            *(_render_example(number, example) for number, example in enumerate(shown, start=1)),
        ]
    return "\n\n".join(parts) + "\n"


def _by_decoding(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Metrics of each system for each decoding that was run, the main one first."""
    decodings = {report["decoding"]["main"]: dict(report["systems"])}
    if report["decoding"]["beside"]:
        beside = report["decoding"]["beside"]
        decodings[beside] = {name: metrics[beside] for name, metrics in report["systems"].items()}
    return decodings


def _metric_rows(
    report: Mapping[str, Any], decoding: str, metrics: Mapping[str, Any]
) -> tuple[list[str], list[list[str]]]:
    """Column names and the rows of one decoding's table, the measure's label first."""
    names = list(metrics)
    pair = f"{names[-1]}_vs_{names[0]}"
    header = [*names, *([f"{names[-1]} - {names[0]}"] if len(names) > 1 else []), "logged"]
    rows: list[list[str]] = []
    for measure, label in LABELS.items():
        row = [label, *(format_estimate(metrics[name][measure]) for name in names)]
        if len(names) > 1:
            comparison = _of_decoding(report, report["comparisons"][pair], decoding)
            change = comparison["differences"].get(measure)
            row.append(format_estimate(change, signed=True) if change else _ABSENT)
        gold = report["references"]["gold"][measure]["value"]
        rows.append([*row, _ABSENT if gold is None else f"{gold:.3f}"])
    return header, rows


def _comparison_rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows = [["items", "decoding", "win", "tie", "lose", "relevance rate"]]
    for pair, comparison in report["comparisons"].items():
        for decoding in _by_decoding(report):
            result = _of_decoding(report, comparison, decoding)
            shares = [format_estimate(result["intervals"][name]) for name in ("win", "tie", "lose")]
            change = format_estimate(result["differences"]["relevance_rate"], signed=True)
            rows.append([pair.replace("_vs_", " vs "), decoding, *shares, change])
    return rows


def _judge_parts(judge: Mapping[str, Any]) -> list[str]:
    header, *rows = _relevance_rows(judge)
    parts = [
        "## The judge's two templates",
        f"{escape(judge['model'])}, main decoding. Level words: words are scored before queries and verdicts; level "
        "sentence: whole queries alone.",
        _table(header, rows),
    ]
    if judge["comparisons"]["sentence"]:
        header, *rows = _verdict_rows(judge)
        parts += [
            "Each pair of lists was asked about in both orders; the same winner twice wins, anything else is a tie. "
            "Flips: the two orders disagreed. Failures: answers without a valid form, whose items are in no share.",
            _table(header, rows),
        ]
    return parts


def _relevance_rows(judge: Mapping[str, Any]) -> list[list[str]]:
    rows = [["judge", "level", "relevance rate", "failures"]]
    for level, systems in judge["relevance"].items():
        for name, result in systems.items():
            rows.append([name, level, format_estimate(result["relevance_rate"]), _percent(result["failure_rate"])])
    return rows


def _verdict_rows(judge: Mapping[str, Any]) -> list[list[str]]:
    rows = [["verdicts", "level", "win", "tie", "lose", "flips", "failures", "equal lists"]]
    for level, pairs in judge["comparisons"].items():
        for pair, result in pairs.items():
            shares = [format_estimate(result[name]) for name in ("win", "tie", "lose")]
            trust = [_percent(result["flip_rate"]), _percent(result["failure_rate"]), str(result["equal_lists"])]
            rows.append([pair.replace("_vs_", " vs "), level, *shares, *trust])
    return rows


def _percent(share: float | None) -> str:
    return _ABSENT if share is None else f"{share:.1%}"


def _of_decoding(report: Mapping[str, Any], value: Mapping[str, Any], decoding: str) -> Mapping[str, Any]:
    return value if decoding == report["decoding"]["main"] else value[decoding]


def _render_example(number: int, example: Mapping[str, Any]) -> str:
    lines = [f"### {number}: {escape(example['id'])}", ""]
    lines += [f"- searched: {escape(query)}" for query in example["history"][-SHOWN_HISTORY:]]
    lines += [f"- next in the log: {escape(query)}" for query in example["targets"]]
    columns = {name: _scored_lines(row) for name, row in example["responses"].items()}
    height = max(map(len, columns.values()))
    rows = [[cells[i] if i < len(cells) else "" for cells in columns.values()] for i in range(height)]
    return "\n".join([*lines, "", _table([escape(name) for name in columns], rows)])


def _scored_lines(row: Mapping[str, Any]) -> list[str]:
    if row["queries"] is None:
        return [f"{escape(query)} (no valid answer of the judge)" for query in split_queries(row["response"])]
    cells = [
        f"{escape(query) or '(empty line)'} **{score}** ({', '.join(map(str, words))})"
        for query, score, words in zip(split_queries(row["response"]), row["queries"], row["words"], strict=True)
    ]
    return cells if row["finished"] else [*cells, "(cut off)"]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that need no escaping any more."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _reference(char: str) -> str:
    return char if char.isalnum() or not char.isascii() or char in _PLAIN_ASCII else f"&#{ord(char)};"
