"""Predictions against the project's own generation and reward model, called one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from common.alignment import DecodedTokens, TokenDecoder
from common.config import ModelOptions
from common.data.prompt_settings import load_prompt_settings
from common.errors import InputError
from common.generation.generate import generate_responses
from common.generation.sampling import Sampling
from common.models.loading import load_causal_lm, load_tokenizer
from common.models.merging import merge
from common.models.token_reward import load_token_reward_scorer
from common.prediction.predictor import (
    Prediction,
    Predictor,
    first_queries,
    load_predictor,
    rewards_of_tokens,
    scored_prediction,
)
from common.text import split_queries, split_words
from step3_tppo.rewards import RewardOptions, token_rewards
from tests.prediction.models import HISTORIES, LEARNT, OTHERS, export_learnt_model
from tests.tiny_models import ordinary_tokenizer

GREEDY = Sampling(32, temperature=0.0)


@pytest.fixture(scope="module")
def predictor(model_folder: Path, reward_folder: Path) -> Predictor:
    return load_predictor(str(model_folder), load_prompt_settings(model_folder), 32, str(reward_folder), ModelOptions())


def predict(predictor: Predictor, sampling: Sampling, reward_rows: int = 2) -> list[Prediction]:
    return predictor.predict(HISTORIES, sampling, rows=2, reward_rows=reward_rows)


def test_greedy_queries_are_those_that_were_learnt(predictor: Predictor) -> None:
    predictions = predict(predictor, GREEDY)
    assert [prediction.queries for prediction in predictions] == LEARNT
    assert all(prediction.finished for prediction in predictions)


@pytest.mark.parametrize("merged_by", ["export", "command"])
def test_a_merged_lora_model_predicts_like_any_other(model_folder: Path, tmp_path: Path, merged_by: str) -> None:
    folder = export_learnt_model(tmp_path / "model", adapt=model_folder)
    if merged_by == "command":
        folder = merge(folder / "adapter", str(model_folder), tmp_path / "merged")
    predictor = load_predictor(str(folder), load_prompt_settings(folder), 32, "", ModelOptions())
    predictions = predict(predictor, GREEDY)
    assert predictions == [Prediction(queries, True) for queries in OTHERS]


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_responses_and_scores_are_those_of_the_models_called_directly(
    predictor: Predictor, model_folder: Path, reward_folder: Path, temperature: float
) -> None:
    sampling = Sampling(32, temperature, samples=1 if temperature == 0 else 3, seed=5)
    tokenizer = load_tokenizer(str(model_folder))
    builder = load_prompt_settings(model_folder).builder(tokenizer)
    prompts = [builder.ids(history) for history in HISTORIES]
    model = load_causal_lm(str(model_folder), ModelOptions())
    responses = generate_responses(model, tokenizer, prompts, sampling, rows=9)
    scorer = load_token_reward_scorer(str(reward_folder), ModelOptions())

    predictions = predict(predictor, sampling)
    assert len(predictions) == len(responses)
    for place, (prediction, response) in enumerate(zip(predictions, responses, strict=True)):
        assert prediction.queries == [line for line in split_queries(response.text)[:2] if line]
        assert prediction.finished == response.finished
        alone = scorer.score([HISTORIES[place // sampling.samples]], [response.text])
        lines = [line for line, query in enumerate(split_queries(response.text)[:2]) if query]
        for query, tokens in zip(prediction.queries, prediction.tokens, strict=True):
            assert "".join(text for text, _ in tokens).strip() == query
        words = list(zip(split_words(response.text), alone.words[0], strict=True))
        # A batch is padded, so sums are taken in another order: fp32 to some 1e-6 of scores up to 2.
        assert prediction.query_scores == pytest.approx([alone.queries[0][line] for line in lines], abs=1e-5)
        for line, scores in zip(lines, prediction.word_scores, strict=True):
            assert scores == pytest.approx([score for word, score in words if word.line == line], abs=1e-5)


def test_scores_do_not_depend_on_the_batch(predictor: Predictor) -> None:
    for one, all_ in zip(predict(predictor, GREEDY, 1), predict(predictor, GREEDY, 9), strict=True):
        assert one.query_scores == pytest.approx(all_.query_scores, abs=1e-5)


def test_words_that_the_reward_model_cannot_see_are_counted(
    predictor: Predictor, reward_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scorer = load_token_reward_scorer(str(reward_folder), ModelOptions())
    scorer.encoder.options = replace(scorer.encoder.options, max_response_tokens=2)
    short_sighted = Predictor(predictor.model, predictor.prompts, scorer)
    unseen = scorer.score(HISTORIES, ["\n".join(queries) for queries in LEARNT]).missing
    assert unseen > 0
    predict(short_sighted, GREEDY)
    short_sighted.tell_unseen_words()
    short_sighted.tell_unseen_words()
    assert f"note: {unseen} words score 0" in (told := capsys.readouterr().err) and told.count("note") == 1


def test_scores_by_hand_where_lines_are_blank_or_too_many() -> None:
    response = " red hat \n\n...\nblue\nshoes"
    assert first_queries(response, 4) == ["red hat", "...", "blue"]
    #   " red"  " ha"   "t"     " "     "\n\n"   "..."     "\n"      "blue"    "\nshoes"  end
    spans = [(0, 4), (4, 7), (7, 8), (8, 9), (9, 11), (11, 14), (14, 15), (15, 19), (19, 25), (25, 25)]
    decoded = DecodedTokens(response, spans)
    prediction = scored_prediction(decoded, True, [0.1, 1.9, 1.4, 1.5], [0.5, 0.0, 0.0, 0.9, 1.0], k=4)
    assert prediction[:4] == (["red hat", "...", "blue"], True, [0.5, 0.0, 0.9], [[0.1, 1.9], [], [1.4]])
    # (0.1 - 1) / 2; (1.9 - 1) / 2, two thirds and a third of it; (1.4 - 1) / 1.
    expected = [[(" red", -0.45), (" ha", 0.3), ("t", 0.15), (" ", 0.0)], [("...", 0.0)], [("blue", 0.4)]]
    for tokens, wanted in zip(prediction.tokens, expected, strict=True):
        assert [text for text, _ in tokens] == [text for text, _ in wanted]
        assert [reward for _, reward in tokens] == pytest.approx([reward for _, reward in wanted])
    row = prediction.to_dict()
    assert row["words"] == [
        [{"word": "red", "score": 0.1}, {"word": "hat", "score": 1.9}], [], [{"word": "blue", "score": 1.4}]
    ]  # fmt: skip
    assert row["tokens"][1] == [["...", 0.0]]
    assert Prediction(["red"], False).to_dict() == {"queries": ["red"], "finished": False}


def test_a_character_of_several_tokens_is_shown_once_and_pays_each() -> None:
    decoded = DecodedTokens("北hat", [(0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1), (1, 4)])
    (tokens,) = scored_prediction(decoded, True, [1.6, 0.0], [0.5], k=1).tokens
    assert [text for text, _ in tokens] == ["北", "", "", "hat"]
    assert [reward for _, reward in tokens] == pytest.approx([0.1, 0.1, 0.1, -0.5])


@pytest.mark.parametrize("text", ["red running shoes\nhow to repair, a bicycle", "espresso", "bicycle pump\nblue hat"])
def test_tokens_are_paid_as_step_3_pays_them_by_default_for_words(text: str) -> None:
    decoded = TokenDecoder(tokenizer := ordinary_tokenizer())(tokenizer(text)["input_ids"])
    words = split_words(text)
    scores = [0.37 * place % 2 for place in range(1, len(words) + 1)]
    queries = text.count("\n") + 1
    paid = token_rewards(decoded, scores, [0.0] * queries, True, RewardOptions(queries, suggested_length=99))
    assert rewards_of_tokens(decoded, words, scores) == pytest.approx(paid.model, abs=1e-12)
    assert any(paid.model)


def test_a_prompt_that_leaves_no_room_is_refused(model_folder: Path) -> None:
    settings = load_prompt_settings(model_folder, max_prompt_tokens=250)
    with pytest.raises(InputError, match="258 tokens, but the model has 256 positions; lower --max_prompt_tokens"):
        load_predictor(str(model_folder), settings, 8, "", ModelOptions())
