"""The critic with adapters: what is trained, where its values begin, and that its folder gives the trained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from common.config import LoraOptions, ModelOptions
from common.errors import InputError
from common.models.loading import save_model_folder
from common.models.sequences import SequenceBatch, pad_sequences
from common.models.token_reward import load_token_reward_model
from common.models.value_model import VALUE_HEAD_NAME, ValueModel, load_value_model, save_value_model
from common.planning.models import ModelSpec, meta_model, weights_of
from step3_tppo.config import Step3Config
from step3_tppo.export import whole_state_dict
from step3_tppo.models import Models
from tests.distributed.ranks import run_on_ranks
from tests.step3.runs import assert_equal_runs, command, numbers, run_main, run_successfully
from tests.tiny_models import SEQUENCES, ordinary_tokenizer, tiny_llama

LORA = LoraOptions(lora_r=4)
# Values are sums of 32 products in fp32 (6e-8) of hidden states that passed through two layers of such sums, some of
# them with the adapters' part added first: below 1e-5 for values of size 1.
ROUNDING = 1e-5


def batch() -> SequenceBatch:
    return pad_sequences(SEQUENCES, [[20, 21, 22], [30], [40, 41], [50, 51, 52, 53]], 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model and a reward model made of it that reads both ways."""
    path = tmp_path_factory.mktemp("critic")
    save_model_folder(tiny_llama(), ordinary_tokenizer(), path / "sft", {})
    load_token_reward_model(str(path / "sft"), ModelOptions(), bidirectional=True).save_pretrained(path / "reward")
    return path


def adapted(path: Path, lora: LoraOptions = LORA, seed: int = 0, learned: bool = True) -> ValueModel:
    """A critic with adapters, as if they had `learned`: B is 0 at first."""
    torch.manual_seed(seed)
    critic = load_value_model(path, ModelOptions(), lora=lora).eval()
    for name, parameter in critic.named_parameters():
        if learned and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return critic


def reloaded(path: Path) -> ValueModel:
    critic = load_value_model(path, ModelOptions()).eval()
    critic.value_head.load_state_dict(load_file(path / VALUE_HEAD_NAME))
    return critic


def values(critic: ValueModel) -> torch.Tensor:
    with torch.no_grad():
        return critic(batch())


@pytest.mark.parametrize("kind", ["causal_lm", "reward_model"])
def test_values_begin_as_those_of_the_critic_without_adapters(folder: Path, kind: str) -> None:
    path = folder / {"causal_lm": "sft", "reward_model": "reward"}[kind]
    torch.manual_seed(0)
    whole = load_value_model(path, ModelOptions()).eval()
    assert torch.equal(values(adapted(path, learned=False)), values(whole))


def test_adapters_and_head_alone_are_trained(folder: Path) -> None:
    critic = adapted(folder / "sft")
    trained = {name for name, parameter in critic.named_parameters() if parameter.requires_grad}
    assert {"value_head.weight", "value_head.bias"} < trained
    assert all("lora_" in name for name in trained if not name.startswith("value_head."))
    layers = sum(isinstance(m, torch.nn.Linear) for m in AutoModel.from_pretrained(folder / "sft").modules())
    assert len(trained) == 2 + 2 * layers


