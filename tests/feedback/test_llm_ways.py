"""How an endpoint is held to the form of an answer: found out on one record, by whatever the server knows.

The server that knows `json_object` alone answers as llama-cpp-python's does: HTTP 500 with an error of pydantic.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.annotator_server import PROSE, RIGHT, UNKNOWN_FORMAT, Endpoint
from common.errors import InputError
from common.feedback.annotator import Unlabelled
from common.feedback.labels import read_labels
from common.feedback.llm import check
from common.feedback.llm.client import is_refusal
from common.feedback.llm.judge import SENTENCE, Pair, compare_pairs, score_whole_queries
from common.files import write_jsonl
from step2_token_reward import label
from tests.feedback.endpoint import MODEL, annotate, annotator, expected, item, options, serving
from tests.labelled_samples import sample

ITEMS = [item(number, f"trail shoes {number}\nred felt hat") for number in range(12)]
RIGHT_LABELS = [expected(asked.response) for asked in ITEMS]


def llama_cpp_python(**more: Any) -> Endpoint:
    """A server that knows no `json_schema`, with a small model: what it is not held to is prose."""
    return Endpoint(formats=("text", "json_object"), chats=True, **more)


@pytest.mark.parametrize(
    ("endpoint", "way", "refused"),
    [
        (Endpoint(), "json_schema", 0),
        (Endpoint(chats=True), "json_schema", 0),
        (llama_cpp_python(), "json_object with the schema", 1),
        (Endpoint(formats=("text",)), "none, the prompt alone asks for the form", 2),
    ],
)
def test_the_first_way_that_works_is_taken(
    endpoint: Endpoint, way: str, refused: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One record decides for all; a refused way costs one request, though a server error is else repeated."""
    with serving(endpoint) as url:
        settings = options(url, structured_output="auto")
        assert annotate(settings, tmp_path / "answers.jsonl", ITEMS) == RIGHT_LABELS
        printed = capsys.readouterr().out
        assert printed.startswith(f"structured output: {way}") and printed.count("structured output") == 1
        assert endpoint.outcomes == {RIGHT: len(ITEMS), **({UNKNOWN_FORMAT: refused} if refused else {})}
        if refused:
            assert "Input should be 'text' or 'json_object'" in printed
        # What was found out is in the store, with the answers: a second run asks nothing.
        assert annotate(settings, tmp_path / "answers.jsonl", ITEMS) == RIGHT_LABELS
        assert sum(endpoint.outcomes.values()) == len(ITEMS) + refused
        assert capsys.readouterr().out == f"structured output: {way}\n"


def test_a_failure_of_another_kind_decides_nothing(tmp_path: Path) -> None:
    """The first record meets a server out of memory, three times; the second one decides."""
    endpoint = Endpoint(choose=lambda number, _: "500" if number < 3 else RIGHT)
    with serving(endpoint) as url:
        settings = options(url, structured_output="auto", concurrency=1)
        assert annotate(settings, tmp_path / "answers.jsonl", ITEMS) == RIGHT_LABELS
    assert all(body["response_format"]["type"] == "json_schema" for body in endpoint.seen)
    assert endpoint.outcomes == {"500": 3, RIGHT: len(ITEMS)}


def test_an_endpoint_that_answers_no_question_ends_the_run(tmp_path: Path) -> None:
    with serving(endpoint := Endpoint(choose=lambda *_: "500")) as url:
        settings = options(url, structured_output="auto", max_retries=1)
        with pytest.raises(InputError, match=r"answers no question of tiny/annotator: HTTP 500: out of memory\. Look"):
            annotate(settings, tmp_path / "answers.jsonl", ITEMS)
    assert endpoint.outcomes == {"500": 3 * 2}


def test_a_way_that_the_server_lacks_is_not_asked_for_again_and_again(tmp_path: Path) -> None:
    """A large share of failures is allowed, and all fail: six records are enough to see that."""
    items = [item(number, f"trail shoes {number}") for number in range(300)]
    message = r"6 of 6 records got no valid answer.*Input should be 'text' or 'json_object'.*--structured_output auto"
    with serving(endpoint := llama_cpp_python()) as url, pytest.raises(InputError, match=message):
        annotate(options(url, max_failure_share=0.5, concurrency=1), tmp_path / "answers.jsonl", items)
    assert endpoint.outcomes == {UNKNOWN_FORMAT: 6}


