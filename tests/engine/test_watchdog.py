"""A rank that hangs: the job ends within the time that was set, and the message names the rank and its phase."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from common.engine.watchdog import FOLDER, Watchdog, refuse_second_writer, silent_ends
from common.errors import HUNG, InputError
from tests.step3.runs import command, environment, ranks_left, write_inputs

HANGS = """
import sys, time
from common.engine.watchdog import Watchdog
with Watchdog(sys.argv[1], 1.0) as watchdog:
    for step in range(3):
        watchdog.phase("rollout", step)
        time.sleep(0.5)
    watchdog.phase("update", 3)
    time.sleep(60)
"""


def test_a_process_without_progress_ends_and_says_where_it_was(tmp_path: Path) -> None:
    begun = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)], env=environment(), capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == HUNG and time.monotonic() - begun < 50
    assert "hung: rank 0 has seen no progress for 1 s (--hang_timeout 1)" in ended.stderr
    assert "rank 0: alive, in update of step 3 for 1 s" in ended.stderr
    assert 'File "<string>", line 9' in ended.stderr  # where it stood


def test_work_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0.4) as watchdog:
        for step in range(10):
            watchdog.phase("rollout", step)
            time.sleep(0.1)
    beat = json.loads((tmp_path / FOLDER / "rank0.json").read_text())
    assert beat["phase"] == "rollout" and beat["alive"] >= beat["since"] - 0.5
    with Watchdog(tmp_path / "off", 0):
        pass
    assert not (tmp_path / "off").exists()


WAITS = """
import sys, time
from common.engine import watchdog as module
module.world_size = lambda: 2
with module.Watchdog(sys.argv[1], 1.5) as watchdog:
    watchdog.phase(module.WAITING, 9)
    time.sleep(60)
"""


def test_a_rank_that_waits_is_not_hung_as_long_as_another_makes_progress(tmp_path: Path) -> None:
    program = [sys.executable, "-c", WAITS, str(tmp_path)]
    waits = subprocess.Popen(program, env=environment(), stderr=subprocess.PIPE, text=True)
    folder = tmp_path / FOLDER
    while not (folder / "rank0.json").exists():
        time.sleep(0.05)
    for step in range(12):  # four seconds, more than twice its limit
        now = time.time()
        beat = {"phase": "sampling", "step": step, "since": now, "alive": now, "ended": False}
        (folder / "new").write_text(json.dumps(beat))
        (folder / "new").rename(folder / "rank1.json")
        time.sleep(0.33)
        assert waits.poll() is None
    _, message = waits.communicate(timeout=240)
    assert waits.returncode == HUNG
    assert "rank 0: alive, in wait for the others of step 9" in message
    assert "rank 1: " in message and "in sampling of step 11" in message


DIES = """
import os, signal, sys, time
from common.engine.watchdog import Watchdog
with Watchdog(sys.argv[1], 100.0) as watchdog:
    watchdog.phase("rollout", 7)
    time.sleep(1)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError
"""


@pytest.mark.parametrize("end", ["killed", "raises"])
def test_only_a_rank_that_cannot_speak_for_itself_is_named_afterwards(end: str, tmp_path: Path) -> None:
    begun = time.time()
    subprocess.run([sys.executable, "-c", DIES, str(tmp_path), end], env=environment(), stderr=subprocess.DEVNULL)
    other = {"phase": "update", "step": 8, "since": begun, "alive": time.time() + 30, "ended": False}
    killed = "  rank 0: in rollout of step 7, last heard of at "
    assert (killed in silent_ends(tmp_path, begun)) == (end == "killed")
    (tmp_path / FOLDER / "rank1.json").write_text(json.dumps(other))  # which the launcher ended, half a minute later
    lines = silent_ends(tmp_path, begun).splitlines()
    assert [line[:8] for line in lines[1:-1]] == ["  rank 0", "  rank 1"][end != "killed" :]
    assert silent_ends(tmp_path, time.time() + 60) == ""  # heartbeats of an earlier run


LIVES = """
import sys, time
from common.engine.watchdog import Watchdog
with Watchdog(sys.argv[1], 100.0) as watchdog:
    watchdog.phase("update", 7)
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_a_folder_that_another_run_is_still_writing_is_refused(tmp_path: Path) -> None:
    """Ranks that a killed launcher left behind go on: a second run beside them would spoil both."""
    program = [sys.executable, "-c", LIVES, str(tmp_path)]
    lives = subprocess.Popen(program, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert lives.stdout.readline() == "writing\n"
    with pytest.raises(InputError, match=rf"another run is still writing here; .* end it: kill {lives.pid}$"):
        refuse_second_writer(tmp_path)
    lives.kill()
    while psutil.Process(lives.pid).status() != psutil.STATUS_ZOMBIE:  # killed, and not waited for yet
        time.sleep(0.01)
    refuse_second_writer(tmp_path)
    lives.communicate()
    refuse_second_writer(tmp_path)
    # A number that another process has taken since, another machine's, one that left in good order, and our own.
    path = tmp_path / FOLDER / "rank0.json"
    beat = json.loads(path.read_text()) | {"pid": os.getppid(), "alive": time.time()}
    path.write_text(json.dumps(beat))
    with pytest.raises(InputError, match=f"kill {os.getppid()}"):
        refuse_second_writer(tmp_path)
    for change in ({"alive": 1.0}, {"host": "elsewhere"}, {"ended": True}, {"pid": os.getpid()}):
        path.write_text(json.dumps(beat | change))
        refuse_second_writer(tmp_path)


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_stopped_rank_ends_the_job_and_is_named_by_the_others(tmp_path: Path) -> None:
    """SIGSTOP stands for a machine that hangs. The launcher waits half a minute before it kills what it cannot end."""
    launch = command(write_inputs(tmp_path / "inputs"), tmp_path / "run", "--hang_timeout", "5")
    script = launch.index("step3_tppo/main.py")
    launch[script : script + 1] = ["tests/distributed/killed_main.py", "step3_tppo.main", "SIGSTOP", "update", "3", "1"]
    ended = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=400)
    assert ended.returncode == HUNG, ended.stderr[-2000:]
    assert "rank 1: no sign of life for" in ended.stderr and "in update of step 2" in ended.stderr
    assert "rank 0: alive, in update of step 2" in ended.stderr
    assert not ranks_left(tmp_path / "run"), "the launcher left a rank behind"


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_rank_that_has_sampled_its_share_names_the_one_that_hangs(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    shutil.copy(inputs / "data" / "train.jsonl", inputs / "data" / "dev.jsonl")
    of_step3 = command(inputs, tmp_path)
    launch = [
        *of_step3[: of_step3.index("step3_tppo/main.py")], "tests/distributed/killed_main.py",
        "step2_token_reward.sample", "SIGSTOP", "draw", "3", "1",
        "--model_name_or_path", str(inputs / "actor"), "--data_dir", str(inputs / "data"),
        "--output_dir", str(tmp_path / "samples"), "--prompt_template", "compact", "--num_queries", "2",
        "--max_prompt_tokens", "64", "--max_response_tokens", "8", "--batch_size", "4", "--hang_timeout", "5",
    ]  # fmt: skip
    ended = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=400)
    assert ended.returncode == HUNG, ended.stderr[-2000:]
    assert "rank 1: no sign of life for" in ended.stderr and "in sampling of step 1" in ended.stderr
    assert "rank 0: alive, in wait for the others" in ended.stderr
    assert not ranks_left(tmp_path / "samples")
