"""Systems without a model, which unmask a hollow win: what a user's history or everybody's searches give away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from common.data.records import Example
from common.text import normalise

Control = Callable[[Example], list[str]]


def copy_last(k: int) -> Control:
    """The user's last `k` different queries, the newest first."""
    return lambda example: list(dict.fromkeys(reversed(searches(example))))[:k]


def user_frequent(k: int) -> Control:
    """The user's `k` most frequent queries; of equals the newer one."""

    def respond(example: Example) -> list[str]:
        newest_first = searches(example)[::-1]
        return [query for query, _ in Counter(newest_first).most_common(k)]

    return respond


def popularity(k: int, train: Sequence[Example]) -> Control:
    """The `k` queries that most users of the training split searched for, the same for everybody."""
    counts = Counter(
        query
        for example in train
        for query in {*searches(example), *map(normalise, example.targets)}
    )
    popular = [query for query, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:k]]
    return lambda example: popular


def searches(example: Example) -> list[str]:
    """The normalised queries of a history, oldest first, without empty ones."""
    queries = (normalise(event.query or "") for event in example.history if event.type == "search")
    return [query for query in queries if query]
