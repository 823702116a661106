"""A user's own function as annotator: what it gets, what it may answer, and how its failures are told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.data.records import Event
from common.errors import InputError
from common.feedback.annotator import FeedbackItem
from common.feedback.llm.options import EndpointOptions
from common.feedback.load import load_annotator, open_annotator
from common.feedback.names import check_annotator_name
from common.feedback.own import OwnAnnotator
from common.files import write_jsonl
from step2_token_reward.label import main
from step3_tppo.config import Step3Config
from tests.commands import ROOT
from tests.labelled_samples import sample

# 2 for a word of a click's title, 1 for a word of a search, 0 for others.
SCORE = """
def score(history, response):
    searched = {word.lower() for event in history if event.type == "search" for word in event.query.split()}
    clicked = {word.lower().strip(",") for event in history if event.type == "click" for word in event.title.split()}
    return [[2 if w.lower() in clicked else 1 if w.lower() in searched else 0 for w in query] for query in response]
"""
# The samples' history: a search for "running shoes for flat feet" and a click on "Boots and shoes, page <place>".
BY_HAND = {
    "Best shoes!\nfeet": ([[0, 2], [1]], [1, 1]),  # "best" is unknown, half of the words known and one scores 2
    "boots, boots\n\nwi-fi": ([[2, 0], [], [0]], [1, 0, 0]),  # a repeated word is noise: half of the words count
    "running page 2": ([[1, 2, 2]], [2]),  # page 2: the third sample's click
    "靴 flat feet": ([[0, 1, 1]], [0]),  # a CJK character is a word; two of three known, none scores 2
}


def item(response: str) -> FeedbackItem:
    return FeedbackItem("example", "user", (Event("search", query="green tea"),), ("secret",), response)


def own(folder: Path, text: str, function: str = "score") -> OwnAnnotator:
    path = folder / "my_scores.py"
    path.write_text(text, encoding="utf-8")
    return OwnAnnotator(f"{path}:{function}")


def test_label_writes_the_scores_of_an_own_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [sample(place, "train", response) for place, response in enumerate(BY_HAND)]
    write_jsonl(tmp_path / "samples.jsonl", rows)
    (tmp_path / "my_scores.py").write_text(SCORE)
    monkeypatch.chdir(tmp_path)
    flags = ["--samples", "samples.jsonl", "--labels", "labels.jsonl", "--annotator", "my_scores.py:score"]
    monkeypatch.setattr(sys, "argv", ["label.py", *flags])
    main()
    labels = [json.loads(line) for line in Path("labels.jsonl").read_text().splitlines()]
    assert [(label["words"], label["queries"]) for label in labels] == list(BY_HAND.values())
    (name,) = {label["annotator"] for label in labels}
    assert re.fullmatch(r"own:my_scores\.py:score@[0-9a-f]{12}", name)
    assert name in capsys.readouterr().out

    (tmp_path / "my_scores.py").write_text(SCORE + "\n# another version\n")
    with pytest.raises(InputError, match=r"labelled by 'own:my_scores\.py:score@"):
        main()


def test_a_function_sees_events_and_words_and_neither_targets_nor_user(tmp_path: Path) -> None:
    annotator = own(tmp_path, "seen = []\ndef score(*given):\n    seen.append(given)\n    return [[1, 1], [2]]\n")
    annotator.annotate(item("green  Tea!\n北"))
    assert sys.modules["own_annotator_my_scores"].seen == [
        ((Event("search", query="green tea"),), [["green", "Tea"], ["北"]])
    ]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("None", "None (NoneType) came, which is no list"),
        ("[[1, 2]]", "a list of 1 came for 2 queries"),
        ("[[1, 2], 1]", "1 (int) came for query 2, which is no list"),
        ("[[1], [1]]", "1 scores came for the 2 words of query 1"),
        ("[[1, 3], [1]]", "3 (int) came for the word 'tea' of query 1"),
        ("[[1, True], [1]]", "True (bool) came for the word 'tea' of query 1"),
        ("[[1, 1], [0.5]]", "0.5 (float) came for the word 'shop' of query 2"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused_with_what_was_expected(
    tmp_path: Path, answer: str, problem: str
) -> None:
    annotator = own(tmp_path, f"def score(history, response):\n    return {answer}\n")
    with pytest.raises(InputError) as refused:
        annotator.annotate(item("green tea\nshop"))
    message = str(refused.value)
    assert "my_scores.py:score' on example 'example'" in message and "[2, 1] of them" in message and problem in message


def test_a_function_that_fails_is_named_with_its_line(tmp_path: Path) -> None:
    annotator = own(tmp_path, "def score(history, response):\n    return {}['missing']\n")
    with pytest.raises(InputError, match=r"failed on example 'example': KeyError: 'missing' at .*my_scores\.py:2$"):
        annotator.annotate(item("tea"))


@pytest.mark.parametrize(
    ("text", "function", "message"),
    [
        ("import nowhere_to_be_found", "score", r"cannot be run: ModuleNotFoundError: .* at .*my_scores\.py:1"),
        ("\ndef score(:", "score", r"cannot be run: SyntaxError: .* at .*my_scores\.py:2"),
        ("def rate(history, response): ...", "score", "has no function 'score'; it has rate"),
        ("score = 3", "score", "has no function 'score'"),
        ("def score(response): ...", "score", r"function of two arguments.*found score\(response\)"),
        ("def score(history, response, k): ...", "score", r"function of two arguments.*'k'"),
    ],
)
def test_a_file_without_such_a_function_is_refused(tmp_path: Path, text: str, function: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        own(tmp_path, text, function)


def test_an_own_function_has_a_place_where_annotators_have_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file 'missing\.py'; the form is FILE\.py:FUNCTION"):
        load_annotator("missing.py:score")
    with pytest.raises(InputError, match="takes neither --truth"):
        load_annotator("missing.py:score", truth_path="truth.jsonl")
    (tmp_path / "my_scores.py").write_text(SCORE)
    place, settings = f"{tmp_path / 'my_scores.py'}:score", {"truth_path": "", "seed": 0, "template": "", "answers": ""}
    with open_annotator(place, endpoint=EndpointOptions(), **settings) as opened:
        assert isinstance(opened, OwnAnnotator)
    with pytest.raises(InputError, match="asks no language model"), open_annotator(
        place, endpoint=EndpointOptions(base_url="http://localhost:1/v1"), **settings
    ):
        pass
    check_annotator_name("a/b.py:score", "annotator", known=("lexical",))
    for name in ("oracle", "b.py", "b.py:", "b.py:my score", "b.txt:score"):
        with pytest.raises(InputError, match=r"is none of lexical, nor of the form FILE\.py:FUNCTION"):
            check_annotator_name(name, "annotator", known=("lexical",))
    paths = {name: "x" for name in ("output_dir", "actor_path", "reward_path", "data_dir")}
    Step3Config(**paths, monitor="my_scores.py:score").validate(world_size=1)
    with pytest.raises(InputError, match="--monitor 'llm' is none of simulated, lexical, nor"):
        Step3Config(**paths, monitor="llm").validate(world_size=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("oracle", "--annotator oracle is none of simulated, lexical, llm, nor of the form FILE.py:FUNCTION"),
        ("missing.py:score", "error: --annotator missing.py:score: no such file as missing.py"),
    ],
)
def test_the_main_job_refuses_an_annotator_that_is_none_before_it_begins(name: str, message: str) -> None:
    command = ["bash", "scripts/run_all.sh", "--run_name", "refused", "--annotator", name]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert ran.returncode == 2 and message in ran.stderr
    assert not (ROOT / "outputs" / "refused").exists()
