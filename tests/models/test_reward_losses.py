from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.alignment import IGNORE_LABEL, NO_LINE
from common.errors import InputError
from common.models.reward_losses import (
    Denominators,
    count_queries,
    expected_score,
    global_loss,
    inverse_class_frequency,
    keep_classes,
    local_loss,
    predicted_sentences,
    query_means,
    summed_class_weights,
    token_reward_loss,
    without_class_weights,
)

X = IGNORE_LABEL
N = NO_LINE
WEIGHTS = torch.tensor([0.5, 1.0, 1.5])


def logits_of(probabilities: list) -> torch.Tensor:
    return torch.tensor(probabilities).log()


# Two responses of four tokens; the probabilities are the table that the numbers below are worked out from.
PROBABILITIES = [
    [[0.2, 0.3, 0.5], [0.6, 0.3, 0.1], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]],
    [[0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.7, 0.2, 0.1], [0.5, 0.25, 0.25]],
]
LABELS = torch.tensor([[2, 0, X, 1], [X, 1, 0, X]])
QUERY_INDEX = torch.tensor([[0, 0, N, 1], [N, 0, 2, N]])
QUERY_SCORES = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.75, 0.0]])


def test_expected_score_by_hand() -> None:
    expected = expected_score(logits_of(PROBABILITIES))
    table = torch.tensor([[1.3, 0.5, 1.0, 1.7], [1.0, 1.1, 0.4, 0.75]])
    torch.testing.assert_close(expected, table, atol=1e-6, rtol=0)


def test_local_loss_by_hand() -> None:
    weighted = -(1.5 * math.log(0.5) + 0.5 * math.log(0.6) + math.log(0.1) + math.log(0.3) + 0.5 * math.log(0.7))
    loss = local_loss(logits_of(PROBABILITIES), LABELS, WEIGHTS)
    assert loss.item() == pytest.approx(weighted / (1.5 + 0.5 + 1.0 + 1.0 + 0.5), rel=1e-6)
    assert summed_class_weights(LABELS, WEIGHTS).item() == 4.5


def test_local_loss_equals_torchs_weighted_cross_entropy() -> None:
    logits = torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(-1, 3, (4, 9), generator=torch.Generator().manual_seed(1))
    labels[labels < 0] = IGNORE_LABEL
    reference = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), WEIGHTS)
    torch.testing.assert_close(local_loss(logits, labels, WEIGHTS), reference)


def test_global_loss_by_hand() -> None:
    # Predictions: (1.3 + 0.5)/2/2 = 0.45, 1.7/2 = 0.85; 1.1/2 = 0.55, none, 0.4/2 = 0.2. The second response's second
    # query and the first one's third have no valid token.
    errors = [(1.0 - 0.45) ** 2, (0.5 - 0.85) ** 2, (0.5 - 0.55) ** 2, (0.0 - 0.2) ** 2]
    loss = global_loss(logits_of(PROBABILITIES), QUERY_INDEX, QUERY_SCORES)
    assert loss.item() == pytest.approx(sum(errors) / 4, rel=1e-5)
    assert count_queries(QUERY_INDEX).item() == 4


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
def test_total_is_the_weighted_sum(w: float) -> None:
    """To the global loss, outputs that the weighted local loss would fit, `w_c p_c`, are the probabilities p."""
    weighted = (torch.tensor(PROBABILITIES) * WEIGHTS).log()
    losses = token_reward_loss(weighted, LABELS, QUERY_INDEX, QUERY_SCORES, WEIGHTS, w)
    assert losses.total.item() == pytest.approx(w * losses.local_loss.item() + (1 - w) * losses.global_loss.item())
    assert losses.local_loss.item() == local_loss(weighted, LABELS, WEIGHTS).item()
    assert losses.global_loss.item() == pytest.approx(0.116875, rel=1e-5)


