"""Settings of step 2's sampling."""

from __future__ import annotations

from dataclasses import dataclass

from common.config import HANG_TIMEOUT, MAX_SEED, ModelOptions, check_numbers, option
from common.errors import InputError


@dataclass
class SampleConfig(ModelOptions):
    """Step 2, first part: responses of the SFT model to the train and dev examples, gold targets among them."""

    model_name_or_path: str = option(
        "", "The SFT model: step 1's folder model/. Every rank holds it whole.", group="model and data",
    )
    pad_token: str = option("", "Pad token where the tokenizer has none: 'eos', or a token of its vocabulary.")
    data_dir: str = option("", "Folder with train.jsonl and dev.jsonl.")
    output_dir: str = option("", "Folder that gets samples.jsonl.")
    resume: bool = option(False, "Go on with the parts that a killed run left out.")
    overwrite: bool = option(False, "Replace the samples that output_dir holds.")
    seed: int = option(0, "Seed of the choice of examples, the responses and the corruptions.", maximum=MAX_SEED)
    prompt_template: str = option("plain", "The template of step 1.", group="prompts and responses")
    num_queries: int = option(3, "Queries a response, as in step 1.", minimum=1)
    max_prompt_tokens: int = option(512, "Token budget of a prompt, as in step 1.", minimum=1)
    max_response_tokens: int = option(64, "A response is cut off here; it then counts as not finished.", minimum=1)
    samples_per_prompt: int = option(1, "Sampled responses an example.", group="what is sampled", minimum=1)
    temperature: float = option(1.0, "1 samples the model itself, which is what step 3 will see.", above=0)
    gold: bool = option(True, "Also write the true next queries, as a response of origin 'gold'.")
    corrupt_share: float = option(
        0.0, "Share of examples with one more response, a sampled one made worse: words repeated, swapped, or a line.",
        maximum=1
    )
    max_train_examples: int = option(0, "Take this many train examples, drawn at random; 0 takes all.")
    max_dev_examples: int = option(0, "Take this many dev examples, drawn at random; 0 takes all.")
    batch_size: int = option(32, "Responses a rank decodes at once.", minimum=1)
    hang_timeout: float = option(
        HANG_TIMEOUT, "End the job when no response ends on a rank for so many seconds; 0: never."
    )


def check_config(config: SampleConfig) -> None:
    """Raise `InputError` for settings that cannot work, before anything is loaded."""
    for name in ("model_name_or_path", "data_dir", "output_dir"):
        if not getattr(config, name):
            raise InputError(f"--{name} is missing")
    check_numbers(config)
