"""The decoding loop: prompts are read once for all their samples, rows that end make way for others.

Rows of a batch are at places of their own (`RowCache`). Long prompts come first, and prompts of similar length are read
together; a row that has ended is dropped, the last row takes its place, and once enough rows are free the next prompts
are read into them. So no pass computes what nobody reads, but for up to `LOOK_EVERY` tokens past an end on CUDA, where
asking whether a row has ended makes the host wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from common.errors import InputError
from common.generation.sampling import Sampling, uniform_table
from common.generation.step import DecodeStep
from common.models.sequences import accepts

PROMPT_TOKENS = 8192  # of a block of prompts, padding included: what reading them may need at once
LOOK_EVERY = 8  # passes on CUDA between two looks at what was drawn
ATTENTION_KINDS = {"full_attention", "sliding_attention"}

# Whether any rank still works, told whether this one does; called before every pass, by all ranks alike.
AnyRank = Callable[[bool], bool]


@dataclass(slots=True)
class Drawn:
    """A response so far: its token ids and their log-probs at the sampling temperature."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def check_decodable(model: PreTrainedModel) -> None:
    """Raise `InputError` naming what a model lacks: rows at places of their own need explicit positions and a cache."""
    for argument in ("position_ids", "past_key_values", "logits_to_keep"):
        if not accepts(model, argument):
            raise InputError(f"{type(model).__name__} cannot generate here: its forward takes no {argument}")
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - ATTENTION_KINDS
    if kinds:
        raise InputError(f"{type(model).__name__} cannot generate here: it has layers of the kind {', '.join(kinds)}")


class Decoder:
    """Draws all responses of one call; see the module. `rows` bounds how many are decoded at once."""

    def __init__(
        self, model: PreTrainedModel, sampling: Sampling, eos_token_id: int, rows: int, any_rank: AnyRank | None
    ) -> None:
        self._model = model
        self._sampling = sampling
        self._eos = eos_token_id
        self._rows = max(rows, sampling.samples)
        self._any_rank = any_rank

    def __call__(self, prompts: Sequence[Sequence[int]], ended: Callable[[int], Any]) -> list[Drawn]:
        """`samples` responses for each prompt, prompt by prompt; calls `ended` with how many have just ended."""
        sampling = self._sampling
        drawn = [Drawn() for _ in range(len(prompts) * sampling.samples)]
        waiting = deque(sorted(range(len(prompts)), key=lambda place: -len(prompts[place])))
        if waiting:
            rows = min(self._rows, len(drawn))
            columns = len(prompts[waiting[0]]) + sampling.max_new_tokens - 1
            uniforms = uniform_table(sampling, len(prompts)).to(self._model.device)
            step = DecodeStep(self._model, sampling, uniforms, rows, columns)
            active: list[int] = []  # the response that each row draws, rows dense from 0
            while waiting or active:
                free = rows - len(active)
                if waiting and (not active or free >= max(sampling.samples, rows // 4)):
                    self._read_prompts(prompts, waiting, step, active, drawn, free)
                else:
                    self._draw(prompts, step, active, drawn)
                ended(self._drop_ended(prompts, step, active, drawn))
        while self._any_rank is not None and self._any_rank(False):
            self._model(input_ids=torch.tensor([[self._eos]], device=self._model.device))
        return drawn

    def _read_prompts(
        self,
        prompts: Sequence[Sequence[int]],
        waiting: deque[int],
        step: DecodeStep,
        active: list[int],
        drawn: list[Drawn],
        free: int,
    ) -> None:
        """Read the next prompts that fit, and draw the first token of each of their responses."""
        samples = self._sampling.samples
        width = len(prompts[waiting[0]])
        count = min(len(waiting), free // samples, max(1, PROMPT_TOKENS // width))
        block = [waiting.popleft() for _ in range(count)]
        responses = [place * samples + number for place in block for number in range(samples)]
        self._await_turn()
        tokens, logprobs = step.read([prompts[place] for place in block], samples, len(active), responses)
        active += responses
        _record(responses, [tokens], [logprobs], drawn)

    def _draw(
        self, prompts: Sequence[Sequence[int]], step: DecodeStep, active: list[int], drawn: list[Drawn]
    ) -> None:
        """Draw the next token of every row; on CUDA several, as far as no row can run past its limit."""
        longest = max(len(drawn[response].ids) for response in active)
        passes = min(LOOK_EVERY, self._sampling.max_new_tokens - longest) if step.on_cuda else 1
        width = max(self._length(prompts, drawn, response) for response in active)
        tokens, logprobs = [], []
        for number in range(passes):
            self._await_turn()
            found = step.draw(len(active), width + number)
            tokens.append(found[0])
            logprobs.append(found[1])
        _record(active, tokens, logprobs, drawn)

    def _drop_ended(
        self, prompts: Sequence[Sequence[int]], step: DecodeStep, active: list[int], drawn: list[Drawn]
    ) -> int:
        """Cut what follows an end, and let the last rows take the places of those that ended; returns their number."""
        holes = [row for row, response in enumerate(active) if self._has_ended(drawn[response])]
        left = len(active) - len(holes)
        targets = [row for row in holes if row < left]
        sources = [row for row in range(left, len(active)) if row not in set(holes)]
        if targets:
            width = max(self._length(prompts, drawn, active[row]) for row in sources)
            step.move(sources, targets, width)
        for source, target in zip(sources, targets, strict=True):
            active[target] = active[source]
        del active[left:]
        return len(holes)

    def _has_ended(self, response: Drawn) -> bool:
        """Whether a response is complete; what was drawn past its EOS is cut off."""
        if self._eos in response.ids:
            length = response.ids.index(self._eos) + 1
            del response.ids[length:], response.logprobs[length:]
            return True
        return len(response.ids) >= self._sampling.max_new_tokens

    def _length(self, prompts: Sequence[Sequence[int]], drawn: list[Drawn], response: int) -> int:
        """Columns that a row fills once its newest token has been read."""
        return len(prompts[response // self._sampling.samples]) + len(drawn[response].ids)

    def _await_turn(self) -> None:
        if self._any_rank is not None:
            self._any_rank(True)


def _record(
    responses: Sequence[int], tokens: list[torch.Tensor], logprobs: list[torch.Tensor], drawn: list[Drawn]
) -> None:
    """Append what some passes drew, (A,) each, to the responses of their rows: the one place where the host waits."""
    token_rows, logprob_rows = (torch.stack(found, dim=1).tolist() for found in (tokens, logprobs))
    for response, ids, values in zip(responses, token_rows, logprob_rows, strict=True):
        drawn[response].ids += ids
        drawn[response].logprobs += values
