"""The reward of every token of a response, from word scores; docs/method.md, section 4.

One response at a time, on plain lists: a response has tens of tokens, and clarity is worth more than vectors here.
The three reward levels hold the same total per response and differ in its place alone: at each token (TPPO), at each
query's last token, or at the response's last token (the paper's sentence-level PPO).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from common.alignment import NO_LINE, DecodedTokens, spread_word_scores, token_lines
from common.text import Word, normalise, split_queries, split_words

RewardLevel = Literal["token", "query", "response"]
MAX_WORD_SCORE = 2.0


@dataclass(frozen=True, slots=True)
class RewardOptions:
    """How word scores become token rewards; docs/method.md, section 4.

    `num_queries` is k, the number of queries asked for. `suggested_length` (tokens) and `length_alpha` make the
    length-weighted penalty; alpha 1 switches it off. `list_cost` is the price of a missing line or a missing EOS, in
    worst queries. `sentence_coef` is the weight of each query's score, which stands at its last token, where its words
    together weigh 1; both are divided by the sum of the two, so that a reward stays on its scale.
    """

    num_queries: int
    suggested_length: int
    level: RewardLevel = "token"
    spread: Literal["copy", "split"] = "split"
    centre: bool = True
    normalise: bool = True
    length_alpha: float = 0.9
    list_cost: float = 1.0
    sentence_coef: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenRewards:
    """Reward per token (T,) in its parts, which add up: the reward model's of words and of sentences, the length
    penalty's, the list guards'."""

    model: list[float]
    sentence: list[float]
    length_penalty: list[float]
    guard: list[float]
    query_of_token: list[int]

    @property
    def total(self) -> list[float]:
        """Sum of the parts, (T,)."""
        return [sum(parts) for parts in zip(self.model, self.sentence, self.length_penalty, self.guard, strict=True)]


def token_rewards(
    decoded: DecodedTokens,
    word_scores: Sequence[float],
    query_scores: Sequence[float],
    finished: bool,
    options: RewardOptions,
) -> TokenRewards:
    """Rewards of one response's tokens.

    `decoded` holds the response's text and each token's span (EOS included, with an empty span), `word_scores` the
    reward model's score in 0..2 of each word of `split_words(decoded.text)`, `query_scores` its score in 0..1 of each
    line. With share s_t of a word in token t (`split`: the part of its characters; `copy`: 1), the word's score e, the
    place i of the token in its query, n the words (`copy`: word tokens) of the query and c = `sentence_coef`:
    `r_t = s_t (e alpha^max(0, i - sl) - 1) / (n (1 + c))`; the `- 1` and the `/ n` are scale control. A query's score s
    adds `(2 s - 1) c / (1 + c)` at its last token.

    Guards: a word that its query said before scores 0, as in every annotator's labels. A query that repeats an earlier
    one is worth the worst score in every word. So is one past the k-th, but all of it is charged to the line break
    that began it: there the list should have ended. A line without a word costs as much as the worst query where it
    ends, a missing line or EOS `list_cost` times as much at the last token: were it cheaper, leaving one out would pay.
    """
    text, spans = decoded
    words = split_words(text)
    lines = token_lines(text, words, spans)
    shares = spread_word_scores(words, [1.0] * len(words), spans, options.spread)
    values = spread_word_scores(words, _without_repeats(words, word_scores), spans, options.spread)
    bad = _bad_queries(text, options.num_queries)
    begun_by = {line: _token_at(decoded, start - 1) for line, start in enumerate(_line_starts(text))}
    centre = MAX_WORD_SCORE / 2 if options.centre else 0.0
    scale = [(1 + options.sentence_coef) * size for size in _scales(shares, lines, options.normalise)]
    sentence_weight = options.sentence_coef / (1 + options.sentence_coef)
    model, sentence, penalty, guard = ([0.0] * len(spans) for _ in range(4))
    for t, (place, discount) in enumerate(_length_discounts(lines, options)):
        if place == 0:
            continue
        scored = (values[t] - centre * shares[t]) / scale[t]
        discounted = (values[t] * discount - centre * shares[t]) / scale[t]
        worst = -centre * shares[t] / scale[t]
        model[t] = scored
        if lines[t] in bad:
            guard[t] -= scored
            guard[_charged(t, lines[t], begun_by, options)] += worst
        else:
            penalty[t] = discounted - scored
    for line, last in {line: t for t, line in enumerate(lines) if line != NO_LINE}.items():
        worst = -sentence_weight * centre
        sentence[last] = sentence_weight * MAX_WORD_SCORE * query_scores[line] + worst
        if line in bad:
            guard[last] -= sentence[last]
            guard[_charged(last, line, begun_by, options)] += worst
    _charge_list_errors(guard, decoded, finished, options)
    parts = TokenRewards(model, sentence, penalty, guard, lines)
    return _moved(parts, options.level)


def _without_repeats(words: Sequence[Word], scores: Sequence[float]) -> list[float]:
    """`scores` with 0 for a word that its query said before; a reward model that saw few such words pays for them."""
    seen: set[tuple[int, str]] = set()
    kept = []
    for word, score in zip(words, scores, strict=True):
        key = (word.line, normalise(word.text))
        kept.append(0.0 if key in seen else score)
        seen.add(key)
    return kept


def _bad_queries(text: str, num_queries: int) -> set[int]:
    """Lines that repeat an earlier line or stand past the k-th."""
    seen: set[str] = set()
    bad: set[int] = set()
    for index, query in enumerate(split_queries(text)):
        key = normalise(query)
        if index >= num_queries or (key and key in seen):
            bad.add(index)
        seen.add(key)
    return bad


def _charged(token: int, line: int, begun_by: dict[int, int], options: RewardOptions) -> int:
    """Where the worst score of a bad query's token is charged: at the line break of a query too many, else there."""
    return begun_by[line] if line >= options.num_queries else token


