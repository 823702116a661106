"""Sample responses from the SFT model: what the annotator will label and the reward model will learn from.

    deepspeed --num_gpus 8 step2_token_reward/sample.py --model_name_or_path outputs/my_run/step1_sft/model \\
        --data_dir outputs/my_run/data --output_dir outputs/my_run/step2_token_reward/samples

The examples are cut into parts; ranks take turns, and each part is written as soon as it is done. A run that was killed
goes on with the parts that are missing (--resume), which the ranks share anew. The responses do not depend on the
number of ranks.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from common.config import ModelOptions, option, parse_config
from common.data.examples import load_examples
from common.data.prompts import PromptBuilder
from common.data.records import Example
from common.engine import distributed
from common.errors import InputError, run_rank_command
from common.files import claim_output_dir, read_jsonl, write_jsonl
from common.generation.decode import CountEnded, check_decodable
from common.generation.generate import Generated, generate_responses
from common.generation.sampling import Sampling
from common.models.loading import causal_lm_skeleton, check_lengths, check_vocabulary, load_causal_lm, load_tokenizer
from common.progress import progress
from step2_token_reward.corruptions import corrupt

SPLITS = ("train", "dev")
BATCHES_PER_PART = 4  # rows that end make way for others, but only within a part


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
    seed: int = option(0, "Seed of the choice of examples, the responses and the corruptions.")
    prompt_template: str = option("plain", "The template of step 1.", group="prompts and responses")
    num_queries: int = option(3, "Queries a response, as in step 1.")
    max_prompt_tokens: int = option(512, "Token budget of a prompt, as in step 1.")
    max_response_tokens: int = option(64, "A response is cut off here; it then counts as not finished.")
    samples_per_prompt: int = option(1, "Sampled responses an example.", group="what is sampled")
    temperature: float = option(1.0, "1 samples the model itself, which is what step 3 will see.")
    gold: bool = option(True, "Also write the true next queries, as a response of origin 'gold'.")
    corrupt_share: float = option(
        0.0, "Share of examples with one more response, a sampled one made worse: words repeated, swapped, or a line."
    )
    max_train_examples: int = option(0, "Take this many train examples, drawn at random; 0 takes all.")
    max_dev_examples: int = option(0, "Take this many dev examples, drawn at random; 0 takes all.")
    batch_size: int = option(32, "Responses a rank decodes at once.")


def main() -> None:
    """Write `<output_dir>/samples.jsonl`."""
    config = parse_config(SampleConfig)
    check_config(config)
    device = distributed.start()
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code, config.pad_token)
    skeleton = causal_lm_skeleton(config.model_name_or_path, config)
    check_decodable(skeleton)
    check_lengths(skeleton.config, config.max_prompt_tokens + config.max_response_tokens)
    builder = PromptBuilder(tokenizer, config.prompt_template, config.max_prompt_tokens, config.num_queries)
    parts = cut_into_parts(choose_examples(config), config.batch_size)
    distributed.on_main_first(lambda: claim(config))
    output = Path(config.output_dir) / "samples.jsonl"
    if output.exists():
        distributed.on_main_first(lambda: print(f"{output} is complete already", flush=True))
        return

    model = load_causal_lm(config.model_name_or_path, config).to(device)
    check_vocabulary(model, tokenizer)
    mine = missing_parts(output, len(parts))[distributed.rank() :: distributed.world_size()]
    total = sum(len(parts[number]) for number in mine) * config.samples_per_prompt
    with progress(total=total, desc="sampling", unit="response") as bar:
        for number in mine:
            rows = sample_part(parts[number], number, model, builder, config, bar.update)
            write_jsonl(part_path(output, number), rows)
    distributed.barrier()
    distributed.on_main_first(lambda: merge(output, len(parts)))


def check_config(config: SampleConfig) -> None:
    """Raise `InputError` for settings that cannot work, before anything is loaded."""
    for name in ("model_name_or_path", "data_dir", "output_dir"):
        if not getattr(config, name):
            raise InputError(f"--{name} is missing")
    for name in ("num_queries", "max_prompt_tokens", "max_response_tokens", "batch_size", "samples_per_prompt"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name} must be 1 or more, not {getattr(config, name)}")
    if config.temperature <= 0:
        raise InputError(f"--temperature must be above 0, not {config.temperature}: samples are to differ")
    if not 0 <= config.corrupt_share <= 1:
        raise InputError(f"--corrupt_share is a share of the examples, 0 to 1, not {config.corrupt_share}")


def choose_examples(config: SampleConfig) -> list[Example]:
    """The train and dev examples to sample for, in the order of their files."""
    chosen: list[Example] = []
    for split, limit in zip(SPLITS, (config.max_train_examples, config.max_dev_examples), strict=True):
        examples = load_examples(config.data_dir, split)
        if 0 < limit < len(examples):
            places = random.Random(f"{config.seed} {split}").sample(range(len(examples)), limit)
            examples = [examples[place] for place in sorted(places)]
        chosen += examples
    return chosen


def cut_into_parts(examples: Sequence[Example], batch_size: int) -> list[Sequence[Example]]:
    """Consecutive parts of `BATCHES_PER_PART` batches; the last may be shorter.

    Examples that one part would hold make parts of one batch, so that several ranks share them. The size must not
    depend on the number of ranks: a part's number seeds its responses.
    """
    size = batch_size * BATCHES_PER_PART
    if len(examples) <= size:
        size = batch_size
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def claim(config: SampleConfig) -> None:
    """Make `output_dir` this run's folder (rank 0 only)."""
    claim_output_dir(
        config.output_dir, asdict(config), resume=config.resume, overwrite=config.overwrite,
        may_differ=frozenset({"resume", "overwrite"}),
    )  # fmt: skip


