"""DPO: the loss against hand numbers, the choice of pairs, and a run of the command on tiny models."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from baselines.dpo import main as dpo
from baselines.dpo.loss import dpo_loss
from baselines.dpo.pairs import PairCollator, build_pairs, response_score
from baselines.dpo.trainer import sequence_logprobs
from common.config import ModelOptions
from common.data.prompts import PromptBuilder
from common.errors import InputError
from common.feedback.annotator import Annotation
from common.feedback.labels import label_row
from common.files import write_jsonl
from common.models.loading import load_causal_lm
from common.models.sequences import SequenceBatch
from common.tracking import read_metrics
from tests.distributed.ranks import run_on_ranks
from tests.tiny_models import ordinary_tokenizer, tiny_llama

HISTORY = [{"type": "search", "query": "red shoes"}]


def test_loss_by_hand() -> None:
    # Log-ratios: chosen -1 - (-2) = 1, rejected -3 - (-2.5) = -0.5; margin 0.1 * 1.5 = 0.15.
    result = dpo_loss(*(torch.tensor([value]) for value in (-1.0, -3.0, -2.0, -2.5)), beta=0.1)
    assert result.margins.item() == pytest.approx(0.15)
    assert result.losses.item() == pytest.approx(math.log(1 + math.exp(-0.15)), rel=1e-6)


def test_gradient_is_that_of_the_paper() -> None:
    """`-beta sigmoid(-margin)` on the chosen log-prob and its opposite on the rejected one (equation 7)."""
    chosen, rejected = (torch.tensor([value], requires_grad=True) for value in (-1.0, -3.0))
    result = dpo_loss(chosen, rejected, torch.tensor([-2.0]), torch.tensor([-2.5]), beta=0.1)
    result.losses.sum().backward()
    weight = 0.1 / (1 + math.exp(0.15))
    assert chosen.grad.item() == pytest.approx(-weight, rel=1e-6)
    assert rejected.grad.item() == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize(
    ("response", "scores", "finished", "expected"),
    [
        ("a\nb", [2, 0], True, 1 - 1),
        ("a\nb", [2, 1], True, 1 + 0),
        ("a\nA!", [2, 2], True, 1 - 1),  # the second repeats the first
        ("a\nb\nc", [2, 2, 2], True, 1 + 1 - 1),  # one too many
        ("a", [2], False, 1 - 1 - 1),  # one missing, no end
        ("\na", [0, 2], True, -1 + 1),  # an empty line
    ],
)
def test_response_score_by_hand(response: str, scores: list[int], finished: bool, expected: float) -> None:
    assert response_score(response, scores, finished, num_queries=2) == expected


def _sample(example: str, number: int, response: str, origin: str = "sample", split: str = "train") -> dict:
    return {
        "id": f"{example}#{number}", "example_id": example, "user_id": example, "group": example, "split": split,
        "origin": origin, "history": HISTORY, "targets": ["x"], "response": response, "finished": True,
    }  # fmt: skip


def _annotation(scores: list[int]) -> Annotation:
    return Annotation(tuple((score,) for score in scores), tuple(scores))


LABELLED = [
    (_sample("u", 0, "hats\nshoes"), _annotation([0, 2])),
    (_sample("u", 1, "boots\nshoes"), _annotation([2, 2])),
    (_sample("u", 2, "hats\nties"), _annotation([0, 0])),
    (_sample("u", 3, "gold\nshoes", origin="gold"), _annotation([2, 2])),
    (_sample("v", 0, "hats\nties"), _annotation([1, 1])),
    (_sample("v", 1, "boots\nties"), _annotation([1, 1])),
    (_sample("w", 0, "boots\nties", split="dev"), _annotation([1, 1])),
    (_sample("w", 1, "boots\nhats", split="dev"), _annotation([1, 0])),
]


def _builder() -> PromptBuilder:
    return PromptBuilder(ordinary_tokenizer(), "compact", 32, 2)


def test_pairs_are_best_against_worst_sample_and_ties_make_none() -> None:
    builder = _builder()
    (pair,) = build_pairs(LABELLED, builder, "train")
    decode = builder.tokenizer.decode
    assert decode(pair["chosen"], skip_special_tokens=True) == "boots\nshoes"
    assert decode(pair["rejected"], skip_special_tokens=True) == "hats\nties"
    assert pair["chosen"][-1] == pair["rejected"][-1] == builder.tokenizer.eos_token_id


def test_no_pair_is_an_error() -> None:
    with pytest.raises(InputError, match="no pair of differently scored samples in the split 'dev'"):
        build_pairs(LABELLED[:6], _builder(), "dev")


def test_sequence_logprobs_equal_the_unpadded_ones() -> None:
    builder, model = _builder(), tiny_llama().eval()
    pairs = build_pairs(LABELLED, builder, "train") + build_pairs(LABELLED, builder, "dev")
    inputs = PairCollator(builder.tokenizer.pad_token_id)(pairs)
    batch = SequenceBatch(*(inputs[name] for name in SequenceBatch._fields))
    with torch.no_grad():
        together = sequence_logprobs(model, model, batch, 0.7).tolist()
        for place, (pair, side) in enumerate((pair, side) for side in ("chosen", "rejected") for pair in pairs):
            ids = torch.tensor([pair["prompt"] + pair[side]])
            logprobs = (model(ids).logits / 0.7).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).squeeze(1)
            # fp32 over another batch shape: errors of 1e-6 a token on sums of some ten of them
            assert together[place] == pytest.approx(logprobs[len(pair["prompt"]) - 1 :].sum().item(), abs=1e-4)


def _main(rank: int, world_size: int, argv: list[str]) -> None:
    try:
        with mock.patch.object(sys, "argv", ["dpo", *argv]):
            dpo.main()
    finally:
        unset_hf_deepspeed_config()  # other tests share these processes


@pytest.mark.distributed
def test_the_command_learns_its_pairs(tmp_path: Path) -> None:
    """On two ranks under ZeRO-3 the margin of the trained model over the reference becomes positive for every pair."""
    tiny_llama(attention_dropout=0.5).save_pretrained(tmp_path / "sft")
    ordinary_tokenizer().save_pretrained(tmp_path / "sft")
    samples = [sample for sample, _ in LABELLED]
    write_jsonl(tmp_path / "samples.jsonl", samples)
    labels = []
    for sample, annotation in LABELLED:
        words = tuple((score,) * 1 for score in annotation.query_scores)
        labels.append(label_row(sample, "hand", Annotation(words, annotation.query_scores)))
    write_jsonl(tmp_path / "labels.jsonl", labels)
    flags = {
        "model_name_or_path": tmp_path / "sft", "samples": tmp_path / "samples.jsonl",
        "labels": tmp_path / "labels.jsonl", "output_dir": tmp_path / "dpo", "prompt_template": "compact",
        "num_queries": 2, "max_prompt_tokens": 32, "zero_stage": 3, "per_device_train_batch_size": 1,
        "learning_rate": 1e-3, "num_train_epochs": 10, "warmup_ratio": 0, "tensorboard": "false",
        "logging_steps": 1,
    }  # fmt: skip
    argv = [str(part) for key, value in flags.items() for part in (f"--{key}", value)]
    run_on_ranks(_main, 2, argv)
    # Before the first update policy and reference are one, also in a model that has dropout.
    assert read_metrics(tmp_path / "dpo" / "metrics.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    builder = _builder()
    pairs = build_pairs(LABELLED, builder, "train")
    inputs = PairCollator(builder.tokenizer.pad_token_id)(pairs)
    batch = SequenceBatch(*(inputs[name] for name in SequenceBatch._fields))
    ratios = []
    for folder in ("sft", "dpo/model"):
        model = load_causal_lm(str(tmp_path / folder), ModelOptions()).eval()
        with torch.no_grad():
            ratios.append(sequence_logprobs(model, model, batch, 1.0))
    chosen, rejected = (ratios[1] - ratios[0]).chunk(2)
    assert (chosen > rejected).all()
