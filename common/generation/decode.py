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
from common.models.layouts import accepts

PROMPT_TOKENS = 8192  # of a block of prompts, padding included: what reading them may need at once
LOOK_EVERY = 8  # passes on CUDA between two looks at what was drawn
ATTENTION_KINDS = {"full_attention", "sliding_attention"}

# Is told, after every pass, how many responses have just ended: what advances a progress bar.
CountEnded = Callable[[int], Any]
# Whether any rank still works, told whether this one does; called before every pass, by all ranks alike.
AnyRank = Callable[[bool], bool]


def uncounted(ended: int) -> None:
    """The `CountEnded` of a caller who shows no progress."""


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
    if getattr(model.config.get_text_config(), "alibi", False):
        raise InputError(
            f"{type(model).__name__} cannot generate here: it has no positions but biases made from masks (alibi)"
        )
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - ATTENTION_KINDS
    if kinds:
        raise InputError(f"{type(model).__name__} cannot generate here: it has layers of the kind {', '.join(kinds)}")


class Decoder:
    """Draws the responses to `prompts`; see the module. At most `rows` are decoded at once, if a prompt's fit.

    A response ends with the first of `eos_token_ids`, which it holds.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        eos_token_ids: Sequence[int],
        rows: int,
        any_rank: AnyRank | None = None,
        graphs: bool = False,
        uniforms: torch.Tensor | None = None,
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._sampling = sampling
        self._eos = eos_token_ids
        self._any_rank = any_rank
        self._graphs = graphs
        self._uniforms = uniforms
        self._drawn = [Drawn() for _ in range(len(prompts) * sampling.samples)]
        self._waiting = deque(sorted(range(len(prompts)), key=lambda place: -len(prompts[place])))
        self._rows = min(max(rows, sampling.samples), len(self._drawn))
        self._active: list[int] = []  # the response that each row draws, rows dense from 0

    def run(self, count_ended: CountEnded) -> list[Drawn]:
        """`samples` responses for each prompt, prompt by prompt."""
        if self._waiting:
            longest = len(self._prompts[self._waiting[0]])
            uniforms = self._uniforms
            if uniforms is None:
                uniforms = uniform_table(self._sampling, len(self._prompts))
            columns = longest + self._sampling.max_new_tokens - 1
            uniforms = uniforms.to(self._model.device)
            step = DecodeStep(self._model, self._sampling, uniforms, self._rows, columns, self._graphs)
            enough = max(self._sampling.samples, self._rows // 4)  # free rows that make reading worth while
            while self._waiting or self._active:
                if self._waiting and (not self._active or self._rows - len(self._active) >= enough):
                    self._read_prompts(step)
                else:
                    self._draw(step)
                count_ended(self._drop_ended(step))
        while self._any_rank is not None and self._any_rank(False):
            self._model(input_ids=torch.tensor([[self._eos[0]]], device=self._model.device))
        return self._drawn

    def _read_prompts(self, step: DecodeStep) -> None:
        """Read the next prompts that fit, and draw the first token of each of their responses."""
        samples, width = self._sampling.samples, len(self._prompts[self._waiting[0]])
        free = self._rows - len(self._active)
        count = min(len(self._waiting), free // samples, max(1, PROMPT_TOKENS // width))
        block = [self._waiting.popleft() for _ in range(count)]
        responses = [place * samples + number for place in block for number in range(samples)]
        self._await_turn()
        found = step.read([self._prompts[place] for place in block], samples, len(self._active), responses)
        self._active += responses
        self._record(responses, [found])

    def _draw(self, step: DecodeStep) -> None:
        """Draw the next token of every row; on CUDA several, as far as no row can run past its limit."""
        longest = max(len(self._drawn[response].ids) for response in self._active)
        passes = min(LOOK_EVERY, self._sampling.max_new_tokens - longest) if step.on_cuda else 1
        width = max(map(self._length, self._active))
        found = []
        for number in range(passes):
            self._await_turn()
            found.append(step.draw(len(self._active), width + number))
        self._record(self._active, found)

    def _record(self, responses: Sequence[int], found: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Append the tokens and log-probs that some passes drew for `responses`: the one place where the host waits."""
        tokens, logprobs = (torch.stack(parts, dim=1).tolist() for parts in zip(*found, strict=True))
        for response, ids, values in zip(responses, tokens, logprobs, strict=True):
            self._drawn[response].ids += ids
            self._drawn[response].logprobs += values

    def _drop_ended(self, step: DecodeStep) -> int:
        """Let the last rows take the places of those that have ended; returns the number of these."""
        ended = {row for row, response in enumerate(self._active) if self._has_ended(self._drawn[response])}
        left = len(self._active) - len(ended)
        targets = [row for row in range(left) if row in ended]
        sources = [row for row in range(left, len(self._active)) if row not in ended]
        if targets:
            step.move(sources, targets, max(self._length(self._active[row]) for row in sources))
        for source, target in zip(sources, targets, strict=True):
            self._active[target] = self._active[source]
        del self._active[left:]
        return len(ended)

    def _has_ended(self, drawn: Drawn) -> bool:
        """Whether a response is complete; what was drawn past its EOS is cut off."""
        ends = [drawn.ids.index(eos) for eos in self._eos if eos in drawn.ids]
        if ends:
            length = min(ends) + 1
            del drawn.ids[length:], drawn.logprobs[length:]
            return True
        return len(drawn.ids) >= self._sampling.max_new_tokens

    def _length(self, response: int) -> int:
        """Columns that a response's row fills once its newest token has been read."""
        return len(self._prompts[response // self._sampling.samples]) + len(self._drawn[response].ids)

    def _await_turn(self) -> None:
        if self._any_rank is not None:
            self._any_rank(True)
