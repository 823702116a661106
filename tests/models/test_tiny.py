"""The tiny base model: its tokenizer holds any text, and the same seed gives the same model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from common.config import ModelOptions
from common.data.prompts import PromptBuilder
from common.data.records import Event, Example
from common.errors import InputError
from common.files import write_jsonl
from common.models.loading import check_vocabulary, load_causal_lm, load_tokenizer
from common.models.tiny import TinyModelConfig, main, tiny_llama, train_tokenizer, training_texts
from tests.unicode_texts import texts

QUERIES = ["red running shoes", "shoes for running", "北京 天气 预报", "поиск обуви", "crème brûlée recipe"]


def examples() -> list[Example]:
    """One invented user a query."""
    return [
        Example(f"e{i}", f"u{i}", f"u{i}", "invented", "train", (Event("search", query=query),), (query, "shoes"))
        for i, query in enumerate(QUERIES)
    ]


@settings(max_examples=50, deadline=None)
@given(texts())
def test_any_text_round_trips(text):
    tokenizer = train_tokenizer(QUERIES, 300)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_training_texts_are_what_step_1_shows():
    config = TinyModelConfig()
    tokenizer = train_tokenizer(training_texts(examples(), "compact", 2), config.vocab_size)
    builder = PromptBuilder(tokenizer, "compact", max_prompt_tokens=100, num_queries=2)
    found = list(training_texts(examples(), "compact", 2))
    expected = [text for e in examples() for text in (builder.text(e.history), builder.response_text(e.targets))]
    assert found == expected
    assert len(tokenizer) < config.vocab_size, "a small log fills less than the vocabulary asked for"
    assert tokenizer.tokenize(" running") == ["Ġrunning"], "a word that repeats becomes one token"


def test_no_bos_and_a_pad_token_of_its_own():
    tokenizer = train_tokenizer(QUERIES, 300)
    assert tokenizer.bos_token is None
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.eos_token_id not in tokenizer("red shoes")["input_ids"]


def test_the_command_makes_a_folder_that_loads_and_the_seed_decides(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "data" / "train.jsonl", (example.to_dict() for example in examples()))

    def make(name, *flags):
        path = str(tmp_path / name)
        monkeypatch.setattr(
            "sys.argv", ["tiny", f"--data_dir={tmp_path / 'data'}", f"--output_dir={path}", "--num_queries=2",
                         "--hidden_size=16", "--num_heads=2", *flags],
        )  # fmt: skip
        main()
        tokenizer, model = load_tokenizer(path), load_causal_lm(path, ModelOptions())
        check_vocabulary(model, tokenizer)
        return model

    first, again, other = make("a"), make("b"), make("c", "--seed=1")
    weights = first.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in again.state_dict().items())
    assert not torch.equal(weights["model.embed_tokens.weight"], other.state_dict()["model.embed_tokens.weight"])
    assert first.lm_head.weight is first.model.embed_tokens.weight
    with pytest.raises(InputError, match="there already; add --overwrite"):
        make("a")
    make("a", "--overwrite")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab_size=200"], "need at least 258"),
        (["--hidden_size=30", "--num_heads=4"], "multiple of twice --num_heads"),
        (["--data_dir="], "give --data_dir and --output_dir"),
    ],
)
def test_settings_that_cannot_work(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr("sys.argv", ["tiny", "--data_dir=d", f"--output_dir={tmp_path / 'm'}", *flags])
    with pytest.raises(InputError, match=message):
        main()


def test_size_of_the_default_model():
    """The size that the embedded run is timed with: vocabulary 1800, width 128, two layers."""
    config = TinyModelConfig()
    tokenizer = train_tokenizer(QUERIES, 300)
    model = tiny_llama(config, tokenizer)
    width, inner = 128, 341
    layer = 4 * width * width + 3 * width * inner + 2 * width
    assert model.num_parameters() == len(tokenizer) * width + 2 * layer + width
