from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.alignment import IGNORE_LABEL, NO_LINE
from common.config import parse_config
from common.errors import InputError, TrainingDiverged
from common.feedback.labels import sample_item
from common.models.query_score import query_features
from common.models.reward_losses import token_reward_loss, without_class_weights
from common.models.token_reward import (
    TokenRewardModel,
    load_token_reward_scorer,
    save_token_reward_model,
    word_probabilities,
)
from common.text import split_words
from step2_token_reward.config import Step2Config, check_config
from step2_token_reward.dataset import RewardCollator, RewardData, build_data
from step2_token_reward.evaluation import METRIC_NAMES, held_out_metrics
from tests.labelled_samples import RESPONSES, WORD_SCORES, annotate, labelled, sample
from tests.models.reward_fixtures import EAGER, HISTORY
from tests.reward_training import CLASS_WEIGHTS, Parts, tiny_parts, trainer_of

X = IGNORE_LABEL


@pytest.fixture
def bert() -> Parts:
    return tiny_parts("bert")


def whole_batch(parts: Parts) -> dict[str, torch.Tensor]:
    return RewardCollator(parts.encoder)(parts.data.train)


def losses_of(parts: Parts, w: float) -> Any:
    batch = whole_batch(parts)
    targets = [batch.pop(name) for name in ("labels", "query_index", "query_scores")]
    batch.pop("row")
    logits = parts.model(**batch).logits
    return token_reward_loss(logits, *targets, torch.tensor(CLASS_WEIGHTS), w)


# Data.


@pytest.mark.parametrize(
    ("kind", "tokens", "labels"),
    [
        ("bert", ["recip", "##e", ",", "boots", "near", "w", "##i", "-", "f", "##i"], [0, 0, X, 2, 1, 0, 0, 0, 0, 0]),
        ("llama", ["▁recipe,", "▁boots", "▁near", "<0x0A>", "w", "i", "<0x2D>", "f", "i"], [0, 2, 1, X, 0, 0, 0, 0, 0]),
    ],
)
def test_tokens_carry_their_words_labels_and_queries(kind: str, tokens: list[str], labels: list[int]) -> None:
    encoder = tiny_parts(kind).encoder
    row = build_data(labelled("train", ["recipe, boots near\nwi-fi"]) + labelled("dev", ["a"]), encoder).train[0]
    place = np.flatnonzero(row["tokens"].in_response)
    assert encoder.tokenizer.convert_ids_to_tokens(row["input_ids"][place].tolist()) == tokens
    assert row["labels"][place].tolist() == labels
    second_line = tokens.index("w")
    lines = [NO_LINE if label == X else int(token >= second_line) for token, label in enumerate(labels)]
    assert row["query_index"][place].tolist() == lines
    assert set(row["labels"][: place[0]]) == {X}
    assert set(row["query_index"][: place[0]]) == {NO_LINE}
    assert row["query_scores"] == [0.5, 0.0]


def test_splits_and_what_is_left_out(bert: Parts) -> None:
    rows = labelled("train", ["best shoes", "", "!?\n..."]) + labelled("dev", ["boots"]) + labelled("test", ["shoes"])
    data = build_data(rows, bert.encoder)
    assert (len(data.train), len(data.held_out), data.without_words, data.cut) == (1, 1, 2, 0)
    assert data.class_counts == [0, 1, 1]
    with pytest.raises(InputError, match="split 'dev'"):
        build_data(labelled("train", ["best shoes"]), bert.encoder)
    with pytest.raises(InputError, match="split 'train'"):
        build_data([(sample(0, "dev", "shoes"), annotate("shoes"))], bert.encoder)


def test_batches_hold_padded_targets(bert: Parts) -> None:
    batch = whole_batch(bert)
    for place, row in enumerate(bert.data.train):
        length = len(row["input_ids"])
        assert batch["labels"][place].tolist() == row["labels"].tolist() + [IGNORE_LABEL] * (
            batch["labels"].shape[1] - length
        )
        assert (batch["query_index"][place] != NO_LINE).tolist() == (batch["labels"][place] != IGNORE_LABEL).tolist()
        assert batch["query_scores"][place].tolist() == row["query_scores"] + [0.0] * (3 - len(row["query_scores"]))
        assert batch["row"][place] == place


# Training.


