"""The page of pretrained models: the control by hand, and every number of a record in its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.data.records import Event, Example
from study.pretrained import MEASURES, control, main, page


def estimate(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 2}


def measures(start: float) -> dict[str, Any]:
    return {name: estimate(start + place / 100) for place, name in enumerate(MEASURES)}


@pytest.fixture
def record() -> dict[str, Any]:
    systems = {
        name: {**measures(start), "greedy": measures(start + 0.5)}
        for name, start in (("base", 0.1), ("sft", 0.2), ("tppo", 0.3))
    }
    change = {"differences": measures(0.05)}
    curve = {"reward/score_per_response": 1.0, "value/explained_variance": 0.5, "response/format_error_rate": 0.1}
    return {
        "settings": {"model": "m", "reward_model": "r", "annotator": "lexical", "seed": "0"},
        "examples": {"train": [10, 4], "test": [3, 2]},
        "decoding": {"temperature": 0.8},
        "machine": {"ranks": 2, "system": "Linux"},
        "seconds": {"step1_sft": 120.0, "step3_tppo": 60.0},
        "step1": [{"epoch": 0, "eval_perplexity": 14.0}, {"epoch": 3, "eval_perplexity": 6.5}],
        "step2": {"word_auc": 0.86, "token_auc": 0.84, "sentence_auc": 0.8, "sentence_spearman": 0.4},
        "step3": [{"step": n, "seconds/step": 60.0 + n, "kl/per_sequence": 0.2 * n, **curve} for n in (0, 1)],
        "systems": systems,
        "gold": measures(0.9),
        "copy": measures(0.7),
        "comparisons": {"tppo_vs_sft": {**change, "greedy": {"differences": measures(-0.2)}}},
        "warnings": ["The judge is the teacher."],
        "note": "Two at a time.",
        "answers": [
            {"history": ["red | hat"], "gold": ["a"], "base": list("bcdefg"), "sft": ["c", "d"], "tppo": ["<script>"]}
        ],
    }  # fmt: skip


def test_the_page_holds_the_numbers_of_a_record(record: dict[str, Any]) -> None:
    text = page({"cast": record})
    assert "from 14.0 (base model) to 6.5" in text and "word_auc 0.860" in text
    assert "Minutes: 3 (step1_sft 2.0, step3_tppo 1.0). Two at a time." in text
    assert "2 rollouts, 60 s each" in text and "in the last 4 is 0.10 nats" in text
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert rows["TPPO - SFT, sampled"][1] == "+0.050 [+0.040, +0.060]"
    assert rows["TPPO - SFT, greedy"][1] == "-0.200 [-0.210, -0.190]"
    tables = [part for part in text.split("\n\n") if part.startswith("| sampled") or part.startswith("| greedy")]
    for part, shift in zip(tables, (0.0, 0.5), strict=True):
        found = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in part.splitlines()[2:]}
        assert found["SFT"][0] == f"{0.2 + shift:.3f} [{0.19 + shift:.3f}, {0.21 + shift:.3f}]"
        assert found["TPPO"][-1].strip("| ") == f"{0.3 + shift + (len(MEASURES) - 1) / 100:.3f}"
        assert found["copy of the last queries"][1] == "0.710"
    assert "<script>" not in text and "red &#124; hat" in text
    assert "c<br>d" in text and "b<br>c<br>d<br>e<br>*2 more lines*" in text


def test_the_page_is_drawn_again_from_the_record(record: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "pretrained.json").write_text(json.dumps({"cast": record}))
    monkeypatch.setattr("sys.argv", ["pretrained", "--report_only", "--results_dir", str(tmp_path)])
    main()
    assert (tmp_path / "pretrained.md").read_text() == page({"cast": record})
    assert (tmp_path / "figures" / "pretrained.png").stat().st_size > 1000


def test_the_control_by_hand() -> None:
    """It writes the user's last queries: relevant words of the next ones, nothing new, and too few lines."""
    def example(user: str, queries: list[str], targets: tuple[str, ...]) -> Example:
        history = tuple(Event("search", query=query) for query in queries)
        return Example(user, user, user, "invented", "test", history, targets)

    first = example("u1", ["red hat", "blue hat"], ("blue hat", "hat price"))
    found = control([first, example("u2", ["tea"], ("coffee", "x"))], 2, "lexical")
    assert found["copy_rate"]["value"] == 1.0 and found["duplicate_rate"]["value"] == 0.0
    assert found["format_error_rate"]["value"] == 0.5  # the second user has one query alone
    assert found["recall"]["value"] == 0.25
