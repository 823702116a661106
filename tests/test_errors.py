"""How commands end: what a user is told, and that a rank does not take its interpreter down piece by piece."""

from __future__ import annotations

import os
import re
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


def run(body: str, ranks: int, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"WORLD_SIZE": str(ranks), "RANK": "1" if ranks > 1 else "0"} | variables
    command = [sys.executable, "-c", COMMAND.replace("{body}", body), *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def read(path: str) -> list[str]:
    return (ROOT / path).read_text().splitlines()


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


def test_an_error_that_nobody_foresaw_is_one_paragraph_and_its_traceback_is_kept(tmp_path: Path) -> None:
    body = "from common.files import write_json; write_json('/dev/null/x', 1)"
    ended = run(body, ranks=2, TMPDIR=str(tmp_path))
    assert ended.returncode == 1 and ended.stdout == "worked\nat exit\n"
    line = next(number for number, text in enumerate(read("common/files.py"), start=1) if ".mkdir(parents" in text)
    assert re.fullmatch(
        rf"\[rank 1\] failed: (NotADirectory|FileExists)Error: .* \(common/files\.py:{line}\)\. "
        r"--debug shows the traceback; it is kept in /\S+/traceback_rank1\.txt\n",
        ended.stderr,
    ), ended.stderr
    kept = Path(ended.stderr.split()[-1])
    assert "Traceback (most recent call last)" in kept.read_text() and 'files.py", line' in kept.read_text()
    assert kept.is_relative_to(tmp_path)


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        ("PermissionError(13, 'Permission denied', 'a/train.jsonl')", 2,
         "error: a/train.jsonl: Permission denied; choose another place, or ask for the right to this one"),
        ("OSError(30, 'Read-only file system', '/data')", 2,
         "error: /data: Read-only file system; choose another place, or ask for the right to this one"),
        ("OSError(28, 'No space left on device', 'outputs/metrics.jsonl')", 4,
         "not saved: outputs/metrics.jsonl: No space left on device; make room, then repeat the command "
         "(a run: with --resume)"),
        ("FileNotFoundError(2, \"No usable temporary directory found in ['/tmp']\")", 2,
         "error: No usable temporary directory found in ['/tmp']; set TMPDIR to a folder with room"),
    ],
)  # fmt: skip
def test_what_the_system_refuses_is_the_users_to_change(raised: str, status: int, message: str) -> None:
    ended = run(f"raise {raised}", 1)
    assert (ended.returncode, ended.stderr) == (status, f"{message}\n")


def test_a_full_disk_without_a_name_shows_the_line_of_code(tmp_path: Path) -> None:
    ended = run("raise OSError(28, 'No space left on device')", 1)
    assert ended.returncode == 4 and re.match(r"not saved: <string>:\d+: No space left", ended.stderr), ended.stderr


def test_a_refusal_that_names_no_file_is_unforeseen(tmp_path: Path) -> None:
    ended = run("raise PermissionError(1, 'Operation not permitted')", 1, TMPDIR=str(tmp_path))
    assert ended.returncode == 1 and ended.stderr.startswith("failed: PermissionError: [Errno 1] Operation not")


def test_tracebacks_of_a_run_stand_in_its_folder_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "run_config.json").write_text("{}")
    for text in ("first", "second"):
        ended = run(f"raise RuntimeError('{text}')", 1, "--output_dir", str(tmp_path))
        assert f"failed: RuntimeError: {text} (" in ended.stderr
        assert ended.stderr.endswith(f"it is kept in {tmp_path}/traceback_rank0.txt\n")
    kept = (tmp_path / "traceback_rank0.txt").read_text()
    assert kept.count("Traceback (most") == 2 and kept.index("RuntimeError: first") < kept.index("RuntimeError: second")


def test_a_full_disk_does_not_lose_the_traceback(tmp_path: Path) -> None:
    (tmp_path / "run_config.json").write_text("{}")
    (tmp_path / "traceback_rank0.txt").mkdir()  # stands for a file that cannot be written
    ended = run("{}['missing']", 1, "--output_dir", str(tmp_path))
    assert ended.returncode == 1
    assert "Traceback (most recent call last)" in ended.stderr and "failed: KeyError: 'missing'" in ended.stderr
    assert "; it stands above, for it could not be kept (" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize(("flags", "environment"), [(("--debug",), {}), ((), {"TPPO_DEBUG": "1"})])
@pytest.mark.parametrize(("error", "status"), [("InputError('no')", 2), ("RuntimeError('no')", 1)])
def test_with_debug_every_error_shows_its_traceback(
    error: str, status: int, flags: tuple[str, ...], environment: dict[str, str]
) -> None:
    ended = run(f"import sys; assert '--debug' not in sys.argv; raise {error}", 1, *flags, **environment)
    assert ended.returncode == status
    assert "Traceback (most recent call last)" in ended.stderr and "kept in" not in ended.stderr
    assert re.match(r"(error: no|failed: RuntimeError: no \(.*\))\n$", ended.stderr.splitlines(keepends=True)[-1])


def test_an_error_under_the_watchdog_tells_its_phase(tmp_path: Path) -> None:
    body = f"""from common.engine.watchdog import Watchdog
    with Watchdog({str(tmp_path)!r}, 0) as watchdog:
        watchdog.phase("rollout", 7)
        raise ValueError("two\\nlines")"""
    ended = run(body, 1, TMPDIR=str(tmp_path))
    assert re.match(r"failed: ValueError: two lines \(<string>:\d+, in rollout of step 7\)\. ", ended.stderr)


def test_an_error_of_a_full_gpu_says_where_help_is(tmp_path: Path) -> None:
    ended = run("import torch; raise torch.OutOfMemoryError('full')", 1, TMPDIR=str(tmp_path))
    assert "failed: OutOfMemoryError: full (" in ended.stderr and "docs/scaling_up.md says what" in ended.stderr


def test_a_process_of_its_own_goes_on_after_a_command() -> None:
    """The study runs several commands in one process."""
    ended = run("pass", ranks=1)
    assert (ended.returncode, ended.stdout) == (0, "worked\nwent on\nat exit\ntorn down\n")
    assert run("raise InputError('no')", ranks=1).returncode == 2


@pytest.mark.parametrize("encoding", ["latin-1", "ascii:strict", "utf-8"])
def test_no_character_ends_a_run(encoding: str) -> None:
    """Nor does a byte of a file name that is no text."""
    ended = run("print('лог.jsonl \\udcff'); print('went on')", ranks=2, PYTHONIOENCODING=encoding)
    assert ended.returncode == 0, ended.stderr
    name = "лог" if encoding == "utf-8" else "\\u043b\\u043e\\u0433"
    assert f"{name}.jsonl \\udcff\nwent on\n" in ended.stdout
