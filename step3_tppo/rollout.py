"""One rollout: sample responses, score them with four models, and place what was found on the response tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from common.alignment import DecodedTokens, TokenDecoder
from common.data.prompts import PromptBuilder
from common.data.records import Example
from common.engine.accumulation import micro_batches
from common.evaluation.summary import Row, score_rows
from common.feedback.annotator import Annotator
from common.generation.generate import Generated
from common.generation.sampling import Sampling
from common.models.response_scores import response_scores
from common.models.sequences import SequenceBatch, pad_sequences, score_in_blocks, whole_groups
from common.progress import phase_progress
from step3_tppo.config import Step3Config
from step3_tppo.losses import k1_kl
from step3_tppo.models import Models
from step3_tppo.rewards import MAX_WORD_SCORE, RewardOptions, TokenRewards, token_rewards


@dataclass(frozen=True, slots=True)
class Rollout:
    """What one rank sampled in a step and what the models say of it; tensors are (B, T) over response tokens.

    `word_scores` are the reward model's, `rewards` is the sum of the parts of `parts`, without KL. `sampled_logprobs`
    are those of decoding. `old_logprobs` are PPO's; for the rows of `pending` (B,) bool they are still those of
    decoding, until the first update, whose policy is unchanged, puts its own there. `judged` are the judge's rows where
    rewards are made of them.
    """

    examples: list[Example]
    generated: list[Generated]
    decoded: list[DecodedTokens]
    word_scores: list[list[float]]
    parts: list[TokenRewards]
    batch: SequenceBatch
    sampled_logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    pending: torch.Tensor
    reference_logprobs: torch.Tensor
    kl: torch.Tensor
    values: torch.Tensor
    rewards: torch.Tensor
    judged: list[Row] | None
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

    def prompt_tokens(self, example: Example) -> int:
        """How many tokens the prompt of `example` has."""
        return len(self._prompts.ids(example.history))

    def __call__(
        self, examples: Sequence[Example], seed: int, first_rows: Callable[[SequenceBatch], torch.Tensor]
    ) -> Rollout:
        """Sample `samples_per_prompt` responses for each of this rank's `examples`; `seed` differs between ranks.

        `first_rows` gives the rows that the first update learns from.
        """
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
            shared = self._models.scoring.layout == "shared"
            batch = pad_sequences(
                prompts, responses, self._tokenizer.pad_token_id, self._device,
                samples=config.samples_per_prompt if shared else 1,
            )
            sampled = _padded([response.logprobs for response in generated], batch.response_mask)
            pending = self._pending(batch, first_rows)
            old_logprobs = self._old_logprobs(actor, batch, sampled, pending)
            blocks = self._blocks(batch, torch.ones_like(pending))
            reference = None
            if self._models.reference is None:
                with actor.disable_adapter():
                    reference = self._logprobs(actor, batch, blocks)
            clock.lap("actor_scoring")
        clock.lap("switch")
        if reference is None:
            with self._models.reference.inference() as module:
                reference = self._logprobs(module, batch, blocks)
        values = torch.zeros_like(reference)
        if self._models.critic is not None:
            with self._models.critic.inference() as module:
                (values,) = score_in_blocks(batch, blocks, lambda block: (module(block),))
        clock.lap("reference_critic_scoring")
        decoded = [self._decoder(ids) for ids in responses]
        judged = self._judged(examples, generated) if self._judge else None
        words, queries = _scores_of(judged) if judged else self._reward_scores(examples, generated)
        rows = zip(decoded, words, queries, generated, strict=True)
        parts = [token_rewards(text, *scores, response.finished, self._rewards) for text, *scores, response in rows]
        clock.lap("reward_scoring")
        return Rollout(
            examples=examples,
            generated=generated,
            decoded=decoded,
            word_scores=words,
            parts=parts,
            batch=batch,
            sampled_logprobs=sampled,
            old_logprobs=old_logprobs,
            pending=pending,
            reference_logprobs=reference,
            kl=k1_kl(old_logprobs, reference, batch.response_mask),
            values=values,
            rewards=_padded([part.total for part in parts], batch.response_mask),
            judged=judged,
            seconds=clock.seconds,
        )

    def _pending(self, batch: SequenceBatch, first_rows: Callable[[SequenceBatch], torch.Tensor]) -> torch.Tensor:
        """The rows (B,) whose old log-probs the first update's own pass gives, because its policy is unchanged."""
        pending = torch.zeros(len(batch.input_ids), dtype=torch.bool, device=self._device)
        if self._config.old_logprobs == "auto" and not self._config.sampling_is_exact():
            pending[first_rows(batch)] = True
        return pending

    def _old_logprobs(
        self, actor: torch.nn.Module, batch: SequenceBatch, sampled: torch.Tensor, pending: torch.Tensor
    ) -> torch.Tensor:
        """Those of decoding, replaced by a pass like the training's where `--old_logprobs` asks for it."""
        setting = self._config.old_logprobs
        if setting == "sampled" or (setting == "auto" and self._config.sampling_is_exact()) or pending.all():
            return sampled.clone()
        again = self._logprobs(actor, batch, self._blocks(batch, ~pending))
        return torch.where(pending.unsqueeze(1), sampled, again)

    def _blocks(self, batch: SequenceBatch, chosen: torch.Tensor) -> list[torch.Tensor]:
        """The `chosen` rows (B,) in blocks for passes without gradients."""
        config = self._config
        return micro_batches(batch, chosen.nonzero()[:, 0], config.scoring_batch_size, config.scoring_batch_tokens)

    def _logprobs(self, module: torch.nn.Module, batch: SequenceBatch, blocks: list[torch.Tensor]) -> torch.Tensor:
        def forward(block: SequenceBatch) -> tuple[torch.Tensor]:
            return (response_scores(module, module, block, self._config.temperature, self._models.scoring).logprobs,)

        return score_in_blocks(batch, blocks, forward)[0]

    def _reward_scores(
        self, examples: Sequence[Example], generated: Sequence[Generated]
    ) -> tuple[list[list[float]], list[list[float]]]:
        """The reward model's scores of each response's words and of its queries."""
        # A history whose responses stand together may be read once.
        size = whole_groups(self._config.scoring_batch_size, self._config.samples_per_prompt)
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

    def _judged(self, examples: Sequence[Example], generated: Sequence[Generated]) -> list[Row]:
        return score_rows(examples, response_rows(generated), self._judge)


def response_rows(generated: Sequence[Generated]) -> list[Row]:
    """Responses as the rows that a judge scores (`common.evaluation.summary.score_rows`)."""
    return [
        {"response": response.text, "finished": response.finished, "tokens": len(response.ids)}
        for response in generated
    ]


def _scores_of(judged: Sequence[Row]) -> tuple[list[list[float]], list[list[float]]]:
    """A judge's scores of words and of queries, on the reward model's scales."""
    words = [[float(score) for line in row["words"] for score in line] for row in judged]
    return words, [[score / MAX_WORD_SCORE for score in row["queries"]] for row in judged]


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
