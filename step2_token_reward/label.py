"""Label sampled responses, word by word and query by query.

    python -m step2_token_reward.label --samples samples.jsonl --labels labels.jsonl --annotator lexical

Labels are appended as they come, one line a sample. Started again, it cuts off a line that a kill left half-written,
skips what is labelled and goes on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.config import option, parse_config
from common.errors import InputError, run_command
from common.feedback.annotator import RELEVANT_FROM, SCORES, Annotation, Annotator
from common.feedback.labels import label_row, read_existing_labels, read_labels, read_samples, sample_item
from common.feedback.load import ANNOTATORS, load_annotator

_LABEL_START = b'{"id": '


@dataclass
class LabelConfig:
    """Label sampled responses, word by word and query by query."""

    samples: str = option("", "The responses to label: samples.jsonl, written by sample.py.")
    labels: str = option("", "Where the labels go; labels that the file holds already are kept.")
    annotator: str = option("lexical", "Who scores.", choices=list(ANNOTATORS))
    truth: str = option("", "For the annotator simulated: truth.jsonl of the embedded log.")
    word_error_rate: float = option(0.0, "For the annotator simulated: share of wrong labels.")
    seed: int = option(0, "For the annotator simulated: seed of its errors.")


def main() -> None:
    """Label what is not labelled yet, then say what the labels are like and where they lie."""
    config = parse_config(LabelConfig)
    if not config.samples or not config.labels:
        raise InputError("--samples and --labels are needed: the file to label and the file for the labels")
    annotator = load_annotator(
        config.annotator, truth_path=config.truth, word_error_rate=config.word_error_rate, seed=config.seed
    )
    label_samples(Path(config.samples), Path(config.labels), annotator)
    print(summarise(read_labels(config.samples, config.labels)))
    print(f"labels by {annotator.name}: {config.labels}")


def label_samples(samples_path: Path, labels_path: Path, annotator: Annotator) -> None:
    """Append a label for each sample that has none. Raises `InputError` if the labels there are not of this run."""
    samples = read_samples(samples_path)
    labels_path.parent.mkdir(parents=True, exist_ok=True)
    mend_last_line(labels_path)
    labelled = read_existing_labels(labels_path, samples, annotator=annotator.name)
    missing = [sample for id_, sample in samples.items() if id_ not in labelled]
    with labels_path.open("a", encoding="utf-8") as stream:
        for sample in tqdm(missing, desc="label", unit="sample", initial=len(labelled), total=len(samples)):
            row = label_row(sample, annotator.name, annotator.annotate(sample_item(sample)))
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()


def mend_last_line(path: Path) -> None:
    """Make `path`, a labels file or none yet, end with a complete line.

    A last line without its line break was being written when a run was killed: half of a label is cut off, a whole
    one gets its line break. Raises `InputError`, and leaves the file alone, if the line is no part of a label.
    """
    path.touch()
    with path.open("rb+") as stream:
        content = stream.read()
        complete = content.rfind(b"\n") + 1
        line = content[complete:]
        if line[: len(_LABEL_START)] != _LABEL_START[: len(line)]:
            raise InputError(f"{path}: the last line is no label; choose another labels file")
        if _is_json(line):
            stream.write(b"\n")
        elif line:
            stream.truncate(complete)
            print(f"{path}: cut off a half-written last line")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def summarise(labelled: Iterable[tuple[dict[str, Any], Annotation]]) -> str:
    """Words per score and the share of relevant queries, all together and by origin of the sample."""
    words: Counter[int] = Counter()
    queries: Counter[str] = Counter()
    relevant: Counter[str] = Counter()
    for sample, annotation in labelled:
        words.update(score for scores in annotation.word_scores for score in scores)
        for origin in ("all", sample["origin"]):
            queries[origin] += len(annotation.query_scores)
            relevant[origin] += sum(score >= RELEVANT_FROM for score in annotation.query_scores)
    counts = ", ".join(f"{words[score]} score {score}" for score in SCORES)
    shares = ", ".join(
        f"{relevant[origin] / max(count, 1):.3f} of {count} ({origin})" for origin, count in queries.items()
    )
    return f"words: {counts}\nrelevant queries: {shares}"


if __name__ == "__main__":
    run_command(main)
