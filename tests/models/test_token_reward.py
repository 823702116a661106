from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForTokenClassification, OPTConfig, OPTForCausalLM

from common.alignment import NO_LINE, pool_token_scores
from common.config import ModelOptions
from common.data.records import Event
from common.errors import InputError
from common.models.loading import load_fast_tokenizer
from common.models.reward_encoder import RewardEncoder
from common.models.reward_losses import expected_score
from common.models.token_reward import (
    SETTINGS_NAME,
    TokenRewardModel,
    load_token_reward_model,
    load_token_reward_scorer,
    query_index,
    save_token_reward_model,
)
from common.text import split_queries, split_words
from tests.models.reward_fixtures import EAGER, HISTORY, INPUTS, SDPA, save_tiny, tiny
from tests.unicode_texts import texts

FAMILIES = ["bert", "roberta", "longformer", "llama", "gpt2"]
RESPONSES = ["running shoes sale\nwi-fi routers", "café", "best boots near me\n\nbest recipe 北京"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny(kind, root / kind) for kind in [*FAMILIES, "mistral"]}


def encoder_of(kind: str, **changes: object) -> RewardEncoder:
    model, tokenizer = tiny(kind)
    return RewardEncoder(tokenizer, replace(INPUTS, **changes), model)


# Reading both ways.


def earlier_logits_change(path: str, options: ModelOptions, bidirectional: bool, padded: bool) -> bool:
    """Whether another last token changes what the model says of the tokens before it."""
    model = load_token_reward_model(path, options, bidirectional).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
    mask = torch.ones_like(ids)
    if padded:
        ids = torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], dim=1)
        mask = torch.cat([mask, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    changed = ids.clone()
    changed[:, 5] = 20
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits[:, :5]
        after = model(input_ids=changed, attention_mask=mask).logits[:, :5]
    return bool((before - after).abs().max() > 1e-6)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("options", [SDPA, EAGER], ids=["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_bidirectional_decoder_reads_later_tokens(
    folders: dict[str, str], kind: str, options: ModelOptions, padded: bool
) -> None:
    assert earlier_logits_change(folders[kind], options, bidirectional=True, padded=padded)
    assert not earlier_logits_change(folders[kind], options, bidirectional=False, padded=padded)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_padding_is_not_read(folders: dict[str, str], kind: str) -> None:
    model = load_token_reward_model(folders[kind], SDPA, bidirectional=True).eval()
    ids, padding = torch.tensor([[5, 6, 7, 8, 9, 10]]), torch.tensor([[1, 1, 1]])
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        mask = torch.tensor([[1] * 6 + [0] * 3])
        padded = model(input_ids=torch.cat([ids, padding], 1), attention_mask=mask).logits[:, :6]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [SDPA, EAGER], ids=["sdpa", "eager"])
def test_reading_both_ways_survives_save_and_load(
    folders: dict[str, str], tmp_path: Path, options: ModelOptions
) -> None:
    model = load_token_reward_model(folders["llama"], options, bidirectional=True)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["is_causal"] is False
    assert earlier_logits_change(str(tmp_path), options, bidirectional=False, padded=True)
    # Kernels that ask the module (flash attention) must hear the same.
    loaded = load_token_reward_model(str(tmp_path), options)
    assert not any(getattr(module, "is_causal", False) for module in loaded.modules())


@pytest.mark.parametrize("kind", ["bert", "roberta", "longformer"])
def test_bidirectional_is_refused_for_encoders(folders: dict[str, str], kind: str) -> None:
    with pytest.raises(InputError, match="no causal attention that could be switched off"):
        load_token_reward_model(folders[kind], EAGER, bidirectional=True)


# Loading.


def test_a_language_model_keeps_its_trunk_and_gets_a_head(folders: dict[str, str]) -> None:
    model = load_token_reward_model(folders["llama"], SDPA)
    source, _ = tiny("llama")
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight, source.model.layers[0].mlp.up_proj.weight)
    assert model.score.weight.shape == (3, 16)
    assert model.config.id2label == {0: "irrelevant", 1: "relevant", 2: "very relevant"}


def test_a_head_of_other_classes_gives_way(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=9)
    source = BertForTokenClassification(config)
    source.save_pretrained(tmp_path)
    model = load_token_reward_model(str(tmp_path), EAGER)
    assert model.classifier.weight.shape == (3, 16)
    torch.testing.assert_close(model.get_input_embeddings().weight, source.get_input_embeddings().weight)


def test_unusable_models_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="scaled_dot_product_attention"):
        load_token_reward_model(folders["longformer"], SDPA)
    with pytest.raises(InputError, match="cannot load a token classifier"):
        load_token_reward_model(str(tmp_path / "nothing"), SDPA)
    with pytest.raises(InputError, match="needs a CUDA GPU"):
        load_token_reward_model(folders["llama"], ModelOptions(attn_implementation="flash_attention_2"))
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    OPTForCausalLM(OPTConfig(vocab_size=30, word_embed_proj_dim=16, **sizes)).save_pretrained(tmp_path / "opt")
    with pytest.raises(InputError, match=r"cannot load a token classifier .*OPTConfig"):
        load_token_reward_model(str(tmp_path / "opt"), SDPA)


