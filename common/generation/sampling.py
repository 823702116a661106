"""How responses are drawn: settings, and the draw itself as a pure function."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.errors import InputError


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of one call of `generate_responses`.

    The model's own distribution is sampled at `temperature` (no top-k, nothing that its folder recommends); 0 is greedy
    decoding. `top_p` below 1 cuts the distribution to its likeliest tokens of that much mass: responses are then no
    samples of the policy, so step 3 keeps it at 1. `samples` responses are drawn for each prompt. What is drawn depends
    on these settings, the prompt's place and the sample's number, not on what shares a batch.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.max_new_tokens < 1 or self.samples < 1 or not 0 < self.top_p <= 1:
            raise InputError(
                "generation needs temperature >= 0, max_new_tokens >= 1, samples >= 1 and 0 < top_p <= 1, not "
                f"{self.temperature}, {self.max_new_tokens}, {self.samples} and {self.top_p}"
            )


def draw_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row by inverting the cumulative distribution at `uniforms`; its log-prob.

    logits (R, V), uniforms (R,) in [0, 1) -> tokens (R,) int64 and log-probs (R,) fp32, those of
    `softmax(logits / temperature)` (at temperature 0: of the likeliest token at temperature 1), before any cut by
    `top_p`. A token of probability 0 is never drawn. No operation waits for the host.
    """
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    elif top_p == 1:
        tokens = _inverted(logprobs.exp(), uniforms)
    else:
        sorted_logprobs, order = logprobs.sort(-1, descending=True)
        shares = sorted_logprobs.exp()
        # The token that crosses top_p belongs to the nucleus, as in Holtzman et al. (2020).
        outside = shares.cumsum(-1) - shares >= top_p
        tokens = order.gather(-1, _inverted(shares.masked_fill(outside, 0.0), uniforms).unsqueeze(-1)).squeeze(-1)
    return tokens, logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def uniform_table(sampling: Sampling, prompts: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """The random numbers of a whole call, (prompts * samples, max_new_tokens) in double precision, on the CPU.

    The tables that one `generator`, seeded with `sampling.seed`, gives one after another are the parts of a single
    table: prompts that are answered in parts get the numbers that they would get in one call.
    """
    if generator is None:
        generator = torch.Generator().manual_seed(sampling.seed)
    return torch.rand(prompts * sampling.samples, sampling.max_new_tokens, generator=generator, dtype=torch.float64)


def _inverted(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The place at which each row's running sum of `weights` (R, V) exceeds that share of its total, (R,).

    In double precision: in single, a running sum over 100,000 tokens loses the rare ones.
    """
    sums = weights.double().cumsum(-1)
    targets = uniforms.double().unsqueeze(-1) * sums[:, -1:]
    return torch.searchsorted(sums, targets, right=True).squeeze(-1).clamp_max(weights.shape[-1] - 1)
