"""Sampled responses with the reward of each token: a line of samples.jsonl each, and a page to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.feedback.annotator import RELEVANT_FROM
from common.files import read_jsonl
from common.pages.render import render

SAMPLES_NAME = "samples.jsonl"
LEGEND = (-1.0, -0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a response: its text (empty for a special token), the parts of its reward, and its KL in nats.

    `words` and `query` are the scores of the words and of the whole query as rewards, `length` the length penalty's
    part, `guard` the list guards'. `kl` is no part of `reward`: what it costs depends on kl_coef; None if not finite.
    """

    text: str
    words: float
    query: float
    length: float
    guard: float
    kl: float | None

    @property
    def reward(self) -> float:
        """Sum of the parts."""
        return self.words + self.query + self.length + self.guard


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's scores, 0..2: of the words of each line, and of each line."""

    words: list[list[int]]
    queries: list[int]


@dataclass(frozen=True, slots=True)
class Sample:
    """A response that a policy wrote at `step` after `history`, pairs of an event's type and its text, oldest first.

    `targets` are the queries that the log has next; `finished` says whether the response ended by itself.
    """

    step: int
    id: str
    history: list[list[str]]
    targets: list[str]
    finished: bool
    tokens: list[Token]
    verdict: Verdict | None

    @property
    def reward(self) -> float:
        """The response's reward, without the KL's cost."""
        return sum(token.reward for token in self.tokens)

    @property
    def relevant(self) -> int | None:
        """How many of its queries the judge calls relevant; None without a judge."""
        return None if self.verdict is None else sum(score >= RELEVANT_FROM for score in self.verdict.queries)

    @property
    def lines(self) -> list[list[Token]]:
        """The tokens by the line that they stand in; one that holds a line break ends its line."""
        lines: list[list[Token]] = [[]]
        for token in self.tokens:
            lines[-1].append(token)
            if "\n" in token.text:
                lines.append([])
        return lines if lines[-1] else lines[:-1]

    def line_score(self, index: int) -> int | None:
        """The judge's score of the query in line `index`; None where there is none."""
        if self.verdict is None or index >= len(self.verdict.queries):
            return None
        return self.verdict.queries[index]

    def to_dict(self) -> dict[str, Any]:
        """A line of samples.jsonl."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Sample:
        """Inverse of `to_dict`; raises `TypeError` or `KeyError` for a row that is none of ours."""
        verdict = Verdict(**row["verdict"]) if row["verdict"] else None
        return cls(**{**row, "tokens": [Token(**token) for token in row["tokens"]], "verdict": verdict})


def read_samples(path: str | Path) -> list[Sample]:
    """All samples of a file, in order. Raises `InputError` that names the line for one that is no sample."""
    samples = []
    for number, row in read_jsonl(path):
        try:
            samples.append(Sample.from_dict(row))
        except (TypeError, KeyError) as error:
            raise InputError(f"{path}:{number}: no sample of step 3 ({error}); another version wrote it") from None
    return samples


def samples_page(samples: Sequence[Sample], step: int, run: str) -> str:
    """The page `samples/step_NNNNN.html`."""
    mean = sum(sample.reward for sample in samples) / max(len(samples), 1)
    return render("samples.html", samples=samples, step=step, run=run, mean=mean, legend_values=LEGEND)