def part_path(output: Path, number: int) -> Path:
    """Where the rows of a part go until all parts are there."""
    return output.parent / "parts" / f"{number:06d}.jsonl"


def missing_parts(output: Path, count: int) -> list[int]:
    """The numbers of the parts that are not written yet; the same list on every rank. Call on all ranks."""
    missing = [number for number in range(count) if not part_path(output, number).exists()]
    return distributed.gather_from_ranks(missing)[0]  # one rank's view: others may look when a part has been written


def sample_part(
    examples: Sequence[Example],
    number: int,
    model: PreTrainedModel,
    builder: PromptBuilder,
    config: SampleConfig,
    count_ended: CountEnded,
) -> list[dict[str, Any]]:
    """The rows of one part, example by example: gold, samples, corrupted."""
    # Every part has its own seed, so that neither the number of ranks nor a restart changes what is drawn.
    seed = config.seed * 1_000_003 + number
    rng = random.Random(seed)
    sampling = Sampling(
        config.max_response_tokens, config.temperature, samples=config.samples_per_prompt, seed=seed
    )
    prompts = [builder.ids(example.history) for example in examples]
    responses = generate_responses(model, builder.tokenizer, prompts, sampling, config.batch_size, count_ended)
    rows = []
    for place, example in enumerate(examples):
        own = responses[place * config.samples_per_prompt : (place + 1) * config.samples_per_prompt]
        if config.gold:
            rows.append(sample_row(example, "gold", "gold", builder.response_text(example.targets), True))
        for count, response in enumerate(own):
            rows.append(sample_row(example, str(count), "sample", response.text, response.finished))
        if rng.random() < config.corrupt_share:
            source = rng.choice(own)
            worse = corrupt(source.text, foreign_response(example, examples, responses, rng), rng)
            rows.append(sample_row(example, "corrupted", "corrupted", worse, source.finished))
    return rows


def foreign_response(
    example: Example, examples: Sequence[Example], responses: Sequence[Generated], rng: random.Random
) -> str:
    """A response to another user's history in the same part; empty when there is no other user."""
    each = len(responses) // len(examples)
    others = [place for place, other in enumerate(examples) if other.user_id != example.user_id]
    return responses[rng.choice(others) * each + rng.randrange(each)].text if others else ""


def sample_row(example: Example, suffix: str, origin: str, response: str, finished: bool) -> dict[str, Any]:
    """One line of samples.jsonl (docs/data_formats.md)."""
    row = example.to_dict()
    return {
        "id": f"{example.id}#{suffix}",
        "example_id": example.id,
        **{key: row[key] for key in ("user_id", "group", "split")},
        "origin": origin,
        "history": row["history"],
        "targets": row["targets"],
        "response": response,
        "finished": finished,
    }


def merge(output: Path, count: int) -> None:
    """Join the parts into `output`, which appears once it is whole, and say where it lies (rank 0 only)."""
    written = write_jsonl(output, (row for number in range(count) for _, row in read_jsonl(part_path(output, number))))
    shutil.rmtree(output.parent / "parts")
    print(
        f"samples: {output} ({written} responses)\n"
        f"next:    python -m step2_token_reward.label --samples {output} --labels {output.parent.parent}/labels.jsonl",
        flush=True,
    )


if __name__ == "__main__":
    run_rank_command(main)
