"""The scripts as a user types them, in a folder of his own: one run in miniature, from nothing to the report."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path("scripts").resolve()
ALL_GIVEN = ("--actor_path", "a", "--reward_path", "r", "--data_dir", ".")
Ran = subprocess.CompletedProcess


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ran[str]]:
    """Run a script in one and the same empty folder, whose name has spaces."""
    folder = tmp_path_factory.mktemp("users") / "a folder of mine"
    folder.mkdir()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = os.environ | {"PATH": path, "TPPO_VENV": "none", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    settings.pop("PYTHONPATH", None)

    def run(name: str, *flags: str) -> Ran[str]:
        command = ["bash", str(SCRIPTS / name), *flags]
        return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=1200)

    run.folder = folder
    return run


def stages_of(ran: Ran[str]) -> list[str]:
    return re.findall(r"^== (\w+)$", ran.stdout, re.MULTILINE)


def refused_at_once(run: Callable[[], Ran[str]], message: str) -> None:
    """Status 2 and one line, before anything is launched; on a quiet machine within 3 seconds."""
    begun = time.monotonic()
    ran = run()
    assert (ran.returncode, ran.stdout) == (2, ""), ran.stderr
    assert ran.stderr.count("\n") == 1 and ran.stderr.startswith("error: ") and message in ran.stderr
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("run_all.sh", ("--total_steps", "3"), "unrecognized arguments: --total_steps 3"),
        ("run_step1.sh", ("--learning_rat", "1"), "did you mean '--learning_rate'?"),
        ("run_step2.sh", ("--heads", "both"), "--heads"),
        ("run_step3.sh", ("--hostfile", "missing.txt"), "--hostfile missing.txt: no such file"),
        ("run_step3.sh", ("--num_gpus", "x"), "--num_gpus is a whole number"),
        ("run_step3.sh", ("--num_gpus", "5"), "number of ranks"),
        ("run_step3.sh", ("--preset", "9x9gb"), "--preset 9x9gb: no such file"),
        ("run_step3.sh", ("--data_dir", "missing"), "--data_dir missing: no such file or folder"),
        ("run_step3.sh", ("--data_dir", "."), "--actor_path, --reward_path missing"),
        ("run_step3.sh", ("--actor_path", "./a"), "--actor_path ./a: no such file or folder"),
        ("run_step3.sh", ALL_GIVEN, "--output_dir is missing"),
        ("run_step3.sh", (*ALL_GIVEN, "--log", str(SCRIPTS)), "--log: not for a step whose inputs are all given"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_message_before_anything_begins(
    name: str, flags: tuple[str, ...], message: str, script: Callable[..., Ran[str]]
) -> None:
    refused_at_once(lambda: script(name, *flags), message)
    assert not list(script.folder.iterdir())


def assert_private_where_users_are_quoted(run: Path) -> None:
    """Every file that holds a query of the log, of several words, is its owner's alone; so are images."""
    events = [event for line in (run / "log" / "sessions.jsonl").open() for event in json.loads(line)["events"]]
    queries = {event["query"] for event in events if event["type"] == "search" and " " in event["query"]}
    pattern = re.compile("|".join(map(re.escape, queries)).encode())
    weights = (".safetensors", ".pt", ".pth")
    files = [path for path in run.rglob("*") if path.is_file() and path.suffix not in weights]
    quoting = {path for path in files if pattern.search(path.read_bytes())}
    quoting |= set((run / "step3_tppo" / "tensorboard").iterdir())
    shared = [str(path.relative_to(run)) for path in quoting if path.stat().st_mode & 0o077]
    assert not shared
    names = {path.name for path in quoting}
    assert {"sessions.jsonl", "train.jsonl", "samples.jsonl", "report.md", "report.html"} <= names
    # What names users, or a longer trained model could quote them in.
    others = ("log/truth.jsonl", "step2_token_reward/labels.jsonl", "report.json", "generations/sft_sampled.jsonl")
    assert [(run / name).stat().st_mode & 0o777 for name in others] == [0o600] * 4
    assert (run / "step3_tppo" / "metrics.jsonl").stat().st_mode & 0o044 == 0o044 & ~current_umask()


def current_umask() -> int:
    os.umask(umask := os.umask(0))
    return umask


@pytest.mark.distributed
@pytest.mark.timeout(2400)
def test_a_run_in_miniature_from_step_3_alone_to_the_report(script: Callable[..., Ran[str]]) -> None:
    ran = script("run_step3.sh", "--miniature")
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
    made = [
        "simulate", "prepare", "base_model", "step1_sft", "step2_sample", "step2_label", "step2_reward", "step3_tppo"
    ]  # fmt: skip
    assert stages_of(ran) == made
    lines = [line for line in ran.stdout.splitlines() if line.endswith(" yet: made first")]
    assert lines == [
        "there are no examples in outputs/demo yet: made first",
        "step 1 has no output in outputs/demo yet: made first",
        "step 2 has no output in outputs/demo yet: made first",
    ]
    assert "preset: tiny (the model is made from the log)" in ran.stdout
    run = script.folder / "outputs" / "demo"
    assert {path.stem for path in (run / "stages").iterdir()} == set(made)
    rows = (run / "step3_tppo" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 3
    # Two CPU ranks took part.
    assert len(list((run / "step3_tppo" / "heartbeat").iterdir())) == 2

    refused_at_once(lambda: script("run_step3.sh"), "outputs/demo/step3_tppo exists; add --resume")
    refused_at_once(lambda: script("run_all.sh"), "outputs/demo exists; add --resume")
    refused_at_once(lambda: script("run_step3.sh", "--resume", "--model", "smollm2-135m"), "begun with --model at its")

    again = script("run_step3.sh", "--resume")
    assert again.returncode == 0 and stages_of(again) == []
    assert "step 3 is done in outputs/demo; --overwrite makes it anew" in again.stdout
    # The command that it ends with is one that works: here it evaluates, which is all that is left.
    (following,) = re.findall(r"^next +(bash .*)$", again.stdout, re.MULTILINE)
    assert following.endswith("run_all.sh --resume")
    ended = script("run_all.sh", "--resume", "--miniature")
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
    assert stages_of(ended) == ["evaluate"]
    assert set(json.loads((run / "report.json").read_text())["systems"]) >= {"sft", "tppo"}
    assert (run / "report.html").is_file() and (run / "report.md").is_file()
    assert sorted(path.name for path in script.folder.iterdir()) == ["outputs"]
    assert_private_where_users_are_quoted(run)

    # The same models as inputs of the user's own, with settings of his own, into a folder of his own.
    mine = [
        "--actor_path", "outputs/demo/step1_sft/model", "--reward_path", "outputs/demo/step2_token_reward/reward/model",
        "--data_dir", "outputs/demo/data", "--output_dir", "my output",
    ]  # fmt: skip
    alone = script("run_step3.sh", *mine, "--miniature")
    assert alone.returncode == 0, alone.stdout[-2000:] + alone.stderr[-3000:]
    assert stages_of(alone) == [] and "preset: tiny (" in alone.stdout and "made from a log" in alone.stdout
    assert (script.folder / "my output" / "model" / "model.safetensors").is_file()
