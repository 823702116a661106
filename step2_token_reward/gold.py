"""A gold file: responses for people to label, as a table that any spreadsheet opens.

    python -m step2_token_reward.gold --samples samples.jsonl --gold gold.tsv --count 100

One row a query and one a word, tab-separated; people fill the column `score` with 0, 1 or 2. Scored against labels by
`step2_token_reward.agreement --reference gold.tsv`. The other columns are for reading; what is compared is bound to the
sample by its digest.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import MAX_SEED, option, parse_config
from common.data.cleaning import hash_fraction
from common.errors import InputError, one_line, run_command
from common.feedback.annotator import SCORES, Annotation, words_by_query
from common.feedback.labels import read_samples, sample_digest, sample_item
from common.files import atomic_write
from common.text import split_queries

COLUMNS = ("sample", "digest", "query", "word", "text", "score", "history")
SUFFIX = ".tsv"
_SHOWN_EVENTS = 12

Row = dict[str, str]


@dataclass
class GoldConfig:
    """Write responses for people to label, word by word and query by query."""

    samples: str = option("", "The responses: samples.jsonl, written by sample.py.")
    gold: str = option("", "The table to write, ending in .tsv.")
    count: int = option(100, "Responses to label, drawn by hash.", minimum=1)
    seed: int = option(0, "Seed of the draw.", maximum=MAX_SEED)


def main() -> None:
    """Write the table and say what to do with it."""
    config = parse_config(GoldConfig)
    if not config.samples or not config.gold.endswith(SUFFIX):
        raise InputError("--samples and --gold are needed, --gold ending in .tsv")
    if Path(config.gold).exists():
        raise InputError(f"{config.gold} exists, and may hold labels; choose another name")
    samples = read_samples(config.samples)
    chosen = sorted(samples.values(), key=lambda row: hash_fraction("gold", config.seed, row["id"]))[: config.count]
    count = write_gold(config.gold, chosen)
    print(f"{len(chosen)} responses, {count} scores to fill in with 0, 1 or 2: {config.gold}")
    print("next: python -m step2_token_reward.agreement --samples ... --labels ... --reference " + config.gold)


def write_gold(path: str | Path, samples: Iterable[dict[str, Any]]) -> int:
    """Write the table of `samples` without scores; returns how many scores it asks for."""
    count = 0
    with atomic_write(path, private=True) as stream:
        writer = csv.DictWriter(stream, COLUMNS, dialect="excel-tab", lineterminator="\n")
        writer.writeheader()
        for sample in samples:
            for row in _sample_rows(sample):
                writer.writerow(row)
                count += 1
    return count


def read_gold(path: str | Path, samples: dict[str, dict[str, Any]]) -> dict[str, Annotation]:
    """Annotations by sample id of the samples whose scores are all filled in; those without any score are left out.

    Raises `InputError` with file and line for a table that is none of ours, a sample that `samples` lacks or that had
    another response, a score that is none, and a sample that is scored in part.
    """
    ids = {sample_digest(sample): id_ for id_, sample in samples.items()}
    by_sample: dict[str, list[tuple[int, Row]]] = {}
    for number, row in _read_rows(path):
        if row["digest"] not in ids:
            raise InputError(f"{path}:{number}: sample {one_line(row['sample'], 80)!r} belongs to another sample file")
        if row["score"].strip() not in ("", *map(str, SCORES)):
            raise InputError(f"{path}:{number}: score {one_line(row['score'], 80)!r} is none of 0, 1, 2")
        by_sample.setdefault(ids[row["digest"]], []).append((number, row))
    annotations: dict[str, Annotation] = {}
    for id_, rows in by_sample.items():
        filled = [row for _, row in rows if row["score"].strip()]
        if not filled:
            continue
        if len(filled) < len(rows):
            number = next(number for number, row in rows if not row["score"].strip())
            raise InputError(
                f"{path}:{number}: sample {id_!r} is scored in part; fill in this score or clear the others"
            )
        annotations[id_] = _annotation(rows, samples[id_], f"{path}:{rows[0][0]}")
    if not annotations:
        raise InputError(f"{path}: no sample is scored yet; fill in the column score with 0, 1 or 2")
    return annotations


def _sample_rows(sample: dict[str, Any]) -> Iterator[Row]:
    """The query's row, then its words' rows; lines without words need no label. The history stands in the first row."""
    item = sample_item(sample)
    history = " | ".join(f"{event.type}: {event.text}" for event in item.history[-_SHOWN_EVENTS:])
    lines = split_queries(sample["response"])
    for line, words in enumerate(words_by_query(sample["response"])):
        for place, text in enumerate([lines[line], *(word.text for word in words)] if words else []):
            yield {
                "sample": _cell(sample["id"]), "digest": sample_digest(sample), "query": str(line + 1),
                "word": str(place) if place else "", "text": _cell(text), "score": "", "history": _cell(history),
            }  # fmt: skip
            history = ""


def _cell(text: str) -> str:
    """Text from logs as a cell: one line, and no formula, which a spreadsheet would run."""
    line = " ".join(text.split())
    return f"'{line}" if line[:1] in ("=", "+", "-", "@") else line


def _read_rows(path: str | Path) -> Iterator[tuple[int, Row]]:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; make it with step2_token_reward.gold")
    with Path(path).open(encoding="utf-8-sig", newline="") as stream:  # spreadsheets write a byte order mark
        reader = csv.DictReader(stream, dialect="excel-tab", strict=True)
        try:
            yield from _rows(path, reader)
        except UnicodeDecodeError:
            raise InputError(f"{path}: not UTF-8; save the table in that encoding") from None
        except csv.Error as error:
            raise InputError(f"{path}:{reader.line_num}: not a row of a tab-separated table ({error})") from None


def _rows(path: str | Path, reader: csv.DictReader) -> Iterator[tuple[int, Row]]:
    if missing := sorted(set(COLUMNS) - {"text", "history"} - set(reader.fieldnames or ())):
        raise InputError(f"{path}:1: the columns {', '.join(missing)} are missing; is it tab-separated?")
    for row in reader:
        yield reader.line_num, {name: value or "" for name, value in row.items() if name}


def _annotation(rows: list[tuple[int, Row]], sample: dict[str, Any], place: str) -> Annotation:
    words = words_by_query(sample["response"])
    wanted = {(str(line + 1), str(word) if word else "")
              for line, of_line in enumerate(words) if of_line for word in range(len(of_line) + 1)}  # fmt: skip
    scores = {(row["query"], row["word"]): int(row["score"]) for _, row in rows}
    if scores.keys() != wanted or len(rows) != len(wanted):
        raise InputError(f"{place}: the rows of sample {sample['id']!r} are not those that were written; restore them")
    return Annotation(
        tuple(
            tuple(scores[str(line + 1), str(word + 1)] for word in range(len(of_line)))
            for line, of_line in enumerate(words)
        ),
        tuple(scores.get((str(line + 1), ""), 0) for line in range(len(words))),
    )


if __name__ == "__main__":
    run_command(main)
