from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.text import Word, content_words, normalise, split_queries, split_words
from tests.unicode_texts import texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("best shoes", [Word("best", 0, 4, 0), Word("shoes", 5, 10, 0)]),
        ('  "best"  shoes!?', [Word("best", 3, 7, 0), Word("shoes", 10, 15, 0)]),
        ("don't wi-fi", [Word("don't", 0, 5, 0), Word("wi-fi", 6, 11, 0)]),
        ("a\nb\n\nc", [Word("a", 0, 1, 0), Word("b", 2, 3, 1), Word("c", 5, 6, 3)]),
        ("-- ... !", []),
        ("", []),
        ("天气app", [Word("天", 0, 1, 0), Word("气", 1, 2, 0), Word("app", 2, 5, 0)]),
        ("iPhone价格。", [Word("iPhone", 0, 6, 0), Word("价", 6, 7, 0), Word("格", 7, 8, 0)]),
        ("ア・イ", [Word("ア", 0, 1, 0), Word("イ", 2, 3, 0)]),
        ("cafe\u0301 🙂", [Word("cafe\u0301", 0, 5, 0), Word("🙂", 6, 7, 0)]),
        ("c++ $5", [Word("c++", 0, 3, 0), Word("$5", 4, 6, 0)]),
        ("(부산) 맛집", [Word("부산", 1, 3, 0), Word("맛집", 5, 7, 0)]),
    ],
)
def test_split_words_by_hand(text: str, expected: list[Word]) -> None:
    assert split_words(text) == expected


def _words_slowly(text: str) -> list[Word]:
    """The same definition, said differently: cut at spaces and around CJK characters, then strip each run."""
    def is_punctuation(char: str) -> bool:
        return unicodedata.category(char).startswith("P")

    def stands_alone(char: str) -> bool:
        name = unicodedata.name(char, "")
        kinds = ("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "CJK RADICAL", "KANGXI", "HIRAGANA", "KATAKANA")
        return name.startswith(kinds) and not is_punctuation(char)

    words = []
    for number, line in enumerate(text.split("\n")):
        offset = sum(len(before) + 1 for before in text.split("\n")[:number])
        runs: list[list[int]] = [[]]
        for position, char in enumerate(line):
            if char.isspace():
                runs.append([])
            elif stands_alone(char):
                runs += [[position], []]
            else:
                runs[-1].append(position)
        for run in runs:
            while run and is_punctuation(line[run[0]]):
                run = run[1:]
            while run and is_punctuation(line[run[-1]]):
                run = run[:-1]
            if run:
                words.append(Word(line[run[0] : run[-1] + 1], offset + run[0], offset + run[-1] + 1, number))
    return words


@given(texts(alphabet="ab \n.-'天气アイ・ー々é🙂\u0301\u200d\t\u3000"))
def test_split_words_equals_the_slow_definition(text: str) -> None:
    assert split_words(text) == _words_slowly(text)


@given(texts())
def test_words_are_ordered_and_leave_out_only_spaces_and_punctuation(text: str) -> None:
    words = split_words(text)
    inside = [position for word in words for position in range(word.start, word.end)]
    assert inside == sorted(set(inside))
    outside = set(range(len(text))) - set(inside)
    assert all(text[p].isspace() or unicodedata.category(text[p]).startswith("P") for p in outside)
    assert all(word.text == text[word.start : word.end] for word in words)
    assert all(word.line == text[: word.start].count("\n") for word in words)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("a b\nc", ["a b", "c"]),
        ("a b\nc\n", ["a b", "c"]),
        (" a \n\nb\n\n", ["a", "", "b", ""]),
        ("", []),
        ("\n", [""]),
        ("a\n  ", ["a"]),
    ],
)
def test_split_queries_by_hand(response: str, expected: list[str]) -> None:
    assert split_queries(response) == expected


@given(texts())
def test_words_of_a_query_are_those_of_its_line(response: str) -> None:
    words = split_words(response)
    for number, query in enumerate(split_queries(response)):
        assert [word.text for word in words if word.line == number] == [word.text for word in split_words(query)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Best  SHOES! ", "best shoes"),
        ("Straße", "strasse"),
        ("ﬁne Ｗｉ－Ｆｉ", "fine wi-fi"),
        ("cafe\u0301", "café"),
        ("?!", ""),
        ("北京 天气", "北 京 天 气"),
    ],
)
def test_normalise_by_hand(text: str, expected: str) -> None:
    assert normalise(text) == expected


@given(st.one_of(texts(), st.text(max_size=30)))
def test_normalise_is_idempotent(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_content_words_leave_out_stop_words() -> None:
    assert content_words("How to clean The Suede boots?") == ["clean", "suede", "boots"]
