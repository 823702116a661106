"""The study's forecast: what makes two jobs take the same time, and hours by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.files import read_json, write_json
from study.forecast import Timings, kind
from study.jobs import DONE_NAME, Job, fingerprints
from study.main import SECONDS_NAME, SHIPPED, Study, shipped_settings
from study.parts import axis_jobs, budget_jobs, main_jobs, search_jobs
from study.plan import Planner, World
from study.settings import FULL

ROOT = Path(__file__).resolve().parents[2]
SHORT = Job("a/s1/tppo", (("m.train", ("--seed", "1", "--total_steps", "10")), ("m.measure", ("--split", "test"))))
OTHER_SEED = Job("a/s2/tppo", (("m.train", ("--seed", "2", "--total_steps", "10")), ("m.measure", ("--split", "test"))))
LONG = Job("a/s1/long", (("m.train", ("--seed", "1", "--total_steps", "20")),))
UNSEEN = Job("a/s1/sft", (("m.other", ()),))


def test_jobs_are_of_one_kind_that_differ_in_seeds_and_settings_but_not_in_the_amount_of_work() -> None:
    assert kind(SHORT) == kind(OTHER_SEED) == "m.train + m.measure (total_steps 10, split test)"
    assert kind(LONG) == "m.train (total_steps 20)"
    planner = Planner(Path("work"), FULL)
    chosen = shipped_settings()
    planner.ppo("x", World(1), "tppo", chosen["tppo"])
    planner.ppo("x", World(2), "ppo_query", chosen["ppo_query"])
    planner.ppo("x", World(1), "tppo", chosen["tppo"], changes={"ppo_epochs": "2"}, label="two_epochs")
    planner.ppo("x", World(1, k=5), "tppo", chosen["tppo"], label="k5")
    made = planner.jobs
    assert kind(made["x/s1/tppo"]) == kind(made["x/s2/ppo_query"])
    assert len({kind(made[f"x/s1/{name}"]) for name in ("tppo", "two_epochs", "k5")}) == 3
    fewer = World(1, users=150)
    planner.ppo("y", fewer, "tppo", chosen["tppo"])
    few, all_users = (f"{world.labels}/token_w0.5" for world in (fewer, World(1)))
    assert kind(made[few]) != kind(made[all_users])


def test_hours_are_medians_of_the_kind_times_its_jobs_over_the_workers(tmp_path: Path) -> None:
    path = tmp_path / SECONDS_NAME
    for job, seconds in ((SHORT, 100.04), (OTHER_SEED, 5000.0), (SHORT, 120.0), (LONG, 600.0)):
        Timings(path).add(job, seconds)
    assert read_json(path) == {kind(SHORT): [100.0, 5000.0, 120.0], kind(LONG): [600.0]}
    timings = Timings(path)
    jobs = [SHORT, OTHER_SEED, LONG, UNSEEN]
    hours, unknown = timings.hours(jobs, workers=2)
    assert hours == pytest.approx((120 + 120 + 600) / 3600 / 2, rel=1e-12)
    assert unknown == 1
    said = timings.summary(jobs, 2)
    assert said == "4 jobs, about 0.1 hours with 2 at a time, not counting 1 of kinds that were never timed"
    assert timings.summary([UNSEEN], 2) == "1 jobs, of kinds that were never timed"
    assert timings.summary([], 2) == "0 jobs, about 0.0 hours with 2 at a time"
    _, short, long, unseen = (line.split() for line in timings.table(jobs))
    assert short[:3] == ["2", "120", "0.07"] and long[:3] == ["1", "600", "0.17"] and unseen[:3] == ["1", "?", "?"]


def test_the_study_is_within_six_hours_on_two_cores_by_the_seconds_that_its_jobs_took() -> None:
    planner = Planner(Path("work"), FULL)
    search_jobs(planner)
    for add in (main_jobs, budget_jobs, axis_jobs):
        add(planner, FULL, shipped_settings())
    hours, unknown = Timings(ROOT / SHIPPED / SECONDS_NAME).hours(planner.jobs.values(), workers=2)
    assert unknown == 0
    assert 0 < hours < 6


def test_the_command_forecasts_without_running_anything(tmp_path: Path) -> None:
    write_json(tmp_path / SECONDS_NAME, read_json(ROOT / SHIPPED / SECONDS_NAME))
    flags = ["--forecast", "--results_dir", str(tmp_path), "--work_dir", str(tmp_path / "work")]
    ran = subprocess.run(
        [sys.executable, "-m", "study.main", *flags], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *_, everything, left = ran.stdout.splitlines()
    # Without records all is left.
    assert everything.startswith("all: ") and everything.removeprefix("all") == left.removeprefix("left")
    assert "hours with 2 at a time" in left
    assert sorted(path.name for path in tmp_path.iterdir()) == [SECONDS_NAME]


def test_a_job_whose_record_is_lost_is_left_to_do_though_its_folder_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planner = Planner(tmp_path, FULL)
    planner.controls("main", World(0))
    marks = fingerprints(planner.jobs.values())
    for name, mark in marks.items():
        write_json(tmp_path / name / DONE_NAME, {"fingerprint": mark, "seconds": 1.0})
        if name not in ("log/k3", "main/s0/popularity"):
            write_json(tmp_path / "results" / "records" / f"{name}.json", {"fingerprint": mark})
    study = Study(tmp_path, tmp_path / "results", 1, FULL, ())
    study.forecast(lambda planner: planner.controls("main", World(0)))
    assert "left: 1 jobs" in capsys.readouterr().out
