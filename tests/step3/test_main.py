"""Step 3 as a whole on two ranks: killed under the deepspeed launcher and resumed, diverged, and refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.data.prompt_settings import load_prompt_settings
from common.data.records import Event
from common.files import read_json
from common.models.loading import save_model_folder
from tests.step3.runs import STEPS, assert_equal_runs, command, environment, kill_after, numbers, run, run_successfully
from tests.tiny_models import ordinary_tokenizer, tiny_llama

pytestmark = pytest.mark.distributed


@pytest.mark.timeout(900)
def test_killed_and_resumed_equals_undisturbed(inputs: Path, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_successfully(inputs, straight)

    kill_after(killed / "checkpoints" / "step_00000002", inputs, killed)
    assert not (killed / "model").exists()
    for status, error in run(inputs, killed):
        assert status == 2 and "--resume to go on with it" in error
    run_successfully(inputs, killed, "--resume")

    assert [row["step"] for row in numbers(straight)] == list(range(STEPS))
    assert_equal_runs(killed, straight)

    first, *_, last = numbers(straight)
    # The critic warms up, the actor is still the reference: only decoding rounds otherwise than a pass.
    assert abs(first["kl/per_sequence"]) < 1e-5 < abs(last["kl/per_sequence"])
    model = AutoModelForCausalLM.from_pretrained(straight / "model")
    tokenizer = AutoTokenizer.from_pretrained(straight / "model")
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    prompts = load_prompt_settings(straight / "model").builder(ordinary_tokenizer())
    history = [Event("search", query="red hat"), Event("click", title="Hats")]
    request = [{"role": "user", "content": prompts.text(history)}]
    assert prompts.text(history) == "red hat\n> Hats\nnext:\n"
    assert tokenizer.apply_chat_template(request, return_dict=False) == prompts.ids(history)
    start = load_file(inputs / "actor" / "model.safetensors")
    tuned = load_file(straight / "model" / "model.safetensors")
    assert start.keys() == tuned.keys()
    assert any(not torch.equal(start[key], tuned[key]) for key in start)


@pytest.mark.timeout(900)
def test_lora_in_the_sharded_path_needs_no_reference_and_leaves_adapters(inputs: Path, tmp_path: Path) -> None:
    run_successfully(
        inputs, tmp_path / "lora", "--lora_r", "4", "--hybrid_weights", "sharded", "--reward_level", "query",
        "--total_steps", "2", "--gradient_checkpointing",
    )
    rows = numbers(tmp_path / "lora")
    assert abs(rows[0]["kl/per_sequence"]) < 1e-5
    assert (tmp_path / "lora" / "model" / "adapter" / "adapter_model.safetensors").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "lora" / "model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have all of it")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--liger", "--liger needs a CUDA GPU and there is none; leave the flag out"),
        ("--quantize nf4 --lora_r 4 --dtype bf16 --zero_stage 2", "--quantize nf4 needs a CUDA GPU"),
        ("--quantize nf4 --lora_r 4 --dtype bf16", "use --zero_stage 2"),
        ("--attn_implementation flash_attention_2 --dtype bf16", "flash_attention_2 needs a CUDA GPU"),
    ],
)
def test_what_cannot_run_here_is_refused_before_a_folder_is_made(
    inputs: Path, tmp_path: Path, flags: str, message: str
) -> None:
    for status, error in run(inputs, tmp_path / "run", *flags.split()):
        assert status == 2 and message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(900)
def test_dora_is_exported_as_base_and_adapter(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "dora"
    run_successfully(
        inputs, output, "--lora_r", "4", "--lora_dora", "--lora_rslora", "--total_steps", "2", "--fused_adam",
        "--critic_warmup_steps", "0", "--ppo_epochs", "1",
    )
    first = numbers(output)[0]
    # One minibatch a rollout: old and new log-probs are of the same weights, up to the rounding of logits of size 10.
    assert first["policy/max_ratio"] == pytest.approx(1.0, abs=5e-5)
    assert first["policy/approx_kl"] == pytest.approx(0.0, abs=5e-5)
    base = AutoModelForCausalLM.from_pretrained(inputs / "actor")
    ids = torch.tensor([[5, 6, 7, 8, 30, 31]])
    with torch.no_grad():
        before = base(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(output / "model")(ids).logits
        adapted = PeftModel.from_pretrained(base, output / "model" / "adapter").eval()(ids).logits
    assert torch.allclose(merged, adapted, atol=1e-4)  # fp32 sums in another order, logits of size 10
    assert not torch.allclose(merged, before, atol=1e-2), "the adapters must have learned"
    chosen = read_json(output / "environment.json")
    assert (chosen["ranks"], chosen["gpus_of_first_host"]) == (2, [])
    assert chosen["packages"]["torch"] == torch.__version__
    assert chosen["choices"]["fused_adam"] and chosen["choices"]["attn_implementation"] == "sdpa"


@pytest.mark.timeout(900)
def test_target_kl_ends_the_updates_of_a_rollout(inputs: Path, tmp_path: Path) -> None:
    """Four minibatches a rollout; the first has ratio 1, the second sees the first's update and exceeds any target."""
    flags = ("--rollout_batch_size", "8", "--ppo_epochs", "2", "--total_steps", "2")
    run_successfully(inputs, tmp_path / "free", *flags, "--target_kl", "0")
    run_successfully(inputs, tmp_path / "bound", *flags, "--target_kl", "1e-6")
    free, bound = numbers(tmp_path / "free")[1], numbers(tmp_path / "bound")[1]
    assert (free["policy/optimizer_steps"], free["policy/stopped_early"]) == (4.0, 0.0)
    assert (bound["policy/optimizer_steps"], bound["policy/stopped_early"]) == (2.0, 1.0)


@pytest.mark.timeout(900)
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(inputs: Path, tmp_path: Path) -> None:
    """A critic whose trunk holds a NaN: its first value is not finite."""
    poisoned = tmp_path / "poisoned"
    save_model_folder(tiny_llama(), ordinary_tokenizer(), poisoned, {})
    weights = load_file(poisoned / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})
    for status, error in run(inputs, tmp_path / "run", "--critic_path", str(poisoned)):
        assert status == 3
        assert "NaN or infinite at step 0" in error


@pytest.mark.timeout(900)
def test_torchrun_is_as_good_a_launcher(inputs: Path, tmp_path: Path) -> None:
    run_successfully(inputs, tmp_path / "deepspeed")
    launch = command(inputs, tmp_path / "torchrun")
    script = launch.index("step3_tppo/main.py")
    port = launch[launch.index("--master_port") + 1]
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", "2", "--master_port", port]
    ended = subprocess.run(
        [*torchrun, *launch[script:]], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert numbers(tmp_path / "torchrun") == numbers(tmp_path / "deepspeed")
