"""The passes of decoding, on buffers that stay where they are, so that CUDA can record a pass and play it again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from common.generation.cache import RowCache
from common.generation.sampling import Sampling, draw_tokens

GRAPH_COLUMNS = 128  # recorded passes attend to a multiple of so many columns, and to a power of two of rows


class DecodeStep:
    """State of up to `rows` rows: next token, its position, which response it belongs to; and the passes over them.

    `uniforms` (N, max_new_tokens) are the random numbers of all responses. With `graphs`, on CUDA, a pass over tokens
    is recorded when its shape comes up the second time: launching the kernels of a small batch takes longer than they
    do.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sampling: Sampling,
        uniforms: torch.Tensor,
        rows: int,
        columns: int,
        graphs: bool = False,
    ) -> None:
        device = model.device
        config = model.config.get_text_config()
        self.on_cuda = device.type == "cuda"
        self._records = graphs and self.on_cuda
        self._model = model
        self._sampling = sampling
        self._uniforms = uniforms
        self._columns = columns
        self._windows = attention_windows(config)
        self._cache = RowCache(config.num_hidden_layers, rows, columns)
        numbers = torch.zeros(4, rows, dtype=torch.long, device=device)
        self._tokens, self._positions, self._responses, self._drawn = numbers
        self._logprobs = torch.zeros(rows, device=device)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}
        # What a pass leaves is copied to the buffers above, so that all graphs may work in the same memory.
        self._graph_memory = torch.cuda.graph_pool_handle() if self._records else None

    def read(
        self, prompts: Sequence[Sequence[int]], samples: int, first_row: int, responses: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read prompts into the rows from `first_row` on, `samples` rows each, and draw each row's first token.

        `responses` are the rows' numbers. Returns tokens and log-probs, (len(responses),).
        """
        device = self._tokens.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        width = int(max(map(len, prompts)))
        ids = torch.tensor([list(prompt) + [0] * (width - len(prompt)) for prompt in prompts], device=device)
        self._cache.begin_prompts(first_row, samples)
        logits = self._model(
            input_ids=ids,
            position_ids=torch.arange(width, device=device).expand(len(prompts), -1),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=(lengths - 1).unsqueeze(1),
        ).logits[:, -1]
        rows = slice(first_row, first_row + len(responses))
        self._responses[rows] = torch.tensor(responses, device=device)
        self._drawn[rows] = 0
        # One less than where the first token will stand: drawing it moves on by one.
        self._positions[rows] = (lengths - 1).repeat_interleave(samples)
        return self._take(logits.repeat_interleave(samples, dim=0), rows)

    def draw(self, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the last token of each of the first `rows` rows and draw the next; attention sees `width` columns.

        Returns tokens and log-probs, (rows,).
        """
        if not self._records:
            return self._pass(rows, width)
        shape = _graph_shape(rows, width, len(self._tokens), self._columns)
        if shape not in self._graphs:
            self._graphs[shape] = None
            self._pass(*shape)  # also what warms up the kernels that a graph may hold
        else:
            if self._graphs[shape] is None:
                self._graphs[shape] = self._recorded(*shape)
            self._graphs[shape].replay()
        return self._tokens[:rows].clone(), self._logprobs[:rows].clone()

    def move(self, sources: list[int], targets: list[int], width: int) -> None:
        """Copy rows `sources`, which fill `width` columns, to `targets`."""
        self._cache.move(sources, targets, width)
        for buffer in (self._tokens, self._positions, self._responses, self._drawn):
            buffer[targets] = buffer[sources]

    def _pass(self, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        positions = self._positions[:rows]
        self._cache.begin_tokens(positions, width)
        logits = self._model(
            input_ids=self._tokens[:rows].unsqueeze(1),
            position_ids=positions.unsqueeze(1),
            attention_mask=self._mask(positions, width),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return self._take(logits, slice(0, rows))

    def _take(self, logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw from `logits` (A, V) for `rows` and move them on by one token; nothing here waits for the host."""
        last = self._uniforms.shape[1] - 1
        uniforms = self._uniforms[self._responses[rows], self._drawn[rows].clamp_max(last)]
        tokens, logprobs = draw_tokens(logits, uniforms, self._sampling.temperature, self._sampling.top_p)
        self._tokens[rows] = tokens
        self._logprobs[rows] = logprobs
        self._drawn[rows] += 1
        # A recorded pass has rows that nobody reads: they must stay inside the cache.
        self._positions[rows] = (self._positions[rows] + 1).clamp_max(self._columns - 1)
        return tokens, logprobs

    def _mask(self, positions: torch.Tensor, width: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Which columns each row sees, (A, 1, 1, width); one mask for each kind of layer if the model has several."""
        columns = torch.arange(width, device=positions.device)
        masks = {}
        for kind, window in self._windows.items():
            seen = columns <= positions.unsqueeze(1)
            if window:
                seen = seen & (columns > positions.unsqueeze(1) - window)
            masks[kind] = self._as_the_kernel_wants_it(seen[:, None, None, :])
        return masks if len(masks) > 1 else masks.popitem()[1]

    def _as_the_kernel_wants_it(self, seen: torch.Tensor) -> torch.Tensor:
        """SDPA takes booleans, the eager kernel adds the mask to its logits."""
        if self._model.config._attn_implementation != "eager":
            return seen
        lowest = torch.finfo(self._model.dtype).min
        return torch.zeros_like(seen, dtype=self._model.dtype).masked_fill(~seen, lowest)

    def _recorded(self, rows: int, width: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog, a thread of its own, asks CUDA for events meanwhile: only this thread's calls are recorded.
        with torch.cuda.graph(graph, pool=self._graph_memory, capture_error_mode="thread_local"):
            self._pass(rows, width)
        return graph


def attention_windows(config: object) -> dict[str, int]:
    """How far back each kind of layer looks, in tokens; 0: to the beginning."""
    window = getattr(config, "sliding_window", None) or 0
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return {"full_attention": window}
    return {kind: window if kind == "sliding_attention" else 0 for kind in sorted(kinds)}


def _graph_shape(rows: int, width: int, most_rows: int, most_columns: int) -> tuple[int, int]:
    """The next larger shape that passes are recorded for."""
    power = 1 << (rows - 1).bit_length()
    return min(power, most_rows), min(-(-width // GRAPH_COLUMNS) * GRAPH_COLUMNS, most_columns)
