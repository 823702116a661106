"""How a model reads a batch of sequences: padded, packed into one row, or with each prompt once for all its responses.

No layout changes a score:

- `padded`: a row for each sequence. Under causal attention no real token sees the padding on its right, so no mask is
  needed, which is the fast path of every attention kernel.
- `packed`: all sequences in one row without padding. Positions start again at 0 with each sequence, which is how
  transformers tells flash attention where a sequence begins.
- `shared`: a row for each prompt, with all its responses behind it: `[prompt | response 1 | ... | response n]`. Each
  response's positions continue the prompt's. A token sees the prompt up to itself and its own response up to itself,
  which a mask says. The prompt is read once in place of n times.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import PretrainedConfig

from common.models.sequences import SequenceBatch, pad_sequences

Layout = Literal["padded", "packed", "shared"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
MASKED_KERNELS = ("sdpa", "eager", "flex_attention")  # those that take a mask of any form
FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of a layer's attention
PROMPT, PADDING = 0, -1  # segments; responses count from 1


class ModelRows(NamedTuple):
    """A batch as a model reads it, (R, W).

    `position_ids` is None where positions are the columns. `segments` is None where causal attention is all that is
    needed; else it names the part of a row that a token belongs to: the prompt, a response, or padding. `keep` (R, W)
    bool marks where response tokens are predicted. `index` (M,) is the number of the kept position that predicts each
    response token, because the last position of a shared prompt predicts n of them; None: one after the other. Rows
    that are read at the response tokens themselves have these in `keep` and `index`.
    `response_ids` (M,) are the response tokens, row by row of the batch, whose `response_mask` (B, T) is here too.
    `positions` is more than the highest position.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    segments: torch.Tensor | None
    keep: torch.Tensor
    index: torch.Tensor | None
    response_ids: torch.Tensor
    response_mask: torch.Tensor
    positions: int

    def to(self, device: torch.device | str) -> ModelRows:
        """The same on another device."""
        return ModelRows(*(item.to(device) if isinstance(item, torch.Tensor) else item for item in self))


def lay_out(batch: SequenceBatch, layout: Layout, at_tokens: bool = False) -> ModelRows:
    """The batch in one of the layouts.

    A model is read where response tokens are predicted, or with `at_tokens` at the response tokens themselves, as a
    token classifier is.
    """
    read = batch.predicting.roll(1, dims=1) if at_tokens else batch.predicting
    rest = batch.response_ids, batch.response_mask, batch.input_ids.shape[1]
    if layout == "shared":
        return ModelRows(*_shared(batch, read), *rest)
    if layout == "packed":
        real = batch.attention_mask.bool()
        ids, positions, keep = (
            tensor[real].unsqueeze(0) for tensor in (batch.input_ids, batch.attention_mask.cumsum(1) - 1, read)
        )
        return ModelRows(ids, positions, None, keep, None, *rest)
    return ModelRows(batch.input_ids, None, None, read, None, *rest)


