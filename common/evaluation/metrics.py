"""What is measured on one response, and on a corpus of them: pure functions on texts and scores.

`queries` is always what `common.text.split_queries` makes of a response: one entry a line, empty lines included.
`k` is the number of queries that were asked for. Only the first `k` lines count, and where a share is taken over the
queries asked for, a missing line counts as irrelevant: the denominator is `k`, not what the system chose to write.
Two texts are equal when `common.text.normalise` makes them so. A share of nothing is None, never 0 or NaN.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from common.feedback.annotator import RELEVANT_FROM
from common.text import STOP_WORDS, normalise


def relevance_rate(query_scores: Sequence[int], k: int) -> float:
    """Share of the `k` queries asked for whose score (0..2) is `RELEVANT_FROM` or more; docs/method.md, section 7."""
    return sum(score >= RELEVANT_FROM for score in query_scores[:k]) / k


def unique_relevance_rate(queries: Sequence[str], query_scores: Sequence[int], k: int) -> float:
    """`relevance_rate` in which a query that repeats an earlier line of its response counts as irrelevant."""
    repeats = _repeats(queries[:k])
    pairs = zip(query_scores[:k], repeats, strict=True)
    return sum(score >= RELEVANT_FROM and not repeat for score, repeat in pairs) / k


def mean_word_score(word_scores: Sequence[Sequence[int]], k: int) -> float:
    """Mean score (0..2) over the words of the first `k` lines; 0, the worst score, for a response without words."""
    scores = [score for line in word_scores[:k] for score in line]
    return sum(scores) / len(scores) if scores else 0.0


def target_recall(queries: Sequence[str], targets: Iterable[str], k: int) -> float | None:
    """Share of the distinct targets that are among the first `k` queries; None without a target that has words."""
    wanted = distinct_forms(targets)
    return len(wanted & distinct_forms(queries[:k])) / len(wanted) if wanted else None


def new_and_repeated(targets: Iterable[str], history_queries: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split targets into those that the user never searched for before and those found in the history.

    Recall of repeated targets mostly measures finding things again, so the two are reported apart.
    """
    seen = distinct_forms(history_queries)
    new: list[str] = []
    repeated: list[str] = []
    for target in targets:
        (repeated if normalise(target) in seen else new).append(target)
    return new, repeated


def token_f1(prediction: str, target: str) -> float:
    """F1 of two multisets of normalised words, as in SQuAD's evaluation (Rajpurkar et al. 2016)."""
    predicted, wanted = _words(prediction), _words(target)
    if not predicted or not wanted:
        return float(predicted == wanted)
    shared = (Counter(predicted) & Counter(wanted)).total()
    return 2 * shared / (len(predicted) + len(wanted))


def best_match_f1(queries: Sequence[str], targets: Iterable[str], k: int) -> float | None:
    """Mean over the distinct targets of the best `token_f1` among the first `k` queries; None without targets."""
    wanted = sorted(distinct_forms(targets))
    best = [max((token_f1(query, target) for query in queries[:k]), default=0.0) for target in wanted]
    return sum(best) / len(best) if best else None


def copy_rate(queries: Sequence[str], history_queries: Iterable[str], k: int) -> float | None:
    """Share of the written queries that equal one of the history; None when nothing is written.

    A policy can win relevance by copying the history, so this is the first sign of a hacked reward.
    """
    copies, written = copy_counts(queries, history_queries, k)
    return copies / written if written else None


def copy_counts(queries: Sequence[str], history_queries: Iterable[str], k: int) -> tuple[int, int]:
    """Written queries that equal one of the history, and all written ones."""
    written = _written(queries, k)
    seen = distinct_forms(history_queries)
    return sum(query in seen for query in written), len(written)


def duplicate_rate(queries: Sequence[str], k: int) -> float | None:
    """Share of the written queries that repeat an earlier line of their response; None when nothing is written."""
    written = _written(queries, k)
    return 1 - len(set(written)) / len(written) if written else None


def words_per_query(queries: Sequence[str], k: int) -> float | None:
    """Mean number of words of the written queries; None when nothing is written."""
    written = _written(queries, k)
    return sum(len(_words(query)) for query in written) / len(written) if written else None


def has_format_error(queries: Sequence[str], finished: bool, k: int) -> bool:
    """True unless the response is `k` lines, none of them empty, and ended by itself (with EOS)."""
    return not (finished and len(queries) == k and all(queries))


def distinct_n(responses: Iterable[Sequence[str]], n: int, k: int) -> float | None:
    """Distinct word n-grams over all n-grams of a corpus's first `k` lines (Li et al. 2016); None without an n-gram.

    It falls as a corpus grows: compare systems on the same examples only.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for queries in responses:
        for query in queries[:k]:
            words = _words(query)
            counts.update(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return len(counts) / counts.total() if counts else None


def word_habits(responses: Iterable[Sequence[str]], k: int) -> dict[str, float]:
    """Shares of a corpus's words that their query said before, and that are function words; 0 without a word.

    Both rise when a policy has learnt what its reward model overlooks.
    """
    words, repeated, function = word_counts(responses, k)
    return {"repeated_word_rate": repeated / max(words, 1), "function_word_rate": function / max(words, 1)}


def word_counts(responses: Iterable[Sequence[str]], k: int) -> tuple[int, int, int]:
    """Words of a corpus's first `k` lines; those that their query said before; function words."""
    queries = [_words(query) for response in responses for query in response[:k]]
    repeated = sum(len(query) - len(set(query)) for query in queries)
    return sum(map(len, queries)), repeated, sum(word in STOP_WORDS for query in queries for word in query)


def distinct_forms(texts: Iterable[str]) -> set[str]:
    """The normalised texts; those without a word are left out."""
    return {form for form in map(normalise, texts) if form}


def _written(queries: Sequence[str], k: int) -> list[str]:
    """Normalised forms of the first `k` lines that are not empty."""
    return [normalise(query) for query in queries[:k] if query]


def _repeats(queries: Sequence[str]) -> list[bool]:
    forms = [normalise(query) for query in queries]
    return [form in forms[:index] for index, form in enumerate(forms)]


def _words(text: str) -> list[str]:
    return normalise(text).split()
