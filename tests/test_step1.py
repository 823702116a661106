"""Step 1: labels, loss, gradients, resume, divergence."""

from __future__ import annotations

import json
import math
import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common.config import LoraOptions
from common.data.prompts import PromptBuilder
from common.data.records import Event, Example
from common.engine.manifest import damage, is_complete, write_manifest
from common.engine.trainer import (
    LengthGroupedOrder,
    checkpoint_step,
    newest_checkpoint,
    remove_incomplete_checkpoints,
    run_callbacks,
)
from common.engine.training_arguments import training_arguments
from common.errors import InputError, Preempted, TrainingDiverged
from common.models.loading import apply_lora
from step1_sft.config import SftConfig, check_config
from step1_sft.dataset import PadRight, build_rows
from step1_sft.trainer import SftTrainer, response_metrics, token_nll, token_weights
from tests.tiny_models import ordinary_tokenizer, tiny_llama

EOS = 0
ROWS = [
    {"input_ids": [5, 6, 7, 30, 31, EOS], "prompt_length": 3},
    {"input_ids": [8, 40, EOS], "prompt_length": 1},
    {"input_ids": [9, 10, 11, 12, 13, 14, 15, 16, 50, EOS], "prompt_length": 8},
    {"input_ids": [17, 18, 60, 61, 62, 63, EOS], "prompt_length": 2},
]


def make_trainer(
    folder, model=None, *, rows=ROWS, callbacks=(), prompt_loss_weight=0.0, chunks=False, **changes: Any
) -> SftTrainer:
    """An `SftTrainer` on the CPU, without DeepSpeed, that pads with EOS."""
    settings = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "optim": "adamw_torch",
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1,
        "logging_nan_inf_filter": False, "remove_unused_columns": False, "save_strategy": "no", "seed": 3,
        "train_sampling_strategy": "group_by_length", "max_grad_norm": 1e9, "num_train_epochs": 1.0,
    }  # fmt: skip
    return SftTrainer(
        model=model or tiny_llama(initializer_range=0.05),
        args=TrainingArguments(**settings | changes),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=PadRight(pad_token_id=EOS),
        processing_class=ordinary_tokenizer(pad_is_eos=True),
        callbacks=list(callbacks),
        prompt_loss_weight=prompt_loss_weight,
        chunks=chunks,
    )


def example(number: int, targets: tuple[str, ...], split: str = "train") -> Example:
    """An invented user who looked for hats."""
    history = (Event("search", query="red hat"), Event("click", title="Hats in red"))
    return Example(f"{split}{number}", f"u{number}", f"u{number}", "invented", split, history, targets)


class TestRows:
    def builder(self, num_queries: int = 2) -> PromptBuilder:
        return PromptBuilder(ordinary_tokenizer(), "plain", max_prompt_tokens=200, num_queries=num_queries)

    def test_a_row_is_prompt_response_and_eos(self):
        builder = self.builder()
        (row,), too_long = build_rows([example(0, ("blue hat", "hat price"))], builder, 40)
        prompt = builder.ids(example(0, ()).history)
        assert row["input_ids"][: row["prompt_length"]] == prompt
        assert row["input_ids"][-1] == EOS
        assert ordinary_tokenizer().decode(row["input_ids"][len(prompt) : -1]) == "blue hat\nhat price"
        assert too_long == 0

    def test_longer_responses_are_left_out_whole(self):
        tokenizer = ordinary_tokenizer()
        short, long = example(0, ("hat", "hats")), example(1, ("blue hat price", "running shoes"))
        limit = len(tokenizer("blue hat price\nrunning shoes")["input_ids"])  # one too few: EOS counts
        assert build_rows([short, long], self.builder(), limit).too_long == 1
        assert build_rows([short, long], self.builder(), limit + 1).too_long == 0
        with pytest.raises(InputError, match="none of the 1 train examples has"):
            build_rows([long], self.builder(), limit)

    def test_another_number_of_targets_than_the_prompt_asks_for(self):
        with pytest.raises(InputError, match="train0 has 2 targets, but --num_queries is 3"):
            build_rows([example(0, ("blue hat", "hat price"))], self.builder(num_queries=3), 40)


def test_labels_by_hand_when_pad_is_eos():
    batch = PadRight(pad_token_id=EOS)(ROWS[:2])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 30, 31, EOS], [8, 40, EOS, EOS, EOS, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 30, 31, EOS], [-100, 40, EOS, -100, -100, -100]]


def test_weights_by_hand():
    batch = PadRight(pad_token_id=EOS)(ROWS[:2])
    weights = token_weights(batch["labels"], batch["attention_mask"], 0.25)
    assert weights.tolist() == [[0, 0.25, 0.25, 1, 1, 1], [0, 1, 1, 0, 0, 0]]


