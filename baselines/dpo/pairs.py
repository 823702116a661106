"""From labelled samples to preference pairs: the best and the worst response to one prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import torch

from common.data.prompts import PromptBuilder
from common.errors import InputError
from common.feedback.annotator import Annotation
from common.feedback.labels import sample_item
from common.models.reward_options import MAX_SCORE
from common.models.sequences import pad_sequences
from common.progress import progress
from common.text import normalise, split_queries


class Pair(TypedDict):
    """Ids of a prompt and of two responses, EOS included where it was written; the reference's log-probs of both.

    `input_ids` is the longer of the two sequences, for a sampler that sorts by length.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    input_ids: list[int]
    reference: tuple[float, float]


class Candidate(NamedTuple):
    """One labelled response to a prompt."""

    sample: dict[str, Any]
    score: float


def response_score(response: str, query_scores: Sequence[int], finished: bool, num_queries: int) -> float:
    """What a list is worth by its sentence labels: step 3's reward at the end of the response, before any scaling.

    Each query's score is taken to -1..1; one that is empty, repeats an earlier one or stands past the k-th is worth -1;
    each missing query and a missing EOS cost 1.
    """
    total, seen = 0.0, set()
    queries = split_queries(response)
    for place, (query, score) in enumerate(zip(queries, query_scores, strict=True)):
        key = normalise(query)
        good = key and key not in seen and place < num_queries
        seen.add(key)
        total += 2 * score / MAX_SCORE - 1 if good else -1.0
    return total - max(0, num_queries - len(queries)) - (not finished)


def build_pairs(
    labelled: Iterable[tuple[dict[str, Any], Annotation]], builder: PromptBuilder, split: str
) -> list[Pair]:
    """The best against the worst sampled response of each example of `split`; equal ones make no pair.

    The log's own targets and corrupted responses are left out: a preference is between what the model says itself.
    Raises `InputError` when no pair is left.
    """
    candidates: dict[str, list[Candidate]] = {}
    for sample, annotation in labelled:
        if sample["split"] == split and sample["origin"] == "sample":
            score = response_score(
                sample["response"], annotation.query_scores, sample["finished"], builder.num_queries
            )
            candidates.setdefault(sample["example_id"], []).append(Candidate(sample, score))
    pairs = []
    for group in progress(candidates.values(), desc=f"pairs of {split}"):
        best, worst = (choose(group, key=lambda candidate: candidate.score) for choose in (max, min))
        if best.score > worst.score:
            prompt = builder.ids(sample_item(best.sample).history)
            chosen, rejected = (_response_ids(candidate.sample, builder) for candidate in (best, worst))
            longer = max(chosen, rejected, key=len)
            pairs.append(
                Pair(prompt=prompt, chosen=chosen, rejected=rejected, input_ids=prompt + longer, reference=(0.0, 0.0))
            )
    if not pairs:
        raise InputError(
            f"no pair of differently scored samples in the split '{split}'; sample with --samples_per_prompt 2 or more"
        )
    return pairs


def _response_ids(sample: dict[str, Any], builder: PromptBuilder) -> list[int]:
    ids = builder.tokenizer(sample["response"], add_special_tokens=False)["input_ids"]
    return [*ids, builder.tokenizer.eos_token_id] if sample["finished"] or not ids else ids


@dataclass(frozen=True, slots=True)
class PairCollator:
    """Pads pairs into one batch: the chosen responses' rows, then the rejected ones'; `reference` (2P,) alike."""

    pad_token_id: int

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        """The fields of `SequenceBatch`, and `reference`."""
        prompts = [pair["prompt"] for pair in pairs] * 2
        responses = [pair[side] for side in ("chosen", "rejected") for pair in pairs]
        batch = pad_sequences(prompts, responses, self.pad_token_id, torch.device("cpu"))
        reference = [pair["reference"][side] for side in (0, 1) for pair in pairs]
        return {**batch._asdict(), "reference": torch.tensor(reference)}
