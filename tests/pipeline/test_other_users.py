"""The scripts for a user who is not root: he may write neither the clone nor HOME, and has a TMPDIR of his own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.engine.environment import environment
from common.engine.trainer_options import TrainerOptions

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
USER = 12345  # as in a container: a number that nobody has
# He may read through folders that are root's alone, such as the Python of a pyenv and pytest's own; nothing else.
AS_USER = (
    "setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=-all,+dac_read_search", "--bounding-set=-all,+dac_read_search",
)  # fmt: skip
FULL_DISK = 'mount -t tmpfs -o size=64k,mode=1777 none "$0" && { cat /dev/zero > "$0/all" || cd "$0" && exec "$@"; }'
Ran = subprocess.CompletedProcess

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv to become another user"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the user, with one for temporary files in it."""
    folder = tmp_path_factory.mktemp("users")
    for name in ("work", "scratch"):
        (folder / name).mkdir()
        os.chown(folder / name, USER, USER)
    return folder


@pytest.fixture(scope="module")
def run(home: Path) -> Callable[..., Ran[str]]:
    """Run a command as the user."""

    def run(*command: str | Path, cwd: Path = home / "work", before: tuple[str | Path, ...] = ()) -> Ran[str]:
        settings = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": "/nonexistent",
            "TMPDIR": str(home / "scratch"), "TPPO_VENV": "none", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        return subprocess.run(
            [*before, *AS_USER, *command], cwd=cwd, env=settings, capture_output=True, text=True, timeout=1200,
            check=False,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("bash", "run_step2.sh"), "outputs/demo: no file can be written in {folder} (Permission denied); type the"),
        (("bash", "run_step3.sh", "--resume"), "type the command in a folder of your own, where outputs/ is made"),
        (("bash", "run_all.sh"), "outputs/demo: no file can be written in {folder} (Permission denied); type the"),
        (("bash", "evaluate.sh", "--data_dir", "d", "--systems", "a=m", "--output_dir", "mine"),
         "mine: no file can be written in {folder} (Permission denied); choose another --output_dir"),
        ((sys.executable, "predict.py", "--model", "m", "--history", "h", "--output", "p.jsonl"),
         "no file can be written in {folder} (Permission denied); choose another --output"),
    ],
)  # fmt: skip
def test_in_a_folder_that_is_not_his_every_script_says_so_at_once(
    run: Callable[..., Ran[str]], home: Path, command: tuple[str, ...], message: str
) -> None:
    program, script, *flags = command
    ran = run(program, SCRIPTS / script, *flags, cwd=home)
    assert (ran.returncode, ran.stdout) == (2, ""), ran.stderr
    assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1, ran.stderr
    assert message.format(folder=home) in ran.stderr


@pytest.mark.parametrize("script", ["run_step1.sh", "run_step2.sh", "run_step3.sh"])
def test_a_full_disk_is_found_before_anything_begins(
    run: Callable[..., Ran[str]], tmp_path: Path, script: str
) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount can be made here")
    ran = run("bash", SCRIPTS / script, before=("unshare", "-m", "bash", "-c", FULL_DISK, str(tmp_path)))
    assert (ran.returncode, ran.stdout) == (2, ""), ran.stderr
    assert f"error: outputs/demo: no file can be written in {tmp_path} (No space left on device); type" in ran.stderr


@pytest.mark.distributed
@pytest.mark.timeout(2400)
def test_all_steps_the_report_and_predictions(run: Callable[..., Ran[str]], home: Path) -> None:
    outputs = home / "work" / "outputs" / "demo"
    ran = run("bash", SCRIPTS / "run_all.sh", "--miniature")
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
    assert "Traceback" not in ran.stderr
    model, histories = outputs / "step3_tppo" / "model", outputs / "data" / "test.jsonl"
    ran = run(sys.executable, SCRIPTS / "predict.py", "--model", model, "--history", histories, "--output", "p.jsonl")
    assert ran.returncode == 0, ran.stderr
    assert len((home / "work" / "p.jsonl").read_text().splitlines()) == len(histories.read_text().splitlines()) > 0

    assert sorted(path.name for path in (home / "work").iterdir()) == ["outputs", "p.jsonl"]
    assert (outputs / "report.html").is_file() and {path.stat().st_uid for path in outputs.rglob("*")} == {USER}
    commit = environment(TrainerOptions())["git_commit"]
    assert json.loads((outputs / "step3_tppo" / "environment.json").read_text())["git_commit"] == commit
    # Nothing of his is elsewhere: what the libraries keep for a while is in his TMPDIR.
    elsewhere = [path for folder in ("/tmp", "/var/tmp", "/dev/shm") for path in Path(folder).iterdir()]
    assert not [path for path in elsewhere if path.lstat().st_uid == USER]
