"""Tiny exported models: one that knows its answers by heart, and a reward model with random judgement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from common.config import LoraOptions, ModelOptions
from common.data.prompts import PromptBuilder
from common.data.records import Event
from common.models.loading import apply_lora, load_causal_lm, save_model_folder
from common.models.reward_options import RewardInputOptions
from common.models.token_reward import load_token_reward_model, save_token_reward_model
from tests.tiny_models import ordinary_tokenizer, tiny_llama

HISTORIES = [
    (Event("search", query="red hat"), Event("click", query="red hat", title="Hats in red")),
    (Event("search", query="espresso"),),
    (Event("search", query="bicycle"), Event("purchase", title="Bicycle pump"), Event("search", query="repair")),
]
LEARNT = [["blue hat price", "red running shoes"], ["espresso grinder", "best espresso"], ["how to repair", "bicycle"]]
OTHERS = LEARNT[1:] + LEARNT[:1]


def export_learnt_model(folder: Path, *, adapt: Path | None = None) -> Path:
    """A folder as steps 1 and 3 export it, of a model that answers each of `HISTORIES` with its `LEARNT` queries; or,
    with LoRA adapters on the model in `adapt`, with those of the next history (`OTHERS`).
    """
    tokenizer = ordinary_tokenizer()
    builder = PromptBuilder(tokenizer, "compact", max_prompt_tokens=64, num_queries=2)
    model = apply_lora(load_causal_lm(str(adapt), ModelOptions()), LoraOptions(lora_r=16)) if adapt else tiny_llama()
    learn(model, builder, OTHERS if adapt else LEARNT)
    generation = {"max_new_tokens": 32, "do_sample": True, "top_k": 0}
    return save_model_folder(model, tokenizer, folder, generation, prompts=builder)


def learn(model: PreTrainedModel, builder: PromptBuilder, answers: Sequence[Sequence[str]]) -> None:
    """Train until every answer is known by heart."""
    tokenizer = builder.tokenizer
    rows = []
    for history, queries in zip(HISTORIES, answers, strict=True):
        prompt = builder.ids(history)
        answer = [*tokenizer("\n".join(queries))["input_ids"], tokenizer.eos_token_id]
        rows.append((torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(300):
        loss = sum(model(input_ids=ids, labels=labels).loss for ids, labels in rows)
        if loss < 0.05:
            return
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"the tiny model did not learn its answers: loss {loss:.3f}")


def export_reward_model(folder: Path, actor: Path) -> Path:
    """A token reward model with a random head on the trunk of `actor`."""
    torch.manual_seed(3)
    model = load_token_reward_model(str(actor), ModelOptions(), bidirectional=True)
    model.score.weight.data.normal_(std=0.5)
    save_token_reward_model(folder, model, ordinary_tokenizer(), RewardInputOptions("compact", 2, 64, 64), {})
    return folder
