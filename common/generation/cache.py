"""Keys and values of rows that are at different places: what `DynamicCache` cannot hold.

A row's token at position i stands in column i, so that nothing needs padding on the left: a block of prompts is padded
on the right, where causal attention never looks, and columns past a row's position are masked while it decodes and
overwritten as it grows.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class RowCache(Cache):
    """A slab of `rows` x `columns` for each layer, made when the layer first writes.

    A forward pass either reads a block of new prompts (`begin_prompts`) or one token for each of the first rows
    (`begin_tokens`); transformers' models then call `update` once a layer.
    """

    def __init__(self, num_layers: int, rows: int, columns: int) -> None:
        super().__init__(layers=[_RowLayer(rows, columns) for _ in range(num_layers)])

    def begin_prompts(self, first_row: int, copies: int) -> None:
        """The next pass reads prompts: prompt b goes to `copies` rows from `first_row + b * copies` on."""
        for layer in self.layers:
            layer.write = _PromptWrite(first_row, copies)

    def begin_tokens(self, positions: torch.Tensor, width: int) -> None:
        """The next pass reads a token at `positions` (A,) for each of the first A rows; attention sees `width`
        columns."""
        for layer in self.layers:
            layer.write = _TokenWrite(torch.arange(len(positions), device=positions.device), positions, width)

    def move(self, sources: list[int], targets: list[int], width: int) -> None:
        """Copy the first `width` columns of rows `sources` to rows `targets`; no row may be in both."""
        for layer in self.layers:
            if layer.is_initialized:
                for slab in (layer.keys, layer.values):
                    slab[targets, :, :width] = slab[sources, :, :width]


class _PromptWrite:
    def __init__(self, first_row: int, copies: int) -> None:
        self._first_row = first_row
        self._copies = copies

    def __call__(self, slab: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        rows, length = len(states) * self._copies, states.shape[2]
        slab[self._first_row : self._first_row + rows, :, :length] = states.repeat_interleave(self._copies, dim=0)
        return states  # a prompt attends to itself alone


class _TokenWrite:
    def __init__(self, rows: torch.Tensor, positions: torch.Tensor, width: int) -> None:
        self._rows = rows
        self._positions = positions
        self._width = width

    def __call__(self, slab: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        slab[self._rows, :, self._positions] = states[:, :, 0]
        return slab[: len(self._rows), :, : self._width]


class _RowLayer(CacheLayerMixin):
    """One layer's slabs, (rows, heads, columns, head size)."""

    is_sliding = False

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self._shape = (rows, columns)
        self.write: _PromptWrite | _TokenWrite | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Zeros, not whatever the memory held: a masked NaN would still spoil a sum."""
        rows, columns = self._shape
        self.keys, self.values = (
            states.new_zeros(rows, states.shape[1], columns, states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep what a pass computed; returns what its queries attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.write is not None, "begin_prompts or begin_tokens comes first"
        return self.write(self.keys, key_states), self.write(self.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of a block of prompts: plain causal attention. Passes over tokens bring their own mask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0: positions are always given."""
        return 0

    def get_max_length(self) -> int:
        """Columns."""
        return self._shape[1]
