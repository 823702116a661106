"""The page of a run: complete or not, it says what it holds, and nothing on it acts or is fetched."""

from __future__ import annotations

import base64
import re
import sys
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest

from common.errors import InputError, run_command
from common.files import write_json, write_jsonl
from common.pages.charts import PALETTE, draw_chart, running_mean
from common.pages.report import choose_examples, main, write_report
from common.pages.samples import Sample, Verdict
from common.pages.sections import QUESTIONS, STEP1, STEP2, Chart
from tests.evaluation.test_report import make_report
from tests.pages.factory import HOSTILE, made_sample
from tests.pages.html_pages import Page, assert_harmless
from tests.pages.test_findings import rows

SETTINGS = {"reward_path": "reward", "monitor": "lexical", "kl_coef": 0.08, "data_dir": HOSTILE.replace("\ud800", "")}
EVALUATION = make_report() | {"settings": {"reward_annotator": "lexical"}}


def write_step3(folder: Path, **last: float) -> None:
    write_jsonl(folder / "metrics.jsonl", rows(**last))
    write_json(folder / "run_config.json", SETTINGS)
    samples = [
        made_sample([f"{step} {number}"], [number / 4], step, f"e{number}", history=HOSTILE)
        for step in (0, 10, 20) for number in range(4)
    ]  # fmt: skip
    write_jsonl(folder / "samples.jsonl", ({**sample.to_dict()} for sample in _without_surrogates(samples)))


def _without_surrogates(samples: list[Sample]) -> list[Sample]:
    for sample in samples:
        sample.history[0][1] = sample.history[0][1].replace("\ud800", "")
    return samples


def write_run(folder: Path, **last: float) -> Path:
    write_step3(folder / "step3_tppo", **last)
    write_jsonl(folder / "step1_sft" / "metrics.jsonl", [{"step": 1, "loss": 3.0}, {"step": 2, "eval_loss": 2.0}])
    write_jsonl(folder / "step2_token_reward" / "reward" / "metrics.jsonl", [{"step": 6, "eval_word_auc": 0.8}])
    write_json(folder / "report.json", EVALUATION)
    return folder


def page_of(folder: Path) -> Page:
    return assert_harmless(write_report(folder).read_text(encoding="utf-8"))


def test_a_whole_run_has_its_warnings_tables_curves_and_examples(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", response__copy_rate=0.6))
    for expected in (
        "The judge of held-out users and of the rollouts is the reward model's own teacher.",
        "Copies from the history rose. From 0.100 (first 10 steps) to 0.600 (last 10)", "format errors rose",
        "relevance rate 0.400 [0.300, 0.500] 0.500 [0.400, 0.600] +0.200", "Item by item", "Best", "Worst",
        "Step 1: supervised fine-tuning", "Step 2: the token-level reward model", "kl_coef 0.08",
    ):  # fmt: skip
        assert expected in page.text, expected
    for question in QUESTIONS:
        assert (question in page.text) is (question not in ("Is it stable?", "Speed")), question  # not measured here
    assert "Not there" not in page.text and "Nothing found" not in page.text
    assert len(page.fetched) == 3 + 2 + 5 + 1 + 1  # charts of the three questions, of step 1 and of step 2


def test_step_3_alone_says_so(tmp_path: Path) -> None:
    write_step3(tmp_path / "alone")
    page = page_of(tmp_path / "alone")
    assert "this is a page on step 3 alone" in page.text
    assert "Nothing found" in page.text and "Held-out users" not in page.text
    assert "the comparison on held-out users, by scripts/evaluate.sh" in page.text
    write_json(tmp_path / "alone" / "evaluation" / "report.json", EVALUATION)
    page = page_of(tmp_path / "alone")
    assert "Held-out users" in page.text and "by scripts/evaluate.sh" not in page.text


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("step1_sft/metrics.jsonl", "step 1's metrics"),
        ("step2_token_reward/reward/metrics.jsonl", "step 2's metrics"),
        ("step3_tppo/metrics.jsonl", "step 3's metrics"),
        ("step3_tppo/samples.jsonl", "sampled responses of step 3"),
        ("step3_tppo/run_config.json", "step 3's settings"),
        ("report.json", "the comparison on held-out users"),
    ],
)
def test_what_is_missing_is_said_on_the_page(missing: str, said: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / missing).unlink()
    page = page_of(run)
    assert f"Not there: {said}" in page.text and missing in page.text


