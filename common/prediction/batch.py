"""Predictions for a file of histories, part by part: nothing is held but the part at hand, and a killed run goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from common.data.prompt_settings import PromptSettings
from common.errors import InputError
from common.files import digest, write_jsonl
from common.generation.decode import CountEnded
from common.generation.sampling import Sampling, uniform_table
from common.prediction.config import PredictConfig
from common.prediction.histories import History, Survey
from common.prediction.partial import PartialOutput
from common.prediction.predictor import Prediction, Predictor
from common.progress import progress

# Of a part, in responses decoded at once: rows that end make way for others, but only within a part.
_PART_BATCHES = 4
# What the rows do not depend on, or what `run_settings` records by its content.
_APART = {"history", "log_format", "max_bad_lines", "output", "overwrite"}


def part_histories(config: PredictConfig) -> int:
    """How many histories are answered at a time."""
    return max(1, _PART_BATCHES * config.batch_size // config.samples)


def open_partial(
    config: PredictConfig, prompts: PromptSettings, sampling: Sampling, survey: Survey
) -> PartialOutput:
    """What an earlier run with these settings has answered, or nothing yet; raises as `PartialOutput` does."""
    settings = run_settings(config, prompts, sampling, survey)
    return PartialOutput(
        config.output, settings, survey.count * config.samples, part_histories(config) * config.samples
    )


def run_settings(
    config: PredictConfig, prompts: PromptSettings, sampling: Sampling, survey: Survey
) -> dict[str, Any]:
    """All that the rows depend on, as JSON values: flags, what the model's folder records, digests of the histories and
    of the names, sizes and times of the files of the models and of the prompt template, and the date of today, which
    chat prompts may show."""
    flags = {name: value for name, value in asdict(config).items() if name not in _APART}
    files = {name: _files_digest(path) for name, path in _read_paths(config, prompts).items()}
    asked = asdict(prompts) | {"max_response_tokens": sampling.max_new_tokens}
    return flags | asked | files | {"histories": survey.digest, "prompt_date": date.today().isoformat()}


def predict_file(
    predictor: Predictor, histories: Iterable[History], sampling: Sampling, config: PredictConfig,
    partial: PartialOutput, total_histories: int,
) -> None:  # fmt: skip
    """Answer what `partial` lacks of `histories`, then write `config.output`, which appears once it is whole.

    Raises `InputError` when there are other histories than were counted before.
    """
    total = total_histories * sampling.samples
    if partial.rows:
        print(f"going on after {partial.rows} of {total} responses ({partial.path})", flush=True)
    with progress(total=total, initial=partial.rows, desc="predictions", unit="response") as bar:
        for rows in _answers(predictor, histories, sampling, config, partial.rows, bar.update):
            partial.append(rows)
    predictor.tell_unseen_words()
    if partial.rows != total:
        raise InputError(f"{config.history}: changed while it was read; delete {partial.path} and run again")
    short = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal short
        for row in partial.read():
            short += len(row["queries"]) < predictor.prompts.num_queries
            yield row

    count = write_jsonl(config.output, counted())
    partial.remove()
    print(f"predictions: {config.output} ({count} lines, {short} of them with fewer than k queries)")


def output_rows(
    histories: Sequence[History], predictions: Sequence[Prediction], samples: int
) -> Iterator[dict[str, Any]]:
    """The lines of the output: `samples` a history, numbered where there are several."""
    for place, prediction in enumerate(predictions):
        history, number = histories[place // samples], place % samples
        numbered = {"sample": number} if samples > 1 else {}
        yield {"id": history.id, "user_id": history.user_id, **numbered, **prediction.to_dict()}


def _answers(
    predictor: Predictor, histories: Iterable[History], sampling: Sampling, config: PredictConfig, answered: int,
    count_ended: CountEnded,
) -> Iterator[list[dict[str, Any]]]:  # fmt: skip
    """The rows of each part after the first `answered` rows."""
    generator = torch.Generator().manual_seed(sampling.seed)
    rest, size = iter(histories), part_histories(config)
    while part := list(islice(rest, size)):
        # Drawn for what is answered too: a row's random numbers are those of its place in the whole file.
        uniforms = uniform_table(sampling, len(part), generator)
        answered -= len(uniforms)
        if answered < 0:
            predictions = predictor.predict(
                [history.events for history in part], sampling, rows=config.batch_size,
                reward_rows=config.reward_batch_size, uniforms=uniforms, count_ended=count_ended,
            )  # fmt: skip
            yield list(output_rows(part, predictions, sampling.samples))


def _read_paths(config: PredictConfig, prompts: PromptSettings) -> dict[str, str]:
    paths = {"model": config.model, "reward": config.reward, "prompt_template": prompts.prompt_template}
    return {f"{name} files": path for name, path in paths.items() if path and Path(path).exists()}


def _files_digest(path: str) -> str:
    """Of the name, size and time of change of a file, or of each file of a folder."""
    files = sorted(Path(path).iterdir()) if Path(path).is_dir() else [Path(path)]
    return digest(*(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files))
