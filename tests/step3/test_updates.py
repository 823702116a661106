"""What an optimiser step computes on real DeepSpeed engines, and that it starts from ratio 1."""

from __future__ import annotations

import pytest
import torch
from deepspeed.utils import safe_get_full_grad

from common.config import LoraOptions
from common.engine import distributed
from common.engine.accumulation import accumulate
from common.engine.hybrid import HybridEngine
from common.generation.sampling import Sampling
from common.models.loading import apply_lora
from common.models.response_scores import response_scores
from common.models.sequences import SequenceBatch, pad_sequences
from step3_tppo.losses import k1_kl, policy_loss, token_denominator
from tests.distributed.ranks import run_on_ranks
from tests.tiny_models import SEQUENCES, ordinary_tokenizer, tiny_llama, zero_engine

ROWS = 8


def _fixed_batch() -> tuple[SequenceBatch, torch.Tensor, torch.Tensor]:
    """Eight sequences whose responses have 1 to 8 tokens, their old log-probs and advantages."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 200, (2 + row % 3,), generator=generator).tolist() for row in range(ROWS)]
    responses = [torch.randint(5, 200, (1 + row,), generator=generator).tolist() for row in range(ROWS)]
    batch = pad_sequences(prompts, responses, 1, torch.device("cpu"))
    model = tiny_llama().eval()
    with torch.no_grad():
        old = response_scores(model, model, batch, 1.0).logprobs
    old = old + 0.1 * torch.randn(old.shape, generator=generator)
    return batch, old, torch.randn(old.shape, generator=generator)


def _loss(forward, module, batch, old, advantages, rows, tokens) -> torch.Tensor:
    part = batch.rows(rows)
    width = part.response_mask.shape[1]
    scores = response_scores(forward, module, part, 1.0)
    return policy_loss(
        scores.logprobs, old[rows, :width], advantages[rows, :width], part.response_mask, 0.2, tokens
    ).loss


def _engine_gradient(rank: int, world_size: int, stage: int, accumulation: int) -> list[float]:
    """Gradient of one optimiser step: this rank's rows in `accumulation` micro-batches."""
    batch, old, advantages = _fixed_batch()
    mine = torch.arange(ROWS)[rank::world_size]
    micro_batches = mine.chunk(accumulation)
    engine = zero_engine(tiny_llama(), stage, len(micro_batches[0]))
    tokens = token_denominator(batch.response_mask[mine])
    engine.step = lambda: None  # it would take the gradients away
    for number, rows in enumerate(micro_batches, start=1):
        loss = _loss(engine, engine.module, batch, old, advantages, rows, tokens)
        accumulate(engine, loss, last=number == accumulation)
    gradient = torch.cat([safe_get_full_grad(parameter).flatten() for parameter in engine.module.parameters()])
    return gradient.double().tolist()


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 3])
def test_gradient_does_not_depend_on_ranks_or_accumulation(stage: int) -> None:
    batch, old, advantages = _fixed_batch()
    model = tiny_llama()
    tokens = batch.response_mask.sum().double()
    _loss(model, model, batch, old, advantages, torch.arange(ROWS), tokens).backward()
    full = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()
    assert full.abs().max() > 1e-3
    for world_size, accumulation in ((1, 4), (2, 2), (2, 1)):
        for gradient in run_on_ranks(_engine_gradient, world_size, stage, accumulation):
            # fp32 sums over 36 tokens in another order: relative rounding of about 36 * 6e-8.
            assert torch.allclose(torch.tensor(gradient).double(), full, rtol=0, atol=5e-6 * float(full.abs().max()))


def _first_ratio(rank: int, world_size: int, lora: LoraOptions, temperature: float) -> tuple[float, float, float]:
    """Largest |log ratio| of the first minibatch, largest |KL to self|, and |KL| after an update."""
    model = apply_lora(tiny_llama(), lora)
    hybrid = HybridEngine(zero_engine(model, 3, 2))
    tokenizer = ordinary_tokenizer()
    prompts = [[token + rank for token in prompt] for prompt in SEQUENCES]
    with hybrid.inference() as module:
        made = hybrid.generate(tokenizer, prompts, Sampling(6, temperature, seed=rank), rows=4)
        batch = pad_sequences(prompts, [response.ids for response in made], 1, torch.device("cpu"))
        old = response_scores(module, module, batch, temperature).logprobs
        reference = old
        if lora.lora_r > 0:
            with module.disable_adapter():
                reference = response_scores(module, module, batch, temperature).logprobs
    kl = float(k1_kl(old, reference, batch.response_mask).abs().max())
    hybrid.module.train()
    largest = 0.0
    tokens = token_denominator(batch.response_mask)
    for number, rows in enumerate(torch.arange(4).split(2), start=1):
        part = batch.rows(rows)
        width = part.response_mask.shape[1]
        new = response_scores(hybrid.engine, hybrid.module, part, temperature).logprobs
        largest = max(largest, float(k1_kl(new.detach(), old[rows, :width], part.response_mask).abs().max()))
        loss = policy_loss(new, old[rows, :width], torch.ones_like(new), part.response_mask, 0.2, tokens).loss
        accumulate(hybrid.engine, loss, last=number == 2)
    with hybrid.inference() as module:
        moved = response_scores(module, module, batch, temperature).logprobs
    return largest, kl, float(k1_kl(moved, reference, batch.response_mask).abs().max())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("lora", "temperature"),
    [
        (LoraOptions(), 1.0),
        (LoraOptions(), 0.7),
        (LoraOptions(lora_r=4), 0.7),
        (LoraOptions(lora_r=4, lora_dora=True, lora_rslora=True), 0.7),
    ],
    ids=["full", "full_cooler", "lora", "dora"],
)
def test_ratio_is_one_before_the_first_update_and_kl_to_self_is_zero(lora: LoraOptions, temperature: float) -> None:
    for ratio, kl, kl_after in run_on_ranks(_first_ratio, 2, lora, temperature):
        # Only the padding differs between the two passes: fp32 rounding of logits of size 10, over 0.7.
        assert ratio < 5e-5
        # DoRA begins with magnitude over norm of the same weights: one, but for rounding.
        assert kl == 0.0 if not lora.lora_dora else kl < 5e-5
        assert kl_after > 1e-3


def _denominator(rank: int, world_size: int) -> float:
    return float(token_denominator(torch.ones(1, 3 + 4 * rank, dtype=torch.bool)))


@pytest.mark.distributed
def test_denominator_counts_the_tokens_of_all_ranks() -> None:
    assert run_on_ranks(_denominator, 2) == [(3 + 7) / 2] * 2
    assert distributed.world_size() == 1
