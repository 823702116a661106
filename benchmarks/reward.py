"""A step of the token reward model's training against transformers' own Trainer on the same tokens.

    python benchmarks/reward.py                about 5 minutes on two cores

Both train all weights of a BERT of all-MiniLM-L6's shape in fp32, on 16 labelled responses a step. transformers'
Trainer with AutoModelForTokenClassification has a cross-entropy over the response's tokens. Ours also has class
weights, a global loss over queries, and denominators over the whole optimizer step.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import BertConfig, BertForTokenClassification, BertTokenizerFast

from benchmarks.measuring import median_ratio, on_ranks, peer, read_switches, save
from benchmarks.peers import StepClock, peak_memory
from common.data.simulator import SimulatorConfig, simulate
from common.engine.training_arguments import training_arguments
from common.errors import run_command
from common.files import write_jsonl
from common.models.loading import load_fast_tokenizer
from common.models.reward_encoder import RewardEncoder
from common.models.reward_options import RewardInputOptions
from common.models.token_reward import load_token_reward_model
from common.text import split_queries, split_words
from step2_token_reward.config import Step2Config
from step2_token_reward.dataset import LabelledResponse, RewardCollator
from step2_token_reward.trainer import RewardTrainer

RUNS, STEPS, WARMUP = 5, 4, 1
CORES = 2
BATCH = 16
INPUTS = RewardInputOptions("compact", 3, max_prompt_tokens=192, max_response_tokens=48)


def main() -> None:
    """Alternate runs of both, then save the ratio."""
    read_switches(__doc__)
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trainer": []}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for run in range(RUNS):
            runs["ours"].append(on_ranks(our_steps, 1, folder, f"run{run}"))
            runs["trainer"].append(peer("benchmarks/trainer_reward.py", Path(folder), STEPS + WARMUP, BATCH, CORES))
            shown = (f"{name} {statistics.median(of[-1]['seconds'][WARMUP:]):.2f} s" for name, of in runs.items())
            print(f"run {run}, a step:", *shown, flush=True)
    seconds = {name: [statistics.median(row["seconds"][WARMUP:]) for row in of] for name, of in runs.items()}
    peaks = {name: [row["peak_mib"] for row in of] for name, of in runs.items()}
    save("reward", {
        "ratios": {
            "trainer_seconds_over_ours": median_ratio(seconds["trainer"], seconds["ours"]),
            "our_peak_over_trainer": median_ratio(peaks["ours"], peaks["trainer"]),
        },
        "shape": {"batch": BATCH} | asdict(INPUTS),
        "runs": runs,
    })  # fmt: skip


def prepare(folder: Path) -> None:
    """A random encoder with a WordPiece vocabulary of the log's words, and the token ids and labels of every step."""
    users = list(simulate(SimulatorConfig(num_users=200, min_history=40, max_history=44)))
    words = sorted({word for user in users for event in user.record.events for word in event.text.lower().split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = BertTokenizerFast(vocab_file=str(folder / "vocab.txt"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30_522, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12,
        num_labels=3,
    )  # fmt: skip
    model = BertForTokenClassification(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = labelled(RewardEncoder(tokenizer, INPUTS, model))
    plain = [
        {
            "input_ids": item.encoded.tokens.input_ids.tolist(),
            "token_type_ids": item.encoded.tokens.token_types.tolist(),
            "labels": item.labels,
        }
        for item in rows
    ]
    write_jsonl(folder / "rows.jsonl", plain)


def labelled(encoder: RewardEncoder) -> list[LabelledResponse]:
    """The responses of every step, of words of the log, with random labels."""
    users = list(simulate(SimulatorConfig(num_users=200, min_history=40, max_history=44)))
    draw, found = random.Random(0), []
    for number in range(BATCH * (STEPS + WARMUP)):
        events = users[number % len(users)].record.events
        words = [word for event in events for word in event.text.split()]
        response = "\n".join(" ".join(draw.sample(words, draw.randint(2, 5))) for _ in range(3))
        word_labels = [draw.randrange(3) for _ in split_words(response)]
        query_scores = [draw.random() for _ in split_queries(response)]
        found.append(LabelledResponse(encoder.encode(events, response), word_labels, query_scores))
    return found


def our_steps(folder: str, run: str) -> dict[str, Any]:
    """Seconds of each step of step 2's training, and the most memory that it held."""
    torch.set_num_threads(CORES)
    config = Step2Config(
        model_name_or_path=f"{folder}/model", samples="-", labels="-", output_dir=f"{folder}/{run}", dtype="fp32",
        zero_stage=0, per_device_train_batch_size=BATCH, max_steps=STEPS + WARMUP, learning_rate=1e-5, save_steps=1000,
        eval_steps=1000, tensorboard=False,
    )  # fmt: skip
    args = training_arguments(config)
    args.save_strategy = args.eval_strategy = "no"
    model = load_token_reward_model(config.model_name_or_path, config)
    encoder = RewardEncoder(load_fast_tokenizer(config.model_name_or_path, False), INPUTS, model)
    items = labelled(encoder)
    clock = StepClock()
    trainer = RewardTrainer(
        model=model,
        args=args,
        train_dataset=[item.row(number) for number, item in enumerate(items)],
        held_out=items[:1],
        data_collator=RewardCollator(encoder),
        callbacks=[clock],
        w=0.5,
        class_weights=[1.0, 1.0, 1.0],
    )
    trainer.train()
    return {"seconds": clock.seconds, "peak_mib": round(peak_memory() / 2**20)}


if __name__ == "__main__":
    run_command(main)