def test_a_random_trunk_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    model = load_token_reward_model(folders["bert"], EAGER)
    partial = {key: value for key, value in model.state_dict().items() if "layer.1" not in key}
    model.save_pretrained(tmp_path, state_dict=partial)
    with pytest.raises(InputError, match=r"weights are missing.*bert\.encoder\.layer\.1"):
        load_token_reward_model(str(tmp_path), EAGER)


# Inputs.


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_word_of_a_response_has_its_own_tokens(kind: str) -> None:
    encoder = encoder_of(kind)
    response = "Best running shoes!\ncafé, wi-fi"
    encoded = encoder.encode(HISTORY, response)
    ids = encoded.tokens.input_ids
    assert encoded.words == split_words(response)
    covered = {word.text: set() for word in encoded.words}
    for word in encoded.words:
        for start, end in encoded.spans:
            covered[word.text] |= set(range(max(word.start, int(start)), min(word.end, int(end))))
        assert covered[word.text] == set(range(word.start, word.end))
    index = query_index(encoded)
    text = encoder.tokenizer.decode(ids[: encoded.tokens.in_response.argmax()].tolist(), skip_special_tokens=True)
    assert "running shoes for flat feet" in text.lower()
    first = int(encoded.tokens.in_response.argmax())
    assert set(index[:first]) == {NO_LINE}
    assert [line for line in index if line != NO_LINE] == sorted(line for line in index if line != NO_LINE)
    assert set(index) == {NO_LINE, 0, 1}


@pytest.mark.parametrize("kind", FAMILIES)
def test_history_and_response_are_parted(kind: str) -> None:
    """By a separator of the tokenizer, or else by the line break that ends the history."""
    encoder = encoder_of(kind)
    encoded = encoder.encode(HISTORY, "best shoes")
    first = int(encoded.tokens.in_response.argmax())
    before = encoder.tokenizer.convert_ids_to_tokens(int(encoded.tokens.input_ids[first - 1]))
    assert before in {"bert": "[SEP]", "llama": "<s>"}.get(kind, "Ċ")


def test_a_template_without_a_last_line_break_gets_one_within_the_budget(tmp_path: Path) -> None:
    template = tmp_path / "bare.jinja"
    template.write_text("{% for event in events %}{{ event.text }} {% endfor %}next:")
    history = [Event("search", query="shoes") for _ in range(40)]
    lengths = set()
    for budget in range(20, 30):
        encoder = encoder_of("gpt2", prompt_template=str(template), max_prompt_tokens=budget)
        encoded = encoder.encode(history, "best shoes")
        first = int(encoded.tokens.in_response.argmax())
        assert encoder.tokenizer.decode(encoded.tokens.input_ids[:first].tolist()).endswith("next:\n")
        lengths.add(budget - first)
    assert min(lengths) == 0  # a budget that is used up to the last token


