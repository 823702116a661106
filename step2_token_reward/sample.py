"""Sample responses from the SFT model: what the annotator will label and the reward model will learn from.

    deepspeed --num_gpus 8 step2_token_reward/sample.py \\
        --config step2_token_reward/configs/recipe_sample.yaml step2_token_reward/configs/8x80gb_sample.yaml \\
        --model_name_or_path outputs/my_run/step1_sft/model \\
        --data_dir outputs/my_run/data --output_dir outputs/my_run/step2_token_reward/samples

The examples are cut into parts; ranks take turns, and each part is written as soon as it is done. A run that was killed
goes on with the parts that are missing (--resume), which the ranks share anew. The responses do not depend on the
number of ranks.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from common.config import parse_config
from common.data.examples import load_examples
from common.data.prompts import PromptBuilder
from common.data.records import Example
from common.engine import distributed
from common.engine.claim import claim_run
from common.engine.preemption import Preemption
from common.engine.run_date import date_record, run_date
from common.engine.watchdog import WAITING, Watchdog
from common.errors import Preempted, run_rank_command
from common.files import read_jsonl, write_jsonl
from common.generation.decode import CountEnded, check_decodable
from common.generation.generate import Generated, generate_responses
from common.generation.sampling import Sampling
from common.models.kernels import settle_dtype
from common.models.loading import causal_lm_skeleton, check_lengths, check_vocabulary, load_causal_lm, load_tokenizer
from common.progress import progress
from step2_token_reward.corruptions import corrupt
from step2_token_reward.sample_config import SampleConfig, check_config

SPLITS = ("train", "dev")
MAY_DIFFER = frozenset({"resume", "overwrite", "hang_timeout"})
BATCHES_PER_PART = 4  # rows that end make way for others, but only within a part


def main() -> None:
    """Write `<output_dir>/samples.jsonl`. Raises `Preempted` after a signal; complete parts are kept."""
    config = settle_dtype(parse_config(SampleConfig))
    check_config(config)
    device = distributed.start(config.hang_timeout)
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code, config.pad_token)
    skeleton = causal_lm_skeleton(config.model_name_or_path, config)
    check_decodable(skeleton)
    check_lengths(skeleton.config, config.max_prompt_tokens + config.max_response_tokens)
    first_day = run_date(config.output_dir, config.resume)
    builder = PromptBuilder(tokenizer, config.prompt_template, config.max_prompt_tokens, config.num_queries, first_day)
    parts = cut_into_parts(choose_examples(config), config.batch_size)
    distributed.on_main_first(lambda: claim_run(config, MAY_DIFFER, date_record(first_day)))
    output = Path(config.output_dir) / "samples.jsonl"
    if output.exists():
        distributed.on_main_first(lambda: print(f"{output} is complete already", flush=True))
        return

    model = load_causal_lm(config.model_name_or_path, config).to(device)
    check_vocabulary(model, tokenizer)
    mine = missing_parts(output, len(parts))[distributed.rank() :: distributed.world_size()]
    total = sum(len(parts[number]) for number in mine) * config.samples_per_prompt
    with (
        Watchdog(config.output_dir, config.hang_timeout) as watchdog,
        Preemption() as preemption,
        progress(total=total, desc="sampling", unit="response") as bar,
    ):
        for number in mine:

            def count_ended(count: int, part: int = number) -> None:
                if preemption.requested_here():
                    raise Preempted("the parts that were complete are saved")
                watchdog.phase("sampling", part)
                bar.update(count)

            watchdog.phase("sampling", number)
            rows = sample_part(parts[number], number, model, builder, config, count_ended)
            write_jsonl(part_path(output, number), rows)
        watchdog.phase(WAITING, len(parts))
        distributed.wait_for_all()
    distributed.on_main_first(lambda: merge(output, len(parts)))


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
