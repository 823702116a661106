"""Compare systems on held-out users: generate, score, and write report.json and report.md.

    python -m common.evaluation.evaluate --data_dir RUN/data --output_dir RUN --annotator lexical \
        --systems sft=RUN/step1_sft/model tppo=RUN/step3_tppo/model
"""

from __future__ import annotations

import math
import platform
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.access import check_writable
from common.config import MAX_SEED, ModelOptions, check_numbers, option, parse_config
from common.data.examples import load_examples
from common.data.prompts import PromptBuilder
from common.data.records import SPLITS, Example
from common.errors import InputError, run_command
from common.evaluation.generate import generate_rows, load_generator
from common.evaluation.judging import judge_systems
from common.evaluation.report import render_markdown, render_terminal
from common.evaluation.statistics import estimate_means
from common.evaluation.summary import (
    Interval,
    Row,
    compare,
    find_warnings,
    gold_rows,
    measure_table,
    score_rows,
    summarise,
)
from common.feedback.annotator import Annotator, BatchAnnotator
from common.feedback.llm.annotator import LLMAnnotator
from common.feedback.llm.options import EndpointOptions
from common.feedback.load import open_annotator
from common.feedback.names import ANNOTATORS, LLM, LLM_TEMPLATE, OWN, check_annotator_name
from common.files import atomic_write, read_json, write_json, write_jsonl
from common.inputs import check_readable
from common.models.kernels import settle_dtype
from common.models.loading import causal_lm_skeleton, load_tokenizer

REPORT_NAME = "report.json"
GENERATIONS = "generations"
GOLD = "gold"
_SYSTEM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass
class EvaluateConfig(EndpointOptions, ModelOptions):
    """Compare systems (model folders) on held-out users and write report.json and report.md."""

    data_dir: str = option("", "Folder with train.jsonl, dev.jsonl and test.jsonl.", group="what is compared")
    systems: list[str] = option(
        [], "name=model folder ..., in the order of training; a later one is compared with each before it."
    )
    output_dir: str = option("", "Folder of the run; report.json, report.md and generations/ are written there.")
    overwrite: bool = option(False, "Replace the report that output_dir holds.")
    annotator: str = option(
        "lexical",
        f"Who judges words and queries: {', '.join((*ANNOTATORS, LLM))}, or a function of your own, {OWN}.",
        group="judge",
    )
    truth: str = option("", "Latent truth of the simulated log; the annotator 'simulated' reads it.")
    reward_annotator: str = option(
        "", "Annotator whose labels trained the reward model (of llm: its model's name); the report warns when it is "
        "the judge too.",
    )
    split: str = option("test", "Whose examples are used.", choices=list(SPLITS), group="examples and decoding")
    max_examples: int = option(0, "Use a random sample of this many examples; 0 uses all.")
    num_queries: int = option(3, "Queries asked for (the paper's k: AOL 3, industrial log 10).", minimum=1)
    prompt_template: str = option("plain", "The template that the systems were trained with.")
    max_prompt_tokens: int = option(512, "Prompt budget in tokens; the newest events are kept.", minimum=1)
    max_new_tokens: int = option(64, "Longest response in tokens, EOS included.", minimum=1)
    decoding: str = option(
        "both", "sampled, greedy, or both: then the main figures are sampled and the greedy ones stand beside them.",
        choices=["sampled", "greedy", "both"],
    )
    temperature: float = option(1.0, "Of sampled decoding; 1 is the model's own distribution.")
    batch_size: int = option(
        64, "Responses decoded at once; with any, a seed draws the same, except for rounding.", minimum=1
    )
    resamples: int = option(10_000, "Bootstrap resamples behind each interval.", group="report", minimum=1)
    shown_examples: int = option(5, "Examples printed in report.md, drawn at random; they hold text from the log.")
    timings: list[str] = option(
        [], 'Files with {"stage": seconds} to be taken into the report.'
    )
    seed: int = option(0, "Seed of the sample of examples, the sampled responses and the bootstrap.", maximum=MAX_SEED)