def test_tokens_outside_the_valid_zone_change_nothing() -> None:
    logits = logits_of(PROBABILITIES).requires_grad_()
    loss = token_reward_loss(logits, LABELS, QUERY_INDEX, QUERY_SCORES, WEIGHTS, 0.5).total
    (gradient,) = torch.autograd.grad(loss, logits)
    outside = LABELS == IGNORE_LABEL
    assert gradient[outside].abs().max() == 0
    assert gradient[~outside].abs().min() > 0
    changed = logits.detach().clone()
    changed[outside] = torch.tensor([1e4, -1e4, float("nan")])
    again = token_reward_loss(changed, LABELS, QUERY_INDEX, QUERY_SCORES, WEIGHTS, 0.5).total
    assert again.item() == loss.item()


def test_a_step_without_valid_tokens_costs_nothing() -> None:
    logits = logits_of(PROBABILITIES).requires_grad_()
    nothing = torch.full_like(LABELS, IGNORE_LABEL), torch.full_like(QUERY_INDEX, NO_LINE)
    losses = token_reward_loss(logits, *nothing, QUERY_SCORES, WEIGHTS, 0.5)
    losses.total.backward()
    assert [loss.item() for loss in losses] == [0.0, 0.0, 0.0]
    assert logits.grad.abs().max() == 0


batches = st.integers(1, 5).flatmap(
    lambda rows: st.tuples(st.just(rows), st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**31))
)


def random_batch(rows: int, tokens: int, queries: int, seed: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, tokens, 3, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 3, (rows, tokens), generator=draw)
    index = torch.randint(0, queries, (rows, tokens), generator=draw)
    outside = torch.rand(rows, tokens, generator=draw) < 0.4
    scores = torch.rand(rows, queries, generator=draw)
    return logits, labels.masked_fill(outside, X), index.masked_fill(outside, N), scores


@settings(max_examples=60, deadline=None)
@given(batches)
def test_losses_equal_loops_over_tokens_and_queries(shape: tuple[int, int, int, int]) -> None:
    logits, labels, index, scores = random_batch(*shape)
    numerator = denominator = 0.0
    of_query: dict[tuple[int, int], list[float]] = {}
    for row in range(logits.shape[0]):
        for token in range(logits.shape[1]):
            if labels[row, token] == X:
                continue
            exponents = [math.exp(value) for value in logits[row, token].tolist()]
            p = [value / sum(exponents) for value in exponents]
            label = int(labels[row, token])
            numerator -= WEIGHTS[label].item() * math.log(p[label])
            denominator += WEIGHTS[label].item()
            # p_c / w_c: the global loss is to see the words without the class weights.
            free = [value / weight for value, weight in zip(p, WEIGHTS.tolist(), strict=True)]
            of_query.setdefault((row, int(index[row, token])), []).append((free[1] + 2 * free[2]) / sum(free))
    squared = [(scores[key].item() - sum(v) / len(v) / 2) ** 2 for key, v in of_query.items()]
    losses = token_reward_loss(logits, labels, index, scores, WEIGHTS, 0.4)
    assert losses.local_loss.item() == pytest.approx(numerator / denominator if denominator else 0.0, rel=1e-5)
    # A square of a difference as small as its fp32 rounding keeps few digits.
    mean_square = sum(squared) / len(squared) if squared else 0.0
    assert losses.global_loss.item() == pytest.approx(mean_square, rel=1e-5, abs=1e-7)
    assert count_queries(index).item() == len(of_query)