def _line_starts(text: str) -> list[int]:
    """Where each line of `text` begins, in characters."""
    return [0, *(index + 1 for index, char in enumerate(text) if char == "\n")]


def _length_discounts(lines: Sequence[int], options: RewardOptions) -> list[tuple[int, float]]:
    """For each token its 1-based place inside its query (0: in none) and `alpha^max(0, place - sl)`."""
    places: dict[int, int] = {}
    discounts: list[tuple[int, float]] = []
    for line in lines:
        if line == NO_LINE:
            discounts.append((0, 1.0))
            continue
        places[line] = places.get(line, 0) + 1
        beyond = max(0, places[line] - options.suggested_length)
        discounts.append((places[line], options.length_alpha**beyond))
    return discounts


def _scales(shares: Sequence[float], lines: Sequence[int], per_query: bool) -> list[float]:
    """What each token's reward is divided by: its query's words (the sum of its shares), or 1."""
    sums: dict[int, float] = {}
    for share, line in zip(shares, lines, strict=True):
        sums[line] = sums.get(line, 0.0) + share
    return [sums[line] if per_query and sums[line] > 0 else 1.0 for line in lines]


def _charge_list_errors(
    guard: list[float], decoded: DecodedTokens, finished: bool, options: RewardOptions
) -> None:
    """Charge lines without a word where they end, missing lines and a missing EOS at the last token (in place)."""
    if not guard:
        return
    queries = split_queries(decoded.text)
    offset = 0
    for query, line in zip(queries, decoded.text.split("\n"), strict=False):
        offset += len(line)
        if not normalise(query):
            guard[_token_at(decoded, offset)] -= 1.0 if options.centre else 0.0
        offset += 1
    missing = max(0, options.num_queries - len(queries))
    guard[-1] -= options.list_cost * (missing + (not finished))


def _token_at(decoded: DecodedTokens, position: int) -> int:
    """Index of the token that holds the character at `position`; the last one past the end."""
    for index, (start, end) in enumerate(decoded.spans):
        if start <= position < end:
            return index
    return len(decoded.spans) - 1


def _moved(rewards: TokenRewards, level: RewardLevel) -> TokenRewards:
    """The same parts, summed at each query's or at the response's last token."""
    if level == "token" or not rewards.model:
        return rewards
    last = len(rewards.model) - 1
    end_of_query = {line: t for t, line in enumerate(rewards.query_of_token)}
    place = [
        last if level == "response" else t if line == NO_LINE else end_of_query[line]
        for t, line in enumerate(rewards.query_of_token)
    ]
    return TokenRewards(
        *(_summed(part, place) for part in (rewards.model, rewards.sentence, rewards.length_penalty, rewards.guard)),
        rewards.query_of_token,
    )


def _summed(part: Sequence[float], place: Sequence[int]) -> list[float]:
    moved = [0.0] * len(part)
    for value, target in zip(part, place, strict=True):
        moved[target] += value
    return moved