def weights_after(kind: str, folder: Path, micro_batch: int, accumulation: int) -> tuple[dict, dict[str, float]]:
    parts = tiny_parts(kind)
    trainer = trainer_of(
        parts, folder, w=0.4, max_steps=1, optim="sgd", learning_rate=0.5,
        per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    return parts.model.state_dict(), trainer.state.log_history[0]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_accumulated_gradients_equal_those_of_the_full_batch(kind: str, tmp_path: Path) -> None:
    parts = tiny_parts(kind)
    losses = losses_of(parts, w=0.4)
    losses.total.backward()
    trained = {name: value for name, value in parts.model.named_parameters() if value.grad is not None}
    expected = {name: (value - 0.5 * value.grad).detach() for name, value in trained.items()}
    for micro_batch, accumulation in ((6, 1), (2, 3), (1, 6)):
        weights, logged = weights_after(kind, tmp_path, micro_batch, accumulation)
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)
        assert logged["loss"] == pytest.approx(losses.total.item(), rel=1e-4)
        assert logged["local_loss"] == pytest.approx(losses.local_loss.item(), rel=1e-4)
        assert logged["global_loss"] == pytest.approx(losses.global_loss.item(), rel=1e-4)


def test_logged_parts_are_means_over_the_steps_since_the_last_log(bert: Parts, tmp_path: Path) -> None:
    trainer = trainer_of(
        bert, tmp_path / "run", w=0.3, num_train_epochs=3, logging_steps=3, learning_rate=1e-2,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in logged] == [3, 6]  # two steps an epoch, the second with one micro-batch
    for row in logged:
        assert row["loss"] == pytest.approx(0.3 * row["local_loss"] + 0.7 * row["global_loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "longformer", "llama"])
def test_a_small_labelled_set_is_learned_by_heart(kind: str, tmp_path: Path) -> None:
    parts = tiny_parts(kind, bidirectional=kind == "llama")
    trainer = trainer_of(parts, tmp_path, max_steps=60, learning_rate=2e-2, logging_steps=60)
    before = trainer.evaluate()
    trainer.train()
    metrics = trainer.final_metrics()
    assert set(metrics) == set(METRIC_NAMES)
    assert metrics["loss"] < 0.1 * before["eval_loss"]
    assert metrics["token_auc"] == metrics["word_auc"] == 1.0
    assert metrics["token_accuracy"] == metrics["word_accuracy"] == metrics["word_accuracy_1"] == 1.0
    assert metrics["global_loss"] < 0.3 * before["eval_global_loss"]
    history = sample_item(sample(0, "dev", "")).history
    scores = TokenRewardModel(parts.model, parts.encoder).score([history for _ in RESPONSES], RESPONSES)
    for response, words in zip(RESPONSES, scores.words, strict=True):
        assert [round(score) for score in words] == [WORD_SCORES.get(word.text, 0) for word in split_words(response)]


def test_a_resumed_run_draws_the_same_class_masks(tmp_path: Path) -> None:
    settings = {"num_train_epochs": 3, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 4,
                "learning_rate": 1e-2}  # fmt: skip
    whole = tiny_parts("bert")
    trainer_of(whole, tmp_path / "run", keep_ratios=(0.5, 0.8, 0.9), **settings).train()
    resumed = tiny_parts("bert")
    trainer = trainer_of(resumed, tmp_path / "run", keep_ratios=(0.5, 0.8, 0.9), **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)
    unmasked = tiny_parts("bert")
    trainer_of(unmasked, tmp_path / "other", **settings).train()
    assert not torch.equal(unmasked.model.classifier.weight, whole.model.classifier.weight)


# Evaluation.


def test_metrics_of_the_trainer_are_those_of_the_whole_set(bert: Parts, tmp_path: Path) -> None:
    """In batches of four (one of them half full), against one padded batch and the pure functions."""
    bert.model.eval()
    metrics = trainer_of(bert, tmp_path, w=0.3, per_device_eval_batch_size=4).evaluate()
    with torch.no_grad():
        losses = losses_of(bert, w=0.3)
    assert metrics["eval_loss"] == pytest.approx(losses.total.item(), rel=1e-5)
    assert metrics["eval_local_loss"] == pytest.approx(losses.local_loss.item(), rel=1e-5)
    assert metrics["eval_global_loss"] == pytest.approx(losses.global_loss.item(), rel=1e-5)
    assert {f"eval_{name}" for name in METRIC_NAMES} <= set(metrics)


def logits_for(data: RewardData, wrong_token: int | None = None) -> list[torch.Tensor]:
    """Certain and right everywhere, except at the first response's `wrong_token`-th labelled token."""
    logits = []
    for place, item in enumerate(data.held_out):
        labels = np.array(item.labels)
        classes = np.where(labels == IGNORE_LABEL, 1, labels)
        if place == 0 and wrong_token is not None:
            target = np.flatnonzero(labels != IGNORE_LABEL)[wrong_token]
            classes[target] = (classes[target] + 1) % 3
        logits.append(20.0 * torch.nn.functional.one_hot(torch.tensor(classes), 3).float())
    return logits


def test_perfect_logits_have_perfect_metrics(bert: Parts) -> None:
    metrics, _ = held_out_metrics(
        zip(logits_for(bert.data), bert.data.held_out, strict=True), torch.tensor(CLASS_WEIGHTS), w=1.0
    )
    for level in ("token", "word"):
        assert all(metrics[f"{level}_{name}"] == 1.0 for name in ("auc", "accuracy", "accuracy_0", "accuracy_2"))
    assert metrics["loss"] == metrics["local_loss"] < 1e-6


def test_one_wrong_token_counts_as_one(bert: Parts) -> None:
    """The second token of "best running shoes" is a word of its own: label 2, said to be 0."""
    metrics, _ = held_out_metrics(
        zip(logits_for(bert.data, wrong_token=1), bert.data.held_out, strict=True), torch.tensor(CLASS_WEIGHTS), w=0.5
    )
    labels = [label for item in bert.data.held_out for label in item.labels if label != IGNORE_LABEL]
    words = [label for item in bert.data.held_out for label in item.word_labels]
    assert metrics["token_accuracy"] == pytest.approx(1 - 1 / len(labels))
    assert metrics["token_accuracy_2"] == pytest.approx(1 - 1 / labels.count(2))
    assert metrics["word_accuracy"] == pytest.approx(1 - 1 / len(words))
    assert metrics["word_accuracy_0"] == metrics["word_accuracy_1"] == 1.0
    counted = sum(CLASS_WEIGHTS[label] for label in labels)
    assert metrics["local_loss"] == pytest.approx(20 * CLASS_WEIGHTS[2] / counted, rel=1e-4)


def test_a_word_of_two_tokens_is_judged_by_their_mean(bert: Parts) -> None:
    data = build_data(labelled("train", ["shoes"]) + labelled("dev", ["recipe"]), bert.encoder)
    (item,) = data.held_out
    first, second = np.flatnonzero(np.array(item.labels) != IGNORE_LABEL)  # "recip" and "##e"
    probabilities = torch.full((len(item.labels), 3), 1 / 3)
    probabilities[first] = torch.tensor([0.5, 0.2, 0.3])
    probabilities[second] = torch.tensor([0.1, 0.8, 0.1])
    logits = (probabilities * torch.tensor(CLASS_WEIGHTS)).log()  # what the weighted loss makes of them
    metrics, _ = held_out_metrics([(logits, item)], torch.tensor(CLASS_WEIGHTS), w=0.5)
    assert metrics["token_accuracy"] == 0.5
    assert metrics["word_accuracy"] == 1.0  # five characters of six: 0.433 against 0.3 and 0.267
    assert metrics["global_loss"] == pytest.approx(((0.2 + 2 * 0.3 + 0.8 + 2 * 0.1) / 4) ** 2, rel=1e-5)
    # One word: relevant with probability 1 - p_0 - p_1, its characters' p_2; the label says 0.
    assert metrics["sentence_mse"] == pytest.approx(((5 * 0.3 + 0.1) / 6) ** 2, rel=1e-5)
    undefined = {name for name, value in metrics.items() if math.isnan(value)}
    assert undefined == {
        "sentence_spearman", "sentence_auc", "token_auc", "word_auc",
        *(f"{level}_accuracy_{label}" for level in ("token", "word") for label in (1, 2)),
    }  # fmt: skip


def test_a_query_rule_is_judged_on_what_it_was_not_fitted_to(bert: Parts) -> None:
    """Query labels that have nothing to do with the words: a rule of five weights finds something in those it saw."""
    rng = np.random.default_rng(0)
    rows = labelled("train", RESPONSES) + labelled("dev", [f"best running shoes {place}" for place in range(30)])
    data = build_data(rows, bert.encoder)
    items = [replace(item, query_scores=[float(rng.integers(2))]) for item in data.held_out]
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(len(item.labels), 3, generator=generator) for item in items]
    metrics, rule = held_out_metrics(zip(logits, items, strict=True), torch.ones(3), 0.5, learns_query_rule=True)
    seen = [
        (rule(query_features(item.encoded.words, word_probabilities(found, item.encoded).tolist(), 1)[0])
         - item.query_scores[0]) ** 2
        for found, item in zip(logits, items, strict=True)
    ]  # fmt: skip
    assert metrics["sentence_mse"] > 1.05 * np.mean(seen)
    assert held_out_metrics(zip(logits, items, strict=True), torch.ones(3), 0.5)[1] is None


def test_a_learned_query_rule_is_saved_and_scores_with_it(bert: Parts, tmp_path: Path) -> None:
    trainer = trainer_of(bert, tmp_path / "run", learns_query_rule=True)
    trainer.evaluate()
    rule = trainer.query_rule
    save_token_reward_model(
        tmp_path / "model", trainer.model, bert.encoder.tokenizer, bert.encoder.options,
        {"query_rule": rule._asdict(), "class_weights": CLASS_WEIGHTS},
    )
    plain = TokenRewardModel(trainer.model, bert.encoder, CLASS_WEIGHTS).score([HISTORY], ["best running shoes"])
    learned = load_token_reward_scorer(str(tmp_path / "model"), EAGER).score([HISTORY], ["best running shoes"])
    assert learned.words[0] == pytest.approx(plain.words[0], abs=1e-5)
    item = bert.encoder.encode(HISTORY, "best running shoes")
    with torch.no_grad():
        logits = trainer.model.eval()(**bert.encoder.collate([item.tokens])).logits[0, : len(item.spans)]
    classes = word_probabilities(without_class_weights(logits, torch.tensor(CLASS_WEIGHTS)), item)
    (features,) = query_features(item.words, classes.tolist(), 1)
    assert learned.queries[0] == pytest.approx([rule(features)], abs=1e-5)
    assert learned.queries[0] != pytest.approx(plain.queries[0], abs=1e-3)


def test_undefined_measures_are_not_logged_and_null_in_the_end(bert: Parts, tmp_path: Path) -> None:
    data = build_data(labelled("train", RESPONSES) + labelled("dev", ["recipe"]), bert.encoder)
    trainer = trainer_of(bert._replace(data=data), tmp_path)
    metrics = trainer.evaluate()
    assert "eval_token_auc" not in metrics
    assert all(math.isfinite(value) for value in metrics.values())
    final = trainer.final_metrics()
    assert final["token_auc"] is None
    assert final["loss"] == metrics["eval_loss"]


def test_a_model_that_has_diverged_is_not_evaluated(bert: Parts, tmp_path: Path) -> None:
    torch.nn.init.constant_(bert.model.classifier.weight, float("nan"))
    with pytest.raises(TrainingDiverged, match="held-out loss nan"):
        trainer_of(bert, tmp_path).evaluate()


# Settings.

GIVEN = ["--model_name_or_path", "m", "--samples", "s", "--labels", "l", "--output_dir", "o"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--w", "1.5"], "--w must lie between 0 and 1"),
        (["--class_weights", "1", "2"], "--class_weights needs 3 numbers"),
        (["--class_weights", "1", "2", "0"], "--class_weights needs 3 numbers"),
        (["--class_keep_ratios", "1", "0.5", "1.5"], "--class_keep_ratios needs 3 numbers"),
        (["--learning_rate", "0"], "--learning_rate must be above 0"),
        (["--samples", ""], "--samples is missing"),
        (["--save_total_limit", "1"], "--save_total_limit must be 2 or more"),
        (["--warmup_ratio", "1"], "--warmup_ratio must be below 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(flags: list[str], message: str) -> None:
    check_config(parse_config(Step2Config, GIVEN))
    with pytest.raises(InputError, match=message):
        check_config(parse_config(Step2Config, GIVEN + flags))
