"""The hybrid engine: one actor that trains under ZeRO and generates as a plain model.

Under ZeRO-3 every forward of every layer gathers that layer's weights from all ranks: right for a training step,
ruinous for generation, which runs hundreds of forwards with the same weights. `HybridEngine.inference()` gathers
the weights once, takes DeepSpeed's hooks off, and puts everything back, also after an exception. Without hooks no
rank waits for another, so ranks may stop generating at different lengths.

DeepSpeed's own `unwrap_model_for_generation` (runtime/zero/stage3.py) is the model; ours restores hooks exactly as
they were instead of registering new ones (so the parameter trace stays valid), leaves persistent parameters alone,
and survives exceptions. DeepSpeed's `hybrid_engine.enabled` swaps in CUDA kernels for a few old architectures and
is not used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn
from transformers import PreTrainedTokenizerBase

from common.engine import distributed
from common.engine.adapters import merged_adapters
from common.engine.memory import WeightMode
from common.generation.decode import CountEnded, uncounted
from common.generation.generate import Generated, generate_responses
from common.generation.sampling import Sampling


class HybridEngine:
    """A DeepSpeed engine that can step out of training to generate and score.

    `weights` says how inference sees ZeRO-3 weights: `gathered` (whole on every rank: fast, needs memory for the
    model) or `sharded` (hooks stay on and gather layer by layer: slow, needs memory for one layer; all ranks must
    then make the same number of forward calls). Stages 0 to 2 hold whole weights anyway. `graphs` lets `generate()`
    record its passes on CUDA, unless weights are sharded.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, weights: WeightMode = "gathered") -> None:
        self.engine = engine
        self.weights = weights
        self.graphs = False
        self._inside = False

    @property
    def module(self) -> nn.Module:
        """The wrapped model; call it inside `inference()` only, the engine elsewhere."""
        return self.engine.module

    @property
    def is_sharded_in_inference(self) -> bool:
        """Whether weights are gathered layer by layer, so that all ranks must make the same number of passes."""
        return self.engine.zero_optimization_partition_weights() and self.weights == "sharded"

    @contextmanager
    def inference(self) -> Iterator[nn.Module]:
        """The model in eval mode, without gradients, with weights as `weights` says; restored on leaving.

        Every rank must enter and leave. Weights must not be changed inside. Raises `RuntimeError` when nested.
        """
        if self._inside:
            raise RuntimeError("HybridEngine.inference() is already entered")
        was_training = self.module.training
        self._inside = True
        try:
            with ExitStack() as stack:
                if self.engine.zero_optimization_partition_weights() and self.weights == "gathered":
                    stack.enter_context(gathered_without_hooks(self.engine))
                stack.enter_context(torch.no_grad())
                self.module.eval()
                yield self.module
        finally:
            self.module.train(was_training)
            self._inside = False

    def generate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        rows: int,
        count_ended: CountEnded = uncounted,
    ) -> list[Generated]:
        """This rank's responses to its `prompts`, see `generate_responses`; call it inside `inference()`.

        Adapters are merged meanwhile, unless weights are sharded. Ranks may have different prompts, and as many as they
        like; all must call it. Raises `RuntimeError` outside `inference()`.
        """
        if not self._inside:
            raise RuntimeError("HybridEngine.generate() needs inference() around it")
        if self.is_sharded_in_inference:
            return generate_responses(
                self.module, tokenizer, prompts, sampling, rows, count_ended, any_rank=distributed.true_on_any_rank
            )
        with merged_adapters(self.module):
            return generate_responses(self.module, tokenizer, prompts, sampling, rows, count_ended, graphs=self.graphs)


@contextmanager
def gathered_without_hooks(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """All weights of a ZeRO-3 engine whole on every rank and its hooks off; both undone on leaving."""
    offload = _parameter_offload(engine)
    # A forward pass may have prefetched weights that no one waited for; gathering them twice is an error.
    offload.get_param_coordinator()._clean_inflight_param_registry()
    partitioned = [
        parameter for parameter in engine.module.parameters() if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE
    ]
    with _hooks_removed([offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]), ExitStack() as stack:
        if partitioned:
            stack.enter_context(deepspeed.zero.GatheredParameters(partitioned))
        stack.enter_context(_plain_linear())
        yield


@contextmanager
def _plain_linear() -> Iterator[None]:
    """torch's own linear layer in place of the one that ZeRO-3 puts there for the whole process.

    DeepSpeed's keeps weights from being held by the autograd graph; without gradients it only costs Python time, a
    quarter of what a small model takes to decode (`benchmarks/step3.py`).
    """
    wrapped = torch.nn.functional.linear
    torch.nn.functional.linear = torch._C._nn.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = wrapped


@contextmanager
def _hooks_removed(handles: list[Any]) -> Iterator[None]:
    """Take the hooks of `handles` (torch's RemovableHandle) off their modules, then restore every dict as it was."""
    registries = {id(registry): registry for handle in handles if (registry := handle.hooks_dict_ref()) is not None}
    saved = [(registry, OrderedDict(registry)) for registry in registries.values()]
    for handle in handles:
        registry = handle.hooks_dict_ref()
        if registry is not None:
            registry.pop(handle.id, None)
    try:
        yield
    finally:
        for registry, hooks in saved:
            registry.clear()
            registry.update(hooks)


def _parameter_offload(engine: deepspeed.DeepSpeedEngine) -> Any:
    """The object that owns an engine's ZeRO-3 hooks: a trained engine's optimizer has it, a frozen one's is it."""
    return getattr(engine.optimizer, "parameter_offload", engine.optimizer)
