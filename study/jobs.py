"""Jobs of a study: commands with inputs, run in parallel, each done once.

A job is a list of this repository's own commands (`python -m module flags`). It runs in a process of its own, forked
from a server that has imported the libraries already, so that a short job does not spend its time on imports.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from common.files import digest, read_json, write_json
from common.output import tolerate_characters
from common.private import only_mine

DONE_NAME = "done.json"
POLL_SECONDS = 0.2
PRELOADED = ["torch", "deepspeed", "peft", "datasets", "transformers.trainer", "transformers.models.llama"]

Command = tuple[str, tuple[str, ...]]


class StudyFailed(RuntimeError):
    """A job of the study failed; what was done before it is kept."""


@dataclass(frozen=True)
class Job:
    """`name` is also its folder below the study's; `inputs` are the names of the jobs whose folders it reads.

    `leftovers` are folders below its own that nobody reads once it is done.
    """

    name: str
    commands: tuple[Command, ...]
    inputs: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = ()


def shell_line(command: Command) -> str:
    """A command as a user would type it."""
    module, flags = command
    return shlex.join(["python", "-m", module, *flags])


def fingerprints(jobs: Iterable[Job]) -> dict[str, str]:
    """What each job's result depends on, by name: its commands and, through theirs, those of all that it reads.

    A result with another fingerprint was made by other settings and is made again.
    """
    by_name = {job.name: job for job in jobs}
    found: dict[str, str] = {}

    def fingerprint(name: str) -> str:
        if name not in found:
            job = by_name[name]
            found[name] = digest(*map(shell_line, job.commands), *map(fingerprint, job.inputs))
        return found[name]

    for name in by_name:
        fingerprint(name)
    return found


def needed_jobs(jobs: Iterable[Job], wanted: Callable[[Job], bool], done: Callable[[Job], bool]) -> list[Job]:
    """The wanted jobs and, as far as they are not done, what they read, in the order of `jobs`."""
    by_name = {job.name: job for job in jobs}
    needed: set[str] = set()

    def need(job: Job) -> None:
        if job.name not in needed and not done(job):
            needed.add(job.name)
            for name in job.inputs:
                need(by_name[name])

    for job in by_name.values():
        if wanted(job):
            need(job)
    return [job for job in by_name.values() if job.name in needed]


class JobRunner:
    """Runs jobs, `workers` at a time, below `folder`; calls `finished` with each job and its seconds.

    Jobs start in the order given as soon as their inputs are done. A job that fails stops the study once those that
    run have ended; its output is in `log.txt` of its folder.
    """

    def __init__(self, folder: Path, workers: int, finished: Callable[[Job, float], None]) -> None:
        self._folder = folder
        self._workers = workers
        self._finished = finished
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def is_done(self, job: Job, fingerprint: str) -> bool:
        """Whether the job's folder is complete and was made with this fingerprint."""
        mark = self._folder / job.name / DONE_NAME
        return mark.is_file() and read_json(mark)["fingerprint"] == fingerprint

    def run(self, jobs: list[Job], marks: Mapping[str, str]) -> None:
        """Run all `jobs`, whose fingerprints are `marks`. Raises `StudyFailed` when one fails."""
        waiting = list(jobs)
        running: dict[str, tuple[Job, BaseProcess, float]] = {}
        failed: list[str] = []
        while running or (waiting and not failed):
            unfinished = {job.name for job in waiting} | set(running)
            ready = [job for job in waiting if not unfinished & set(job.inputs)]
            for job in ready[: 0 if failed else self._workers - len(running)]:
                waiting.remove(job)
                process = self._context.Process(target=run_job, args=(job, str(self._folder), marks[job.name]))
                process.start()
                running[job.name] = (job, process, time.monotonic())
            for name, (job, process, begun) in list(running.items()):
                if process.is_alive():
                    continue
                del running[name]
                if process.exitcode == 0:
                    self._finished(job, time.monotonic() - begun)
                else:
                    failed.append(name)
            time.sleep(POLL_SECONDS)
        if failed:
            logs = ", ".join(str(self._folder / name / "log.txt") for name in failed)
            raise StudyFailed(f"{', '.join(failed)} failed; see {logs}. Start again to go on from here")


def run_job(job: Job, study_folder: str, fingerprint: str) -> None:
    """The body of a job's process: its commands one by one, output to `log.txt`, and the mark that it is done."""
    folder = Path(study_folder) / job.name
    # What a killed run or other settings left is not to be gone on with: labels, say, of samples that are made anew.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = only_mine(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    tolerate_characters()  # the folder's name is printed before a command's own preparation
    os.environ["MASTER_PORT"] = str(_free_port())
    begun = time.monotonic()
    for module, flags in job.commands:
        print(f"$ {shell_line((module, flags))}", flush=True)
        sys.argv = [module, *flags]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    write_json(folder / DONE_NAME, {"fingerprint": fingerprint, "seconds": round(time.monotonic() - begun, 1)})


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
