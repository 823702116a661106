"""scripts/environment.sh: a virtual environment without pip, and the flags that reach the deepspeed launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path("scripts/environment.sh").resolve()


def bash(command: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`command` after the script is sourced, with the programs in tmp_path/bin before all others."""
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", f'set -euo pipefail; source "$0"; {command}', str(SCRIPT)], cwd=tmp_path, text=True,
        env=os.environ | {"PATH": path} | environment, capture_output=True, timeout=240, check=False,
    )  # fmt: skip


def program(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


# As Debian's python3 without python3-venv: the folder is there, pip is not, and the exit status is 1, or 0.
NO_PIP = """
case "$*" in
    "-m venv "*) mkdir -p "$3/bin"; printf '#!/usr/bin/env bash\\nexit 1\\n' > "$3/bin/python"; chmod +x "$3/bin/python"
        exit "$STATUS" ;;
esac
exit 1
"""


@pytest.mark.parametrize("status", ["0", "1"])
def test_a_virtual_environment_without_pip_is_not_left_behind(tmp_path: Path, status: str) -> None:
    program(tmp_path, "python3.11", NO_PIP)
    for _ in range(2):
        ended = bash("install_requirements requirements.txt", tmp_path, TPPO_VENV=str(tmp_path / "venv"), STATUS=status)
        assert ended.returncode == 2
        assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
        assert "cannot make a virtual environment with pip" in ended.stderr and "python3-venv" in ended.stderr
        assert not (tmp_path / "venv").exists()


def test_one_without_pip_that_was_there_is_named_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    program(tmp_path / "venv", "python", "exit 1")
    ended = bash("install_requirements requirements.txt", tmp_path, TPPO_VENV=str(tmp_path / "venv"))
    assert ended.returncode == 2 and f"error: {tmp_path}/venv has no pip; delete it" in ended.stderr
    assert (tmp_path / "venv" / "bin" / "python").exists()


def test_one_that_cannot_be_made_is_said_in_one_line(tmp_path: Path) -> None:
    program(tmp_path, "python3.11", NO_PIP)
    (tmp_path / "file").touch()  # nothing can be made below it, not even by root
    place = tmp_path / "file" / "venv"
    ended = bash("install_requirements requirements.txt", tmp_path, TPPO_VENV=str(place), STATUS="1")
    assert ended.returncode == 2
    message = f"error: {place} cannot be made here; set TPPO_VENV to an environment, or to a folder where one can be\n"
    assert ended.stderr == message


def test_one_that_is_complete_and_read_only_is_used(tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    program(tmp_path / "venv", "python", "exit 0")
    (tmp_path / "venv" / ".requirements.txt.installed").mkdir()  # the stamp cannot be written, not even by root
    ended = bash("install_requirements requirements.txt; echo used", tmp_path, TPPO_VENV=str(tmp_path / "venv"))
    assert (ended.returncode, ended.stdout) == (0, "installing requirements.txt\nused\n")
    assert ended.stderr == f"warning: {tmp_path}/venv is read-only, so that each start installs anew\n"


def test_many_hosts_need_a_temporary_file(tmp_path: Path) -> None:
    """Ranks elsewhere would start without what they must know."""
    (tmp_path / "hosts").touch()
    program(tmp_path, "deepspeed", "echo started")
    settings = {"TMPDIR": str(tmp_path / "none"), "HOME": str(tmp_path)}
    ended = bash("launch deepspeed --hostfile hosts main.py", tmp_path, **settings)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"error: no file can be written in {tmp_path}/none; set TMPDIR to a folder with room\n"
    assert bash("launch deepspeed --hostfile hosts main.py", tmp_path, HOME=str(tmp_path)).stdout == "started\n"


def launched(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """What a stand-in for the deepspeed launcher is given."""
    program(tmp_path, "deepspeed", 'printf "%s\\n" "$@"')
    return bash(f"launch deepspeed {' '.join(words)}", tmp_path)


def test_launcher_flags_are_moved_before_the_script_and_win(tmp_path: Path) -> None:
    flags = ("--num_gpus", "2", "main.py", "--a", "b.py", "--num_gpus", "3", "--master_port=5", "'c d'")
    ended = launched(tmp_path, *flags)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "--master_port=5", "--num_gpus", "3", "--log_level", "error", "--no_local_rank", "main.py",
        "--a", "b.py", "c d",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("visible", "accelerator", "given"),
    [
        ("2,3,5", "", ["--include", "localhost:2,3"]),
        ("2,3", "cpu", ["--num_gpus", "2"]),
        ("", "", ["--num_gpus", "2"]),
        ("GPU-8c1f,GPU-77aa", "", ["--num_gpus", "2"]),  # names, which deepspeed does not take
    ],
)
def test_gpus_are_taken_from_those_that_the_user_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, accelerator: str, given: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    ended = launched(tmp_path, "--num_gpus", "8", "--master_port", "5", "main.py", "--num_gpus=2")
    assert ended.stdout.splitlines()[:4] == ["--master_port", "5", *given], ended.stderr
    ended = launched(tmp_path, "--num_gpus", "8", "--master_port", "5", "main.py", "--include", "localhost:1")
    assert ended.stdout.splitlines()[:5] == ["--master_port", "5", "--include", "localhost:1", "--log_level"]


def test_no_launch_needs_a_temporary_file(tmp_path: Path) -> None:
    """A bash before 5.1 writes one for each here-string and here-document; a newer one does so in this mode."""
    full = "export BASH_COMPAT=50; trap '' XFSZ; ulimit -f 0;"  # no byte can be written to any file
    here = bash(f"{full} cat <<< text", tmp_path)
    assert here.returncode != 0 and "temp file for here-document" in here.stderr
    program(tmp_path, "python", f'exec "{sys.executable}" "$@"')
    program(tmp_path, "deepspeed", 'printf "%s\\n" "$@"')
    launch = f"{full} launch deepspeed --num_gpus 2 --master_port 5 main.py --output_dir {tmp_path}"
    ended = bash(launch, tmp_path, CUDA_VISIBLE_DEVICES="2,3,5", DS_ACCELERATOR="")
    assert "localhost:2,3" in ended.stdout.splitlines() and not ended.stderr
    # How ranks ended without a word is looked up once the launcher fails.
    program(tmp_path, "deepspeed", "exit 1")
    ended = bash(launch, tmp_path)
    assert (ended.returncode, ended.stderr.strip()) == (1, "")
    scripts = [path.read_text(encoding="utf-8") for path in SCRIPT.parents[1].rglob("*.sh")]
    assert len(scripts) > 10 and not any("<<" in text for text in scripts)


def test_a_tmpdir_that_cannot_be_used_ends_every_script_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("none", "file"):
        ended = bash("echo went on", tmp_path, TMPDIR=str(tmp_path / place))
        assert (ended.returncode, ended.stdout) == (2, "")
        message = f"error: no file can be written in {tmp_path}/{place}; set TMPDIR to a folder with room\n"
        assert ended.stderr == message
    (tmp_path / "mine").mkdir()
    assert bash("echo went on", tmp_path, TMPDIR=str(tmp_path / "mine")).stdout == "went on\n"
    assert not list((tmp_path / "mine").iterdir())


def test_a_disk_that_takes_empty_files_alone_is_full(tmp_path: Path) -> None:
    program(tmp_path, "mktemp", 'ln -s /dev/full "$2/link"; echo "$2/link"')
    ended = bash(f"takes_files {tmp_path} || echo full", tmp_path, TMPDIR=str(tmp_path))
    assert ended.returncode == 2 and ended.stderr.startswith(f"error: no file can be written in {tmp_path}; set TMPDIR")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]


@pytest.mark.parametrize("flag", [("--hostfile", "missing.txt"), ("--hostfile=missing.txt",)])
def test_a_hostfile_that_is_missing_is_refused(tmp_path: Path, flag: tuple[str, ...]) -> None:
    (tmp_path / "hosts").write_text("a slots=1\n")
    ended = launched(tmp_path, "--hostfile", "hosts", "main.py", *flag)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: --hostfile missing.txt: no such file; scripts/hostfile.example shows one\n"
    ended = launched(tmp_path, *flag, "main.py", "--hostfile", "hosts")
    assert ended.returncode == 0 and ended.stdout, ended.stderr


def test_a_hostfile_with_a_byte_order_mark_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=1\n", encoding="utf-8-sig")
    ended = launched(tmp_path, "--hostfile", "hosts", "main.py")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: hosts:1: begins with a byte order mark; save the file as UTF-8 without it\n"


def test_cpu_ranks_share_one_arena_and_the_users_allocator_wins(tmp_path: Path) -> None:
    shown = 'use_cpu_ranks; echo "$MALLOC_ARENA_MAX ${LD_PRELOAD:-none}"'
    arena, preloaded = bash(shown, tmp_path, MALLOC_ARENA_MAX="", LD_PRELOAD="").stdout.split()
    assert arena == "1"
    assert preloaded == "none" or (Path(preloaded).exists() and "tcmalloc" in preloaded)
    given = bash(shown, tmp_path, MALLOC_ARENA_MAX="4", LD_PRELOAD="/nowhere/liballocator.so")
    assert given.stdout.split() == ["4", "/nowhere/liballocator.so"]
