from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.alignment import (
    IGNORE_LABEL,
    NO_LINE,
    TokenDecoder,
    copy_word_scores,
    pool_token_scores,
    split_word_scores,
    spread_word_scores,
    token_labels,
    token_lines,
    token_words,
)
from common.errors import InputError
from common.text import Word, split_words
from tests.tokenizer_factory import ALL, byte_level, sentencepiece_bpe, unigram, word_piece
from tests.unicode_texts import texts

KINDS = sorted(ALL)
any_kind = st.sampled_from(KINDS)
random_draws = st.lists(st.integers(0, 10**6), max_size=30)
quick = settings(max_examples=60, deadline=None)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decoded_by_library(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def words_of_tokens_slowly(words: list[Word], spans: list[tuple[float, float]]) -> list[int]:
    """`token_words` in exact fractions: every token against every word."""
    exact = [tuple(Fraction(side).limit_denominator(12) for side in span) for span in spans]
    owners = []
    for start, end in exact:
        shared = [min(word.end, end) - max(word.start, start) for word in words]
        most = max(shared, default=Fraction(0))
        owners.append(shared.index(most) if most > 0 else -1)
    return owners


# Decoding: text and spans of the ids in hand.


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(text=texts())
def test_text_of_canonical_ids_is_the_librarys(kind: str, text: str) -> None:
    tokenizer = ALL[kind]()
    ids = tokenizer(text)["input_ids"]  # special tokens of the post-processor included
    assert TokenDecoder(tokenizer)(ids).text == decoded_by_library(tokenizer, ids)


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(draws=random_draws)
def test_random_ids_never_crash_and_spans_cover_the_text(kind: str, draws: list[int]) -> None:
    tokenizer = ALL[kind]()
    ids = [draw % (len(tokenizer) + 3) for draw in draws]  # three ids past the vocabulary: a padded embedding
    text, spans = TokenDecoder(tokenizer)(ids)
    assert len(spans) == len(ids)
    ends = [0.0] + [end for _, end in spans]
    assert [start for start, _ in spans] == ends[:-1]  # contiguous
    assert all(start <= end for start, end in spans)
    assert ends[-1] == len(text)
    library = decoded_by_library(tokenizer, ids)
    if "\ufffd" not in library:
        assert text == library


def test_bytes_of_a_character_share_its_span() -> None:
    tokenizer = byte_level()
    ids = tokenizer.convert_tokens_to_ids(["a", "å", "Į", "Ĺ", "b"])  # a, the three bytes of 北, b
    text, spans = TokenDecoder(tokenizer)(ids)
    assert text == "a北b"
    assert np.allclose(spans, [(0, 1), (1, 4 / 3), (4 / 3, 5 / 3), (5 / 3, 2), (2, 3)], atol=1e-12)


def test_broken_utf8_becomes_one_replacement_character_a_byte() -> None:
    tokenizer = sentencepiece_bpe()
    ids = tokenizer.convert_tokens_to_ids(["a", "<0xE5>", "<0x8C>", "b", "<0xF0>"])
    text, spans = TokenDecoder(tokenizer)(ids)
    assert text == "a\ufffd\ufffdb\ufffd"
    assert spans == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]


def test_special_tokens_have_an_empty_span() -> None:
    tokenizer = unigram()
    ids = [tokenizer.bos_token_id, *ids_of(tokenizer, "best shoes"), tokenizer.eos_token_id, tokenizer.pad_token_id]
    text, spans = TokenDecoder(tokenizer)(ids)
    assert text == "best shoes"
    assert spans[0] == (0, 0)
    assert spans[-2:] == [(10, 10), (10, 10)]


def test_word_piece_spaces_by_hand() -> None:
    tokenizer = word_piece()
    ids = tokenizer.convert_tokens_to_ids(["s", "##h", "?", "s", "##h"])
    text, spans = TokenDecoder(tokenizer)(ids)
    assert text == "sh? sh"
    assert spans == [(0, 1), (1, 2), (2, 3), (3, 5), (5, 6)]


def test_non_canonical_ids_are_kept_as_they_are() -> None:
    words = ["best", "shoes"]
    for tokenizer, ids in (
        (byte_level(), [byte_level().convert_tokens_to_ids(char) for char in "bestĠshoes"]),
        (sentencepiece_bpe(), [sentencepiece_bpe().convert_tokens_to_ids(f"<0x{ord(c):02X}>") for c in "best shoes"]),
    ):
        assert len(ids_of(tokenizer, "best shoes")) < len(ids)  # the tokenizer itself would take fewer
        text, spans = TokenDecoder(tokenizer)(ids)
        assert text == "best shoes"
        assert [word.text for word in split_words(text)] == words
        assert token_labels(split_words(text), [1, 2], spans) == [1] * 4 + [IGNORE_LABEL] + [2] * 5


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match="no fast version"):
        TokenDecoder(ByT5Tokenizer())


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Fuse(),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]),  # strips every token
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip("x", 1, 0)]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "b")]),
    ],
)
def test_a_decoder_that_cannot_be_followed_is_refused(decoder: decoders.Decoder | None) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(InputError, match="cannot be traced to characters"):
        TokenDecoder(PreTrainedTokenizerFast(tokenizer_object=backend))


