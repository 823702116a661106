"""How commands end: what a user is told, and that a rank does not take its interpreter down piece by piece."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMAND = """
import atexit
from common.errors import InputError, TrainingDiverged, run_rank_command

class Holder:
    def __del__(self):
        print("torn down")

holder = Holder()  # what gloo's threads hold when DeepSpeed keeps a process group
atexit.register(lambda: print("at exit"))

def main():
    print("worked")
    {body}

run_rank_command(main)
print("went on")
"""


def run(body: str, ranks: int) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"WORLD_SIZE": str(ranks), "RANK": "1" if ranks > 1 else "0"}
    return subprocess.run(
        [sys.executable, "-c", COMMAND.format(body=body)], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )


def test_a_finished_rank_does_what_is_due_at_exit_and_is_gone() -> None:
    ended = run("pass", ranks=2)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "worked\nat exit\n", "")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("raise InputError('log.jsonl:3: no query; mend the line')", 2, "[rank 1] error: log.jsonl:3: no query; mend"),
        ("raise TrainingDiverged('loss nan')", 3, "[rank 1] diverged: loss nan"),
    ],
)
def test_a_rank_that_fails_says_why_and_how_badly(body: str, status: int, message: str) -> None:
    ended = run(body, ranks=2)
    assert ended.returncode == status
    assert ended.stderr.startswith(message) and ended.stderr.count("\n") == 1
    assert ended.stdout == "worked\nat exit\n"


def test_an_error_that_nobody_foresaw_keeps_its_traceback() -> None:
    ended = run("{}['missing']", ranks=2)
    assert ended.returncode == 1
    assert "KeyError: 'missing'" in ended.stderr


def test_a_process_of_its_own_goes_on_after_a_command() -> None:
    """The study runs several commands in one process."""
    ended = run("pass", ranks=1)
    assert (ended.returncode, ended.stdout) == (0, "worked\nwent on\nat exit\ntorn down\n")
    assert run("raise InputError('no')", ranks=1).returncode == 2
