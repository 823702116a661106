"""Plans of whole steps: verdicts, what is advised, and the command that shows them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import LongformerConfig

from common.config import parse_config
from common.engine.memory import GIB, mode_that_fits
from common.planning.advice import Change, advice_line, advice_text, advise, halvings
from common.planning.plan import MARGIN, Machine, Phase, Plan
from common.planning.trainer import trainer_changes
from step1_sft.config import SftConfig
from step1_sft.planning import plan_step1
from step2_token_reward.config import Step2Config
from step2_token_reward.planning import plan_step2
from step3_tppo.config import Step3Config
from step3_tppo.planning import plan_step3, step3_changes
from tests.planning.architectures import config_file
from tests.tiny_models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
LONG = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 4, "max_position_embeddings": 2048}


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    tiny_llama(**LONG).config.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny" / "config.json")


def _step3(model: str, **settings: object) -> Step3Config:
    return Step3Config(
        actor_path=model, reward_path=model, data_dir="-", output_dir="-", max_prompt_tokens=960,
        max_response_tokens=64, rollout_batch_size=32, samples_per_prompt=4, mini_batch_size=32, **settings,
    )  # fmt: skip


def _plan(peak: int, memory: int) -> Plan:
    return Plan("", Machine(1, memory), [Phase("small", {"weights": 1}), Phase("large", {"weights": peak})])


@pytest.mark.parametrize(
    ("peak", "verdict"), [(1000 - int(1000 * MARGIN), "fits"), (1000, "is tight"), (1001, "does not fit")]
)
def test_a_plan_fits_with_a_margin_is_tight_without_and_else_does_not_fit(peak: int, verdict: str) -> None:
    plan = _plan(peak, 1000)
    assert (plan.verdict, plan.fullest.name, plan.peak) == (verdict, "large", peak)
    assert plan.summary().endswith(verdict) and "in large of" in plan.summary()


def test_a_table_has_a_row_a_phase_whose_parts_add_up(tiny: str) -> None:
    plan = plan_step3(_step3(tiny), Machine(2, GIB))
    rows = [line.split("  ") for line in plan.table().splitlines()]
    assert [row[0].strip() for row in rows[1:]] == [
        "load", "generation", "actor scoring", "reference scoring", "critic scoring", "reward scoring", "critic update",
        "actor update", "optimiser step", "export",
    ]  # fmt: skip
    assert all(phase.total == sum(phase.parts.values()) for phase in plan.phases)
    assert plan.updates == 200 and plan.seconds == pytest.approx(sum(phase.seconds for phase in plan.phases))


def test_adapters_on_the_critic_are_advised_where_its_states_are_what_does_not_fit(tmp_path: Path) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    tiny_llama(**LONG | wide).config.save_pretrained(tmp_path)
    config = dataclasses.replace(
        _step3(str(tmp_path), lora_r=4, scoring_batch_size=1, micro_batch_size=1, gradient_checkpointing=True),
        max_prompt_tokens=24, max_response_tokens=8, decode_rows=4,
    )  # fmt: skip
    adapted = plan_step3(dataclasses.replace(config, critic_lora_r=16), Machine(1, GIB, cuda=False))
    machine = Machine(1, int(1.15 * adapted.peak), cuda=False)
    plan = plan_step3(config, machine)
    assert plan.verdict == "does not fit" and "--critic_lora_r 16 trains adapters alone" in plan.notes[-1]
    (step,) = advise(config, machine, plan_step3, step3_changes(config, machine))
    assert step.flag == "--critic_lora_r 16" and step.plan.verdict == "fits"
    assert not any("critic" in note for note in step.plan.notes)
    # Master weight and two moments of each weight of the trunk go; those of its adapters, of rank 16, come.
    trunk = 4 * (512 * 512 * 2 + 512 * 256 * 2 + 3 * 512 * 2048 + 2 * 512) + 300 * 512 + 512
    adapters = 4 * 16 * ((512 + 512) * 2 + (512 + 256) * 2 + (512 + 2048) * 3)
    whole, thin = (next(p for p in each.phases if p.name == "export").parts["optimiser"] for each in (plan, step.plan))
    assert whole - thin == 12 * (trunk - adapters)


def test_the_preset_of_24_gb_fits_a_model_of_3b_and_the_hosts_memory(tmp_path: Path) -> None:
    actor = config_file("llama_3_3b", tmp_path)
    LongformerConfig(vocab_size=50_265, max_position_embeddings=4098, type_vocab_size=1).save_pretrained(
        tmp_path / "reward"
    )
    models = ["--actor_path", actor, "--reward_path", str(tmp_path / "reward")]
    flags = [*_preset_flags("step3_tppo", "1x24gb_lora"), *models, "--data_dir", "-", "--output_dir", "-"]
    plan = plan_step3(parse_config(Step3Config, flags), Machine(1, 24 * GIB))
    assert plan.verdict == "fits" and plan.peak == pytest.approx(22.01 * GIB, rel=0.002)  # as docs/models.md says
    assert plan.host < 32 * GIB


def _preset_flags(step: str, name: str) -> list[str]:
    configs = ROOT / step / "configs"
    return ["--config", str(configs / "recipe.yaml"), str(configs / f"{name}.yaml")]


def test_time_is_flops_over_what_is_achieved_and_decoding_waits_for_memory(tiny: str) -> None:
    machine = Machine(2, GIB, flops=1e12, bandwidth=1e12)
    slow = plan_step3(_step3(tiny), dataclasses.replace(machine, flops=1e9, bandwidth=1e15))
    fast = plan_step3(_step3(tiny), dataclasses.replace(machine, flops=1e10, bandwidth=1e15))
    assert slow.seconds == pytest.approx(10 * fast.seconds)
    starved = {p.name: p for p in plan_step3(_step3(tiny), dataclasses.replace(machine, bandwidth=1e6)).phases}
    plain = {p.name: p for p in plan_step3(_step3(tiny), machine).phases}
    assert starved["generation"].seconds > 1000 * plain["generation"].seconds
    assert starved["actor update"].seconds == plain["actor update"].seconds


def test_the_rollouts_weights_are_chosen_by_the_rule_of_the_hybrid_engine(tiny: str) -> None:
    roomy, cramped = (plan_step3(_step3(tiny), Machine(4, memory)) for memory in (10 * GIB, 3 * GIB))
    gathered, sharded = (
        next(phase.parts for phase in plan.phases if phase.name == "generation") for plan in (roomy, cramped)
    )
    rest = sum(next(phase for phase in roomy.phases if phase.name == "load").parts.values())
    assert mode_that_fits(gathered["gathered"], gathered["KV cache"], 10 * GIB - rest) == "gathered"
    assert "gathered (" in roomy.notes[0] and "sharded, each layer" in cramped.notes[0]
    assert sharded["weights"] == gathered["weights"]


@pytest.mark.parametrize("share", [0.7, 0.3])
def test_each_advised_change_of_step_3_lowers_the_peak_until_it_fits(tiny: str, share: float) -> None:
    config = _step3(tiny, deepspeed_config=_small_buckets(Path(tiny).parent))
    machine = Machine(2, int(share * plan_step3(config, Machine(2, GIB)).peak))
    plan = plan_step3(config, machine)
    assert plan.verdict == "does not fit"
    steps = advise(config, machine, plan_step3, step3_changes(config, machine))
    peaks = [plan.peak, *(step.plan.peak for step in steps)]
    assert len(steps) >= 1 and steps[-1].plan.verdict == "fits"
    assert all(later <= earlier for earlier, later in pairwise(peaks)) and peaks[-1] < peaks[0]
    # The flags are real: with them on the command line the plan is the last one advised.
    flags = [word for step in steps for word in step.flag.split() if step.flag.startswith("--")]
    as_typed = parse_config(Step3Config, [f"--{k}={v}" for k, v in _given(config).items()] + flags)
    if not any(step.flag.endswith("GPUs") for step in steps):
        assert plan_step3(as_typed, machine).peak == steps[-1].plan.peak


def _small_buckets(folder: Path) -> str:
    path = folder / "deepspeed.json"
    path.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 100000}}')
    return str(path)


def _given(config: Step3Config) -> dict[str, object]:
    default = Step3Config()
    return {k: v for k, v in dataclasses.asdict(config).items() if v != getattr(default, k)}


def test_what_is_not_needed_is_not_advised() -> None:
    def plan(config: Step3Config, machine: Machine) -> Plan:
        return _plan(50 * config.micro_batch_size + 10 * config.scoring_batch_size, machine.memory)

    config = Step3Config(micro_batch_size=8, scoring_batch_size=8)
    changes = [
        Change("scoring_batch_size", halvings(8), "slower"), Change("micro_batch_size", halvings(8), "slower still"),
        Change("gradient_checkpointing", [True], "no help at all"),
    ]
    assert [step.flag for step in advise(config, Machine(1, 310), plan, changes)] == ["--micro_batch_size 4"]
    steps = advise(config, Machine(1, 70), plan, changes)
    assert [step.flag for step in steps] == ["--scoring_batch_size 1", "--micro_batch_size 1"]
    assert "--scoring_batch_size 1" in advice_text(steps).splitlines()[1]
    assert advice_line(advise(config, Machine(1, 10), plan, changes)).endswith("which is still too much")
    assert "larger GPUs" in advice_text([]) and "larger GPUs" in advice_line([])


def test_mistral_7b_fits_eight_gpus_of_80_gib_and_not_two(tmp_path: Path) -> None:
    path = config_file("mistral_7b", tmp_path)
    flags = [*_preset_flags("step3_tppo", "8x80gb_full"), "--actor_path", path, "--reward_path", path]
    config = parse_config(Step3Config, [*flags, "--output_dir", "-", "--data_dir", "-"])
    plan = plan_step3(config, Machine(8, 80 * GIB))
    assert plan.verdict == "fits"
    weights = next(phase.parts["weights"] for phase in plan.phases)
    assert weights == pytest.approx(2 * (2 * 7.24e9 + 2 * 7.11e9) / 8, rel=0.01)  # two with their output layer
    assert plan_step3(config, Machine(2, 80 * GIB)).verdict == "does not fit"


def test_adapters_of_llama_70b_fit_eight_gpus_that_its_states_would_not(tmp_path: Path) -> None:
    flags = [*_preset_flags("step1_sft", "8x80gb_lora"), "--model_name_or_path", config_file("llama_3_70b", tmp_path)]
    config = parse_config(SftConfig, flags)
    plan = plan_step1(config, Machine(8, 80 * GIB))
    assert plan.verdict == "fits"
    load = plan.phases[0].parts
    assert load["weights"] == pytest.approx(2 * 70.55e9 / 8, rel=0.01)
    assert load["optimiser"] < 0.01 * 12 * 70.55e9 / 8 and 80 * GIB < 12 * 70.55e9 / 8


def test_smaller_batches_and_checkpointing_lower_the_peaks_of_steps_1_and_2(tiny: str) -> None:
    settings = {"model_name_or_path": tiny, "per_device_train_batch_size": 16, "zero_stage": 0}
    for make_plan, config in (
        (plan_step1, SftConfig(**settings)), (plan_step2, Step2Config(bidirectional="true", **settings))
    ):  # fmt: skip
        machine = Machine(2, 10 * MIB)
        plan = make_plan(config, machine)
        assert plan.verdict == "does not fit"
        steps = advise(config, machine, make_plan, trainer_changes(config, machine))
        flags = " ".join(step.flag for step in steps)
        assert "--gradient_checkpointing true" in flags and "--per_device_train_batch_size" in flags
        assert steps[-1].plan.peak < plan.peak / 4


def test_a_users_own_zero_3_keeps_what_the_flags_zero_3_keeps(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text('{"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": true}}')
    config = SftConfig(model_name_or_path=tiny, lora_r=4, lora_target_modules="q_proj", dtype="fp32")
    flags, own, plain = (
        plan_step1(dataclasses.replace(config, **changes), Machine(2, GIB)).phases[1].parts["activations"]
        for changes in ({"zero_stage": 3}, {"zero_stage": 1, "deepspeed_config": str(path)}, {"zero_stage": 1})
    )
    assert flags == own > plain


def test_the_command_runs_from_the_root_without_a_path_and_says_what_to_change(tiny: str) -> None:
    found = subprocess.run(
        [
            sys.executable, "scripts/plan.py", "--step", "3", "--gpus", "2", "--gpu_memory", "1.9", "--actor_path",
            tiny, "--max_prompt_tokens", "900",
        ],
        cwd=ROOT, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=400, check=True,
    )  # fmt: skip
    assert "generation" in found.stdout and "does not fit" in found.stdout
    assert "what to change" in found.stdout and "TFLOP/s" in found.stdout and "reduce_bucket_size" in found.stdout
