"""A real OpenAI-compatible server: `transformers serve` with a tiny model that has learnt the answers by heart.

What the stand-in endpoint of the other tests cannot show: that requests are such as a real server takes, and that its
answers are read. The server ignores `response_format`, so the form comes from the prompt alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.data.records import Event
from common.feedback.annotator import Annotation, FeedbackItem, Unlabelled
from common.feedback.llm.prompts import load_template, shown_history, shown_queries
from tests.feedback.endpoint import annotate, options
from tests.transformers_server import transformers_serve

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HISTORY = (Event("search", query="trail shoes"), Event("click", title="Shoes for flat feet"))
LEARNT = {
    "red trail shoes": (
        '{"queries": {"1": {"words": {"1": 0, "2": 2, "3": 2}, "score": 1}}}'
    ),
    "flat feet\nred hat": (
        '{"queries": {"1": {"words": {"1": 2, "2": 2}, "score": 2}, '
        '"2": {"words": {"1": 0, "2": 0}, "score": 0}}}'
    ),
}
LABELS = [Annotation(((0, 2, 2),), (1,)), Annotation(((2, 2), (0, 0)), (2, 0))]


def items() -> list[FeedbackItem]:
    return [FeedbackItem(response, "u", HISTORY, (), response) for response in LEARNT]


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers the two prompts as `LEARNT` says; any other prompt it answers with something."""
    template = load_template("label_words_v1")
    prompts = [
        template.messages(history=shown_history(HISTORY, 50), queries=shown_queries(response)) for response in LEARNT
    ]
    tokenizer = tokenizer_of([message["content"] for prompt in prompts for message in prompt] + list(LEARNT.values()))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = []
    for prompt, answer in zip(prompts, LEARNT.values(), strict=True):
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
        end = tokenizer(answer + "<|end|>", add_special_tokens=False)["input_ids"]
        batch.append((torch.tensor([start + end]), torch.tensor([[-100] * len(start) + end])))
    for _ in range(300):
        loss = sum(model(input_ids=ids, labels=labels).loss for ids, labels in batch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if loss < 0.01:
            break
    assert loss < 0.05, f"the tiny model did not learn its answers: loss {loss:.3f}"
    folder = tmp_path_factory.mktemp("annotator")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with transformers_serve(model_folder, tmp_path_factory.mktemp("server")) as url:
        yield url


def test_labels_from_a_real_server(server: str, model_folder: Path, tmp_path: Path) -> None:
    settings = options(server, model=str(model_folder), timeout=60.0, concurrency=2)
    assert annotate(settings, tmp_path / "answers.jsonl", items()) == LABELS
    stored = (tmp_path / "answers.jsonl").read_text()
    assert '"finish_reason": "stop"' in stored and '"prompt_tokens": 0' not in stored


def test_an_answer_that_is_cut_off_is_no_label(server: str, model_folder: Path, tmp_path: Path) -> None:
    settings = options(server, model=str(model_folder), timeout=60.0, max_answer_tokens=5)
    (result, _) = annotate(settings, tmp_path / "answers.jsonl", items())
    assert isinstance(result, Unlabelled) and "(cut off at 5 tokens)" in result.reason and len(result.replies) == 3
    assert '"finish_reason": "length"' in (tmp_path / "answers.jsonl").read_text()


def test_a_model_that_the_server_does_not_have(server: str, tmp_path: Path) -> None:
    (result, _) = annotate(options(server, model="nobody/nothing", timeout=60.0), tmp_path / "answers.jsonl", items())
    assert isinstance(result, Unlabelled) and "HTTP 400" in result.reason and "nobody/nothing" in result.reason
