"""Invented samples."""

from __future__ import annotations

from common.pages.samples import Sample, Token, Verdict

HOSTILE = "\u202e<script>alert(1)</script>\x00\x1b[31m {{ 7 * 7 }} $\\frac{ \" onload='x' &amp; \ud800"


def made_sample(
    texts: list[str], rewards: list[float], step: int = 0, name: str = "e0", verdict: Verdict | None = None,
    history: str = "red shoes",
) -> Sample:
    """A finished response of `texts`, whose rewards are the words' alone."""
    tokens = [Token(text, reward, 0.0, 0.0, 0.0, 0.5) for text, reward in zip(texts, rewards, strict=True)]
    return Sample(step, name, [["search", history]], [], True, tokens, verdict)