# Words to tokens.


def test_labels_lines_copy_and_split_by_hand() -> None:
    text = "best shoes\n!\nbuy"
    words = split_words(text)
    #         be      st_s    hoes     \n        !         \n     bu        y         empty
    spans = [(0, 2), (2, 6), (6, 10), (10, 11), (11, 12), (12, 13), (13, 15), (15, 16), (16, 16)]
    assert token_words(words, spans) == [0, 0, 1, -1, -1, -1, 2, 2, -1]
    ignore = IGNORE_LABEL
    assert token_labels(words, [2, 0, 1], spans) == [2, 2, 0, ignore, ignore, ignore, 1, 1, ignore]
    assert copy_word_scores(words, [2.0, 0.5, 1.0], spans) == [2.0, 2.0, 0.5, 0, 0, 0, 1.0, 1.0, 0]
    split = split_word_scores(words, [2.0, 0.5, 1.0], spans)
    assert np.allclose(split, [1.0, 1.0 + 0.5 / 5, 0.5 * 4 / 5, 0, 0, 0, 2 / 3, 1 / 3, 0], atol=1e-15)
    assert token_lines(text, words, spans) == [0, 0, 0, NO_LINE, 1, NO_LINE, 2, 2, NO_LINE]
    pooled = pool_token_scores(words, [1.0, 2.0, 0.0, 9, 9, 9, 3.0, 6.0, 9], spans, missing=-1.0)
    assert np.allclose(pooled, [(2 * 1 + 2 * 2) / 4, (1 * 2 + 4 * 0) / 5, (2 * 3 + 6) / 3], atol=1e-15)


def test_a_word_without_tokens_scores_missing() -> None:
    words = split_words("best shoes")
    assert pool_token_scores(words, [1.5], [(0, 4)], missing=0.25) == [1.5, 0.25]
    assert split_word_scores(words, [1.0, 2.0], [(0, 4)]) == [1.0]


def test_a_token_that_holds_a_line_break_and_a_word_is_the_words() -> None:
    text = "a\nb"
    assert token_lines(text, split_words(text), [(0, 1), (1, 3)]) == [0, 1]


def test_spread_names_both_modes() -> None:
    words, spans = split_words("best"), [(0, 1), (1, 4)]
    assert spread_word_scores(words, [2.0], spans, "copy") == [2.0, 2.0]
    assert spread_word_scores(words, [2.0], spans, "split") == [0.5, 1.5]


def test_values_must_match_words_and_tokens() -> None:
    words = split_words("best shoes")
    for call in (
        lambda: token_labels(words, [1], [(0, 4)]),
        lambda: copy_word_scores(words, [1.0, 2.0, 3.0], [(0, 4)]),
        lambda: split_word_scores(words, [1.0], [(0, 4)]),
        lambda: pool_token_scores(words, [1.0], [(0, 4), (4, 10)], missing=0.0),
    ):
        with pytest.raises(ValueError, match="values for"):
            call()


