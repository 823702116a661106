"""From histories to queries, and to what a reward model thinks of them; one process, on a GPU where there is one."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from common.alignment import DecodedTokens, TokenDecoder, split_word_scores, token_lines
from common.config import ModelOptions
from common.data.prompt_settings import PromptSettings
from common.data.prompts import PromptBuilder
from common.data.records import Event
from common.generation.decode import CountEnded, uncounted
from common.generation.generate import Generated, generate_responses
from common.generation.sampling import Sampling
from common.models.loading import check_lengths, check_vocabulary, load_causal_lm, load_model_config, load_tokenizer
from common.models.reward_options import MAX_SCORE
from common.models.token_reward import TokenRewardModel, load_token_reward_scorer
from common.text import Word, split_queries, split_words


class Prediction(NamedTuple):
    """One response: its queries (the first k lines, blank ones left out) and whether the model ended it by itself.

    With a reward model also each query's score in 0..1, the scores in 0..2 of each query's words (`split_words`), and
    the text and reward of each query's tokens (`rewards_of_tokens`).
    """

    queries: list[str]
    finished: bool
    query_scores: list[float] | None = None
    word_scores: list[list[float]] | None = None
    tokens: list[list[tuple[str, float]]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form; scores only where there are any."""
        row: dict[str, Any] = {"queries": self.queries, "finished": self.finished}
        if self.query_scores is not None and self.word_scores is not None and self.tokens is not None:
            row["query_scores"] = self.query_scores
            row["words"] = [
                [{"word": word.text, "score": score} for word, score in zip(split_words(query), scores, strict=True)]
                for query, scores in zip(self.queries, self.word_scores, strict=True)
            ]
            row["tokens"] = [[list(token) for token in query] for query in self.tokens]
        return row


class Predictor:
    """Writes queries with `model`, and scores them with `scorer` if there is one.

    `unseen_words` counts the words that scored 0 because the reward model could not see them.
    """

    def __init__(self, model: PreTrainedModel, prompts: PromptBuilder, scorer: TokenRewardModel | None = None) -> None:
        self.model = model
        self.prompts = prompts
        self.scorer = scorer
        self.unseen_words = 0
        self._decode = TokenDecoder(prompts.tokenizer)

    def predict(
        self,
        histories: Sequence[Sequence[Event]],
        sampling: Sampling,
        *,
        rows: int,
        reward_rows: int,
        uniforms: torch.Tensor | None = None,
        count_ended: CountEnded = uncounted,
    ) -> list[Prediction]:
        """`sampling.samples` predictions for each history, in order.

        At most `rows` responses are decoded and `reward_rows` scored at once; for `uniforms` and `count_ended`
        see `generate_responses`. Raises `InputError` for an empty history.
        """
        prompts = [self.prompts.ids(history) for history in histories]
        responses = generate_responses(
            self.model, self.prompts.tokenizer, prompts, sampling, rows, count_ended, uniforms=uniforms
        )
        k = self.prompts.num_queries
        if self.scorer is None:
            return [Prediction(first_queries(response.text, k), response.finished) for response in responses]
        asked = [history for history in histories for _ in range(sampling.samples)]
        return [
            scored_prediction(self._decode(response.ids), response.finished, words, queries, k)
            for response, (words, queries) in zip(responses, self._scores(asked, responses, reward_rows), strict=True)
        ]

    def tell_unseen_words(self) -> None:
        """Say on stderr if the reward model could not see some words, and begin to count anew."""
        if self.scorer is not None and self.unseen_words:
            limit = self.scorer.encoder.options.max_response_tokens
            print(
                f"note: {self.unseen_words} words score 0 because the reward model cannot see them (behind its limit "
                f"of {limit} response tokens, or unknown to its tokenizer)",
                file=sys.stderr,
            )
        self.unseen_words = 0

    def _scores(
        self, histories: Sequence[Sequence[Event]], responses: Sequence[Generated], rows: int
    ) -> Iterator[tuple[list[float], list[float]]]:
        """The scores of each response's words, and of its lines."""
        for start in range(0, len(responses), rows):
            part = slice(start, start + rows)
            scores = self.scorer.score(histories[part], [response.text for response in responses[part]])
            self.unseen_words += scores.missing
            yield from zip(scores.words, scores.queries, strict=True)


def first_queries(response: str, k: int) -> list[str]:
    """The first `k` lines of a response without the blank ones, which are format errors."""
    return [query for query in split_queries(response)[:k] if query]


def scored_prediction(
    response: DecodedTokens, finished: bool, word_scores: Sequence[float], query_scores: Sequence[float], k: int
) -> Prediction:
    """A prediction with the scores of its queries: of all words of `response`, and of all its lines."""
    text, spans = response
    words = split_words(text)
    scores_of_line: dict[int, list[float]] = {}
    for word, score in zip(words, word_scores, strict=True):
        scores_of_line.setdefault(word.line, []).append(score)
    tokens_of_line: dict[int, list[tuple[str, float]]] = {}
    rewards = rewards_of_tokens(response, words, word_scores)
    for line, (start, end), reward in zip(token_lines(text, words, spans), spans, rewards, strict=True):
        # A character that several tokens spell is the first one's, so that the texts add up to the response.
        tokens_of_line.setdefault(line, []).append((text[math.ceil(start) : math.ceil(end)], reward))
    kept = [place for place, query in enumerate(split_queries(text)[:k]) if query]
    return Prediction(
        first_queries(text, k),
        finished,
        [query_scores[place] for place in kept],
        [scores_of_line.get(place, []) for place in kept],
        [tokens_of_line.get(place, []) for place in kept],
    )


def rewards_of_tokens(response: DecodedTokens, words: Sequence[Word], word_scores: Sequence[float]) -> list[float]:
    """What the words of `response` are worth at each token (T,), by step 3's defaults.

    A word with the score e in 0..2 in a query of n words is worth `(e - 1) / n`, divided over the tokens that hold its
    characters; a query is worth -1..1. Step 3 divides this by `1 + sentence_coef` and adds the query's score, the
    guards and the length penalty (docs/method.md, section 4).
    """
    sizes = Counter(word.line for word in words)
    centre = MAX_SCORE / 2
    worth = [(score - centre) / sizes[word.line] for word, score in zip(words, word_scores, strict=True)]
    return split_word_scores(words, worth, response.spans)


def load_predictor(
    model: str,
    settings: PromptSettings,
    max_response_tokens: int,
    reward: str,
    options: ModelOptions,
    today: date | None = None,
) -> Predictor:
    """The models in the folders `model` and `reward` (empty: none), on the GPU if there is one; `today` as in
    `PromptBuilder`.

    Raises `InputError` when there are no such models, or prompt and response do not fit the model's positions.
    """
    # Padding is masked and never read, so a folder without a pad token will do.
    tokenizer = load_tokenizer(model, options.trust_remote_code, pad_token="eos")
    prompts = settings.builder(tokenizer, today)
    config = load_model_config(model, options.trust_remote_code)
    check_lengths(config, settings.max_prompt_tokens + max_response_tokens)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scorer = load_token_reward_scorer(reward, options) if reward else None
    if scorer is not None:
        scorer.module.to(device)
    generator = load_causal_lm(model, options)
    check_vocabulary(generator, tokenizer)
    return Predictor(generator.to(device), prompts, scorer)