def test_a_run_of_three_steps_is_not_judged_by_its_drift(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_jsonl(run / "step3_tppo" / "metrics.jsonl", rows()[:3])
    assert "Step 3 has 3 steps. Its end is compared with its beginning from 20 steps on" in page_of(run).text


def test_hostile_text_of_a_run_is_only_shown(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run<script>alert(2)<"))
    assert "run<script>alert(2)<" in page.text and "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text


@pytest.mark.parametrize(("file", "message"), [("", "no run to report on"), ("metrics.jsonl", "metrics.jsonl:1: not")])
def test_what_is_no_run_is_refused_in_a_line(
    file: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if file:
        write_step3(tmp_path)
        (tmp_path / file).write_text("{nonsense\n")
    with pytest.raises(InputError, match=message):
        write_report(tmp_path)
    with mock.patch.object(sys, "argv", ["report.py", "--run", str(tmp_path)]), pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_best_and_worst_are_the_judge_s_and_of_the_newest_steps() -> None:
    def judged(step: int, name: str, reward: float, *queries: int) -> Sample:
        return made_sample(["a"], [reward], step, name, Verdict([[0]] * len(queries), list(queries)))

    samples = [
        judged(0, "old", 9.0, 2, 2, 2),
        judged(10, "paid for nothing", 3.0, 0, 0, 0), judged(20, "bad", -1.0, 0, 0, 0),
        judged(20, "good", 0.5, 2, 1, 1), judged(30, "fair", 0.2, 2, 0, 0), judged(30, "fair too", 0.4, 0, 1, 0),
    ]  # fmt: skip
    best, worst, overpaid = choose_examples(samples)
    assert [sample.id for sample in best.samples] == ["good", "fair too"]
    assert [sample.id for sample in worst.samples] == ["bad", "paid for nothing"]
    assert [sample.id for sample in overpaid.samples] == ["paid for nothing"]
    assert best.why == "by the judge, then by reward, of steps 10, 20, 30"


def test_without_a_judge_the_reward_decides_and_nothing_is_shown_twice() -> None:
    samples = [made_sample(["a"], [reward], 0, str(reward)) for reward in (0.1, 0.5, -0.5, 0.3, 0.2)]
    best, worst = choose_examples(samples)
    assert [sample.id for sample in best.samples] == ["0.5", "0.3"]
    assert [sample.id for sample in worst.samples] == ["-0.5", "0.1"]
    assert choose_examples([]) == [] and len(choose_examples(samples[:1])) == 1


def test_a_chart_holds_its_curves_and_says_them_in_words() -> None:
    chart = Chart("Loss", "nats", {"loss": "training", "eval_loss": "held out", "absent": "never"})
    drawn = draw_chart(chart, [{"step": 1, "loss": 3.0, "eval_loss": None}, {"step": 2, "loss": 2.5, "eval_loss": 2.0}])
    assert drawn.description == "Loss: training from 3 to 2.5; held out from 2 to 2"
    assert [(curve.label, curve.colour, curve.steps, curve.values) for curve in drawn.curves] == [
        ("training", PALETTE[0], [1, 2], [3.0, 2.5]), ("held out", PALETTE[1], [2], [2.0])
    ]  # fmt: skip
    image = base64.b64decode(drawn.image.removeprefix("data:image/svg+xml;base64,")).decode()
    ElementTree.fromstring(image)  # well-formed
    assert PALETTE[0] in image and PALETTE[1] in image and PALETTE[2] not in image
    assert "<script" not in image and not re.search(r'(?:xlink:)?href="(?!#)', image)
    assert draw_chart(chart, [{"step": 1, "other": 1.0}]) is None


def test_no_chart_has_more_curves_than_there_are_colours() -> None:
    charts = [*sum(QUESTIONS.values(), ()), *STEP1, *STEP2]
    assert max(len(chart.curves) for chart in charts) <= len(PALETTE)


def test_running_mean_equals_a_slow_loop() -> None:
    values = np.random.default_rng(0).normal(size=40)
    slow = [values[max(0, end - 10) : end].mean() for end in range(1, 41)]
    np.testing.assert_allclose(running_mean(list(values), 10), slow, atol=1e-12)