def _shared(batch: SequenceBatch, read: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The first five fields of `ModelRows`, read at the marked positions (B, L)."""
    prompt_lengths, response_lengths = batch.prompt_lengths, batch.response_mask.sum(1)
    prompts, row = batch.prompt_index.unique(return_inverse=True)
    earlier = (row.unsqueeze(1) == row).tril(-1)  # (B, B): the responses that stand before one in its row
    shift = (earlier * response_lengths).sum(1, keepdim=True)
    segment = earlier.sum(1, keepdim=True) + 1
    columns = torch.arange(batch.input_ids.shape[1], device=row.device)
    in_prompt = columns < prompt_lengths.unsqueeze(1)
    real = batch.attention_mask.bool() & (~in_prompt | (segment == 1))  # a prompt comes from its first sequence
    width = int((prompt_lengths + response_lengths + shift.squeeze(1)).max())
    places = row.unsqueeze(1) * width + columns + torch.where(in_prompt, 0, shift)

    def scattered(values: torch.Tensor, fill: int) -> torch.Tensor:
        flat = values.new_full((len(prompts) * width,), fill)
        return flat.scatter(0, places[real], values[real]).view(len(prompts), width)

    read_at = places[read]
    keep = torch.zeros(len(prompts) * width, dtype=torch.bool, device=row.device).index_fill(0, read_at, True)
    return (
        scattered(batch.input_ids, 0),
        scattered(columns.expand_as(places), 0),
        scattered(torch.where(in_prompt, PROMPT, segment), PADDING),
        keep.view(len(prompts), width),
        (keep.cumsum(0) - 1)[read_at],
    )


def forward_arguments(module: nn.Module, rows: ModelRows, causal: bool = True) -> dict[str, Any]:
    """Keyword arguments for `module`'s forward, without a cache.

    A model with logits (which takes `logits_to_keep`) gives those alone that predict a response token: (U, V). `causal`
    as in `visible`.
    """
    arguments: dict[str, Any] = {"input_ids": rows.input_ids}
    if rows.position_ids is not None:
        arguments["position_ids"] = rows.position_ids
    if rows.segments is not None:
        arguments["attention_mask"] = _attention_mask(module, rows, causal)
    if accepts(module, "use_cache"):
        arguments["use_cache"] = False
    if accepts(module, "logits_to_keep"):
        arguments["logits_to_keep"] = rows.keep
    return arguments


def hidden_of_predictions(trunk: nn.Module, rows: ModelRows) -> torch.Tensor:
    """The trunk's last hidden states where response tokens are predicted, one each: (M, H)."""
    hidden = trunk(**forward_arguments(trunk, rows)).last_hidden_state[rows.keep]
    return hidden if rows.index is None else hidden[rows.index]


def visible(
    segments: torch.Tensor, position_ids: torch.Tensor | None = None, window: int | None = None, causal: bool = True
) -> torch.Tensor:
    """Which tokens (last dimension) a token sees, as a mask (R, 1, W, W) bool.

    A token sees the prompt and its own response, `causal` up to itself. A sliding `window` counts positions: a
    response's first token is next to the prompt's last one wherever it stands.
    """
    own, other = segments.unsqueeze(-1), segments.unsqueeze(-2)
    seen = (other == PROMPT) | (other == own)
    if causal:
        seen = seen.tril()
    if window is not None:
        seen &= position_ids.unsqueeze(-1) - position_ids.unsqueeze(-2) < window
    return seen.unsqueeze(1)


def kernel_mask(seen: torch.Tensor, kernel: str, dtype: torch.dtype) -> torch.Tensor:
    """A mask of `visible` in the form that an attention kernel takes: eager attention adds it to the logits."""
    if kernel == "sdpa":
        return seen
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def why_not_shared(model: nn.Module, read: Callable[[SequenceBatch, Layout], Any]) -> str:
    """Why `model` cannot read a prompt once for all its responses; empty where it can.

    `read` makes it read a batch. It is asked to read two responses side by side, and one alone. Under ZeRO-3 every rank
    must call this, with the weights as in inference.
    """
    if reason := lacks_for_sharing(model):
        return reason
    trunk = _trunk(model)
    return "" if _reads_apart(trunk, read) else f"{type(trunk).__name__} does not follow a mask of four dimensions"


def lacks_for_sharing(model: nn.Module) -> str:
    """`why_not_shared` as far as the code of `model` shows it, whose weights may be without storage."""
    trunk = _trunk(model)
    config = trunk.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    if config._attn_implementation not in MASKED_KERNELS:
        return f"{config._attn_implementation} takes no mask (--attn_implementation sdpa does)"
    if not accepts(trunk, "position_ids"):
        return f"{type(trunk).__name__} takes no positions"
    if kinds:
        return f"{type(trunk).__name__} has layers of the kind {', '.join(sorted(kinds))}"
    return ""


def _trunk(model: nn.Module) -> nn.Module:
    return without_wrapper(model).base_model.get_decoder()


@torch.no_grad()
def _reads_apart(trunk: nn.Module, read: Callable[[SequenceBatch, Layout], Any]) -> bool:
    """Whether a response's hidden states are the same beside another response, whatever that is, and alone."""
    limit = min(8, trunk.config.get_text_config().vocab_size)
    prompt, first, second, third = ([(start + step) % limit for step in range(3)] for start in (0, 2, 4, 5))
    seen: list[torch.Tensor] = []
    hook = trunk.register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state[0, -3:]))
    try:
        for responses, layout in (([second, first], "shared"), ([third, first], "shared"), ([first], "padded")):
            prompts = [prompt] * len(responses)
            read(pad_sequences(prompts, responses, 0, trunk.device, samples=len(responses)), layout)
    finally:
        hook.remove()
    beside, beside_other, alone = (hidden.float() for hidden in seen)
    tolerance = (1e-3 if trunk.dtype == torch.float32 else 0.05) * float(alone.abs().max())
    return torch.equal(beside, beside_other) and torch.allclose(beside, alone, rtol=0, atol=tolerance)


def _attention_mask(module: nn.Module, rows: ModelRows, causal: bool) -> Any:
    """The mask of the shared layout in the form that the model's kernel takes.

    One for each kind of layer where a model has layers with a sliding window and layers without.
    """
    inner = without_wrapper(module)
    config = inner.config.get_text_config()
    windows = _windows(config, rows.positions)
    masks = {window: _in_form(inner, rows, window, causal) for window in set(windows.values())}
    if len(masks) == 1:
        return masks.popitem()[1]
    return {kind: masks[window] for kind, window in windows.items()}


def _windows(config: PretrainedConfig, positions: int) -> dict[str, int | None]:
    """The sliding window of each kind of layer, None where a layer sees all of `positions` positions."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [SLIDING if window else FULL])
    if window is not None and window >= positions:
        window = None
    return {kind: window if kind == SLIDING else None for kind in kinds}


def _in_form(inner: nn.Module, rows: ModelRows, window: int | None, causal: bool) -> Any:
    kernel = inner.config.get_text_config()._attn_implementation
    if kernel == "flex_attention":
        return _block_mask(rows.segments, rows.position_ids, window, causal)
    seen = visible(rows.segments, rows.position_ids, window, causal)
    return kernel_mask(seen, kernel, next(inner.parameters()).dtype)


def _block_mask(segments: torch.Tensor, position_ids: torch.Tensor, window: int | None, causal: bool) -> Any:
    """`visible` as FlexAttention's block mask, which skips blocks that no token sees."""

    def sees(row: torch.Tensor, _: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = (segments[row, key] == PROMPT) | (segments[row, key] == segments[row, query])
        if causal:
            seen = seen & (key <= query)
        if window is not None:
            seen = seen & (position_ids[row, query] - position_ids[row, key] < window)
        return seen

    count, width = segments.shape
    return create_block_mask(sees, count, None, width, width, device=segments.device)


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether the model's forward names `argument`; a peft wrapper passes on to the model inside."""
    return argument in inspect.signature(without_wrapper(module).forward).parameters


def without_wrapper(module: nn.Module) -> nn.Module:
    """The model itself where peft wraps it; adapters live inside its layers."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module
