"""Advantages without a critic: by hand, against a loop, and in whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.alignment import NO_LINE
from common.errors import InputError
from step3_tppo.advantages import group_advantages, line_steps, token_discounts
from step3_tppo.config import Step3Config
from tests.step3.runs import numbers, run, run_successfully


def masked(rows: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as (B, T) with NaN where masked, and the mask."""
    width = max(map(len, rows))
    values = torch.tensor([row + [float("nan")] * (width - len(row)) for row in rows])
    return values, ~values.isnan()


def test_two_responses_by_hand() -> None:
    """Two lines each; a query is an episode. Tokens: word, word, break, word, EOS | word, break, word, word, EOS."""
    rewards, mask = masked([[1.0, 2.0, 0.5, 4.0, 0.0], [3.0, 0.0, 1.0, 5.0, -1.0]])
    lines = [[0, 0, NO_LINE, 1, NO_LINE], [0, NO_LINE, 1, 1, NO_LINE]]
    steps = line_steps(lines, mask)
    assert steps.tolist() == [[0, 1, 2, 5, 6], [0, 1, 5, 6, 7]]
    gamma = token_discounts(lines, rewards, 1.0, 0.0)
    advantages, returns = group_advantages(rewards, mask, gamma, steps, samples=2)
    assert returns.tolist() == [[3.5, 2.5, 0.5, 4.0, 0.0], [3.0, 0.0, 5.0, 4.0, -1.0]]
    # The third token of the first line and of the second one are written by one response alone: their baseline is 0.
    assert advantages.tolist() == [[0.5, 2.5, 0.5, -1.0, -4.0], [-0.5, -2.5, 1.0, 4.0, -1.0]]


def test_prompts_do_not_meet() -> None:
    rewards, mask = masked([[1.0], [2.0], [10.0], [40.0]])
    steps = torch.zeros(4, 1, dtype=torch.long)
    advantages, _ = group_advantages(rewards, mask, torch.ones(4, 1), steps, samples=2)
    assert advantages.tolist() == [[-1.0], [1.0], [-30.0], [30.0]]


ROWS = st.lists(st.lists(st.tuples(st.floats(-2, 2, width=32), st.booleans()), min_size=1, max_size=6), min_size=4,
                max_size=4)  # fmt: skip


@given(ROWS, st.sampled_from([1, 2, 4]), st.sampled_from([0.0, 0.5, 1.0]))
def test_advantages_against_a_loop(rows: list[list[tuple[float, bool]]], samples: int, line_gamma: float) -> None:
    rewards, mask = masked([[reward for reward, _ in row] for row in rows])
    lines = [[NO_LINE if ends else 0 for _, ends in row] for row in rows]
    gamma = token_discounts(lines, rewards, 0.9, line_gamma)
    advantages, returns = group_advantages(rewards, mask, gamma, line_steps(lines, mask), samples)
    place, to_go = {}, {}
    for b, row in enumerate(rows):
        line = written = 0
        for t, (_, ends) in enumerate(row):
            place[b, t] = (line, written)
            line, written = (line + 1, 0) if ends else (line, written + 1)
        for t in reversed(range(len(row))):
            discount = 0.9 * (line_gamma if row[t][1] else 1.0)
            to_go[b, t] = row[t][0] + discount * to_go.get((b, t + 1), 0.0)
    for b, row in enumerate(rows):
        others = [c for c in range(4) if c != b and c // samples == b // samples]
        for t in range(len(row)):
            there = [to_go[c, u] for c in others for u in range(len(rows[c])) if place[c, u] == place[b, t]]
            baseline = sum(there) / len(there) if there else 0.0
            assert returns[b, t].item() == pytest.approx(to_go[b, t], abs=1e-5)
            assert advantages[b, t].item() == pytest.approx(to_go[b, t] - baseline, abs=1e-5)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_one_response_a_prompt_has_no_group() -> None:
    config = Step3Config(output_dir="o", actor_path="a", reward_path="r", data_dir="d", baseline="group")
    with pytest.raises(InputError, match="--samples_per_prompt 2 or more"):
        config.validate(1)


FLAGS = ("--baseline", "group", "--samples_per_prompt", "2", "--micro_batch_size", "2", "--total_steps", "4")


@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("more", [(), ("--zero_stage", "1"), ("--lora_r", "4", "--gradient_checkpointing")])
def test_a_run_without_a_critic_learns_resumes_and_exports_no_critic(
    inputs: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    flags = (*FLAGS, *more, "--lr_schedule", "constant")
    run_successfully(inputs, tmp_path / "straight", *flags)
    run_successfully(inputs, tmp_path / "resumed", *flags, "--total_steps", "2")
    run_successfully(inputs, tmp_path / "resumed", *flags, "--resume")
    rows = numbers(tmp_path / "straight")
    assert rows == numbers(tmp_path / "resumed")
    # No critic warms up: the actor learns from the first step on.
    assert all(row["policy/grad_norm"] > 0 for row in rows)
    of_a_critic = {"loss/value", "value/clip_fraction", "value/grad_norm"}
    assert not any(of_a_critic & row.keys() for row in rows)
    assert abs(rows[-1]["kl/per_sequence"]) > 1e-3
    assert (tmp_path / "straight" / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "straight" / "critic").exists()


@pytest.mark.distributed
def test_a_run_with_a_critic_cannot_go_on_without_it(inputs: Path, tmp_path: Path) -> None:
    flags = (*FLAGS[2:], "--lr_schedule", "constant")
    run_successfully(inputs, tmp_path / "run", *flags, "--total_steps", "2")
    for status, error in run(inputs, tmp_path / "run", *flags, "--resume", "--baseline", "group"):
        assert status == 2 and "baseline" in error
