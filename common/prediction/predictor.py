"""From histories to queries, and to what a reward model thinks of them; one process, on a GPU where there is one."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from common.config import ModelOptions
from common.data.prompt_settings import PromptSettings
from common.data.prompts import PromptBuilder
from common.data.records import Event
from common.generation.generate import generate_responses
from common.generation.sampling import Sampling
from common.models.loading import check_lengths, check_vocabulary, load_causal_lm, load_model_config, load_tokenizer
from common.models.token_reward import TokenRewardModel, load_token_reward_scorer
from common.text import split_queries, split_words


class Prediction(NamedTuple):
    """One response: its queries (the first k lines, blank ones left out) and whether the model ended it by itself.

    With a reward model also each query's score in 0..1, and the scores in 0..2 of each query's words (`split_words`).
    """

    queries: list[str]
    finished: bool
    query_scores: list[float] | None = None
    word_scores: list[list[float]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form; scores only where there are any."""
        row: dict[str, Any] = {"queries": self.queries, "finished": self.finished}
        if self.query_scores is not None and self.word_scores is not None:
            row["query_scores"] = self.query_scores
            row["words"] = [
                [{"word": word.text, "score": score} for word, score in zip(split_words(query), scores, strict=True)]
                for query, scores in zip(self.queries, self.word_scores, strict=True)
            ]
        return row


class Predictor:
    """Writes queries with `model`, and scores them with `scorer` if there is one."""

    def __init__(self, model: PreTrainedModel, prompts: PromptBuilder, scorer: TokenRewardModel | None = None) -> None:
        self.model = model
        self.prompts = prompts
        self.scorer = scorer

    def predict(
        self,
        histories: Sequence[Sequence[Event]],
        sampling: Sampling,
        *,
        rows: int,
        reward_rows: int,
        progress: bool = False,
    ) -> list[Prediction]:
        """`sampling.samples` predictions for each history, in order.

        At most `rows` responses are decoded and `reward_rows` scored at once; `progress` shows bars with the time left.
        Raises `InputError` for an empty history.
        """
        prompts = [self.prompts.ids(history) for history in tqdm(histories, desc="prompts", disable=not progress)]
        responses = generate_responses(
            self.model, self.prompts.tokenizer, prompts, sampling, rows, "queries" if progress else ""
        )
        k = self.prompts.num_queries
        if self.scorer is None:
            return [Prediction(first_queries(response.text, k), response.finished) for response in responses]
        asked = [history for history in histories for _ in range(sampling.samples)]
        scores = self._scores(asked, [response.text for response in responses], reward_rows, progress)
        return [
            scored_prediction(response.text, response.finished, words, queries, k)
            for response, (words, queries) in zip(responses, scores, strict=True)
        ]

    def _scores(
        self, histories: Sequence[Sequence[Event]], responses: Sequence[str], rows: int, progress: bool
    ) -> Iterator[tuple[list[float], list[float]]]:
        """The scores of each response's words, and of its lines. Says so when words were not seen: those score 0."""
        missing = 0
        with tqdm(total=len(responses), desc="scores", disable=not progress) as bar:
            for start in range(0, len(responses), rows):
                part = slice(start, start + rows)
                scores = self.scorer.score(histories[part], responses[part])
                bar.update(len(scores.words))
                missing += scores.missing
                yield from zip(scores.words, scores.queries, strict=True)
        if missing:
            limit = self.scorer.encoder.options.max_response_tokens
            print(
                f"note: {missing} words score 0 because the reward model cannot see them (behind its limit of {limit} "
                "response tokens, or unknown to its tokenizer)",
                file=sys.stderr,
            )


def first_queries(response: str, k: int) -> list[str]:
    """The first `k` lines of a response without the blank ones, which are format errors."""
    return [query for query in split_queries(response)[:k] if query]


def scored_prediction(
    response: str, finished: bool, word_scores: Sequence[float], query_scores: Sequence[float], k: int
) -> Prediction:
    """A prediction with the scores of its queries: of all words of `response`, and of all its lines."""
    of_line: dict[int, list[float]] = {}
    for word, score in zip(split_words(response), word_scores, strict=True):
        of_line.setdefault(word.line, []).append(score)
    kept = [place for place, query in enumerate(split_queries(response)[:k]) if query]
    return Prediction(
        first_queries(response, k),
        finished,
        [query_scores[place] for place in kept],
        [of_line.get(place, []) for place in kept],
    )


def load_predictor(
    model: str, settings: PromptSettings, max_response_tokens: int, reward: str, options: ModelOptions
) -> Predictor:
    """The models in the folders `model` and `reward` (empty: none), on the GPU if there is one.

    Raises `InputError` when there are no such models, or prompt and response do not fit the model's positions.
    """
    # Padding is masked and never read, so a folder without a pad token will do.
    tokenizer = load_tokenizer(model, options.trust_remote_code, pad_token="eos")
    prompts = settings.builder(tokenizer)
    config = load_model_config(model, options.trust_remote_code)
    check_lengths(config, settings.max_prompt_tokens + max_response_tokens)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scorer = load_token_reward_scorer(reward, options) if reward else None
    if scorer is not None:
        scorer.module.to(device)
    generator = load_causal_lm(model, options)
    check_vocabulary(generator, tokenizer)
    return Predictor(generator.to(device), prompts, scorer)
