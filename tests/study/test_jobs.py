"""The job runner with real processes: order, one run each, failures, and going on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import InputError
from study.jobs import Job, JobRunner, StudyFailed, fingerprints, needed_jobs, shell_line
from study.main import main
from tests.commands import ROOT

MODULE = "tests.study.job_that_writes"


def _jobs(path: Path, words: dict[str, str]) -> list[Job]:
    """`c` reads `a` and `b`; each job appends its word."""
    inputs = {"c": ("a", "b")}
    return [Job(name, ((MODULE, (str(path), word)),), inputs.get(name, ())) for name, word in words.items()]


def test_inputs_come_first_and_each_job_runs_once(tmp_path: Path) -> None:
    written = tmp_path / "written.txt"
    ended: list[str] = []
    runner = JobRunner(tmp_path / "study", 2, lambda job, seconds: ended.append(job.name))
    jobs = _jobs(written, {"c": "third", "a": "first", "b": "second"})
    marks = fingerprints(jobs)
    runner.run(jobs, marks)
    words = written.read_text().split()
    assert sorted(words[:2]) == ["first", "second"]
    assert words[2] == "third"
    assert ended[-1] == "c"
    assert all(runner.is_done(job, marks[job.name]) for job in jobs)
    assert not runner.is_done(jobs[0], "another")
    assert shell_line(jobs[0].commands[0]) in (tmp_path / "study" / "c" / "log.txt").read_text()


def test_a_failure_stops_what_follows_and_a_second_run_goes_on(tmp_path: Path) -> None:
    written = tmp_path / "written.txt"
    runner = JobRunner(tmp_path / "study", 1, lambda job, seconds: None)
    with pytest.raises(StudyFailed, match=r"b failed; see .*b/log\.txt"):
        failing = _jobs(written, {"a": "first", "b": "fail", "c": "third"})
        runner.run(failing, fingerprints(failing))
    assert written.read_text().split() == ["first"]
    jobs = _jobs(written, {"a": "first", "b": "second", "c": "third"})
    marks = fingerprints(jobs)
    runner.run(needed_jobs(jobs, lambda job: job.name == "c", lambda job: runner.is_done(job, marks[job.name])), marks)
    assert written.read_text().split() == ["first", "second", "third"]


def test_a_job_logs_a_folder_that_its_output_cannot_spell_for_its_owner_alone(tmp_path: Path) -> None:
    folder, written = tmp_path / "исследование", tmp_path / "written.txt"
    job = Job("a", ((MODULE, (str(written), f"{folder.name}")),))
    # A job's process takes the encoding of the study's, and its rights.
    code = f"import os; os.umask(0); from study.jobs import *; run_job({job!r}, {str(folder)!r}, 'mark')"
    settings = os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=False)
    log = folder / "a" / "log.txt"
    assert ended.returncode == 0, log.read_text(encoding="latin-1")
    assert "\\u0438\\u0441\\u0441" in log.read_text(encoding="latin-1") and log.stat().st_mode & 0o777 == 0o600
    assert written.read_text(encoding="utf-8") == "исследование\n"


def test_needed_jobs_are_the_wanted_ones_and_what_they_read() -> None:
    jobs = [Job("log", ()), Job("sft", (), ("log",)), Job("reward", (), ("sft",)), Job("ppo", (), ("sft", "reward")),
            Job("dpo", (), ("sft",))]  # fmt: skip
    names = [job.name for job in needed_jobs(jobs, lambda job: job.name == "ppo", lambda job: job.name == "log")]
    assert names == ["sft", "reward", "ppo"]
    assert needed_jobs(jobs, lambda job: job.name == "ppo", lambda job: True) == []


def test_a_changed_command_changes_the_fingerprints_of_all_that_follows() -> None:
    def marks(flag: str) -> dict[str, str]:
        return fingerprints([
            Job("log", (("m", ("--users", "5")),)), Job("sft", (("m", ("--epochs", flag)),), ("log",)),
            Job("ppo", (("m", ()),), ("sft",)), Job("control", (("m", ()),), ("log",)),
        ])  # fmt: skip

    before, after = marks("1"), marks("2")
    assert {name for name in before if before[name] != after[name]} == {"sft", "ppo"}
    assert before == marks("1")


@pytest.mark.parametrize("flag", ["--work_dir", "--results_dir"])
def test_a_folder_that_cannot_be_written_is_refused_before_a_job_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    (tmp_path / "file").touch()
    folders = {"--work_dir": str(tmp_path / "work"), "--results_dir": str(tmp_path / "results")}
    folders[flag] = str(tmp_path / "file" / "here")
    monkeypatch.setattr("sys.argv", ["study", "--quick", *(word for pair in folders.items() for word in pair)])
    monkeypatch.setattr(JobRunner, "run", lambda *arguments: pytest.fail("a job has begun"))
    with pytest.raises(InputError, match=rf"/file/here: no file can be written .*; give another {flag}$"):
        main()