@settings(max_examples=40, deadline=None)
@given(batches, st.integers(1, 3))
def test_parts_with_the_steps_denominators_sum_to_the_whole(shape: tuple[int, int, int, int], size: int) -> None:
    logits, labels, index, scores = random_batch(*shape)
    logits.requires_grad_()
    whole = token_reward_loss(logits, labels, index, scores, WEIGHTS, 0.4)
    (expected,) = torch.autograd.grad(whole.total, logits)
    denominators = Denominators(summed_class_weights(labels, WEIGHTS), count_queries(index))
    parts = [
        token_reward_loss(*(tensor[first : first + size] for tensor in (logits, labels, index, scores)),
                          WEIGHTS, 0.4, denominators).total
        for first in range(0, len(labels), size)
    ]  # fmt: skip
    (gradient,) = torch.autograd.grad(torch.stack(parts).sum(), logits)
    assert sum(part.item() for part in parts) == pytest.approx(whole.total.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


def test_query_means_by_hand() -> None:
    means, present = query_means(torch.tensor([[1.0, 2.0, 4.0, 9.0]]), torch.tensor([[0, 2, 2, N]]), 3)
    assert means.tolist() == [[1.0, 0.0, 3.0]]
    assert present.tolist() == [[True, False, True]]


def test_class_weights_are_inverse_frequencies_of_mean_one() -> None:
    # 1/60 : 1/30 : 1/10 = 1 : 2 : 6, scaled to a sum of 3.
    assert inverse_class_frequency([60, 30, 10]) == pytest.approx([1 / 3, 2 / 3, 2.0])
    assert inverse_class_frequency([7, 7, 7]) == pytest.approx([1.0, 1.0, 1.0])


def test_a_class_without_examples_is_refused() -> None:
    with pytest.raises(InputError, match=r"labelled 1 .*\[5, 0, 3\].*--class_weights"):
        inverse_class_frequency([5, 0, 3])


def test_class_masks_keep_each_class_at_its_ratio() -> None:
    labels = torch.tensor([0, 1, 2, X]).repeat(500, 50)  # (500, 200): 25,000 of each class
    kept = keep_classes(labels, [0.25, 1.0, 0.0], torch.Generator().manual_seed(0))
    # The share of n = 25,000 draws lies within 5 standard deviations, sqrt(p (1 - p) / n) each.
    assert (kept == 0).sum().item() / 25_000 == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 25_000))
    assert torch.equal(kept == 1, labels == 1)
    assert not (kept == 2).any()
    assert torch.equal(kept[labels == X], labels[labels == X])
    again = keep_classes(labels, [0.25, 1.0, 0.0], torch.Generator().manual_seed(0))
    assert torch.equal(kept, again)


SENTENCE_LOGITS = torch.tensor([[0.4, -0.8, 9.0, 1.2], [9.0, 0.5, -0.3, 9.0]])


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


# Queries of the first response: tokens 0 and 1, and token 3; of the second: token 1, none, and token 2.
PREDICTED = [_sigmoid((0.4 - 0.8) / 2), _sigmoid(1.2), _sigmoid(0.5), _sigmoid(-0.3)]
SENTENCE_ERROR = sum((s - p) ** 2 for s, p in zip((1.0, 0.5, 0.5, 0.0), PREDICTED, strict=True)) / 4


def test_a_sentence_level_model_judges_queries_by_the_mean_of_its_outputs() -> None:
    logits = SENTENCE_LOGITS.unsqueeze(-1)
    predicted, present = predicted_sentences(logits, QUERY_INDEX, 3)
    assert present.tolist() == [[True, True, False], [True, False, True]]
    assert predicted[present].tolist() == pytest.approx(PREDICTED, abs=1e-6)
    assert global_loss(logits, QUERY_INDEX, QUERY_SCORES).item() == pytest.approx(SENTENCE_ERROR, abs=1e-6)


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0])
def test_a_sentence_level_model_has_the_global_loss_alone(w: float) -> None:
    losses = token_reward_loss(SENTENCE_LOGITS.unsqueeze(-1), LABELS, QUERY_INDEX, QUERY_SCORES, WEIGHTS, w)
    assert losses.total.item() == losses.global_loss.item() == pytest.approx(SENTENCE_ERROR, abs=1e-6)
    assert losses.local_loss.item() == 0.0


def test_taking_class_weights_out_gives_the_true_frequencies_back() -> None:
    """Logits fitted to labels with the weighted loss say `w_c n_c / sum`; corrected they say `n_c / n`."""
    counts = torch.tensor([60, 30, 10])
    labels = torch.repeat_interleave(torch.arange(3), counts).unsqueeze(0)
    weights = torch.tensor(inverse_class_frequency(counts.tolist()))
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-12)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = local_loss(logits.expand(1, len(labels[0]), 3), labels, weights)
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted = logits.detach()
    assert fitted.softmax(0).tolist() == pytest.approx([1 / 3] * 3, abs=1e-4)
    corrected = without_class_weights(fitted, weights)
    assert corrected.softmax(0).tolist() == pytest.approx([0.6, 0.3, 0.1], abs=1e-4)
