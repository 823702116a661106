"""What the benchmarks count by: FLOPs against torch's own counter, answer lengths against their distribution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import annotator_load
from benchmarks.flops import Sizes, forward_flops, tppo_step_flops
from benchmarks.measuring import median_ratio
from benchmarks.models import query_tokenizer, random_llama
from common.files import write_jsonl
from common.generation.generate import generate_responses
from common.generation.sampling import Sampling


@pytest.mark.parametrize("key_value_heads", [8, 2])
def test_forward_flops_are_those_that_torch_counts(key_value_heads: int) -> None:
    model = random_llama(query_tokenizer(), num_key_value_heads=key_value_heads)
    model.config._attn_implementation = "eager"  # matrix products that the counter sees
    length = 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(2, 2 + length).unsqueeze(0), logits_to_keep=5)
    sizes = Sizes.of(model.config)
    # The eager kernel computes the whole square of an attention matrix, the useful part is the lower triangle.
    square = 4 * length * length * 256 * 6
    triangle = forward_flops(sizes, 0, length) - 2 * sizes.layer_weights * length
    found = counter.get_total_flops() - square + triangle
    assert found == pytest.approx(forward_flops(sizes, 0, length, logits=5), rel=1e-9)


def test_reading_in_two_parts_costs_as_much_as_at_once() -> None:
    sizes = Sizes(1000, 10, 32)
    whole = forward_flops(sizes, 0, 30, logits=4)
    assert forward_flops(sizes, 0, 11) + forward_flops(sizes, 11, 30, logits=4) == pytest.approx(whole)


def test_a_steps_passes_by_hand() -> None:
    """One prompt of five tokens, two answers of one, no head: 2 FLOPs a weight and token, 4 a pair of tokens."""
    # Sampling reads the prompt; reward model, reference, critic and three times two updates also read both answers.
    assert tppo_step_flops(Sizes(1, 0, 0), 1, 2, 5, 1) == 2 * (5 + (3 + 3 * 2) * 7)
    # Pairs: 15 in a causal prompt, 6 more for each answer. In the reward model the prompt has all 25.
    assert tppo_step_flops(Sizes(0, 0, 1), 1, 2, 5, 1) == 4 * (15 + (25 + 2 * 6) + (2 + 3 * 2) * (15 + 2 * 6))


def test_ratios_are_taken_run_by_run() -> None:
    assert median_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0


def test_answers_of_the_benchmark_model_are_geometric() -> None:
    tokenizer = query_tokenizer()
    made = generate_responses(
        random_llama(tokenizer, mean_answer=4, num_hidden_layers=1), tokenizer, [[5, 6, 7]] * 400,
        Sampling(200, seed=1), rows=400,
    )  # fmt: skip
    lengths = torch.tensor([float(len(response.ids)) for response in made])
    # A geometric distribution of mean 4 has deviation sqrt(12); four standard errors of 400 draws.
    assert float(lengths.mean()) == pytest.approx(4, abs=4 * 12**0.5 / 20)
    assert float((lengths == 1).float().mean()) == pytest.approx(1 / 4, abs=4 * (3 / 16 / 400) ** 0.5)


def test_labelling_under_load_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    """The load benchmark in small: the label command against the stand-in endpoint, a fifth of its answers failing."""
    samples = tmp_path / "samples.jsonl"
    write_jsonl(samples, annotator_load.records(200, seed=1))
    config = annotator_load.LoadConfig(concurrency=16, seconds=0.01, seed=1)
    found = annotator_load.labelled(config, samples, tmp_path / "labels.jsonl", fault_rate=0.2)
    assert found["labelled"] + found["quarantined"] == 200
    assert found["lost"] == found["duplicated"] == found["wrong"] == 0
    assert sum(found["outcomes"].values()) - found["outcomes"]["right"] > 20  # of some 50 faults, 6.5 their deviation