@pytest.mark.parametrize("kind", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(queries=st.lists(texts(), max_size=20), response=texts())
def test_history_and_response_always_fit(kind: str, queries: list[str], response: str) -> None:
    encoder = encoder_of(kind, max_prompt_tokens=80, max_response_tokens=12)
    history = [Event("search", query=query or "a") for query in [*queries, "shoes"]]
    encoded = encoder.encode(history, response)
    assert len(encoded.tokens.input_ids) <= encoder.max_tokens
    assert encoded.tokens.in_response.sum() <= 12
    full = encoder.tokenizer(response, add_special_tokens=False)["input_ids"]
    assert encoded.dropped_tokens + encoded.tokens.in_response.sum() == len(full)
    assert len(encoded.spans) == len(encoded.tokens.input_ids)


def test_a_long_response_is_cut_and_counted() -> None:
    encoder = encoder_of("bert", max_response_tokens=3)
    encoded = encoder.encode(HISTORY, "best running shoes for feet")
    whole = encoder_of("bert").encode(HISTORY, "best running shoes for feet")
    assert encoded.dropped_tokens == whole.tokens.in_response.sum() - 3
    assert encoder.tokenizer.convert_ids_to_tokens(encoded.tokens.input_ids[-4:].tolist()) == [
        "best", "running", "shoes", "[SEP]",
    ]  # fmt: skip
    pooled = pool_token_scores(encoded.words, [1.0] * len(encoded.spans), encoded.spans, missing=-1.0)
    assert pooled == [1.0, 1.0, 1.0, -1.0, -1.0]


def test_batches_are_padded_by_length_and_hold_what_the_model_takes() -> None:
    bert, llama, longformer = encoder_of("bert"), encoder_of("llama"), encoder_of("longformer")
    for encoder, extra in ((bert, "token_type_ids"), (llama, None), (longformer, "global_attention_mask")):
        items = [encoder.encode(HISTORY, response) for response in RESPONSES]
        batch = encoder.collate([item.tokens for item in items])
        assert set(batch) == {"input_ids", "attention_mask", extra} - {None}
        lengths = [len(item.tokens.input_ids) for item in items]
        assert batch["attention_mask"].sum(1).tolist() == lengths
        assert batch["input_ids"].shape == (3, max(lengths))
        for row, item in zip(batch["input_ids"], items, strict=True):
            assert np.array_equal(row[: len(item.tokens.input_ids)], item.tokens.input_ids)
            assert set(row[len(item.tokens.input_ids) :].tolist()) <= {encoder.tokenizer.pad_token_id}
        if extra == "global_attention_mask":
            for row, item in zip(batch[extra], items, strict=True):
                assert row[: len(item.spans)].tolist() == [end > start for start, end in item.spans]
                assert not row[len(item.spans) :].any()
        if extra == "token_type_ids":
            first = int(items[0].tokens.in_response.argmax())
            assert batch[extra][0, :first].tolist() == [0] * first
            assert batch[extra][0, first] == 1


def test_unusable_tokenizers_and_limits_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    model, tokenizer = tiny("roberta")
    RewardEncoder(tokenizer, replace(INPUTS, max_prompt_tokens=144), model)  # 192 positions, two of 194 are unused
    with pytest.raises(InputError, match="193 tokens, but the reward model has 192 positions"):
        RewardEncoder(tokenizer, replace(INPUTS, max_prompt_tokens=145), model)
    model, tokenizer = tiny("llama")
    tokenizer = load_fast_tokenizer(folders["llama"])
    tokenizer.add_tokens(["onemoreword"])
    with pytest.raises(InputError, match="do not belong together"):
        RewardEncoder(tokenizer, INPUTS, model)
    tokenizer = load_fast_tokenizer(folders["llama"])
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match="no pad and no EOS token"):
        RewardEncoder(tokenizer, INPUTS, model)
    with pytest.raises(InputError, match="cannot load a tokenizer"):
        load_fast_tokenizer(str(tmp_path))


# Scores.


@pytest.mark.parametrize("kind", FAMILIES)
def test_scores_equal_those_of_one_response_at_a_time(folders: dict[str, str], kind: str) -> None:
    """Padding changes nothing, and word and sentence scores are what a plain reading of the logits gives."""
    model = load_token_reward_model(folders[kind], EAGER).eval()
    encoder = encoder_of(kind)
    scores = TokenRewardModel(model, encoder).score([HISTORY] * 3, RESPONSES)
    assert scores.missing == 0
    for response, words, queries in zip(RESPONSES, scores.words, scores.queries, strict=True):
        encoded = encoder.encode(HISTORY, response)
        with torch.no_grad():
            logits = model(**encoder.collate([encoded.tokens])).logits[0]
        columns = (expected_score(logits), *logits.softmax(-1).T[:2])
        expected, irrelevant, relevant = (column.tolist() for column in columns)
        fit, only_relevant = ([float(bool(line)) for line in split_queries(response)] for _ in range(2))
        for word, score in zip(split_words(response), words, strict=True):
            shared = [max(0, min(word.end, end) - max(word.start, start)) for start, end in encoded.spans]
            mean, p_0, p_1 = (np.dot(shared, column) / sum(shared) for column in (expected, irrelevant, relevant))
            assert score == pytest.approx(mean, abs=1e-5)
            fit[word.line] *= 1 - p_0
            only_relevant[word.line] *= p_1
        assert queries == pytest.approx([a - b for a, b in zip(fit, only_relevant, strict=True)], abs=1e-5)


