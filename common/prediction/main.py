"""The prediction command (scripts/predict.py): a file of histories in one go, or a dialogue."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from common.config import parse_config
from common.data.prompt_settings import load_prompt_settings
from common.data.records import Event
from common.files import write_jsonl
from common.generation.sampling import Sampling
from common.prediction.config import PredictConfig, check_config, sampling_options
from common.prediction.dialogue import run_dialogue
from common.prediction.histories import History, read_histories
from common.prediction.predictor import Prediction, Predictor, load_predictor
from common.prediction.terminal import may_colour


def main() -> None:
    """Read, load, predict, write."""
    config = parse_config(PredictConfig)
    check_config(config)
    histories = read_histories(config.history, config.log_format, config.max_bad_lines) if config.history else []
    settings = load_prompt_settings(
        config.model, config.prompt_template, config.num_queries, config.max_prompt_tokens
    )
    sampling = sampling_options(config)
    predictor = load_predictor(config.model, settings, sampling.max_new_tokens, config.reward, config)
    if config.history:
        try:
            predict_file(predictor, histories, sampling, config)
        except KeyboardInterrupt:
            print(f"stopped; {config.output} was not written", file=sys.stderr)
            raise SystemExit(130) from None
    else:
        hold_dialogue(predictor, sampling, config)


def predict_file(
    predictor: Predictor, histories: Sequence[History], sampling: Sampling, config: PredictConfig
) -> None:
    """Write the predictions for `histories` to `config.output`, which appears once it is whole."""
    predictions = predictor.predict(
        [history.events for history in histories], sampling, rows=config.batch_size,
        reward_rows=config.reward_batch_size, progress=True,
    )  # fmt: skip
    count = write_jsonl(config.output, output_rows(histories, predictions, sampling.samples))
    short = sum(len(prediction.queries) < predictor.prompts.num_queries for prediction in predictions)
    print(f"predictions: {config.output} ({count} lines, {short} of them with fewer than k queries)")


def output_rows(
    histories: Sequence[History], predictions: Sequence[Prediction], samples: int
) -> Iterator[dict[str, Any]]:
    """The lines of the output: `samples` a history, numbered where there are several."""
    for place, prediction in enumerate(predictions):
        history, number = histories[place // samples], place % samples
        numbered = {"sample": number} if samples > 1 else {}
        yield {"id": history.id, "user_id": history.user_id, **numbered, **prediction.to_dict()}


def hold_dialogue(predictor: Predictor, sampling: Sampling, config: PredictConfig) -> None:
    """Ask at the terminal; each turn has random numbers of its own."""

    def predict(history: list[Event], turn: int) -> list[Prediction]:
        drawn = replace(sampling, seed=sampling.seed + turn)
        return predictor.predict([history], drawn, rows=config.batch_size, reward_rows=config.reward_batch_size)

    sys.stdin.reconfigure(errors="replace")  # a byte that is no text must not end the dialogue
    prompts_shown = sys.stdin.isatty()
    run_dialogue(
        predict, predictor.prompts.num_queries, ask=lambda prompt: input(prompt if prompts_shown else ""),
        colour=may_colour(sys.stdout),
    )  # fmt: skip
