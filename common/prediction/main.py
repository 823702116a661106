"""The prediction command (scripts/predict.py): a file of histories in one go, or a dialogue."""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import date

from common.config import parse_config
from common.data.prompt_settings import PromptSettings, load_prompt_settings
from common.data.records import Event
from common.generation.sampling import Sampling
from common.models.kernels import settle_dtype
from common.prediction.batch import open_partial, predict_file
from common.prediction.config import PredictConfig, check_config, sampling_options
from common.prediction.dialogue import run_dialogue
from common.prediction.histories import read_histories, survey_histories
from common.prediction.predictor import Prediction, Predictor, load_predictor
from common.prediction.terminal import colour_depth
from common.progress import phase_progress


def main() -> None:
    """Read, load, predict, write."""
    config = settle_dtype(parse_config(PredictConfig))
    check_config(config)
    settings = load_prompt_settings(
        config.model, config.prompt_template, config.num_queries, config.max_prompt_tokens
    )
    sampling = sampling_options(config)
    if config.history:
        answer_file(config, settings, sampling)
    else:
        hold_dialogue(_load(config, settings, sampling), sampling, config)


def answer_file(config: PredictConfig, settings: PromptSettings, sampling: Sampling) -> None:
    """Predict for `config.history`, going on with what an earlier run left; everything is checked before any weight is
    read."""
    source = (config.history, config.log_format, config.max_bad_lines)
    counted = phase_progress(read_histories(*source), desc="counting histories", unit="history")
    survey = survey_histories(counted)
    with open_partial(config, settings, sampling, survey) as partial:
        # The day on which the answers began: no two of them may show other dates.
        predictor = _load(config, settings, sampling, date.fromisoformat(partial.settings["prompt_date"]))
        try:
            predict_file(predictor, read_histories(*source), sampling, config, partial, survey.count)
        except KeyboardInterrupt:
            kept = f"the same command goes on after {partial.rows} responses" if partial.rows else "nothing is kept"
            print(f"stopped; {config.output} was not written, {kept}", file=sys.stderr)
            raise SystemExit(130) from None


def hold_dialogue(predictor: Predictor, sampling: Sampling, config: PredictConfig) -> None:
    """Ask at the terminal; each turn has random numbers of its own."""

    def predict(history: list[Event], turn: int) -> list[Prediction]:
        drawn = replace(sampling, seed=sampling.seed + turn)
        made = predictor.predict([history], drawn, rows=config.batch_size, reward_rows=config.reward_batch_size)
        predictor.tell_unseen_words()
        return made

    sys.stdin.reconfigure(errors="replace")  # a byte that is no text must not end the dialogue
    prompts_shown = sys.stdin.isatty()
    run_dialogue(
        predict, predictor.prompts.num_queries, ask=lambda prompt: input(prompt if prompts_shown else ""),
        depth=colour_depth(sys.stdout),
    )  # fmt: skip


def _load(
    config: PredictConfig, settings: PromptSettings, sampling: Sampling, today: date | None = None
) -> Predictor:
    return load_predictor(config.model, settings, sampling.max_new_tokens, config.reward, config, today)
