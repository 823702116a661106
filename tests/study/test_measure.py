"""Controls, KL and the measures of a record, on a tiny model and by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from common.data.records import Event, Example
from common.evaluation.metrics import word_habits
from common.files import read_json, write_jsonl
from common.models.sequences import pad_sequences
from study import measure
from study.controls import copy_last, popularity, user_frequent
from study.measure import relevance_by_length, sequence_kl
from tests.tiny_models import ordinary_tokenizer, tiny_llama


def _example(user: str, queries: list[str], targets: tuple[str, ...] = ("red hats", "blue hats")) -> Example:
    history = tuple(Event("search", query=query, ts=float(place)) for place, query in enumerate(queries))
    return Example(
        id=f"{user}@0", user_id=user, group=user, source="test", split="test", history=history, targets=targets
    )


def test_controls_by_hand() -> None:
    example = _example("u", ["Shoes", "red hats", "shoes", "blue ties", "", "red hats"])
    assert copy_last(2)(example) == ["red hats", "blue ties"]
    assert user_frequent(2)(example) == ["red hats", "shoes"]
    others = [_example("v", ["shoes", "shoes"], ("ties",)), _example("w", ["ties", "shoes"], ("caps",))]
    # One vote a user: shoes and ties two each, caps one; of equals the first by name.
    assert popularity(2, others)(example) == ["shoes", "ties"]


def test_kl_is_zero_to_itself_and_the_log_ratio_otherwise() -> None:
    model, other = tiny_llama().eval(), tiny_llama().eval()
    with torch.no_grad():
        other.lm_head.weight.mul_(0.5)
    prompts, responses = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13]]
    batches = [pad_sequences(prompts, responses, 0, torch.device("cpu"))]
    assert sequence_kl(model, model, batches, 0.7) == 0.0
    expected = 0.0
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt + response])
        rows = slice(len(prompt) - 1, -1)
        with torch.no_grad():
            own, reference = ((m(ids).logits[0, rows] / 0.7).log_softmax(-1) for m in (model, other))
        chosen = torch.tensor(response)[:, None]
        expected += float((own - reference).gather(1, chosen).sum())
    # fp32 log-probs of five tokens, padded together or alone: errors of 1e-6 each
    assert sequence_kl(model, other, batches, 0.7) == pytest.approx(expected / 2, abs=1e-5)


def test_habits_and_lengths_by_hand() -> None:
    responses = [["how to tie tie", "red shoes"], ["hats"]]
    habits = word_habits(responses, k=1)
    # First lines alone: how to tie tie, hats. One repeat and two function words in five.
    assert habits == {"repeated_word_rate": pytest.approx(1 / 5), "function_word_rate": pytest.approx(2 / 5)}
    assert relevance_by_length(responses, [[0, 2], [1]], k=2) == {"1": [1, 1], "2": [1, 1], "4": [1, 0]}


def test_the_command_measures_a_model_and_a_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    ordinary_tokenizer().save_pretrained(tmp_path / "model")
    examples = [_example("u", ["red shoes", "blue hats"]), _example("v", ["ties"])]
    for split in ("train", "dev", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", [example.to_dict() for example in examples])
    truth = [{"user_id": user, "interests": [], "words": {"blue": 2, "hats": 2}} for user in ("u", "v")]
    write_jsonl(tmp_path / "truth.jsonl", truth)
    common = ["--data_dir", str(tmp_path / "data"), "--truth", str(tmp_path / "truth.jsonl"), "--num_queries", "2"]

    def run(*flags: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["measure", *common, *flags, "--output", str(tmp_path / "record.json")])
        measure.main()
        return read_json(tmp_path / "record.json")

    control = run("--control", "copy_last")["decodings"]["greedy"]["simulated"]
    # u: blue hats is relevant, red shoes is not; v: ties is not, and the second line is missing.
    assert control["relevant"] == control["unique"] == [1, 0]
    assert control["means"]["relevance_rate"] == pytest.approx(1 / 4)
    assert control["means"]["copy_rate"] == 1.0
    assert control["recall"] == [0.5, 0.0]

    model = str(tmp_path / "model")
    record = run("--model", model, "--reference", model, "--max_response_tokens", "8")
    assert record["kl"] == 0.0
    assert set(record["decodings"]) == {"sampled", "greedy"}
    assert set(record["decodings"]["greedy"]) == {"simulated", "lexical"}
    assert len(record["decodings"]["sampled"]["simulated"]["relevant"]) == 2
    repeated = run("--model", model, "--reference", model, "--max_response_tokens", "8", "--samples", "3")
    assert len(repeated["decodings"]["sampled"]["simulated"]["relevant"]) == 6
    assert repeated["decodings"]["greedy"] == record["decodings"]["greedy"]
    assert repeated["examples"][1]["greedy"] == record["examples"][1]["greedy"]
    assert json.dumps(record) == json.dumps(run("--model", model, "--reference", model, "--max_response_tokens", "8"))
