"""A byte order mark, which editors on Windows write at a file's start, changes nothing of what a user's file holds."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.config import option, parse_config
from common.data.cleaning import Cleaner, CleaningOptions
from common.data.examples import load_examples
from common.data.prompts import PromptBuilder
from common.data.readers import read_log
from common.data.records import Event, Example, Record
from common.engine.deepspeed_config import _read
from common.feedback.labels import read_labels
from common.feedback.llm.prompts import load_template, shown_queries
from common.feedback.own import OwnAnnotator
from common.feedback.simulated import read_truth
from common.files import write_json, write_jsonl
from common.prediction.dialogue import read_history
from common.prediction.histories import read_histories
from step2_token_reward.gold import read_gold, write_gold
from tests.data.log_files import FIXTURES
from tests.labelled_samples import RESPONSES, labelled, write_files
from tests.tiny_models import ordinary_tokenizer

BOM = b"\xef\xbb\xbf"
HISTORY = (Event("search", query="red hat"),)
EXAMPLE = Example("e", "u", "u", "log", "train", HISTORY, ("blue hat",))
ROWS = labelled("train", RESPONSES)


@dataclass
class Options:
    steps: int = option(1, "A number.")


def log(source: Path) -> Callable[[Path, bytes], Any]:
    """Reads a copy of a fixture, a file or a folder, whose files begin with the mark."""

    def read(folder: Path, mark: bytes) -> list[Record]:
        path = folder / source.name
        if source.is_dir():
            shutil.copytree(source, path)
        else:
            shutil.copy(source, path)
        for file in path.iterdir() if path.is_dir() else [path]:
            if file.suffix in (".txt", ".csv", ".xml", ".jsonl"):
                marked(file, mark)
        return list(read_log(path))

    return read


def marked(path: Path, mark: bytes) -> Path:
    path.write_bytes(mark + path.read_bytes())
    return path


def packed_log(folder: Path, mark: bytes) -> list[Record]:
    (folder / "log.jsonl.gz").write_bytes(gzip.compress(mark + (FIXTURES / "generic.jsonl").read_bytes()))
    return list(read_log(folder / "log.jsonl.gz"))


def written(folder: Path, name: str, text: str, mark: bytes) -> str:
    (folder / name).write_bytes(mark + text.encode())
    return str(folder / name)


def adult_words(folder: Path, mark: bytes) -> list[bool]:
    """Whether users who searched for the first and for the second phrase are kept."""
    cleaner = Cleaner(CleaningOptions(adult_words=written(folder, "a.txt", "rude\nnaked\n", mark), min_queries=1), 1, 0)
    return [cleaner._enabled_record_rules()["adult_words"](None, [Event("search", query=word)]) for word in
            ("rude", "naked", "kind")]  # fmt: skip


def prompt_template(folder: Path, mark: bytes) -> str:
    path = written(folder, "prompt.jinja", "{{ events[0].text }}", mark)
    return PromptBuilder(ordinary_tokenizer(), path, 60, 1).text(HISTORY)


def llm_template(folder: Path, mark: bytes) -> Any:
    text = "{% block user %}{{ queries[0].text }}{% endblock %}"
    template = load_template(written(folder, "ask.jinja", text, mark))
    return template.messages(history=[], queries=shown_queries("red hat"))


def yaml_config(folder: Path, mark: bytes) -> Options:
    return parse_config(Options, ["--config", written(folder, "c.yaml", "steps: 7\n", mark)])


def json_config(folder: Path, mark: bytes) -> Any:
    write_json(folder / "ds.json", {"zero_optimization": {"stage": 2}})
    return _read(str(marked(folder / "ds.json", mark)))


def examples(folder: Path, mark: bytes) -> list[Example]:
    write_jsonl(folder / "train.jsonl", [EXAMPLE.to_dict()])
    marked(folder / "train.jsonl", mark)
    return load_examples(folder, "train")


def histories(folder: Path, mark: bytes) -> Any:
    write_jsonl(folder / "test.jsonl", [EXAMPLE.to_dict()])
    return list(read_histories(marked(folder / "test.jsonl", mark)))


def samples_and_labels(folder: Path, mark: bytes) -> Any:
    paths = write_files(folder, ROWS)
    for path in paths:
        marked(Path(path), mark)
    return read_labels(*paths)


def hand_labels(folder: Path, mark: bytes) -> Any:
    write_gold(folder / "gold.tsv", [row for row, _ in ROWS])
    lines = (folder / "gold.tsv").read_text().split("\n")
    place = lines[0].split("\t").index("score")
    rows = [line.split("\t") for line in lines[1:] if line]
    text = "\n".join([lines[0], *("\t".join([*row[:place], "1", *row[place + 1 :]]) for row in rows), ""])
    return read_gold(written(folder, "gold.tsv", text, mark), {row["id"]: row for row, _ in ROWS})


def truth(folder: Path, mark: bytes) -> Any:
    write_jsonl(folder / "truth.jsonl", [{"user_id": "u", "words": {"hat": 2}}])
    return read_truth(marked(folder / "truth.jsonl", mark))


def own_annotator(folder: Path, mark: bytes) -> list[list[int]]:
    path = written(folder, "mine.py", "def score(history, response):\n    return [[1]]\n", mark)
    return OwnAnnotator(f"{path}:score")._function([], [["hat"]])


def dialogue(folder: Path, mark: bytes) -> Any:
    lines = iter([f"{mark.decode()}> Hats", ""])
    return read_history(lambda _: next(lines))


CASES: dict[str, Callable[[Path, bytes], Any]] = {
    "jsonl": log(FIXTURES / "generic.jsonl"), "jsonl.gz": packed_log, "aol": log(FIXTURES / "aol"),
    "aol4ps": log(FIXTURES / "aol4ps"), "trec": log(FIXTURES / "trec" / "sessiontrack2013.xml"),
    "adult_words": adult_words, "prompt_template": prompt_template, "llm_template": llm_template,
    "yaml": yaml_config, "deepspeed": json_config, "examples": examples, "histories": histories,
    "samples_and_labels": samples_and_labels, "hand_labels": hand_labels, "truth": truth,
    "own_annotator": own_annotator, "dialogue": dialogue,
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_byte_order_mark_changes_nothing(tmp_path: Path, case: str) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "marked").mkdir()
    plain, with_mark = CASES[case](tmp_path / "plain", b""), CASES[case](tmp_path / "marked", BOM)
    assert plain and with_mark == plain


def test_the_first_phrase_and_the_first_prompt_are_those_of_the_file(tmp_path: Path) -> None:
    assert adult_words(tmp_path, BOM) == [False, False, True]
    assert prompt_template(tmp_path, BOM) == "red hat"