@pytest.mark.parametrize("settings", [{}, {"lora_rslora": True}, {"lora_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_the_saved_critic_is_merged_and_gives_the_same_values(
    folder: Path, tmp_path: Path, kind: str, settings: dict[str, bool]
) -> None:
    critic = adapted(folder / kind, LoraOptions(lora_r=4, **settings))
    before = {name: tensor.clone() for name, tensor in critic.state_dict().items()}
    save_value_model(critic, critic.state_dict(), tmp_path / "critic")
    assert all(torch.equal(tensor, before[name]) for name, tensor in critic.state_dict().items())
    assert not torch.allclose(values(critic), values(adapted(folder / kind, learned=False)), atol=0.01)
    torch.testing.assert_close(values(reloaded(tmp_path / "critic")), values(critic), rtol=0, atol=ROUNDING)
    base = AutoModel.from_pretrained(folder / "sft").state_dict()
    saved = load_file(tmp_path / "critic" / "model.safetensors")
    assert {name: t.shape for name, t in saved.items()} == {name: t.shape for name, t in base.items()}


def test_an_adapted_critic_of_a_reward_model_does_not_look_ahead(folder: Path) -> None:
    critic = adapted(folder / "reward")
    first, other = (pad_sequences([[11, 12]], [[3, last, 5]], 0, torch.device("cpu")) for last in (4, 7))
    with torch.no_grad():
        before, after = critic(first)[0], critic(other)[0]
    assert torch.equal(before[:2], after[:2]) and before[2] != after[2]


def test_checkpointing_changes_no_gradient_over_frozen_embeddings(folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        critic = adapted(folder / "sft").train()
        if checkpointing:
            critic.gradient_checkpointing_enable()
        critic(batch()).pow(2).sum().backward()
        gradients.append({name: p.grad for name, p in critic.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert all(gradient is not None and torch.equal(gradient, plain[name]) for name, gradient in checkpointed.items())
    assert all(float(gradient.abs().max()) > 0 for name, gradient in plain.items() if "lora_B" in name)


def test_a_plan_counts_the_weights_that_peft_trains(folder: Path) -> None:
    spec = ModelSpec(str(folder / "sft"), "value_model", lora_r=4)
    weights = weights_of(spec, trained=True)
    critic = adapted(folder / "sft")
    adapters, everything = critic.trunk.get_nb_trainable_parameters()
    head = 32 + 1
    # Two layers of width 32: q and o are 32 x 32, k and v 32 to 16 (two of four heads), gate, up, down 32 and 64.
    assert adapters == 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert (sum(weights.trained), weights.total) == (adapters + head, everything + head)
    assert weights.adapted == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert meta_model(spec).value_head.weight.requires_grad


def _config(**settings: Any) -> Step3Config:
    return Step3Config(output_dir="o", actor_path="a", reward_path="r", data_dir="d", **settings)


def test_the_rank_is_checked_and_kinds_of_adapters_may_be_the_critics_alone() -> None:
    with pytest.raises(InputError, match="--critic_lora_r must not be negative"):
        _config(critic_lora_r=-1).validate(1)
    _config(critic_lora_r=4, lora_dora=True).validate(1)
    with pytest.raises(InputError, match="--lora_dora is for adapters and there are none"):
        _config(lora_dora=True).validate(1)


def test_the_critics_adapters_are_of_the_actors_kind_but_for_the_rank() -> None:
    kind = {"lora_alpha": 32, "lora_rslora": True, "lora_target_modules": "q_proj"}
    lora = _config(lora_r=64, critic_lora_r=8, **kind).of_critic()
    found = (lora.lora_r, lora.lora_alpha, lora.lora_rslora, lora.lora_target_modules)
    assert found == (8, 32, True, "q_proj")


FLAGS = ("--critic_lora_r", "4", "--lora_r", "4", "--lr_schedule", "constant", "--total_steps", "2",
         "--save_steps", "1", "--gradient_checkpointing")  # fmt: skip


class TrainedRun(NamedTuple):
    """A run's folder, and its critic's whole weights and values before they were saved."""

    output: Path
    state: dict[str, torch.Tensor]
    values: torch.Tensor


def _trained(rank: int, world_size: int, argv: list[str]) -> tuple[dict[str, Any], Any]:
    """A run's critic before it is saved: its whole weights (on rank 0), and its values."""
    found: dict[str, Any] = {}

    def look(models: Models, *others: Any) -> None:
        from step3_tppo.export import export_models

        state = whole_state_dict(models.critic) or {}  # elsewhere than on rank 0 there is nothing
        found["state"] = {name: tensor.clone().numpy() for name, tensor in state.items()}
        with models.critic.inference() as critic:
            found["values"] = critic(batch()).numpy()
        export_models(models, *others)

    with mock.patch("step3_tppo.main.export_models", look):
        status, error = run_main(rank, world_size, argv)
    assert status == 0, error[-3000:]
    return found["state"], found["values"]


@pytest.fixture(scope="module")
def trained(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A run of two ranks under ZeRO-3."""
    output = tmp_path_factory.mktemp("trained") / "run"
    argv = command(inputs, output, *FLAGS)
    (state, found), _ = run_on_ranks(_trained, 2, argv[argv.index("step3_tppo/main.py") :])
    return TrainedRun(output, {name: torch.from_numpy(array) for name, array in state.items()}, torch.from_numpy(found))


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_updates_leave_the_frozen_trunk_as_it_was_to_the_last_bit(
    inputs: Path, trained: TrainedRun
) -> None:
    start = AutoModel.from_pretrained(inputs / "actor").state_dict()
    frozen = {
        name.removeprefix("trunk.base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in trained.state.items() if name.startswith("trunk.") and "lora_" not in name
    }  # fmt: skip
    assert frozen.keys() == start.keys()
    assert all(torch.equal(tensor, start[name]) for name, tensor in frozen.items())
    assert all(float(tensor.abs().max()) > 0 for name, tensor in trained.state.items() if "lora_B" in name)
    assert float(trained.state["value_head.bias"]) != 0  # where it began


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_the_first_rollouts_values_are_those_of_a_run_without_adapters(
    inputs: Path, tmp_path: Path, trained: TrainedRun
) -> None:
    run_successfully(inputs, tmp_path / "whole", *FLAGS, "--critic_lora_r", "0", "--total_steps", "1")
    (whole,), (first, *_) = numbers(tmp_path / "whole"), numbers(trained.output)
    for name in ("value/explained_variance", "value/returns_mean", "value/returns_std"):
        assert first[name] == whole[name]
    assert first["loss/value"] == whole["loss/value"]  # one minibatch: before the first optimiser step
    assert first["value/grad_norm"] != whole["value/grad_norm"]


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_the_exported_critic_gives_the_values_that_were_trained(trained: TrainedRun) -> None:
    torch.testing.assert_close(values(reloaded(trained.output / "critic")), trained.values, rtol=0, atol=ROUNDING)


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_resumed_run_equals_an_undisturbed_one_and_keeps_no_frozen_weights(
    inputs: Path, tmp_path: Path, trained: TrainedRun
) -> None:
    output = tmp_path / "run"
    run_successfully(inputs, output, *FLAGS, "--total_steps", "1")
    run_successfully(inputs, output, *FLAGS, "--resume")
    assert_equal_runs(output, trained.output)
    files = list((output / "checkpoints").glob("*/critic/*model_states.pt"))
    assert files
    for file in files:
        saved = torch.load(file, weights_only=False)["module"]
        assert saved and all("lora_" in name or name.startswith("value_head.") for name in saved)


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_in_bf16_zero_3_trains_adapters_and_head_together(inputs: Path, tmp_path: Path) -> None:
    """ZeRO-3 keeps all that it trains of a model in one buffer, and so in one precision; peft would take fp32."""
    output = tmp_path / "run"
    run_successfully(inputs, output, *FLAGS, "--total_steps", "1", "--dtype", "bf16", "--critic_warmup_steps", "0")
    (row,) = numbers(output)
    assert row["value/grad_norm"] > 0 and row["policy/grad_norm"] > 0
    for name in ("critic/model.safetensors", f"critic/{VALUE_HEAD_NAME}", "model/adapter/adapter_model.safetensors"):
        assert {tensor.dtype for tensor in load_file(output / name).values()} == {torch.bfloat16}
