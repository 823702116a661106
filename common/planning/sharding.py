"""What DeepSpeed holds of a model on each rank, from its own settings: see `Sharding`.

Sources are in deepspeed 0.19: `runtime/zero/stage3.py`, `stage_1_and_2.py`, `partitioned_param_coordinator.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

from common.planning.models import Weights
from common.planning.tracking import PassTracker

MASTER = 4  # bytes of an fp32 master weight
MOMENTS = 8  # bytes of Adam's two


@dataclass(frozen=True)
class Sharding:
    """`zero` are the settings of ZeRO with DeepSpeed's own defaults, `ranks` all GPUs; all methods give bytes a rank.

    On `cuda` buffers take their whole size; on CPU ranks only what has been written to takes memory, and what is
    offloaded to the host stays where it was.
    """

    zero: DeepSpeedZeroConfig
    ranks: int
    cuda: bool

    @classmethod
    def of(cls, ds_config: dict[str, Any], ranks: int, cuda: bool) -> Sharding:
        """From DeepSpeed's JSON (its `auto` values count as defaults)."""
        return cls(DeepSpeedZeroConfig(**ds_config.get("zero_optimization", {})), ranks, cuda)

    @property
    def shards_weights(self) -> bool:
        """ZeRO-3."""
        return int(self.zero.stage) == 3

    def weights(self, model: Weights) -> int:
        """Of parameters, at rest: a shard of each, the smallest of them whole as well."""
        if not self.shards_weights:
            return model.total * model.itemsize
        sizes = (*model.trained, *model.frozen)
        shards = 0 if self._on_host(self.zero.offload_param) else sum(map(self._shard, sizes))
        persistent = sum(size for size in sizes if self._persists(size)) if self.ranks > 1 else 0
        return (shards + persistent) * model.itemsize

    def masters(self, model: Weights) -> int:
        """Of fp32 master weights, which ZeRO makes also of fp32 weights."""
        needed = int(self.zero.stage) > 0 or model.itemsize < MASTER
        return MASTER * self.owned(model) if needed and not self._on_host(self.zero.offload_optimizer) else 0

    def optimizer(self, model: Weights) -> int:
        """Of fp32 master weights and Adam's moments, which the first step makes."""
        moments = 0 if self._on_host(self.zero.offload_optimizer) else MOMENTS * self.owned(model)
        return self.masters(model) + moments

    def gradients(self, model: Weights) -> int:
        """Of gradients, from one micro-batch to the next."""
        if self._on_host(self.zero.offload_optimizer):
            return 0
        whole = sum(model.trained) if int(self.zero.stage) < 2 else self.owned(model)
        return whole * model.itemsize

    def buckets(self, model: Weights) -> int:
        """Of the buffer that gradients wait in to be reduced."""
        return self._bucket(model) * model.itemsize if self.cuda else self._filled(model) * model.itemsize

    def reduction(self, model: Weights) -> int:
        """Of the copy of a bucket that is sent."""
        return self._filled(model) * model.itemsize if self.ranks > 1 else 0

    def reduces_early(self, model: Weights) -> bool:
        """Whether buckets fill up while most activations are still there."""
        return sum(model.trained) > self._bucket(model)

    def gathered(self, model: Weights) -> int:
        """That whole weights add to the shards."""
        if not self.shards_weights or self.ranks == 1:
            return 0
        rows = (self._shard(size) * self.ranks for size in (*model.trained, *model.frozen) if not self._persists(size))
        return sum(rows) * model.itemsize

    def live(self, model: Weights, backward: bool) -> int:
        """Of weights that ZeRO-3 holds whole at a time: the module at hand, those that it fetches ahead (twice while
        they arrive), and with a `backward` pass those that come up again soon, which lie around its beginning."""
        if not self.shards_weights or self.ranks == 1:
            return 0
        ahead = min(self.zero.prefetch_bucket_size, model.total)
        kept = self.zero.max_reuse_distance // 2 if backward else 0
        return min(kept + ahead + model.largest_module, self.gathered(model) // model.itemsize) * model.itemsize + (
            ahead * model.itemsize
        )

    def on_file(self, model: Weights) -> int:
        """That reading or writing a model's folder adds: on a GPU the module at hand. Host memory, which is what CPU
        ranks have, holds the whole file, and under ZeRO-3 once more while it is sharded or collected (as measured)."""
        if self.cuda:
            return model.largest_module * model.itemsize if self.shards_weights else 0
        return (2 if self.shards_weights else 1) * model.total * model.itemsize

    def step(self, model: Weights) -> int:
        """Of an optimiser step: the gradient in fp32 and what AdamW computes with, a sub-group at a time."""
        if self._on_host(self.zero.offload_optimizer) or not model.trained:
            return 0
        count = min(self.owned(model), self.zero.sub_group_size) if self.shards_weights else self.owned(model)
        adam = MASTER * count + adam_scratch(self.cuda) * count
        return max(adam, (MASTER + model.itemsize) * count)

    def owned(self, model: Weights) -> int:
        """Elements whose optimiser states are this rank's."""
        return sum(model.trained) if int(self.zero.stage) == 0 else sum(map(self._shard, model.trained))

    def host(self, model: Weights) -> int:
        """Of host memory, for what is offloaded."""
        found = 0
        if self._on_host(self.zero.offload_optimizer):
            found += (MASTER + MOMENTS + MASTER + model.itemsize) * self.owned(model)
        if self._on_host(self.zero.offload_param):
            found += sum(map(self._shard, (*model.trained, *model.frozen))) * model.itemsize
        return found

    def _bucket(self, model: Weights) -> int:
        return self.zero.reduce_bucket_size if int(self.zero.stage) > 0 else 0

    def _filled(self, model: Weights) -> int:
        return min(self.zero.reduce_bucket_size, sum(model.trained))

    def _shard(self, size: int) -> int:
        return -(-size // self.ranks)

    def _persists(self, size: int) -> bool:
        return size <= self.zero.param_persistence_threshold

    def _on_host(self, offload: Any) -> bool:
        return self.cuda and offload is not None and offload.device != OffloadDeviceEnum.none


@lru_cache(maxsize=2)
def adam_scratch(cuda: bool) -> float:
    """Bytes an element that a step of torch's AdamW holds besides weight, gradient and moments; on CUDA it takes the
    kernels for several tensors at once, which write over one copy."""
    weight = torch.nn.Parameter(torch.empty(1000, device="meta"))
    weight.grad = torch.empty_like(weight)
    optimizer = torch.optim.AdamW([weight], foreach=cuda)
    optimizer.step()
    with PassTracker() as tracker:
        optimizer.step()
    return tracker.peak / weight.numel()
