"""Reward models whose histories attend to themselves alone, so that a history is read once for all its responses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.config import ModelOptions
from common.files import read_json
from common.models.layouts import visible
from common.models.loading import load_fast_tokenizer
from common.models.reward_encoder import RewardEncoder
from common.models.token_reward import (
    SETTINGS_NAME,
    TokenRewardModel,
    load_token_reward_model,
    load_token_reward_scorer,
    save_token_reward_model,
    takes_prefix_attention,
    token_classifier_skeleton,
)
from tests.models.reward_fixtures import EAGER, HISTORY, INPUTS, SDPA, tiny

PREFIX = replace(INPUTS, prefix_attention=True)
HISTORIES = [HISTORY, HISTORY[:1], HISTORY, HISTORY, HISTORY[:1]]
RESPONSES = ["best running shoes\ncaf\u00e9", "red shoes", "shoes shoes shoes", "", "best running shoes"]
DECODERS = ("llama", "gpt2")


@pytest.fixture(scope="module", params=["bert", *DECODERS])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    model, tokenizer = tiny(request.param)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def scorer_of(folder: Path, options: ModelOptions) -> TokenRewardModel:
    torch.manual_seed(1)
    both_ways = not folder.name.startswith("bert")
    model = load_token_reward_model(str(folder), options, bidirectional=both_ways).eval()
    return TokenRewardModel(model, RewardEncoder(load_fast_tokenizer(str(folder)), PREFIX, model))


def test_a_mask_by_hand() -> None:
    """Two tokens of a history, two of a response, one of another, padding."""
    seen = visible(torch.tensor([[0, 0, 1, 1, 2, -1]]), causal=False)[0, 0].int()
    assert seen.tolist() == [
        [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]  # fmt: skip


@pytest.mark.parametrize("options", [SDPA, EAGER], ids=["sdpa", "eager"])
def test_histories_read_once_give_the_same_scores(folder: Path, options: ModelOptions) -> None:
    scorer = scorer_of(folder, options)
    plain = scorer.score(HISTORIES, RESPONSES)
    alone = [scorer.score([history], [response]) for history, response in zip(HISTORIES, RESPONSES, strict=True)]
    scorer.shares_prompts = True
    shared = scorer.score(HISTORIES, RESPONSES)
    for number, words in enumerate(plain.words):
        assert shared.words[number] == pytest.approx(words, abs=1e-5)
        assert alone[number].words[0] == pytest.approx(words, abs=1e-5)
        assert shared.queries[number] == pytest.approx(plain.queries[number], abs=1e-5)
    assert shared.missing == plain.missing == 0


@torch.no_grad()
def test_a_history_does_not_see_the_response_and_a_word_sees_those_after_it(folder: Path) -> None:
    scorer = scorer_of(folder, SDPA)
    encoder, model = scorer.encoder, scorer.module
    first, other = (encoder.encode(HISTORY, response) for response in ("red shoes", "red boots"))
    begin = int(first.tokens.in_response.argmax())
    hidden = [
        model(**encoder.collate([item.tokens]), output_hidden_states=True).hidden_states[-1][0]
        for item in (first, other)
    ]
    assert torch.equal(hidden[0][:begin], hidden[1][:begin])
    # "red" is the same token in both, before a word that is not.
    assert (hidden[0][begin] - hidden[1][begin]).abs().max() > 1e-4


def test_a_saved_folder_remembers_how_it_reads(folder: Path, tmp_path: Path) -> None:
    scorer = scorer_of(folder, SDPA)
    save_token_reward_model(tmp_path / "model", scorer.module, scorer.encoder.tokenizer, PREFIX, {})
    assert read_json(tmp_path / "model" / SETTINGS_NAME)["inputs"]["prefix_attention"] is True
    loaded = load_token_reward_scorer(str(tmp_path / "model"), SDPA)
    assert loaded.encoder.options == PREFIX
    expected = scorer.score(HISTORIES, RESPONSES)
    assert loaded.score(HISTORIES, RESPONSES).words == [pytest.approx(words, abs=1e-6) for words in expected.words]


def test_who_can_read_so(folder: Path) -> None:
    skeleton = token_classifier_skeleton(str(folder), SDPA)
    assert takes_prefix_attention(skeleton, "sdpa") and takes_prefix_attention(skeleton, "eager")
    assert not takes_prefix_attention(skeleton, "flash_attention_2")


@pytest.mark.parametrize("kind", ["roberta", "longformer", "mistral"])
def test_who_cannot(kind: str, tmp_path: Path) -> None:
    """RoBERTa counts positions from its padding id on, Longformer has a window of its own, and so has Mistral here."""
    model, _ = tiny(kind)
    if kind == "mistral":
        model.config.sliding_window = 8
    model.save_pretrained(tmp_path)
    assert not takes_prefix_attention(token_classifier_skeleton(str(tmp_path), SDPA), "sdpa")