def test_token_nll_is_read_one_position_earlier_and_computed_nowhere_else():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 4, 7), torch.tensor([[1, 2, 3, 0], [6, 5, 4, 0]])
    wanted = torch.tensor([[False, True, True, False], [False, False, False, True]])
    asked = []

    def forward(input_ids, attention_mask, logits_to_keep):
        asked.append(logits_to_keep)
        return SimpleNamespace(logits=logits[logits_to_keep])

    nll = token_nll(forward, None, ids, torch.ones_like(ids), wanted)
    assert asked[0].tolist() == [[True, True, False, False], [False, False, True, False]]
    expected = [-logits[row, at - 1].log_softmax(-1)[ids[row, at]] for row, at in [(0, 1), (0, 2), (1, 3)]]
    assert torch.allclose(nll, torch.stack(expected), atol=1e-6)


class CatchGradients(TrainerCallback):
    """Keeps the gradients of the first optimiser step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        control.should_training_stop = True


def reference_gradients(prompt_loss_weight: float) -> dict[str, torch.Tensor]:
    """Gradients of `sum w nll / sum w` over `ROWS`, one sequence and one token at a time, unpadded."""
    model = tiny_llama(initializer_range=0.05)
    total, weight_sum = torch.tensor(0.0), 0.0
    for row in ROWS:
        ids = row["input_ids"]
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in range(1, len(ids)):
            weight = 1.0 if position >= row["prompt_length"] else prompt_loss_weight
            total = total - weight * log_probs[position - 1, ids[position]]
            weight_sum += weight
    (total / weight_sum).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("prompt_loss_weight", [0.0, 0.3])
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_gradients_do_not_depend_on_how_the_step_is_cut(tmp_path, batch, accumulation, prompt_loss_weight, chunks):
    catch = CatchGradients()
    make_trainer(
        tmp_path, callbacks=[catch], per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        prompt_loss_weight=prompt_loss_weight, chunks=chunks,
    ).train()  # fmt: skip
    expected = reference_gradients(prompt_loss_weight)
    assert catch.found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(catch.found[name], gradient, atol=1e-6), name


def test_eos_is_learned_when_pad_is_eos(tmp_path):
    def probability_of_eos(model):
        with torch.no_grad():
            before_eos = [model.eval()(torch.tensor([row["input_ids"][:-1]])).logits[0, -1] for row in ROWS]
        return [float(logits.softmax(-1)[EOS]) for logits in before_eos]

    model = tiny_llama(initializer_range=0.05)
    assert max(probability_of_eos(model)) < 0.1
    make_trainer(tmp_path, model, num_train_epochs=40).train()
    assert min(probability_of_eos(model)) > 0.9


def test_evaluation_is_a_mean_over_response_tokens(tmp_path):
    model = tiny_llama(initializer_range=0.2)
    nlls = []
    for row in ROWS:
        ids = row["input_ids"]
        log_probs = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
        nlls += [-log_probs[at - 1, ids[at]].item() for at in range(row["prompt_length"], len(ids))]
    expected = sum(nlls) / len(nlls)
    for size in (1, 3, 4):
        # Prompt tokens weigh in training alone.
        trainer = make_trainer(tmp_path, model, per_device_eval_batch_size=size, prompt_loss_weight=0.5)
        found = trainer.evaluate()
        assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert found["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_response_metrics_by_hand():
    class Prediction:
        predictions = torch.tensor([[9.0, 9.0, 1.0, 2.0], [9.0, 3.0, 9.0, 9.0]]).numpy()
        label_ids = torch.tensor([[-100, -100, 5, 6], [-100, 7, -100, -100]]).numpy()

    assert response_metrics(Prediction()) == {"loss": 2.0, "perplexity": math.exp(2.0)}


class TestOrder:
    LENGTHS = tuple(number * 7 % 31 + 1 for number in range(97))

    def order(self, seed: int, epoch: int, group_size: int = 8) -> list[int]:
        return list(LengthGroupedOrder(self.LENGTHS, group_size, seed, lambda: epoch))

    def test_seed_and_epoch_decide_and_nothing_else(self):
        first = self.order(seed=1, epoch=2)
        torch.rand(5)
        assert self.order(seed=1, epoch=2) == first
        assert self.order(seed=1, epoch=3) != first
        assert self.order(seed=4, epoch=2) != first

    def test_every_index_once_and_similar_lengths_together(self):
        order = self.order(seed=0, epoch=0)
        assert sorted(order) == list(range(97))
        groups = [[self.LENGTHS[index] for index in order[at : at + 8]] for at in range(0, 96, 8)]
        spread = sum(max(group) - min(group) for group in groups) / len(groups)
        assert spread < 10, "in a random order a group of 8 spreads over about 24 of the 30"


@pytest.mark.parametrize("lora", [False, True])
def test_resume_in_the_middle_of_an_epoch_gives_the_same_weights(tmp_path, lora):
    def model():
        options = LoraOptions(lora_r=2, lora_dropout=0.2) if lora else LoraOptions()
        torch.manual_seed(5)  # of the adapters
        return apply_lora(tiny_llama(initializer_range=0.05, attention_dropout=0.1), options)

    rows = [{"input_ids": [5 + i, 6, *range(20, 20 + i), EOS], "prompt_length": 2} for i in range(7)]
    # Four steps an epoch; the checkpoint after step 6 is in the middle of the second.
    settings = {"rows": rows, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 6}
    callbacks = run_callbacks(tmp_path, tensorboard=False, checkpoint=None)
    straight = make_trainer(tmp_path / "run", model(), callbacks=callbacks, **settings)
    straight.train()
    checkpoint = tmp_path / "run" / "checkpoint-6"
    assert is_complete(checkpoint) and damage(checkpoint) == []
    torch.manual_seed(99)
    resumed = make_trainer(tmp_path / "again", model(), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == straight.state.global_step == 12
    for name, weight in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


class SignalAfterStep(TrainerCallback):
    """What a scheduler does, in the middle of an epoch."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_signal_ends_the_training_with_a_checkpoint_that_goes_on(tmp_path):
    rows = [{"input_ids": [5 + i, 6, *range(20, 20 + i), EOS], "prompt_length": 2} for i in range(7)]
    settings = {"rows": rows, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 100}
    straight = make_trainer(tmp_path / "straight", tiny_llama(), **settings)
    straight.train()
    callbacks = [SignalAfterStep(), *run_callbacks(tmp_path, tensorboard=False, checkpoint=None)]
    stopped = make_trainer(tmp_path / "run", tiny_llama(), callbacks=callbacks, **settings)
    with pytest.raises(Preempted, match="saved after step 5, the same command with --resume"):
        stopped.train()
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint.name == "checkpoint-5"
    resumed = make_trainer(tmp_path / "run", tiny_llama(), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == straight.state.global_step == 12
    for name, weight in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


class PoisonWeights(TrainerCallback):
    """Makes a weight NaN after a step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            next(model.parameters()).data[0] = float("nan")


class PoisonGradient(TrainerCallback):
    """Makes a gradient infinite in step 4, whose loss is still finite."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            next(model.parameters()).register_hook(lambda gradient: gradient * float("inf"))


@pytest.mark.parametrize(
    ("poison", "message"),
    [(PoisonWeights(), "loss nan at step 4"), (PoisonGradient(), "grad_norm (nan|inf) at step 4")],
)
def test_a_diverged_run_stops_before_it_spoils_a_checkpoint(tmp_path, poison, message):
    callbacks = [poison, *run_callbacks(tmp_path, tensorboard=False, checkpoint=None)]
    settings = {"num_train_epochs": 5, "save_strategy": "steps", "save_steps": 2, "logging_steps": 100}
    trainer = make_trainer(tmp_path / "run", callbacks=callbacks, **settings)
    with pytest.raises(TrainingDiverged, match=message):
        trainer.train()
    kept = newest_checkpoint(tmp_path / "run")
    assert kept.name == "checkpoint-2"
    weights = AutoModelForCausalLM.from_pretrained(kept).state_dict()
    assert all(bool(weight.isfinite().all()) for weight in weights.values())


def test_only_complete_checkpoints_count(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None
    for step in (5, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert newest_checkpoint(tmp_path) is None
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}" / "weights").write_text("w")
        write_manifest(tmp_path / f"checkpoint-{step}", world_size=1, sequences_a_step=4)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert checkpoint_step(tmp_path / "checkpoint-10") == 10
    remove_incomplete_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5"]


class TestConfig:
    def config(self, **changes: Any) -> SftConfig:
        return SftConfig(**{"model_name_or_path": "m", "data_dir": "d", "output_dir": "o"} | changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"data_dir": ""}, "--data_dir is missing"),
            ({"eval_steps": 0}, "--eval_steps must be 1 or more"),
            ({"save_total_limit": 1}, "--save_total_limit must be 2 or more"),
            ({"warmup_ratio": 1.0}, "--warmup_ratio must be below 1"),
            ({"prompt_loss_weight": -0.1}, "--prompt_loss_weight"),
        ],
    )
    def test_what_cannot_work_is_refused(self, changes, message):
        check_config(self.config())
        with pytest.raises(InputError, match=message):
            check_config(self.config(**changes))

    def test_a_deepspeed_file_that_contradicts_the_flags(self, tmp_path):
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": 1}}))
        try:
            with pytest.raises(InputError, match="train_micro_batch_size_per_gpu=3"):
                training_arguments(self.config(deepspeed_config=str(path)))
        finally:
            unset_hf_deepspeed_config()
