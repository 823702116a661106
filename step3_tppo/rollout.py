"""One rollout: sample responses, score them with four models, and place what was found on the response tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.alignment import DecodedTokens, TokenDecoder
from common.data.prompts import PromptBuilder
from common.data.records import Example
from common.engine.accumulation import micro_batches
from common.evaluation.summary import score_rows
from common.feedback.annotator import Annotator
from common.generation.generate import Generated
from common.generation.sampling import Sampling
from common.models.sequences import SequenceBatch, TokenScores, pad_sequences, response_scores, score_in_blocks
from common.progress import phase_progress
from step3_tppo.config import Step3Config
from step3_tppo.losses import k1_kl
from step3_tppo.models import Models
from step3_tppo.rewards import MAX_WORD_SCORE, RewardOptions, TokenRewards, token_rewards


@dataclass(frozen=True, slots=True)
class Rollout:
    """What one rank sampled in a step and what the models say of it; tensors are (B, T) over response tokens.

    `word_scores` are the reward model's, `rewards` is the sum of the parts of `parts`, without KL. `checked` are the
    tokens whose log-probs were computed again by a pass like the training's: all of them, or one block's when the old
    log-probs are those of sampling; there stand `mismatch`, by how much the two differ, and the policy's `entropy`.
    """

    examples: list[Example]
    generated: list[Generated]
    decoded: list[DecodedTokens]
    word_scores: list[list[float]]
    parts: list[TokenRewards]
    batch: SequenceBatch
    old_logprobs: torch.Tensor
    reference_logprobs: torch.Tensor
    checked: torch.Tensor
    mismatch: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor
    values: torch.Tensor
    rewards: torch.Tensor
    seconds: dict[str, float]


class RolloutMaker:
    """Samples with the actor and scores with all four models; the same number of forward calls on every rank.

    A `judge` gives the scores in place of the reward model.
    """

    def __init__(
        self,
        models: Models,
        prompts: PromptBuilder,
        rewards: RewardOptions,
        config: Step3Config,
        device: torch.device,
        judge: Annotator | None = None,
    ) -> None:
        self._models = models
        self._prompts = prompts
        self._tokenizer = prompts.tokenizer
        self._decoder = TokenDecoder(prompts.tokenizer)
        self._rewards = rewards
        self._config = config
        self._device = device
        self._judge = judge

    def __call__(self, examples: Sequence[Example], seed: int) -> Rollout:
        """Sample `samples_per_prompt` responses for each of this rank's `examples`; `seed` differs between ranks."""
        clock, config = _Clock(), self._config
        prompts = [self._prompts.ids(example.history) for example in examples]
        examples = [example for example in examples for _ in range(config.samples_per_prompt)]
        sampling = Sampling(
            config.max_response_tokens, config.temperature, samples=config.samples_per_prompt, seed=seed
        )
        with self._models.actor.inference() as actor:
            clock.lap("switch")
            with phase_progress(total=len(examples), desc="rollout", unit="response") as bar:
                generated = self._models.actor.generate(
                    self._tokenizer, prompts, sampling, config.decode_rows or len(examples), bar.update
                )
            clock.lap("generate")
            responses = [response.ids for response in generated]
            prompts = [prompt for prompt in prompts for _ in range(config.samples_per_prompt)]
            batch = pad_sequences(prompts, responses, self._tokenizer.pad_token_id, self._device)
            rows = torch.arange(len(responses), device=self._device)
            blocks = micro_batches(batch, rows, config.scoring_batch_size, config.scoring_batch_tokens)
            checked = blocks if config.old_logprobs == "recomputed" else blocks[:1]
            again = self._scores(actor, batch, checked)
            reference = None
            if self._models.reference is None:
                with actor.disable_adapter():
                    reference = self._scores(actor, batch, blocks)
            clock.lap("actor_scoring")
        clock.lap("switch")
        if reference is None:
            with self._models.reference.inference() as module:
                reference = self._scores(module, batch, blocks)
        with self._models.critic.inference() as module:
            (values,) = score_in_blocks(batch, blocks, lambda block: (module(block),))
        clock.lap("reference_critic_scoring")
        decoded = [self._decoder(ids) for ids in responses]
        words, queries = (self._judged if self._judge else self._reward_scores)(examples, generated)
        rows = zip(decoded, words, queries, generated, strict=True)
        parts = [token_rewards(text, *scores, response.finished, self._rewards) for text, *scores, response in rows]
        clock.lap("reward_scoring")
        sampled = _padded([response.logprobs for response in generated], batch.response_mask)
        checked_mask = torch.zeros_like(batch.response_mask)
        checked_mask[torch.cat(checked)] = batch.response_mask[torch.cat(checked)]
        old_logprobs = again.logprobs if config.old_logprobs == "recomputed" else sampled
        return Rollout(
            examples=examples,
            generated=generated,
            decoded=decoded,
            word_scores=words,
            parts=parts,
            batch=batch,
            old_logprobs=old_logprobs,
            reference_logprobs=reference.logprobs,
            checked=checked_mask,
            mismatch=torch.where(checked_mask, (sampled - again.logprobs).abs(), 0.0),
            entropy=again.entropy,
            kl=k1_kl(old_logprobs, reference.logprobs, batch.response_mask),
            values=values,
            rewards=_padded([part.total for part in parts], batch.response_mask),
            seconds=clock.seconds,
        )

    def _scores(self, module: torch.nn.Module, batch: SequenceBatch, blocks: list[torch.Tensor]) -> TokenScores:
        temperature, way = self._config.temperature, self._models.way
        return TokenScores(
            *score_in_blocks(batch, blocks, lambda block: response_scores(module, module, block, temperature, way))
        )

    def _reward_scores(
        self, examples: Sequence[Example], generated: Sequence[Generated]
    ) -> tuple[list[list[float]], list[list[float]]]:
        """The reward model's scores of each response's words and of its queries."""
        size = self._config.scoring_batch_size
        words: list[list[float]] = []
        queries: list[list[float]] = []
        with self._models.reward.inference():
            for start in range(0, len(examples), size):
                chunk = slice(start, start + size)
                scores = self._models.scorer.score(
                    [example.history for example in examples[chunk]], [response.text for response in generated[chunk]]
                )
                words += scores.words
                queries += scores.queries
        return words, queries

    def _judged(
        self, examples: Sequence[Example], generated: Sequence[Generated]
    ) -> tuple[list[list[float]], list[list[float]]]:
        """The judge's scores, on the reward model's scales."""
        rows = score_rows(examples, [{"response": response.text} for response in generated], self._judge)
        words = [[float(score) for line in row["words"] for score in line] for row in rows]
        return words, [[score / MAX_WORD_SCORE for score in row["queries"]] for row in rows]


def reward_options(config: Step3Config, suggested_length: int) -> RewardOptions:
    """The reward's settings from step 3's flags."""
    return RewardOptions(
        num_queries=config.num_queries,
        suggested_length=suggested_length,
        level=config.reward_level,
        spread=config.reward_spread,
        centre=config.centre_rewards,
        normalise=config.normalise_rewards,
        length_alpha=config.length_alpha,
        list_cost=config.list_cost,
        sentence_coef=config.sentence_coef,
    )


def part_tensor(rollout: Rollout, name: str) -> torch.Tensor:
    """One part of the rewards (a field of `TokenRewards`) as (B, T)."""
    return _padded([getattr(part, name) for part in rollout.parts], rollout.batch.response_mask)


def _padded(rows: Sequence[Sequence[float]], mask: torch.Tensor) -> torch.Tensor:
    width = mask.shape[1]
    return torch.tensor([list(row) + [0.0] * (width - len(row)) for row in rows], device=mask.device)


class _Clock:
    """Seconds of each phase, added up under its name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