@pytest.mark.parametrize("offset", range(12))
def test_a_tie_goes_to_the_first_word_wherever_it_stands(offset: int) -> None:
    """A token with the last byte of one ideograph and the first of the next: thirds are rounded differently."""
    text = "天" * (offset + 2)
    words = split_words(text)
    assert token_words(words, [(offset + 2 / 3, offset + 4 / 3)]) == [offset]


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(text=texts(), draws=random_draws, use_random_ids=st.booleans())
def test_each_words_score_arrives_on_exactly_its_tokens(
    kind: str, text: str, draws: list[int], use_random_ids: bool
) -> None:
    tokenizer = ALL[kind]()
    ids = [draw % len(tokenizer) for draw in draws] if use_random_ids else ids_of(tokenizer, text)
    decoded, spans = TokenDecoder(tokenizer)(ids)
    words = split_words(decoded)
    scores = [1.0 + index for index in range(len(words))]
    owners = words_of_tokens_slowly(words, spans)
    assert copy_word_scores(words, scores, spans) == [scores[owner] if owner >= 0 else 0.0 for owner in owners]
    lines = token_lines(decoded, words, spans)
    assert [line for line, owner in zip(lines, owners, strict=True) if owner >= 0] == [
        words[owner].line for owner in owners if owner >= 0
    ]


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(text=texts(), draws=random_draws, use_random_ids=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_split_conserves_totals(kind: str, text: str, draws: list[int], use_random_ids: bool, seed: int) -> None:
    tokenizer = ALL[kind]()
    ids = [draw % len(tokenizer) for draw in draws] if use_random_ids else ids_of(tokenizer, text)
    decoded, spans = TokenDecoder(tokenizer)(ids)
    words = split_words(decoded)
    scores = np.random.default_rng(seed).normal(size=len(words)).tolist()
    # A span's end is rounded to one ulp of the text's length, so is a share of a word of at least one character;
    # the sums add one rounding a token.
    rounding = np.finfo(float).eps * (len(decoded) + len(spans) + 1)
    tolerance = 8 * rounding * sum(abs(score) for score in scores)
    received = split_word_scores(words, scores, spans)
    assert sum(received) == pytest.approx(sum(scores), abs=tolerance)
    # Word by word: with all other scores zero, what is received is this word's.
    for index in range(min(3, len(words))):
        alone = [score if other == index else 0.0 for other, score in enumerate(scores)]
        received = split_word_scores(words, alone, spans)
        assert sum(received) == pytest.approx(scores[index], abs=8 * rounding * abs(scores[index]))
        outside = [r for r, (start, end) in zip(received, spans, strict=True)
                   if end <= words[index].start or start >= words[index].end]  # fmt: skip
        assert not any(outside)


@quick
@given(
    text=texts(), actor_kind=any_kind, reward_kind=any_kind, seed=st.integers(0, 2**32 - 1), as_bytes=st.booleans()
)
def test_scores_cross_from_any_tokenizer_to_any_other(
    text: str, actor_kind: str, reward_kind: str, seed: int, as_bytes: bool
) -> None:
    """Reward-model tokens (its own offsets in the actor's text) -> words -> the actor's ids."""
    actor, reward = ALL[actor_kind](), ALL[reward_kind]()
    ids = ids_of(actor, text)
    if as_bytes and actor_kind == "byte_level":  # ids that the tokenizer would never choose itself
        ids = [actor.convert_tokens_to_ids(char) for id_ in ids for char in actor.convert_ids_to_tokens(id_)]
    decoded, actor_spans = TokenDecoder(actor)(ids)
    words = split_words(decoded)
    scores = np.random.default_rng(seed).uniform(0, 2, size=len(words)).tolist()
    reward_spans = reward(decoded, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]

    pooled = pool_token_scores(words, copy_word_scores(words, scores, reward_spans), reward_spans, missing=-1.0)
    received = copy_word_scores(words, pooled, actor_spans)

    overlaps = [
        [i for i, word in enumerate(words) if min(word.end, end) > max(word.start, start)]
        for start, end in reward_spans
    ]
    for index, score in enumerate(scores):
        sharing = [others for others in overlaps if index in others]
        if all(others == [index] for others in sharing):  # no reward token holds parts of two words
            expected = score if sharing else -1.0
            assert pooled[index] == pytest.approx(expected, abs=1e-12)
            owners = words_of_tokens_slowly(words, actor_spans)
            own = [r for r, owner in zip(received, owners, strict=True) if owner == index]
            assert own == pytest.approx([expected] * len(own), abs=1e-12)


@pytest.mark.parametrize("actor_kind", KINDS)
@pytest.mark.parametrize("reward_kind", KINDS)
def test_a_plain_response_crosses_between_all_pairs(actor_kind: str, reward_kind: str) -> None:
    """No condition here: every word of this response must get its own score."""
    actor, reward = ALL[actor_kind](), ALL[reward_kind]()
    decoded, actor_spans = TokenDecoder(actor)(ids_of(actor, "best running shoes\ncafé recipe, wi-fi routers!"))
    words = split_words(decoded)
    scores = [0.25 * index for index in range(1, len(words) + 1)]
    reward_spans = reward(decoded, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    pooled = pool_token_scores(words, copy_word_scores(words, scores, reward_spans), reward_spans, missing=-1.0)
    assert pooled == pytest.approx(scores, abs=1e-12)
    owners = words_of_tokens_slowly(words, actor_spans)
    assert set(owners) - {-1} == set(range(len(words)))
    expected = [scores[owner] if owner >= 0 else 0.0 for owner in owners]
    assert copy_word_scores(words, pooled, actor_spans) == pytest.approx(expected, abs=1e-12)
    assert sum(split_word_scores(words, pooled, actor_spans)) == pytest.approx(sum(scores), abs=1e-12)