def main() -> None:
    """The command."""
    started = time.perf_counter()
    config = settle_dtype(parse_config(EvaluateConfig))
    systems = parse_systems(config.systems)
    check_config(config)
    timings = read_timings(config.timings)
    output_dir = claim_report(config.output_dir, config.overwrite)
    check_systems(systems.values(), config)
    examples = choose_examples(load_examples(config.data_dir, config.split), config.max_examples, config.seed)
    with open_annotator(
        config.annotator, truth_path=config.truth, seed=config.seed, endpoint=config, template=LLM_TEMPLATE,
        answers=config.answers or output_dir / "judge_answers.jsonl",
    ) as annotator:  # fmt: skip
        rows = {name: generate_and_score(name, path, examples, annotator, config) for name, path in systems.items()}
        gold = score_rows(examples, gold_rows(examples), annotator, f"judge {GOLD}")
        report = build_report(config, examples, rows, gold)
        if isinstance(annotator, LLMAnnotator):
            main_rows = {name: of_system[decodings_of(config)[0]] for name, of_system in rows.items()}
            report["judge"] = judge_systems(annotator, examples, main_rows, interval_of(config), config.num_queries)
    report["timings"] = {**timings, "evaluation": round(time.perf_counter() - started, 3)}
    with atomic_write(output_dir / "report.md", private=True) as stream:
        stream.write(render_markdown(report, choose_shown(examples, rows, config)))
    write_json(output_dir / REPORT_NAME, report, private=True)
    print(render_terminal(report, str(output_dir / "report.md")))
    print(f"next: read its warnings, then single responses with their scores in {output_dir / GENERATIONS}")


def generate_and_score(
    name: str, path: str, examples: Sequence[Example], annotator: Annotator | BatchAnnotator, config: EvaluateConfig
) -> dict[str, list[Row]]:
    """Scored rows of one system for each decoding, also written under `generations/`."""
    model, tokenizer = load_generator(path, config)
    builder = PromptBuilder(tokenizer, config.prompt_template, config.max_prompt_tokens, config.num_queries)
    rows: dict[str, list[Row]] = {}
    for decoding in decodings_of(config):
        generated = generate_rows(
            model, tokenizer, builder, examples, decoding=decoding, temperature=config.temperature,
            max_new_tokens=config.max_new_tokens, batch_size=config.batch_size, seed=config.seed,
            progress=f"{name}, {decoding}",
        )
        rows[decoding] = score_rows(examples, generated, annotator, f"judge {name}, {decoding}")
        write_jsonl(Path(config.output_dir) / GENERATIONS / f"{name}_{decoding}.jsonl", rows[decoding])
    return rows


def build_report(
    config: EvaluateConfig, examples: Sequence[Example], rows: dict[str, dict[str, list[Row]]], gold: Sequence[Row]
) -> dict[str, Any]:
    """What report.json holds, timings aside.

    `systems.<name>.<measure>` are of the main decoding; those of the other one stand under
    `systems.<name>.<decoding>`, and in the same way within `comparisons.<later>_vs_<earlier>`.
    """
    main_decoding, *beside = decodings_of(config)
    users = [example.user_id for example in examples]
    interval = interval_of(config)
    k = config.num_queries
    tables = {
        name: {decoding: measure_table(examples, of_decoding, k) for decoding, of_decoding in of_system.items()}
        for name, of_system in rows.items()
    }
    metrics = {
        name: {
            decoding: summarise(table, rows[name][decoding], users, interval, k)
            for decoding, table in of_system.items()
        }
        for name, of_system in tables.items()
    }
    comparisons = {
        f"{later}_vs_{earlier}": {
            decoding: compare(tables[later][decoding], tables[earlier][decoding], users, interval)
            for decoding in decodings_of(config)
        }
        for earlier, later in combinations(rows, 2)
    }

    def nested(of_decoding: dict[str, Any]) -> dict[str, Any]:
        return {**of_decoding[main_decoding], **{decoding: of_decoding[decoding] for decoding in beside}}

    return {
        "systems": {name: nested(of_decoding) for name, of_decoding in metrics.items()},
        "references": {GOLD: summarise(measure_table(examples, gold, k), gold, users, interval, k)},
        "comparisons": {pair: nested(of_decoding) for pair, of_decoding in comparisons.items()},
        "warnings": find_warnings(metrics, judge_name(config), config.reward_annotator),
        "annotator": judge_name(config),
        "num_queries": k,
        "data": {"split": config.split, "examples": len(examples), "users": len(set(users))},
        "decoding": {
            "main": main_decoding, "beside": next(iter(beside), None), "temperature": config.temperature,
            "top_p": 1.0, "top_k": 0, "max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size,
        },
        "seed": config.seed,
        "settings": asdict(config),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
    }


