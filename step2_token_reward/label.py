"""Label sampled responses, word by word and query by query.

    python -m step2_token_reward.label --samples samples.jsonl --labels labels.jsonl --annotator lexical
    python -m step2_token_reward.label --samples samples.jsonl --labels labels.jsonl \
        --annotator llm --base_url http://localhost:8000/v1 --model meta-llama/Llama-3.3-70B-Instruct
    python -m step2_token_reward.label --samples samples.jsonl --labels labels.jsonl --annotator my_scores.py:score

Labels are appended as they come, one line a sample. Started again, it cuts off a line that a kill left half-written,
skips what is labelled and goes on. A sample that a language model gives no valid answer for is put into quarantine
with the reason; the next run tries it again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from common.access import check_writable, naming
from common.config import MAX_SEED, option, parse_config
from common.data.cleaning import hash_fraction
from common.errors import InputError, run_command
from common.feedback.annotator import (
    RELEVANT_FROM,
    SCORES,
    Annotation,
    Annotator,
    BatchAnnotator,
    FeedbackItem,
    Unlabelled,
    annotate_all,
)
from common.feedback.labels import (
    label_row,
    quarantine_path,
    quarantine_row,
    read_existing_labels,
    read_quarantine,
    read_samples,
    sample_item,
)
from common.feedback.llm.annotator import LLMAnnotator
from common.feedback.llm.model import Question
from common.feedback.llm.options import EndpointOptions
from common.feedback.load import open_annotator
from common.feedback.names import ANNOTATORS, LLM, LLM_TEMPLATE, OWN, check_annotator_name
from common.files import lock, mend_last_line
from common.private import only_mine

_LABEL_START = b'{"id": '

Samples = dict[str, dict[str, Any]]


@dataclass
class LabelConfig(EndpointOptions):
    """Label sampled responses, word by word and query by query."""

    samples: str = option(
        "", "The responses to label: samples.jsonl, written by sample.py.", group="what is labelled",
    )
    labels: str = option("", "Where the labels go; labels that the file holds already are kept.")
    annotator: str = option(
        "lexical", f"Who scores: {', '.join((*ANNOTATORS, LLM))}, or a function of your own, {OWN}.",
        group="annotator",
    )
    truth: str = option("", "For the annotator simulated: truth.jsonl of the embedded log.")
    word_error_rate: float = option(0.0, "For the annotator simulated: share of wrong labels.", maximum=1)
    seed: int = option(0, "Seed of the share, and of the errors of the annotator simulated.", maximum=MAX_SEED)
    template: str = option(
        LLM_TEMPLATE, "For the annotator llm: the prompt, by name (common/feedback/llm/templates) or as a file."
    )
    share: float = option(
        1.0, "Label this share of the samples only, drawn by hash: to measure agreement.", group="how much",
        above=0, maximum=1
    )
    dry_run: bool = option(
        False, "For the annotator llm: print calls, estimated tokens and the first prompt, and ask nothing."
    )


def main() -> None:
    """Label what is not labelled yet, then say what the labels are like and where they lie."""
    config = parse_config(LabelConfig)
    check_config(config)
    samples = choose_samples(read_samples(config.samples), config.share, config.seed)
    labels = Path(config.labels)
    with open_annotator(
        config.annotator, truth_path=config.truth, word_error_rate=config.word_error_rate, seed=config.seed,
        endpoint=config, template=config.template, answers=config.answers or labels.with_suffix(".answers.jsonl"),
    ) as annotator:  # fmt: skip
        if config.dry_run:
            print(describe_calls(annotator, [sample_item(row) for row in missing_samples(samples, labels, annotator)]))
            print("next: the same command without --dry_run")
            return
        label_samples(samples, labels, annotator)
        existing = read_existing_labels(labels, samples, annotator=annotator.name)
        print(summarise((samples[id_], annotation) for id_, annotation in existing.items()))
        if isinstance(annotator, LLMAnnotator):
            print(describe_endpoint(annotator, labels, samples))
        print(f"labels by {annotator.name}: {labels}")
        print(
            f"next: bash scripts/run_step2.sh --samples {config.samples} --labels {labels} "
            f"--output_dir {labels.parent / 'reward'} --model_name_or_path ..."
        )


def check_config(config: LabelConfig) -> None:
    """Raise `InputError` for flags that are missing or contradict each other, and where no label can be written."""
    if not config.samples or not config.labels:
        raise InputError("--samples and --labels are needed: the file to label and the file for the labels")
    check_writable(Path(config.labels).parent, "give another --labels")
    check_annotator_name(config.annotator, "annotator", known=(*ANNOTATORS, LLM))
    if config.dry_run and config.annotator != LLM:
        raise InputError("--dry_run is for the annotator llm: the others ask nobody")


def choose_samples(samples: Samples, share: float, seed: int) -> Samples:
    """The samples of a share drawn by hash: the same ones in every run. Raises `InputError` if none is left."""
    chosen = {id_: row for id_, row in samples.items() if share == 1 or hash_fraction("label", seed, id_) < share}
    if not chosen:
        raise InputError(f"--share {share:g} of {len(samples)} samples leaves none; give a larger share")
    return chosen


def missing_samples(samples: Samples, labels_path: Path, annotator: Annotator | BatchAnnotator) -> list[dict[str, Any]]:
    """The samples without a label. Raises `InputError` if the labels there are not of this run."""
    if not labels_path.exists():
        return list(samples.values())
    labelled = read_existing_labels(labels_path, samples, annotator=annotator.name)
    return [sample for id_, sample in samples.items() if id_ not in labelled]


def label_samples(samples: Samples, labels_path: Path, annotator: Annotator | BatchAnnotator) -> None:
    """Append a label for each sample that has none, or put it into quarantine.

    Raises `InputError` if the labels there are not of this run, if another process is writing them, and before any
    sample is labelled if one is malformed.
    """
    labels_path.parent.mkdir(parents=True, exist_ok=True)
    with naming(labels_path), open(labels_path, "a", encoding="utf-8", opener=only_mine) as stream:
        lock(stream, labels_path, "give another --labels")  # or each sample would be labelled twice
        mend_last_line(labels_path, _LABEL_START)
        missing = missing_samples(samples, labels_path, annotator)
        items = [sample_item(sample) for sample in missing]
        quarantine_path(labels_path).unlink(missing_ok=True)

        def done(place: int, result: Annotation | Unlabelled) -> None:
            if isinstance(result, Annotation):
                _append(stream, label_row(missing[place], annotator.name, result))
                return
            path = quarantine_path(labels_path)
            with naming(path), open(path, "a", encoding="utf-8", opener=only_mine) as quarantine:
                _append(quarantine, quarantine_row(missing[place], annotator.name, result))

        annotate_all(annotator, items, done, progress="label", before=len(samples) - len(missing))


def describe_calls(annotator: LLMAnnotator, items: Sequence[FeedbackItem]) -> str:
    """What labelling would take, and the first prompt as it would be sent."""
    questions = (question for item in items if isinstance(question := annotator.question(item), Question))
    first = next((question for item in items if isinstance(question := annotator.question(item), Question)), None)
    estimate = annotator.model.estimate(questions)
    options = annotator.model.options
    lines = [
        f"{len(items)} samples to label, {estimate.questions} of them by asking {options.model} at {options.base_url}",
        f"calls: {estimate.calls} ({estimate.stored} answers are stored already), corrections and repeats not counted",
        f"tokens, estimated: {estimate.prompt_tokens:,.0f} of prompts, {estimate.answer_tokens:,.0f} of answers",
    ]
    if options.price_in or options.price_out:
        lines.append(f"cost, estimated: {estimate.cost:.2f}")
    for message in first.messages if first else ():
        lines.append(f"--- {message['role']}\n{message['content']}")
    return "\n".join(lines)


def describe_endpoint(annotator: LLMAnnotator, labels_path: Path, samples: Samples) -> str:
    """What the language model was asked, and which samples it left without labels."""
    lines = [annotator.model.describe()]
    quarantined = len(read_quarantine(labels_path, samples))
    if quarantined:
        lines.append(
            f"quarantined: {quarantined} of {len(samples)} samples ({quarantined / len(samples):.2%}) have no valid "
            f"answer and are left out of training: {quarantine_path(labels_path)}"
        )
    return "\n".join(lines)


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


def _append(stream: IO[str], row: dict[str, Any]) -> None:
    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    stream.flush()


if __name__ == "__main__":
    run_command(main)
