"""Sampled responses on a page and in an image: the colours are the rewards', and hostile text is only shown."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InputError
from common.files import write_jsonl
from common.pages.colours import hexadecimal, reward_colour
from common.pages.heat_map import heat_map
from common.pages.render import signed, visible_token
from common.pages.samples import Token, Verdict, read_samples, samples_page
from tests.pages.factory import HOSTILE, made_sample
from tests.pages.html_pages import assert_harmless

TEXTS = ["red", " sho", "es", "\n", " hat", ""]
REWARDS = [0.25, -0.5, 0.0, 0.1, 1.0, -3.0]


def test_a_page_shows_each_token_on_the_colour_of_its_reward() -> None:
    verdict = Verdict([[2, 1], [0]], [1, 0])
    text = samples_page([made_sample(TEXTS, REWARDS, verdict=verdict)], 20, "outputs/run")
    chips = re.findall(r'style="background:(#\w+)">([^<]*)</span><small>([^<]*)<', text)
    shown = ["red", "sho", "es", "⏎", "hat", "end"]
    assert chips == [
        (hexadecimal(reward_colour(reward)), token, signed(reward))
        for token, reward in zip(shown, REWARDS, strict=True)
    ]
    page = assert_harmless(text)
    assert "Sampled responses at step 20" in page.text
    assert "judge: 1 of 2 relevant" in page.text and "judge 0 of 2, words 0" in page.text
    assert "search red shoes" in page.text


def test_a_page_without_a_judge_or_a_history_or_a_sample_says_nothing_of_it() -> None:
    sample = made_sample(TEXTS, REWARDS)
    sample.history.clear()
    page = assert_harmless(samples_page([sample], 0, "run"))
    assert "judge" not in page.text and "no history" in page.text
    assert "0 responses" in assert_harmless(samples_page([], 0, "run")).text


@given(st.text(max_size=30))
def test_no_text_can_act_on_a_page(text: str) -> None:
    for hostile in (text, HOSTILE + text):
        sample = made_sample([hostile], [0.5], name=hostile, history=hostile)
        sample.targets.append(hostile)
        page = assert_harmless(samples_page([sample], 0, hostile))
        assert page.tags <= set(
            "html head meta title style body h1 h2 p div span code article header b bdi i small details summary table "
            "thead tbody tr th td".split()
        )


def test_hostile_text_is_still_readable() -> None:
    text = assert_harmless(samples_page([made_sample([HOSTILE], [0.5])], 0, "run")).text
    assert "�<script>alert(1)</script> [31m {{ 7 * 7 }}" in text and "49" not in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [("", "end"), (" ", "␣"), ("\n", "⏎"), (" a\tb", "a b"), ("\u200b", "�"), ("\x00", "␣"), ("京", "京")],
)
def test_a_token_is_never_shown_as_nothing(text: str, shown: str) -> None:
    assert visible_token(text) == shown


def test_numbers_have_one_form() -> None:
    assert [signed(value) for value in (0.125, -0.5, 0.001, -0.001, None)] == ["+0.12", "−0.50", "0.00", "0.00", "–"]


def test_lines_end_where_a_line_break_stands() -> None:
    sample = made_sample(["a", "\n", "b c", " d\n", ""], [0.0] * 5)
    assert [[token.text for token in line] for line in sample.lines] == [["a", "\n"], ["b c", " d\n"], [""]]
    assert made_sample(["a", "\n"], [0.0] * 2).lines[-1][-1].text == "\n"
    assert made_sample([], []).lines == []


def test_a_token_s_reward_is_the_sum_of_its_parts_and_a_response_s_that_of_its_tokens() -> None:
    assert Token("a", 0.5, 0.25, -0.125, -1.0, 9.0).reward == -0.375
    assert made_sample(TEXTS, REWARDS).reward == pytest.approx(-2.15)


def test_the_image_shows_the_colours_and_survives_any_text() -> None:
    image = heat_map([made_sample(["京都", "$\\frac", HOSTILE, "a" * 300], [-0.75] * 4), made_sample([], [])])
    assert image.dtype == np.uint8 and image.shape[2] == 3
    for reward in (-0.75, 1.0):  # a token's, and the legend's
        assert (image == np.array(reward_colour(reward))).all(axis=2).sum() > 100


def test_samples_are_read_as_they_were_written(tmp_path: Path) -> None:
    samples = [made_sample(TEXTS, REWARDS, step, verdict=Verdict([[1]], [2])) for step in (0, 20)]
    write_jsonl(tmp_path / "samples.jsonl", (sample.to_dict() for sample in samples))
    assert read_samples(tmp_path / "samples.jsonl") == samples


@pytest.mark.parametrize("row", [{"step": 3}, {"step": 0, "verdict": None, "tokens": [{"txt": "a"}]}])
def test_a_line_that_is_no_sample_is_named(row: dict, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "samples.jsonl", [made_sample(TEXTS, REWARDS).to_dict(), row])
    with pytest.raises(InputError, match=r"samples\.jsonl:2: no sample of step 3"):
        read_samples(tmp_path / "samples.jsonl")
