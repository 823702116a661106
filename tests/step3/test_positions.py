"""The alignment table: which position each response token's log-prob and value are read at."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from common.config import ModelOptions
from common.models.response_scores import response_scores
from common.models.sequences import SequenceBatch, pad_sequences, score_in_blocks
from common.models.token_reward import load_token_reward_model
from common.models.value_model import ValueModel, load_value_model
from tests.tiny_models import tiny_llama

PROMPTS = [[11, 12, 13], [14]]
RESPONSES = [[3, 4], [5, 3, 2]]


def batch(pad: int = 0) -> SequenceBatch:
    return pad_sequences(PROMPTS, RESPONSES, pad, torch.device("cpu"))


def test_padding_masks_and_positions_by_hand() -> None:
    made = batch(pad=2)  # the pad id is a real token of the second response: masks must not depend on it
    assert made.input_ids.tolist() == [[11, 12, 13, 3, 4], [14, 5, 3, 2, 2]]
    assert made.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert made.predicting.int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert made.response_mask.tolist() == [[True, True, False], [True, True, True]]
    assert made.response_ids.tolist() == [3, 4, 5, 3, 2]


def test_trimmed_rows_keep_every_real_token() -> None:
    row = batch().rows(torch.tensor([1]))
    assert row.input_ids.tolist() == [[14, 5, 3, 2]]
    assert row.response_mask.tolist() == [[True, True, True]]
    first = batch().rows(torch.tensor([0]))
    assert first.input_ids.tolist() == [[11, 12, 13, 3, 4]]
    assert first.response_mask.tolist() == [[True, True]]


class TableModel(torch.nn.Module):
    """Logits that are 0 but for `2 * position` on id 3 (and on id 5), so that what was read names its position."""

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor) -> SimpleNamespace:
        rows, width = input_ids.shape
        logits = torch.zeros(rows, width, 16)
        logits[:, :, 3] = logits[:, :, 5] = 2.0 * torch.arange(width)
        return SimpleNamespace(logits=logits[logits_to_keep])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_prob_of_token_t_is_read_one_position_before_it(temperature: float) -> None:
    model = TableModel()
    found = response_scores(model, model, batch(), temperature).logprobs

    def expected(position: int, wanted: bool) -> float:
        peak = 2.0 * position / temperature
        normaliser = torch.log(14 + 2 * torch.tensor(peak, dtype=torch.float64).exp())
        return float((peak if wanted else 0.0) - normaliser)

    # Token t stands at position P + t, its log-prob at P + t - 1, P being 3 and 1. Ids 3 and 5 have the raised logit.
    table = [[expected(2, True), expected(3, False)], [expected(0, True), expected(1, True), expected(2, False)]]
    assert found[0, :2].tolist() == pytest.approx(table[0], rel=1e-5)
    assert found[1].tolist() == pytest.approx(table[1], rel=1e-5)


class CountingTrunk(torch.nn.Module):
    """Hidden states that are the position itself."""

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=1))

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        rows, width = input_ids.shape
        return SimpleNamespace(last_hidden_state=torch.arange(width).float().expand(rows, -1).unsqueeze(-1))


def test_value_of_the_state_before_token_t_is_read_there() -> None:
    critic = ValueModel(CountingTrunk())
    torch.nn.init.ones_(critic.value_head.weight)
    assert critic(batch()).tolist() == [[2.0, 3.0, 0.0], [0.0, 1.0, 2.0]]


def test_padding_changes_neither_log_probs_nor_values() -> None:
    model = tiny_llama().eval()
    critic = ValueModel(tiny_llama(seed=1).model).eval()
    together = response_scores(model, model, batch(), 0.7)
    values = critic(batch())
    for row, length in enumerate(map(len, RESPONSES)):
        alone = pad_sequences(PROMPTS[row : row + 1], RESPONSES[row : row + 1], 0, torch.device("cpu"))
        scores = response_scores(model, model, alone, 0.7)
        # fp32 sums of 32 terms in another order: a few units in the last place of values of size 10.
        assert torch.allclose(together.logprobs[row, :length], scores.logprobs[0], rtol=0, atol=2e-5)
        assert torch.allclose(together.entropy[row, :length], scores.entropy[0], rtol=0, atol=2e-5)
        assert torch.allclose(values[row, :length], critic(alone)[0], rtol=0, atol=2e-5)


def test_entropy_and_log_probs_against_torch_distributions() -> None:
    model = tiny_llama().eval()
    made = batch()
    logits = [model(torch.tensor([prompt + made_ids])).logits[0, len(prompt) - 1 : -1]
              for prompt, made_ids in zip(PROMPTS, RESPONSES, strict=True)]
    reference = torch.distributions.Categorical(logits=torch.cat(logits) / 0.7)
    found = response_scores(model, model, made, 0.7)
    mask = made.response_mask
    assert torch.allclose(found.logprobs[mask], reference.log_prob(made.response_ids), rtol=0, atol=2e-5)
    assert torch.allclose(found.entropy[mask], reference.entropy(), rtol=0, atol=2e-5)
    assert float(found.logprobs[~mask].abs().max()) == float(found.entropy[~mask].abs().max()) == 0.0


def test_critic_starts_from_the_trunk_of_a_language_model(tmp_path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    critic = load_value_model(tmp_path, ModelOptions())
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(critic.trunk.layers[0].self_attn.q_proj.weight, weight)
    assert 0 < float(critic(batch()).detach().abs().max()) < 1  # deviation 1/33, normed hidden states of size 32
    assert float(critic.value_head.bias.detach()) == 0


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_blocks_by_length_score_every_row_as_the_whole_batch_does(size: int) -> None:
    model = tiny_llama().eval()
    prompts = [[11, 12, 13], [14], [15, 16], [17, 18, 19, 20, 21], [22]]
    responses = [[3, 4], [5, 3, 6, 7], [8], [9, 10], [4, 5, 6]]
    made = pad_sequences(prompts, responses, 0, torch.device("cpu"))
    widths: list[torch.Size] = []

    def forward(block: SequenceBatch) -> tuple[torch.Tensor, ...]:
        widths.append(block.input_ids.shape)
        return response_scores(model, model, block, 1.0)

    with torch.no_grad():
        logprobs, entropy = score_in_blocks(made, made.by_length(torch.arange(5), size), forward)
        whole = response_scores(model, model, made, 1.0)
    assert len(widths) == -(-5 // size)
    if size == 1:
        # Longest first, each as long as it is: 7, 5, 5, 4 and 3 tokens.
        assert [shape[1] for shape in widths] == [7, 5, 5, 4, 3]
    mask = made.response_mask
    # fp32 over other batch shapes
    torch.testing.assert_close(logprobs[mask], whole.logprobs[mask], rtol=0, atol=2e-5)
    torch.testing.assert_close(entropy[mask], whole.entropy[mask], rtol=0, atol=2e-5)


def test_entropy_has_a_gradient_only_when_asked_for() -> None:
    model = tiny_llama()
    assert not response_scores(model, model, batch(), 1.0).entropy.requires_grad
    entropy = response_scores(model, model, batch(), 1.0, entropy_gradient=True).entropy
    entropy.sum().backward()
    assert float(model.lm_head.weight.grad.abs().max()) > 0


def test_critic_from_a_reward_model_that_reads_both_ways_does_not_look_ahead(tmp_path) -> None:
    tiny_llama().save_pretrained(tmp_path / "sft")
    reward = load_token_reward_model(str(tmp_path / "sft"), ModelOptions(), bidirectional=True)
    reward.save_pretrained(tmp_path / "reward")
    critic = load_value_model(tmp_path / "reward", ModelOptions()).eval()
    weight = reward.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(critic.trunk.layers[0].self_attn.q_proj.weight, weight)
    first, other = (pad_sequences([[11, 12]], [[3, 4, last]], 0, torch.device("cpu")) for last in (5, 9))
    with torch.no_grad():
        # The last token is known to no value; the one before it to the last value alone.
        assert torch.equal(critic(first), critic(other))
        changed = pad_sequences([[11, 12]], [[3, 7, 5]], 0, torch.device("cpu"))
        before, after = critic(first)[0], critic(changed)[0]
    assert torch.equal(before[:2], after[:2])
    assert before[2] != after[2]
