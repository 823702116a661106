"""The lexical annotator against a hand table."""

from __future__ import annotations

from common.data.records import Event
from common.feedback.annotator import FeedbackItem
from common.feedback.lexical import LexicalAnnotator

HISTORY = (
    Event("search", query="ceramic GRINDER near me"),
    Event("click", query="ceramic grinder near me", title="Grinder repair - Handbook", url="https://a.example/hidden"),
    Event("click", query="unseen", url="https://b.example/shop/moka-pot.html"),
    Event("purchase", title="Paper filter"),
    Event("search", query="茶 店"),
)
TARGETS = ("espresso machine", "how to descale", "咖啡机")

# Query, scores of its words, score of the query.
TABLE = [
    ("espresso machine", [2, 2], 2),
    ("espresso grinder", [2, 1], 2),
    ("espresso ceramic grinder", [2, 1, 1], 1),
    ("ceramic grinder", [1, 1], 1),
    ("how to descale", [1, 1, 2], 2),
    ("what espresso", [0, 2], 2),
    ("grinder near me", [1, 1, 1], 1),
    ("espresso teapot", [2, 0], 1),
    ("grinder teapot", [1, 0], 0),
    ("espresso teapot lamp", [2, 0, 0], 0),
    ("espresso grinder teapot lamp", [2, 1, 0, 0], 1),
    ("espresso espresso", [2, 0], 1),
    ("grinder, Grinder repair", [1, 0, 1], 0),
    ("how how descale", [1, 0, 2], 2),
    ("moka pot", [1, 1], 1),
    ("paper filter", [1, 1], 1),
    ("hidden unseen shop", [0, 0, 0], 0),
    ("how to", [1, 1], 0),
    ("Repair, (GRINDER)!", [1, 1], 1),
    ("", [], 0),
    ("--", [], 0),
    ("咖啡店", [2, 2, 1], 2),
    ("茶茶叶", [1, 0, 0], 0),
]


def test_hand_table_as_one_response() -> None:
    response = "\n".join(query for query, _, _ in TABLE) + "\n"
    annotation = LexicalAnnotator().annotate(FeedbackItem("u-0", "u", HISTORY, TARGETS, response))
    scored = zip(TABLE, annotation.word_scores, annotation.query_scores, strict=True)
    assert [(query, list(words), score) for (query, _, _), words, score in scored] == TABLE


def test_own_targets_score_2_and_nothing_without_history_and_targets() -> None:
    gold = "\n".join(TARGETS)
    assert LexicalAnnotator().annotate(FeedbackItem("u-0", "u", (), TARGETS, gold)).query_scores == (2, 2, 2)
    blank = LexicalAnnotator().annotate(FeedbackItem("u-0", "u", (), (), gold))
    assert set(blank.query_scores) == {0} and {score for line in blank.word_scores for score in line} == {0}
