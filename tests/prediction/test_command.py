"""The prediction command: its file of predictions, its refusals, and that it needs neither launcher nor settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from common.errors import InputError, TrainingDiverged
from common.files import write_jsonl
from common.models.token_reward import TokenRewardModel
from common.prediction.main import main
from tests.prediction.models import HISTORIES, LEARNT

SCRIPT = Path("scripts/predict.py").resolve()


def run(**flags: object) -> None:
    argv = ["predict.py", *(f"--{name}={value}" for name, value in flags.items())]
    with mock.patch.object(sys, "argv", argv):
        main()


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "history.jsonl"
    events = [[event.to_dict() for event in of_user] for of_user in HISTORIES]
    write_jsonl(path, ({"user_id": f"u{place}", "events": of_user} for place, of_user in enumerate(events)))
    return path


def test_from_any_folder_in_one_process_without_the_launcher(
    model_folder: Path, reward_folder: Path, history: Path, tmp_path: Path
) -> None:
    flags = {"model": model_folder, "reward": reward_folder, "history": history, "output": "p.jsonl"}
    argv = [str(SCRIPT), *(f"--{name}={value}" for name, value in flags.items())]
    program = (
        f"import runpy, sys; sys.argv = {argv}; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "assert 'deepspeed' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DS_ACCELERATOR")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "predictions: p.jsonl (3 lines, 0 of them with fewer than k queries)" in done.stdout
    assert "predictions: 100%" in done.stderr
    rows = read_rows(tmp_path / "p.jsonl")
    assert [(row["id"], row["user_id"], row["queries"]) for row in rows] == [
        (f"history/u{place}", f"u{place}", queries) for place, queries in enumerate(LEARNT)
    ]
    for row in rows:
        assert [" ".join(word["word"] for word in query) for query in row["words"]] == row["queries"]
        assert all(0 <= word["score"] <= 2 for query in row["words"] for word in query)
        assert ["".join(text for text, _ in query).strip() for query in row["tokens"]] == row["queries"]
        assert len(row["query_scores"]) == 2 and all(0 <= score <= 1 for score in row["query_scores"])


def test_samples_are_numbered_and_repeat_with_their_seed(model_folder: Path, history: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        run(model=model_folder, history=history, output=tmp_path / name, temperature=3, samples=2, seed=seed)
    one, again, other = (read_rows(tmp_path / name) for name in ("one", "again", "other"))
    assert one == again and one != other
    assert [(row["user_id"], row["sample"]) for row in one] == [(f"u{i}", n) for i in range(3) for n in range(2)]
    assert "words" not in one[0]


def test_fewer_queries_than_the_model_was_trained_for(model_folder: Path, history: Path, tmp_path: Path) -> None:
    run(model=model_folder, history=history, output=tmp_path / "p", num_queries=1)
    assert [row["queries"] for row in read_rows(tmp_path / "p")] == [queries[:1] for queries in LEARNT]


@pytest.mark.parametrize("failure", [TrainingDiverged("not finite"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_run_that_ends_before_its_first_answer_leaves_no_file(
    model_folder: Path, reward_folder: Path, history: Path, tmp_path: Path, failure: BaseException
) -> None:
    (tmp_path / "p").write_text("of before")
    broken = mock.patch.object(TokenRewardModel, "score", side_effect=failure)
    with broken, pytest.raises((TrainingDiverged, SystemExit)):
        run(model=model_folder, history=history, output=tmp_path / "p", overwrite=True, reward=reward_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["p"] and (tmp_path / "p").read_text() == "of before"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "--model is missing"),
        ({"model": "nowhere"}, "nowhere: no such folder; if it is a hub name, add --prompt_template, --num_queries"),
        ({"output": ""}, "give --history and --output together, or neither"),
        ({"history": ""}, "give --history and --output together, or neither"),
        ({"history": "nowhere"}, "nowhere: no such file; check --history"),
        ({"output": __file__}, "exists; add --overwrite"),
        ({"samples": 2}, "greedy responses are all alike; add --temperature 1"),
        ({"top_p": 0.9}, "greedy decoding does not sample"),
        ({"temperature": -1}, "--temperature must not be negative"),
        ({"batch_size": 0}, "--batch_size must be 1 or more"),
        ({"num_queries": -1}, "--num_queries must not be negative"),
        ({"log_format": "csv"}, "invalid choice: 'csv'"),
        ({"reward": "tests"}, "no token reward model .no token_reward.json.; give the model folder that step 2 wrote"),
        ({"prompt_template": "nosuch"}, "prompt template 'nosuch' is neither a file nor one of"),
        ({"max_response_tokens": 999}, "1063 tokens, but the model has 256 positions"),
    ],
)
def test_what_cannot_work_is_refused(
    model_folder: Path, history: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    flags = {"model": model_folder, "history": history, "output": tmp_path / "p"} | changes
    with pytest.raises(InputError, match=message):
        run(**flags)
    assert not (tmp_path / "p").exists()


def test_a_folder_that_does_not_say_how_long_a_response_is(model_folder: Path, history: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder.iterdir():
        if file.name != "generation_config.json":
            (folder / file.name).symlink_to(file)
    with pytest.raises(InputError, match="how long a response may be; add --max_response_tokens"):
        run(model=folder, history=history, output=tmp_path / "p")
    run(model=folder, history=history, output=tmp_path / "p", max_response_tokens=32)
    assert [row["queries"] for row in read_rows(tmp_path / "p")] == LEARNT
