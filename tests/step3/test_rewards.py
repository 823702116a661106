"""The reward of every token against tables made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.alignment import DecodedTokens
from common.text import split_words
from step3_tppo.rewards import RewardOptions, TokenRewards
from step3_tppo.rewards import token_rewards as rewards_of

PLAIN = RewardOptions(num_queries=2, suggested_length=99)


def token_rewards(
    decoded: DecodedTokens, words: list[float], finished: bool, options: RewardOptions, queries: tuple[float, ...] = ()
) -> TokenRewards:
    """The rewards of words alone, unless sentence scores are given."""
    return rewards_of(decoded, words, queries or [0.0] * len(decoded.text.split("\n")), finished, options)


def tokens(*pieces: str) -> DecodedTokens:
    """Pieces of text as tokens; an empty piece is EOS."""
    spans, position = [], 0
    for piece in pieces:
        spans.append((float(position), float(position + len(piece))))
        position += len(piece)
    return DecodedTokens("".join(pieces), spans)


RED_SHOES = tokens("red", " sho", "es", "\n", "blue", " hat", "")
SCORES = [2.0, 1.0, 0.0, 2.0]


def test_split_centred_and_normalised() -> None:
    rewards = token_rewards(RED_SHOES, SCORES, True, PLAIN)
    # Query 1, two words: red +1/2; shoes (score 1, centred 0) over "sho" 3/5 and "es" 2/5. Query 2: -1/2, +1/2.
    assert rewards.model == pytest.approx([0.5, 0, 0, 0, -0.5, 0.5, 0])
    assert rewards.guard == [0.0] * 7
    assert rewards.query_of_token == [0, 0, 0, -1, 1, 1, -1]


def test_split_raw_divides_a_word_by_its_characters() -> None:
    raw = replace(PLAIN, centre=False, normalise=False)
    assert token_rewards(RED_SHOES, SCORES, True, raw).model == pytest.approx([2, 0.6, 0.4, 0, 0, 2, 0])


def test_copy_gives_each_token_the_word_and_normalises_by_word_tokens() -> None:
    copy = replace(PLAIN, spread="copy", centre=False)
    assert token_rewards(RED_SHOES, SCORES, True, copy).model == pytest.approx([2 / 3, 1 / 3, 1 / 3, 0, 0, 1, 0])


def test_length_penalty_discounts_tokens_past_the_suggested_length() -> None:
    options = replace(PLAIN, suggested_length=1, length_alpha=0.5, normalise=False)
    rewards = token_rewards(RED_SHOES, [2.0, 2.0, 2.0, 2.0], True, options)
    # Raw score times 0.5^(place - 1), then centred: sho 0.6 * (2 * 0.5 - 1), es 0.4 * (2 * 0.25 - 1), hat 2 * 0.5 - 1.
    assert rewards.total == pytest.approx([1, 0, 0.4 * (0.5 - 1), 0, 1, 0, 0])
    assert rewards.model == pytest.approx([1, 0.6, 0.4, 0, 1, 1, 0])


def test_a_repeated_query_and_one_past_the_last_get_the_worst() -> None:
    decoded = tokens("a1", "\n", "A1!", "\n", "b2", "")
    rewards = token_rewards(decoded, [2.0, 2.0, 2.0], True, PLAIN)
    # The repeat is the worst in its own word; the third query is charged to the line break before it.
    assert rewards.total == pytest.approx([1, 0, -1, -1, 0, 0])
    assert rewards.guard == pytest.approx([0, 0, -2, -1, -1, 0])


def test_a_word_said_before_in_its_query_scores_nothing() -> None:
    rewards = token_rewards(tokens("tie", " Tie!", "\n", "tie", " hat", ""), [2.0, 2.0, 2.0, 2.0], True, PLAIN)
    # Two words a query: +1/2 each, but -1/2 for the repeat; another query may say the word again.
    assert rewards.model == pytest.approx([0.5, -0.5, 0, 0.5, 0.5, 0])


def test_the_sentence_score_stands_at_the_querys_last_token() -> None:
    options = replace(PLAIN, sentence_coef=0.5)
    rewards = token_rewards(RED_SHOES, SCORES, True, options, queries=(0.9, 0.25))
    # A third of 2 * 0.9 - 1 and of 2 * 0.25 - 1; the words keep two thirds.
    assert rewards.sentence == pytest.approx([0, 0, 0.8 / 3, 0, 0, -0.5 / 3, 0])
    words_alone = token_rewards(RED_SHOES, SCORES, True, PLAIN).model
    assert rewards.model == pytest.approx([value / 1.5 for value in words_alone])
    raw = token_rewards(RED_SHOES, SCORES, True, replace(options, centre=False), queries=(0.9, 0.25))
    assert raw.sentence == pytest.approx([0, 0, 0.6, 0, 0, 0.5 / 3, 0])


def test_a_bad_query_loses_its_sentence_score_too() -> None:
    options = replace(PLAIN, sentence_coef=0.5)
    rewards = token_rewards(tokens("a1", "\n", "A1!", "\n", "b2", ""), [2.0] * 3, True, options, queries=(1.0,) * 3)
    # Worst words -2/3 and worst sentence -1/3: at the repeat itself, and at the break that began the third query.
    assert rewards.total == pytest.approx([1, 0, -1, -1, 0, 0])
    assert rewards.guard == pytest.approx([0, 0, -2, -1, -1, 0])


def test_empty_line_missing_line_and_missing_end_are_charged() -> None:
    three = replace(PLAIN, num_queries=3)
    empty = token_rewards(tokens("a1", "\n", "\n", "b2", ""), [1.0, 1.0], True, three)
    assert empty.guard == pytest.approx([0, 0, -1, 0, 0])
    missing = token_rewards(tokens("a1", ""), [1.0], True, three)
    assert missing.guard == pytest.approx([0, -2])
    unfinished = token_rewards(tokens("a1"), [1.0], False, three)
    assert unfinished.guard == pytest.approx([-3])


@pytest.mark.parametrize("sentence_coef", [0.0, 0.5])
def test_leaving_a_query_out_costs_as_much_as_the_worst_one(sentence_coef: float) -> None:
    options = replace(PLAIN, num_queries=2, sentence_coef=sentence_coef)
    worst = token_rewards(tokens("a1", "\n", "b2", ""), [2.0, 0.0], True, options, queries=(1.0, 0.0))
    empty = token_rewards(tokens("a1", "\n", ""), [2.0], True, options, queries=(1.0, 0.0))
    missing = token_rewards(tokens("a1", ""), [2.0], True, options, queries=(1.0,))
    assert sum(worst.total) == pytest.approx(0)
    assert sum(empty.total) == pytest.approx(sum(worst.total))
    assert sum(missing.total) == pytest.approx(sum(worst.total))


def test_query_level_stands_at_each_querys_last_token_and_response_level_at_the_end() -> None:
    raw = replace(PLAIN, centre=False, normalise=False)
    assert token_rewards(RED_SHOES, SCORES, True, replace(raw, level="query")).model == pytest.approx(
        [0, 0, 3, 0, 0, 2, 0]
    )
    assert token_rewards(RED_SHOES, SCORES, True, replace(raw, level="response")).model == pytest.approx(
        [0, 0, 0, 0, 0, 0, 5]
    )


@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(["red", " shoe", "s", "\n", " ", "!", "日本", "é"]), min_size=1, max_size=14),
    finished=st.booleans(),
    spread=st.sampled_from(["split", "copy"]),
    centre=st.booleans(),
    data=st.data(),
)
def test_the_levels_differ_in_place_alone(
    pieces: list[str], finished: bool, spread: str, centre: bool, data: st.DataObject
) -> None:
    decoded = tokens(*pieces, "") if finished else tokens(*pieces)
    words = split_words(decoded.text)
    scores = [data.draw(st.floats(0, 2)) for _ in words]
    options = RewardOptions(num_queries=2, suggested_length=2, spread=spread, centre=centre, sentence_coef=0.7)
    queries = tuple(data.draw(st.floats(0, 1)) for _ in decoded.text.split("\n"))
    totals = [
        sum(token_rewards(decoded, scores, finished, replace(options, level=level), queries).total)
        for level in ("token", "query", "response")
    ]
    assert totals == pytest.approx([totals[0]] * 3, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(cut=st.integers(1, 4), score=st.floats(0, 2))
def test_split_pays_a_word_the_same_however_it_is_tokenised(cut: int, score: float) -> None:
    whole = token_rewards(tokens("shoes", ""), [score], True, replace(PLAIN, num_queries=1))
    parts = token_rewards(tokens("shoes"[:cut], "shoes"[cut:], ""), [score], True, replace(PLAIN, num_queries=1))
    assert sum(whole.total) == pytest.approx(sum(parts.total), abs=1e-12)
