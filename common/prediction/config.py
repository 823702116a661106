"""Settings of the prediction command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig

from common.access import check_writable
from common.config import MAX_SEED, ModelOptions, check_numbers, option
from common.data.readers import AUTO, READERS
from common.errors import InputError
from common.generation.sampling import Sampling
from common.inputs import check_readable
from common.models.loading import check_attention


@dataclass
class PredictConfig(ModelOptions):
    """Write the next queries of users with a trained model: for a file of histories, or, without one, in a dialogue."""

    model: str = option("", "Model folder that steps 1 or 3 wrote (outputs/<run>/step3_tppo/model), or a hub name.")
    history: str = option(
        "", "Histories: a log in any format of docs/data_formats.md, or prepared examples. Empty: a dialogue."
    )
    output: str = option("", "JSON lines to write, one a history, or one a sample; a run that was stopped goes on.")
    overwrite: bool = option(False, "Replace output.")
    reward: str = option("", "Token reward model, step 2's model folder: scores each query, word and token.")
    log_format: str = option(AUTO, "Format of history; auto: by its name.", choices=[AUTO, *READERS])
    max_bad_lines: int = option(0, "Lines of history that may be skipped because they cannot be read.")

    temperature: float = option(0.0, "0 takes the likeliest tokens (greedy); 1 samples the model's own distribution.")
    top_p: float = option(1.0, "Sample from the likeliest tokens of this much mass; 1: from all.", above=0, maximum=1)
    samples: int = option(1, "Responses to each history; more than 1 need a temperature above 0.", minimum=1)
    max_response_tokens: int = option(0, "Longest response in tokens, EOS included; 0: as in the model's training.")
    seed: int = option(0, "Seed of what is sampled.", maximum=MAX_SEED)
    batch_size: int = option(64, "Responses decoded at once.", minimum=1)
    reward_batch_size: int = option(32, "Responses that the reward model scores at once.", minimum=1)

    num_queries: int = option(0, "k, queries a response; 0: as the model's folder records.")
    prompt_template: str = option("", "plain, compact, chat or a Jinja file; empty: as the model's folder records.")
    max_prompt_tokens: int = option(0, "Budget of a prompt in tokens; 0: as the model's folder records.")


def check_config(config: PredictConfig) -> None:
    """Raise `InputError` for settings that cannot work, before anything is read."""
    check_attention(config.attn_implementation, config.dtype)
    if not config.model:
        raise InputError("--model is missing: a model folder, such as outputs/<run>/step3_tppo/model")
    if bool(config.history) != bool(config.output):
        raise InputError("give --history and --output together, or neither for a dialogue")
    if config.output and Path(config.output).exists() and not config.overwrite:
        raise InputError(f"{config.output} exists; add --overwrite to replace it, or choose another --output")
    check_readable(config.history, config.model, config.reward)
    if config.output:
        check_writable(Path(config.output).parent, "choose another --output")
    check_numbers(config)
    if config.temperature == 0 and config.samples > 1:
        raise InputError("--samples: greedy responses are all alike; add --temperature 1, or keep 1 sample")
    if config.temperature == 0 and config.top_p < 1:
        raise InputError("--top_p: greedy decoding does not sample; add --temperature 1, or leave it out")


def sampling_options(config: PredictConfig) -> Sampling:
    """How responses are drawn. Raises `InputError` when neither a flag nor the model's folder says how long one is."""
    length = config.max_response_tokens or _recorded_length(config.model)
    return Sampling(length, config.temperature, config.top_p, config.samples, config.seed)


def _recorded_length(model: str) -> int:
    try:
        length = GenerationConfig.from_pretrained(model).max_new_tokens
    except OSError:  # a folder without a generation config
        length = None
    if not length:
        raise InputError(f"{model}: does not say how long a response may be; add --max_response_tokens, as in training")
    return length