def test_scores_of_a_sentence_level_model(folders: dict[str, str], tmp_path: Path) -> None:
    """Queries from its output, each word's from its query's."""
    model = load_token_reward_model(folders["llama"], SDPA, bidirectional=True, heads="sentence").eval()
    tokenizer = load_fast_tokenizer(folders["llama"])
    encoder = RewardEncoder(tokenizer, INPUTS, model)
    scores = TokenRewardModel(model, encoder).score([HISTORY] * 3, RESPONSES)
    for response, words, queries in zip(RESPONSES, scores.words, scores.queries, strict=True):
        encoded = encoder.encode(HISTORY, response)
        with torch.no_grad():
            logits = model(**encoder.collate([encoded.tokens])).logits[0]
        index = np.array(query_index(encoded))
        for line, score in enumerate(queries):
            tokens = np.flatnonzero(index == line)
            plain = torch.sigmoid(logits[tokens, -1].mean()).item() if len(tokens) else 0.0
            assert score == pytest.approx(plain, abs=1e-5)
        for word, score in zip(split_words(response), words, strict=True):
            assert score == pytest.approx(2 * queries[word.line], abs=1e-5)
    facts = {"heads": "sentence", "class_weights": [0.5, 1.0, 1.5]}
    save_token_reward_model(tmp_path / "model", model, tokenizer, INPUTS, facts)
    loaded = load_token_reward_scorer(str(tmp_path / "model"), SDPA).score([HISTORY] * 3, RESPONSES)
    assert loaded.queries == [pytest.approx(queries, abs=1e-6) for queries in scores.queries]
    assert loaded.words == [pytest.approx(words, abs=1e-6) for words in scores.words]


def test_one_forward_call_a_batch_and_missing_words_are_counted(folders: dict[str, str]) -> None:
    model = load_token_reward_model(folders["bert"], EAGER)
    calls: list[torch.Size] = []
    model.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True)
    scorer = TokenRewardModel(model, encoder_of("bert", max_response_tokens=2))
    scores = scorer.score([HISTORY] * 3, ["best running shoes", "", "shoes"])
    assert len(calls) == 1
    assert [len(words) for words in scores.words] == [3, 0, 1]
    assert scores.words[0][2] == 0.0
    assert scores.missing == 1
    assert scores.queries[1] == []
    assert not model.training
    assert scorer.score([HISTORY], ["shoes"]).words == [pytest.approx(scores.words[2], abs=1e-5)]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_a_causal_model_reads_a_history_once_for_all_its_responses(folders: dict[str, str], kind: str) -> None:
    model = load_token_reward_model(folders[kind], SDPA).eval()
    scorer = TokenRewardModel(model, RewardEncoder(load_fast_tokenizer(folders[kind]), INPUTS, model))
    histories = [HISTORY, HISTORY[:1], HISTORY, HISTORY, HISTORY[:1]]
    responses = [*RESPONSES[:3], "", "best running shoes"]
    plain = scorer.score(histories, responses)
    read: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    scorer.shares_prompts = True
    shared = scorer.score(histories, responses)
    assert shared.words == [pytest.approx(words, abs=1e-5) for words in plain.words]
    assert shared.queries == [pytest.approx(queries, abs=1e-5) for queries in plain.queries]
    assert shared.missing == plain.missing
    scorer.shares_prompts = False
    scorer.score(histories, responses)
    assert read[0] < 0.8 * read[1]


def test_saved_and_loaded_scorer_gives_the_same_scores(folders: dict[str, str], tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{% for event in events %}* {{ event.text }}\n{% endfor %}")
    inputs = replace(INPUTS, prompt_template=str(template))
    model = load_token_reward_model(folders["llama"], SDPA, bidirectional=True)
    tokenizer = load_fast_tokenizer(folders["llama"])
    before = TokenRewardModel(model, RewardEncoder(tokenizer, inputs, model)).score([HISTORY] * 3, RESPONSES)
    save_token_reward_model(tmp_path / "model", model, tokenizer, inputs, {"w": 0.5})
    template.unlink()  # the folder stands alone
    settings_saved = json.loads((tmp_path / "model" / SETTINGS_NAME).read_text())
    assert settings_saved == {"inputs": asdict(inputs) | {"prompt_template": "prompt_template.jinja"}, "w": 0.5}
    loaded = load_token_reward_scorer(str(tmp_path / "model"), SDPA).score([HISTORY] * 3, RESPONSES)
    assert loaded.words == [pytest.approx(words, abs=1e-6) for words in before.words]
    assert loaded.queries == [pytest.approx(queries, abs=1e-6) for queries in before.queries]


def test_a_folder_of_another_kind_is_no_scorer(folders: dict[str, str]) -> None:
    with pytest.raises(InputError, match="no token reward model"):
        load_token_reward_scorer(folders["llama"], SDPA)