def test_a_model_that_keeps_to_no_form_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = [item(number, f"trail shoes {number}") for number in range(300)]
    with serving(endpoint := Endpoint(formats=("text",), chats=True)) as url:
        settings = options(url, structured_output="auto", max_failure_share=0.5, concurrency=1)
        with pytest.raises(InputError, match=r"not valid JSON.*What may help: another --model") as caught:
            annotate(settings, tmp_path / "answers.jsonl", items)
    assert "--structured_output auto" not in str(caught.value)
    assert "none: the answer does not have the form: 'These are fine queries" in capsys.readouterr().out
    assert endpoint.outcomes == {UNKNOWN_FORMAT: 2, PROSE: 6 * 3}  # the first record's answer is in the store


def test_a_record_that_no_way_helps_is_passed_over(tmp_path: Path) -> None:
    """A response too long for the server is refused whichever way it is asked about."""
    endpoint = Endpoint(choose=lambda _, body: "400" if "trail shoes 0\n" in body["messages"][1]["content"] else RIGHT)
    with serving(endpoint) as url:
        results = annotate(options(url, structured_output="auto"), tmp_path / "answers.jsonl", ITEMS)
    assert isinstance(results[0], Unlabelled) and "too long" in results[0].reason and results[1:] == RIGHT_LABELS[1:]
    assert endpoint.outcomes == {"400": 3 + 1, RIGHT: len(ITEMS) - 1}


def test_the_judge_finds_out_once(tmp_path: Path) -> None:
    with serving(endpoint := llama_cpp_python()) as url:
        settings = options(url, structured_output="auto")
        with annotator(settings, tmp_path / "answers.jsonl") as judge:
            scores = score_whole_queries(judge.model, ITEMS[:3], "test")
            pairs = [Pair(ITEMS[0].history, "trail shoes", "red hat")]
            (comparison,) = compare_pairs(judge.model, pairs, SENTENCE, "test")
    assert None not in scores and comparison.verdict is not None
    assert endpoint.outcomes == {UNKNOWN_FORMAT: 1, RIGHT: 3 + 2}


def test_the_check_finds_out_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The pipeline asks annotator and judge by this command before it trains."""
    with serving(llama_cpp_python()) as url:
        monkeypatch.setattr(sys, "argv", ["check", "--base_url", url, "--model", MODEL])
        check.main()
    printed = capsys.readouterr().out
    assert printed.startswith("structured output: json_object with the schema") and "answers as it should" in printed


def test_labelling_goes_on_at_a_server_that_knows_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, labels = tmp_path / "samples.jsonl", tmp_path / "labels.jsonl"
    write_jsonl(samples, (sample(number, "train", f"best shoes {number}") for number in range(12)))
    flags = ["label.py", "--samples", str(samples), "--labels", str(labels), "--annotator", "llm", "--model", MODEL]
    with serving(llama_cpp_python()) as url:
        monkeypatch.setattr(sys, "argv", [*flags, "--base_url", url, "--max_requests", "6", "--concurrency", "1"])
        with pytest.raises(InputError, match=r"--max_requests 6 is reached\. 5 of 12 records are done"):
            label.main()
    assert "structured output: json_object with the schema (json_schema: HTTP 500" in capsys.readouterr().out
    with serving(endpoint := Endpoint()) as url:
        monkeypatch.setattr(sys, "argv", [*flags, "--base_url", url])
        label.main()
    assert "structured output: json_schema\n" in capsys.readouterr().out and endpoint.outcomes == {RIGHT: 7}
    pairs = read_labels(samples, labels)  # refuses labels of two annotators
    assert [annotation for _, annotation in pairs] == [expected(row["response"]) for row, _ in pairs]
    assert len(pairs) == 12


@pytest.mark.parametrize(
    ("status", "body", "refusal"),
    [
        (500, "[{'type': 'literal_error', 'loc': ('body', 'response_format', 'type')}]", True),
        (500, "1 validation error for ChatCompletionRequest", True),
        (502, '{"detail": [{"loc": ["body", "seed"], "msg": "Input should be a valid integer"}]}', True),
        (400, "anything", True),
        (422, "", True),
        (500, '{"error": {"message": "out of memory"}}', False),
        (503, "Service Unavailable: loading the model", False),
        (429, "response_format quota", False),
    ],
)
def test_what_counts_as_a_refusal(status: int, body: str, refusal: bool) -> None:
    assert is_refusal(status, body) is refusal