def judge_name(config: EvaluateConfig) -> str:
    """The annotator, a language model by its own name."""
    return config.model if config.annotator == LLM else config.annotator


def interval_of(config: EvaluateConfig) -> Interval:
    """`estimate_means` with the report's resamples and seed."""
    return partial(estimate_means, resamples=config.resamples, seed=config.seed)


def decodings_of(config: EvaluateConfig) -> list[str]:
    """The decodings to run, the main one first."""
    return ["sampled", "greedy"] if config.decoding == "both" else [config.decoding]


def choose_examples(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    """A random sample of `limit` examples in their order, all of them for 0. Raises `InputError` without any."""
    if not examples:
        raise InputError("no examples to evaluate on: this split is empty; choose another --split or more data")
    if limit == 0 or limit >= len(examples):
        return list(examples)
    chosen = np.random.default_rng(seed).choice(len(examples), size=limit, replace=False)
    return [examples[i] for i in sorted(chosen)]


def choose_shown(
    examples: Sequence[Example], rows: dict[str, dict[str, list[Row]]], config: EvaluateConfig
) -> list[dict[str, Any]]:
    """Random examples with each system's scored response under the main decoding, for report.md."""
    decoding = decodings_of(config)[0]
    places = {example.id: place for place, example in enumerate(examples)}
    return [
        {
            "id": example.id,
            "history": [event.query for event in example.history if event.type == "search"],
            "targets": list(example.targets),
            "responses": {name: of_system[decoding][places[example.id]] for name, of_system in rows.items()},
        }
        for example in (choose_examples(examples, config.shown_examples, config.seed) if config.shown_examples else [])
    ]


def parse_systems(items: Sequence[str]) -> dict[str, str]:
    """`name=folder` texts as a mapping in their order. Raises `InputError` for other texts and for equal names."""
    systems: dict[str, str] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not equals or not path or not _SYSTEM_NAME.fullmatch(name):
            raise InputError(f"--systems {item!r}: expected name=model folder, a name being letters, digits, . _ or -")
        if name in systems or name == GOLD:
            raise InputError(f"--systems {item!r}: the name {name!r} is taken; give each system its own")
        systems[name] = path
    if not systems:
        raise InputError("--systems: name at least one system, such as sft=outputs/run/step1_sft/model")
    return systems


def check_systems(paths: Iterable[str], options: ModelOptions) -> None:
    """Raise `InputError` for a model that cannot be loaded, before the one in front of it has written its responses."""
    for path in paths:
        load_tokenizer(path, options.trust_remote_code, pad_token="eos")
        causal_lm_skeleton(path, options)
        check_readable(path)


def check_config(config: EvaluateConfig) -> None:
    """Raise `InputError` for settings that cannot be meant."""
    for name in ("data_dir", "output_dir"):
        if not getattr(config, name):
            raise InputError(f"--{name} is needed")
    check_annotator_name(config.annotator, "annotator", known=(*ANNOTATORS, LLM))
    check_numbers(config)


def claim_report(output_dir: str, overwrite: bool) -> Path:
    """The folder to write to. Raises `InputError` where nothing can be written, and when it holds a report already and
    `overwrite` is not given."""
    path = Path(output_dir)
    for folder in (path, path / GENERATIONS):
        check_writable(folder, "choose another --output_dir")
    if (path / REPORT_NAME).exists() and not overwrite:
        raise InputError(f"{path / REPORT_NAME} exists; add --overwrite to replace it, or choose another --output_dir")
    return path


def read_timings(paths: Sequence[str]) -> dict[str, float]:
    """Seconds by stage from all files together. Raises `InputError` for a file with anything else in it."""
    timings: dict[str, float] = {}
    for path in paths:
        content = read_json(path)
        if not isinstance(content, dict):
            raise InputError(f'{path}: expected {{"stage": seconds}}')
        for stage, seconds in content.items():
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
                raise InputError(f"{path}: stage {stage!r} has {seconds!r} where seconds belong")
            timings[stage] = float(seconds)
    return timings


if __name__ == "__main__":
    run_command(main)
