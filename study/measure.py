"""Measure one system of the study on users that it was not trained on; write a record for the study's tables.

    python -m study.measure --model RUN/model --reference RUN/sft/model --data_dir RUN/data \\
        --truth RUN/log/truth.jsonl --output RUN/measure.json
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from common.config import MAX_SEED, ModelOptions, option, parse_config
from common.data.examples import load_examples
from common.data.prompts import PromptBuilder
from common.data.records import Example
from common.errors import InputError, run_command
from common.evaluation import metrics
from common.evaluation.generate import generate_rows, load_generator, repeated
from common.evaluation.summary import MEASURES, Row, measure_table, score_rows
from common.feedback.annotator import normalised_words
from common.feedback.load import load_annotator
from common.files import write_json
from common.models.loading import load_causal_lm
from common.models.response_scores import response_scores
from common.models.sequences import SequenceBatch, pad_sequences
from common.text import split_queries
from study.controls import Control, copy_last, popularity, user_frequent

EXAMPLES = 6  # responses that a record keeps for people to read


@dataclass
class MeasureConfig(ModelOptions):
    """Measure one system: a model folder, or with --control a rule that needs none."""

    # One precision on every machine: what is measured is compared with records from elsewhere.
    dtype: str = option("fp32", "Precision of weights and activations.", choices=["fp32", "bf16"])
    model: str = option("", "Model folder.")
    control: str = option("", "Instead of a model.", choices=["", "copy_last", "user_frequent", "popularity"])
    reference: str = option("", "Model folder that the KL is measured to; empty: no KL.")
    data_dir: str = option("", "Folder with the examples.")
    split: str = option("test", "Whose examples are used.", choices=["dev", "test"])
    max_examples: int = option(0, "The first so many examples; 0 uses all.")
    truth: str = option("", "truth.jsonl of the embedded log; without it the lexical annotator alone judges.")
    output: str = option("", "The record to write.")
    num_queries: int = option(3, "Queries a response.", minimum=1)
    prompt_template: str = option("compact", "The template that the system was trained with.")
    max_prompt_tokens: int = option(160, "Prompt budget in tokens.", minimum=1)
    max_response_tokens: int = option(32, "Longest response in tokens.", minimum=1)
    temperature: float = option(
        1.0, "Of sampled decoding, as in step 3; log-probs for the KL are taken at it too.", above=0
    )
    samples: int = option(1, "Sampled responses an example: more of them take chance out of a comparison.", minimum=1)
    batch_size: int = option(64, "Prompts generated at once.", minimum=1)
    seed: int = option(0, "Seed of the sampled responses.", maximum=MAX_SEED)


def main() -> None:
    """Generate, judge, write the record."""
    config = parse_config(MeasureConfig)
    if not config.output or not config.data_dir or bool(config.model) == bool(config.control):
        raise InputError("--output, --data_dir and one of --model and --control are needed")
    examples = load_examples(config.data_dir, config.split)[: config.max_examples or None]
    asked = {"sampled": repeated(examples, config.samples), "greedy": examples}
    if config.control:
        responses = {"greedy": control_rows(config, examples)}
        kl = None
    else:
        responses, kl = model_rows(config, examples)
    judges = {"lexical": load_annotator("lexical")}
    if config.truth:
        judges = {"simulated": load_annotator("simulated", truth_path=config.truth), **judges}
    record = {
        "users": [example.user_id for example in examples],
        "kl": kl,
        "examples": [
            {
                "history": [event.query for event in example.history if event.type == "search"],
                "targets": example.targets,
                **{
                    decoding: rows[place * len(rows) // len(examples)]["response"]
                    for decoding, rows in responses.items()
                },
            }
            for place, example in enumerate(examples[:EXAMPLES])
        ],
        "decodings": {
            decoding: {
                name: judged(asked[decoding], score_rows(asked[decoding], rows, judge), config.num_queries)
                for name, judge in judges.items()
            }
            for decoding, rows in responses.items()
        },
    }
    write_json(config.output, record)
    print(f"record: {config.output}")


def model_rows(
    config: MeasureConfig, examples: Sequence[Example]
) -> tuple[dict[str, list[Row]], float | None]:
    """The model's rows for the examples of each decoding, and its KL to the reference on the sampled ones."""
    model, tokenizer = load_generator(config.model, config)
    builder = PromptBuilder(tokenizer, config.prompt_template, config.max_prompt_tokens, config.num_queries)
    rows = {
        decoding: generate_rows(
            model, tokenizer, builder, examples, decoding=decoding, temperature=config.temperature,
            max_new_tokens=config.max_response_tokens, batch_size=config.batch_size, seed=config.seed, samples=samples,
            progress=decoding,
        )
        for decoding, samples in (("sampled", config.samples), ("greedy", 1))
    }  # fmt: skip
    if not config.reference:
        return rows, None
    reference = load_causal_lm(config.reference, config).to(model.device).eval()
    prompts = [builder.ids(example.history) for example in repeated(examples, config.samples)]
    responses = [
        [*tokenizer(row["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for row in rows["sampled"]
    ]
    batches = _batches(prompts, responses, tokenizer.pad_token_id, config.batch_size)
    return rows, sequence_kl(model, reference, batches, config.temperature)


@torch.no_grad()
def sequence_kl(
    model: PreTrainedModel, reference: PreTrainedModel, batches: Iterable[SequenceBatch], temperature: float
) -> float:
    """Mean over the model's own samples of `log pi - log pi_ref` of the whole response, in nats.

    The text is encoded again, which may split a word otherwise than the model did; both models see the same ids.
    """
    total, count = 0.0, 0
    for batch in batches:
        own, other = (response_scores(m, m, batch, temperature).logprobs for m in (model, reference))
        total += float((own - other)[batch.response_mask].sum())
        count += len(batch.input_ids)
    return total / count


def _batches(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_token_id: int, size: int
) -> Iterator[SequenceBatch]:
    """Pairs of a prompt and its response, those of similar length together: little padding."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs = sorted(zip(prompts, responses, strict=True), key=lambda pair: len(pair[0]) + len(pair[1]))
    for start in range(0, len(pairs), size):
        yield pad_sequences(*zip(*pairs[start : start + size], strict=True), pad_token_id, device)


def control_rows(config: MeasureConfig, examples: Sequence[Example]) -> list[Row]:
    """The rows of a rule: one list of queries an example."""
    rules: dict[str, Control] = {"copy_last": copy_last(config.num_queries)}
    rules["user_frequent"] = user_frequent(config.num_queries)
    rules["popularity"] = popularity(config.num_queries, load_examples(config.data_dir, "train"))
    return [
        {"id": example.id, "response": "\n".join(rules[config.control](example)), "finished": True, "tokens": 0}
        for example in examples
    ]


def judged(examples: Sequence[Example], rows: Sequence[Row], k: int) -> dict[str, Any]:
    """Means of all measures, and what paired comparisons need of each example.

    `examples` may hold one several times, in a row, once for each response. `relevant` is the number of relevant
    queries among the first k, `unique` of those that repeat no earlier line,
    `recall` the share of targets found (null where undefined). `by_length` holds, for each number of words of a query,
    how many were written and were relevant.
    """
    table = measure_table(examples, rows, k)
    means = {name: _mean(table[:, column]) for column, name in enumerate(MEASURES)}
    lines = [split_queries(row["response"]) for row in rows]
    means["distinct_2"] = metrics.distinct_n(lines, 2, k)
    return {
        "means": means | metrics.word_habits(lines, k),
        "relevant": [round(value * k) for value in table[:, MEASURES.index("relevance_rate")]],
        "unique": [round(value * k) for value in table[:, MEASURES.index("unique_relevance_rate")]],
        "recall": [None if np.isnan(value) else round(value, 4) for value in table[:, MEASURES.index("recall")]],
        "by_length": relevance_by_length(lines, [row["queries"] for row in rows], k),
    }


def relevance_by_length(
    responses: Sequence[Sequence[str]], scores: Sequence[Sequence[int]], k: int
) -> dict[str, list[int]]:
    """`{words: [written, relevant]}` over the first k queries; the last entry gathers those of six words and more."""
    found: dict[str, list[int]] = {}
    for response, query_scores in zip(responses, scores, strict=True):
        for query, score in zip(response[:k], query_scores[:k], strict=True):
            count = found.setdefault(str(min(len(normalised_words(query)), 6)), [0, 0])
            count[0] += 1
            count[1] += score > 0
    return dict(sorted(found.items()))


def _mean(values: np.ndarray) -> float | None:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else None


if __name__ == "__main__":
    run_command(main)
