"""What a model's passes hold and compute, found by running its real code on tensors without storage (device "meta").

No formula per architecture: the model's own forward, and autograd's backward, run operation by operation. Each storage
is counted from when an operation makes it until Python and autograd have let go of it, and each matrix product by
torch's own table of floating-point operations.
"""

from __future__ import annotations

import weakref
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten


class PassTracker(TorchDispatchMode):
    """Counts, while entered, the bytes that operations have made and that are still held (`held`, at most `peak`) and
    floating-point operations (`flops`).

    Tensors from before it was entered, such as weights, do not count. `selected` is how many entries a boolean mask
    selects, which a tensor without storage cannot tell; nor can it what models ask of a batch in order to go without a
    mask, whether every token is real and every row one sequence: yes, unless `padded`.
    """

    def __init__(self, selected: int = 0, padded: bool = False) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.flops = 0.0
        self._selected = selected
        self._padded = padded
        self._alive: dict[int, weakref.ref] = {}
        self._kernel = functional.scaled_dot_product_attention

    def __enter__(self) -> Self:
        # A function mode would be off in the backward pass, where checkpointing runs the forward again.
        functional.scaled_dot_product_attention = self._attend
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        functional.scaled_dot_product_attention = self._kernel

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run `func` on tensors without storage, and count what it makes."""
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default and args[0].is_meta:
            return not self._padded
        for tensor in tree_iter((args, kwargs)):
            self._meet(tensor, counts=False)
        if func is _aten.index.Tensor:
            args = (args[0], [places for index in args[1] for places in self._without_mask(index)])
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        for tensor in tree_iter(out):
            self._meet(tensor, counts=True)
        return out

    def _meet(self, value: Any, counts: bool) -> None:
        """Know a tensor's storage from now on; if it is new and an operation made it (`counts`), it is held."""
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key, size = id(storage), storage.nbytes() if counts else 0
        if key in self._alive:
            return

        def gone(_: weakref.ref) -> None:
            del self._alive[key]
            self.held -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.held += size
        self.peak = max(self.peak, self.held)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **_: Any,
    ) -> Tensor:
        """Scaled dot-product attention as fused kernels hold it: see `_Attention`."""
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = attn_mask.to(query.dtype)  # kernels add it to the logits
        # Of the queries (..., L, E) with keys (S, E) and of their weights with values; half of them if causal.
        products = 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return _Attention.apply(query, key, value, attn_mask, self, products / 2 if is_causal else products)

    def _without_mask(self, index: Tensor | None) -> list[Tensor | None]:
        """An index as it is; a boolean mask as the whole numbers, one list for each of its dimensions."""
        if index is None or index.dtype != torch.bool:
            return [index]
        return [torch.empty(self._selected, dtype=torch.long, device="meta") for _ in range(index.dim())]


class _Attention(torch.autograd.Function):
    """Keeps queries, keys, values, the output and one sum for each query, never the logits."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, tracker: PassTracker, products: float
    ) -> Tensor:
        *batch, heads, queries, _ = query.shape
        output = query.new_empty(*batch, queries, heads, value.shape[-1]).transpose(-3, -2)  # as kernels lay it out
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, output, sums)
        ctx.tracker, ctx.products = tracker, products
        tracker.flops += products
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        ctx.tracker.flops += 2.5 * ctx.products  # logits again, then the gradients of both products
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None, None
