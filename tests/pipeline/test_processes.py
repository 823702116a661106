"""Processes of stages: their exit status, their record, and signals, which are handed on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.processes import run_process, run_stage
from pipeline.stages import Stage


def exits(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("code", "status"),
    [("pass", 0), ("raise SystemExit(75)", 75), ("import os; os.kill(os.getpid(), 9)", 128 + 9)],
)
def test_the_status_is_the_childs_and_a_signals_as_a_shell_counts_it(code: str, status: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run_process(exits(code)) == status
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stage_is_recorded_once_it_is_done_and_only_if_it_belongs_to_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "stages" / "prepare.json"
    with pytest.raises(SystemExit) as ended:
        run_stage(tmp_path, Stage("prepare", 0, exits("raise SystemExit(4)"), tmp_path))
    assert ended.value.code == 4 and not record.exists()
    run_stage(tmp_path, Stage("prepare", 0, exits("pass"), tmp_path, recorded=False))
    assert not record.exists()
    run_stage(tmp_path, Stage("prepare", 0, exits("pass"), tmp_path))
    assert json.loads(record.read_text())["prepare"] < 60
    assert capsys.readouterr().out == "== prepare\n" * 3


CHILD = """
import signal, sys, time
def handle(number, frame):
    print(f"child got {number}", flush=True)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, handle)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_the_child_and_its_status_comes_back(number: signal.Signals) -> None:
    code = "import sys; from pipeline.processes import run_process; raise SystemExit(run_process(sys.argv[1:]))"
    parent = subprocess.Popen(
        [*exits(code), sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())}, start_new_session=True,
    )  # fmt: skip
    try:
        assert parent.stdout.readline() == "ready\n"
        time.sleep(0.2)  # the parent is behind its Popen
        parent.send_signal(number)
        printed, _ = parent.communicate(timeout=240)
    finally:
        parent.kill()
    assert printed == f"child got {int(number)}\n" and parent.returncode == 75
