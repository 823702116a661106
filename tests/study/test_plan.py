"""The study's plan: what differs between two runs is what their names say, and nothing else."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from baselines.dpo.config import DpoConfig
from common.config import parse_config
from common.files import read_json
from step1_sft.config import SftConfig
from step2_token_reward.config import Step2Config
from step2_token_reward.label import LabelConfig
from step2_token_reward.sample_config import SampleConfig
from step3_tppo.config import Step3Config
from study.jobs import Job, fingerprints, shell_line
from study.main import SHIPPED, shipped_settings
from study.measure import MeasureConfig
from study.parts import axis_jobs, budget_jobs, dpo_settings, main_jobs, ppo_settings, real_jobs, search_jobs
from study.plan import Planner
from study.records import Records, leaves_record
from study.settings import ABLATIONS, COMPARED, FULL, PPO_SYSTEMS

CHOSEN = {**{arm: ppo_settings({"credit": "short"}) for arm in COMPARED}, "dpo": dpo_settings({})}
CONFIGS = {
    "step1_sft.main": SftConfig, "step2_token_reward.main": Step2Config, "step2_token_reward.sample": SampleConfig,
    "step2_token_reward.label": LabelConfig, "step3_tppo.main": Step3Config, "study.measure": MeasureConfig,
    "baselines.dpo.main": DpoConfig,
}  # fmt: skip


@pytest.fixture(scope="module")
def jobs() -> dict[str, Job]:
    planner = Planner(Path("work"), FULL, ("a.jsonl", "b.jsonl"))
    search_jobs(planner)
    for add in (main_jobs, budget_jobs, axis_jobs, real_jobs):
        add(planner, FULL, CHOSEN)
    return planner.jobs


def _settings(job: Job, module: str) -> dict:
    flags = dict(job.commands)[module]
    config = parse_config(CONFIGS[module], list(flags))
    return {field.name: getattr(config, field.name) for field in fields(config)}


def _changed(job: Job, other: Job, module: str = "step3_tppo.main") -> set[str]:
    first, second = _settings(job, module), _settings(other, module)
    return {name for name in first if first[name] != second[name]} - {"output_dir"}


def test_every_command_is_one_its_module_takes(jobs: dict[str, Job]) -> None:
    for job in jobs.values():
        for module, flags in job.commands:
            if module in CONFIGS:
                parse_config(CONFIGS[module], list(flags))


def test_settings_that_commands_leave_open_are_those_that_the_records_were_made_with(jobs: dict[str, Job]) -> None:
    """Fingerprints are made of commands: they miss a changed preset or default. `left_open.json` holds such settings.

    `auto` reads both ways in a decoder, as the study's encoders are, and is fp32 on a CPU. The records recomputed old
    log-probs. Those of sampling, which `auto` takes in fp32, differ by rounding.
    """
    left_open = read_json(Path(__file__).with_name("left_open.json"))
    for job in jobs.values():
        for module, flags in job.commands:
            kept = {name: value for name, value in left_open.get(module, {}).items() if f"--{name}" not in flags}
            settings = _settings(job, module) if kept else {}
            assert {name: settings[name] for name in kept} == kept, job.name


def test_shipped_records_were_made_by_the_commands_that_are_planned() -> None:
    planner = Planner(Path("outputs/study"), FULL)
    search_jobs(planner)
    for add in (main_jobs, budget_jobs, axis_jobs):
        add(planner, FULL, shipped_settings())
    marks, records = fingerprints(planner.jobs.values()), dict(Records(SHIPPED / "records").read())
    recorded = {name: job for name, job in planner.jobs.items() if leaves_record(job)}
    assert len(recorded) > 300
    for name, job in recorded.items():
        assert records[name]["commands"] == list(map(shell_line, job.commands)), name
        assert records[name]["fingerprint"] == marks[name], name


def test_step_3_settings_are_valid(jobs: dict[str, Job]) -> None:
    for job in jobs.values():
        flags = dict(job.commands).get("step3_tppo.main")
        if flags:
            parse_config(Step3Config, list(flags)).validate(world_size=1)


def test_inputs_are_jobs_and_every_path_read_is_in_an_input(jobs: dict[str, Job]) -> None:
    for job in jobs.values():
        readable = {job.name, *job.inputs}
        # What an input has read itself is there too: the log below the SFT model.
        for name in job.inputs:
            readable |= set(jobs[name].inputs)
        for _, flags in job.commands:
            for flag in flags:
                if flag.startswith("work/"):
                    assert any(flag.startswith(f"work/{name}/") for name in readable), (job.name, flag)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_what_it_says(jobs: dict[str, Job], name: str) -> None:
    if name == "credit_short":  # as TPPO is in these plans
        assert f"ablation_{name}/s1/tppo" not in jobs
        return
    changed = _changed(jobs[f"ablation_{name}/s1/tppo"], jobs["main/s1/tppo"])
    # A credit is three flags, of which another credit may share some.
    expected = {"gamma", "lam"} if name == "credit_long" else set(ABLATIONS[name])
    assert changed == expected


def test_arms_differ_in_place_and_reward_model_alone(jobs: dict[str, Job]) -> None:
    models = {"reward_path", "critic_path", "sentence_coef"}
    for system, design in PPO_SYSTEMS.items():
        changed = _changed(jobs[f"main/s1/{system}"], jobs["main/s1/tppo"])
        place = {"reward_level"} if design["level"] != "token" else set()
        assert changed == place | (models if design["heads"] == "sentence" else set())


def test_seeds_differ_in_seed_and_models_alone(jobs: dict[str, Job]) -> None:
    changed = _changed(jobs["main/s1/tppo"], jobs["main/s2/tppo"])
    assert changed == {"seed", "actor_path", "reward_path", "critic_path"}
    assert _changed(jobs["s1/k3/sft"], jobs["s2/k3/sft"], "step1_sft.main") == {"seed", "model_name_or_path"}


def test_search_points_differ_in_what_is_searched_and_use_development_users(jobs: dict[str, Job]) -> None:
    assert _changed(jobs["search/s0/tppo-1"], jobs["search/s0/tppo-0"]) == {"actor_learning_rate"}
    assert _changed(jobs["search/s0/tppo-4"], jobs["search/s0/tppo-0"]) == {"gamma", "lam"}
    for name, job in jobs.items():
        if "study.measure" in dict(job.commands):
            assert _settings(job, "study.measure")["split"] == ("dev" if name.startswith("search/") else "test")


def test_budgets_and_noise_change_the_labels_alone(jobs: dict[str, Job]) -> None:
    few, many = jobs["s1/k3/n150_noise0.09"], jobs["s1/k3/n0_noise0.09"]
    assert _changed(few, many, "step2_token_reward.sample") == {"max_train_examples"}
    clean, usual = jobs["s1/k3/n1500_noise0"], jobs["s1/k3/n1500_noise0.09"]
    assert _changed(clean, usual, "step2_token_reward.sample") == set()
    assert _changed(clean, usual, "step2_token_reward.label") == {"samples", "labels", "word_error_rate"}


def test_sentence_models_learn_from_the_same_labels(jobs: dict[str, Job]) -> None:
    token, sentence = jobs["s1/k3/n0_noise0.09/token_w0.5"], jobs["s1/k3/n0_noise0.09/sentence"]
    assert _changed(token, sentence, "step2_token_reward.main") == {"heads"}
