"""label.py with a language model: killed and gone on with, dry, limited, and its quarantine left out of training."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.annotator_server import RIGHT, Endpoint
from common.errors import InputError
from common.feedback.annotator import check_annotation
from common.feedback.labels import quarantine_path, read_labels, read_quarantine, read_samples
from common.feedback.lexical import LexicalAnnotator
from common.feedback.llm.answers import answer_key
from common.feedback.llm.client import sampling
from common.feedback.llm.prompts import load_template
from common.feedback.llm.schemas import response_format, word_form
from common.files import write_jsonl
from step2_token_reward.label import label_samples, main
from tests.feedback.endpoint import MODEL, expected, options, serving
from tests.labelled_samples import sample


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "samples.jsonl"
    write_jsonl(path, (sample(number, "train", f"best shoes {number}\nsuede boots") for number in range(60)))
    return path


def flags(samples: Path, url: str, *more: str) -> list[str]:
    return [
        "label.py", "--samples", str(samples), "--labels", str(samples.with_name("labels.jsonl")), "--annotator", "llm",
        "--base_url", url, "--model", MODEL, "--timeout", "2", "--max_retries", "1", *more,
    ]  # fmt: skip


def label(monkeypatch: pytest.MonkeyPatch, samples: Path, url: str, *more: str) -> None:
    monkeypatch.setattr(sys, "argv", flags(samples, url, *more))
    main()


def key_of(body: dict[str, Any]) -> str:
    """The key under which the answer to a request is stored."""
    template = load_template("label_words_v1").digest
    form = response_format(word_form("best shoes 0\nsuede boots"), "json_schema")
    return answer_key(MODEL, template, body["messages"], sampling(options("")), form)


def stored_keys(samples: Path) -> set[str]:
    lines = samples.with_name("labels.answers.jsonl").read_bytes().split(b"\n")[:-1]
    return {json.loads(line)["key"] for line in lines}


def test_killed_again_and_again_no_stored_answer_is_asked_for_twice_and_no_label_is_lost(samples: Path) -> None:
    """kill -9 in the middle of the work, four times; the fifth run ends it."""
    endpoint = Endpoint(seconds=0.05)
    with serving(endpoint) as url:
        command = [sys.executable, "-m", "step2_token_reward.label", *flags(samples, url, "--concurrency", "4")[1:]]
        before: set[str] = set()
        for run in range(5):
            begun = len(endpoint.seen)
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            while run < 4 and process.poll() is None and len(endpoint.seen) < begun + 10:
                time.sleep(0.005)
            if run < 4:
                os.kill(process.pid, signal.SIGKILL)
            output, _ = process.communicate(timeout=240)
            assert process.returncode == (-signal.SIGKILL if run < 4 else 0), output
            assert not before & {key_of(body) for body in endpoint.seen[begun:]}
            before = stored_keys(samples)
        assert len(before) == 60
        # What was under way at a kill, four requests at most, is asked for again; all else once.
        assert len(endpoint.seen) <= 60 + 4 * 4
    pairs = read_labels(samples, samples.with_name("labels.jsonl"))
    assert len(pairs) == 60
    assert all(annotation == expected(row["response"]) for row, annotation in pairs)


def test_every_label_carries_its_template(
    samples: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Endpoint()) as url:
        label(monkeypatch, samples, url, "--price_in", "2", "--price_out", "4")
    name = f"llm:{MODEL}:label_words_v1@{load_template('label_words_v1').digest[:12]}"
    rows = [json.loads(line) for line in samples.with_name("labels.jsonl").read_text().splitlines()]
    assert {row["annotator"] for row in rows} == {name}
    answers = [json.loads(line) for line in samples.with_name("labels.answers.jsonl").read_text().splitlines()]
    assert {row["template"] for row in answers} == {name.rpartition(":")[2]}
    printed = capsys.readouterr().out
    tokens = [sum(row[field] for row in answers) for field in ("prompt_tokens", "answer_tokens")]
    cost = (2 * tokens[0] + 4 * tokens[1]) / 1e6
    assert f"60 requests, 60 answers, {tokens[0]} prompt tokens, {tokens[1]} answer tokens, cost {cost:.2f}" in printed
    assert printed.splitlines()[-2] == f"labels by {name}: {samples.with_name('labels.jsonl')}"


def test_a_dry_run_asks_nothing_and_writes_nothing(
    samples: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(endpoint := Endpoint()) as url:
        label(monkeypatch, samples, url, "--dry_run", "--price_in", "1", "--price_out", "1")
        printed = capsys.readouterr().out.splitlines()
        assert not endpoint.outcomes and not samples.with_name("labels.jsonl").exists()
        label(monkeypatch, samples, url, "--max_requests", "70")
        capsys.readouterr()
        samples.with_name("labels.jsonl").unlink()
        label(monkeypatch, samples, url, "--dry_run")
        after = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("60 samples to label, 60 of them by asking")
    assert printed[1].startswith("calls: 60 (0 answers are stored already)")
    assert any(line.startswith("cost, estimated: 0.0") for line in printed)
    assert "query 1: best shoes 0" in printed
    assert after[1].startswith("calls: 0 (60 answers are stored already)")
    real = sum(len(message["content"]) for body in endpoint.seen for message in body["messages"]) / 4
    assert f"{real:,.0f} of prompts" in printed[2]


def test_samples_in_quarantine_are_left_out_of_training_and_tried_again(
    samples: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Endpoint(choose=lambda _, body: "500" if "best shoes 7\n" in body["messages"][1]["content"] else RIGHT)
    labels = samples.with_name("labels.jsonl")
    with serving(broken) as url:
        label(monkeypatch, samples, url)
        assert "quarantined: 1 of 60 samples (1.67%) have no valid answer" in capsys.readouterr().out
        assert read_quarantine(labels, read_samples(samples)) == {"train7#0": "HTTP 500: out of memory"}
        files = (labels, quarantine_path(labels), labels.with_name("labels.answers.jsonl"))
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
        pairs = read_labels(samples, labels)
        assert len(pairs) == 59 and "train7#0" not in [row["id"] for row, _ in pairs]
        broken.choose = lambda *_: RIGHT
        label(monkeypatch, samples, url)
    assert not quarantine_path(labels).exists() and len(read_labels(samples, labels)) == 60
    for row, annotation in read_labels(samples, labels):
        check_annotation(annotation, row["response"])


def test_a_quarantine_of_other_samples_is_refused(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = samples.with_name("labels.jsonl")
    with serving(Endpoint()) as url:
        label(monkeypatch, samples, url)
    quarantine_path(labels).write_text('{"id": "train7#0", "sample_digest": "0"}\n')
    with pytest.raises(InputError, match=r"labels\.quarantine\.jsonl:1: 'train7#0' belongs to another sample file"):
        read_labels(samples, labels)


def test_a_share_is_the_same_share_in_every_run(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(endpoint := Endpoint()) as url:
        label(monkeypatch, samples, url, "--share", "0.3")
        first = samples.with_name("labels.jsonl").read_text()
        label(monkeypatch, samples, url, "--share", "0.3")
        assert samples.with_name("labels.jsonl").read_text() == first
        label(monkeypatch, samples, url)
    count = first.count("\n")
    assert 6 <= count <= 32  # 18 on average; four standard deviations are 14.2
    assert len(endpoint.seen) == 60


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--annotator", "lexical"], "asks no language model: --base_url and --model are for 'llm'"),
        (["--truth", "truth.jsonl"], "annotator 'llm' takes neither --truth nor --word_error_rate"),
        (["--share", "0"], "--share must be above 0, not 0.0"),
        (["--template", "nowhere"], "template 'nowhere' is neither a file nor one of"),
        (["--base_url", "http://8.8.8.8/v1"], "Add --allow_remote"),
    ],
)
def test_flags_that_cannot_be_meant(
    more: list[str], message: str, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=message):
        label(monkeypatch, samples, "http://127.0.0.1:9/v1", *more)


def test_labels_of_another_template_are_not_mixed(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(endpoint := Endpoint()) as url:
        label(monkeypatch, samples, url)
        with pytest.raises(InputError, match="one file holds one annotator's labels"):
            label(monkeypatch, samples, url, "--template", "label_terse_v1")
    assert len(endpoint.seen) == 60


def test_two_runs_do_not_label_into_one_file(samples: Path) -> None:
    labels = samples.with_name("labels.jsonl")
    with labels.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"labels\.jsonl: another process is writing here"):
            label_samples(read_samples(samples), labels, LexicalAnnotator())
    label_samples(read_samples(samples), labels, LexicalAnnotator())
    assert len(read_labels(samples, labels)) == 60


def test_a_malformed_sample_is_named_before_anything_is_asked(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    rows[50]["history"] = [{"type": "search"}]
    write_jsonl(samples, rows)
    with serving(endpoint := Endpoint()) as url, pytest.raises(InputError, match="sample 'train50#0': a search event"):
        label(monkeypatch, samples, url)
    assert not endpoint.outcomes
