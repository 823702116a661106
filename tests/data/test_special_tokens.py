"""Special tokens of public tokenizers around a prompt: one BOS where the tokenizer uses one, never an EOS at the end.

Each layout is a small stand-in with its family's settings: what it adds before and after a text, prefix spaces, several
special tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.alignment import TokenDecoder
from common.data.prompt_settings import load_prompt_settings, serving_tokenizer
from common.data.prompts import PromptBuilder, added_ids
from common.data.records import Event
from common.models.loading import load_tokenizer, save_model_folder
from tests import tokenizer_factory
from tests.tiny_models import tiny_llama

HISTORY = [Event("search", query="red shoes"), Event("click", title="Best boots"), Event("search", query="北京 ü")]
RESPONSE = "best running shoes\ncafé 北京"
# What a template may do about the marks: write BOS or not, and end the user's turn with EOS whatever the caller wants.
CHATS = {
    "bos": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}",
    "bos_and_eos": "{{ bos_token }}{% for m in messages %}\n  {{ m.content }}{{ eos_token }}{% endfor %}",
    "eos_in_the_middle": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}[assistant]",
}


def with_marks(make: str, before: str, after: str, **attributes: object) -> PreTrainedTokenizerFast:
    """A tokenizer of `tokenizer_factory` whose post-processor puts these special tokens around a text."""
    source = tokenizer_factory.ALL[make]()
    backend = json.loads(source.backend_tokenizer.to_str())
    marks = [mark for mark in (before, after) if mark]
    single = [
        *([{"SpecialToken": {"id": before, "type_id": 0}}] if before else []), {"Sequence": {"id": "A", "type_id": 0}},
        *([{"SpecialToken": {"id": after, "type_id": 0}}] if after else []),
    ]  # fmt: skip
    backend["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            mark: {"id": mark, "ids": [source.convert_tokens_to_ids(mark)], "tokens": [mark]} for mark in marks
        },
    }
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"} | attributes
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), **names)


def flagged(make: str, *, bos: bool, eos: bool) -> PreTrainedTokenizerFast:
    """The marks by the settings `add_bos_token` and `add_eos_token`, as tokenizer_config.json has them."""
    source = tokenizer_factory.ALL[make]()
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(source.backend_tokenizer.to_str()), bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", unk_token="<unk>", add_bos_token=bos, add_eos_token=eos,
    )


LAYOUTS = {
    "llama: prefix space, BOS": (lambda: with_marks("sentencepiece_bpe", "<s>", ""), 1),
    "llama with add_eos_token": (lambda: flagged("sentencepiece_bpe", bos=True, eos=True), 1),
    "add_eos_token alone": (lambda: flagged("sentencepiece_bpe", bos=False, eos=True), 0),
    "byte-level, BOS and EOS": (lambda: flagged("byte_level", bos=True, eos=True), 1),
    "gpt2, qwen: no marks": (lambda: with_marks("byte_level", "", ""), 0),
    "gpt2: BOS is EOS": (lambda: with_marks("byte_level", "", "", bos_token="</s>"), 0),
    "opt: BOS is EOS and stands before": (lambda: with_marks("byte_level", "</s>", "", bos_token="</s>"), 1),
    "roberta, xlm-r": (lambda: with_marks("unigram", "<s>", "</s>"), 1),
    "bert: [CLS] and [SEP] as BOS and EOS": (
        lambda: with_marks(
            "word_piece", "[CLS]", "[SEP]", bos_token="[CLS]", eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
        ), 1,
    ),
    "t5: EOS after, no BOS at all": (lambda: with_marks("unigram", "", "</s>", bos_token=None), 0),
    "several special tokens": (
        lambda: with_marks("byte_level", "<s>", "</s>", extra_special_tokens=["<|user|>", "<|end|>", "addedword"]), 1,
    ),
    "prefix space": (lambda: with_marks("byte_level_prefix_space", "<s>", "</s>"), 1),
}  # fmt: skip


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> tuple[PreTrainedTokenizerFast, int]:
    """A tokenizer, and how many BOS it puts before a text."""
    make, num_bos = LAYOUTS[request.param]
    return make(), num_bos


def check_marks(tokenizer: PreTrainedTokenizerFast, ids: list[int], num_bos: int) -> None:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert len(ids) > 3 and ids[-1] != eos
    assert ids[:num_bos] == [bos] * num_bos
    assert not {bos, eos} & set(ids[num_bos:])


@pytest.mark.parametrize("template", ["plain", "compact", "file"])
def test_a_prompt_has_one_bos_and_no_eos(
    tmp_path: Path, layout: tuple[PreTrainedTokenizerFast, int], template: str
) -> None:
    tokenizer, num_bos = layout
    if template == "file":  # copied from a card that shows the whole text of a prompt, marks included
        bos = tokenizer.bos_token if num_bos else ""
        (tmp_path / "own.jinja").write_text(f"{bos}{{{{ events[0].text }}}} next{tokenizer.eos_token}")
        template = str(tmp_path / "own.jinja")
    builder = PromptBuilder(tokenizer, template, 500, 3)
    ids = builder.ids(HISTORY)
    check_marks(tokenizer, ids, num_bos)
    before, _ = added_ids(tokenizer)
    assert ids == before + tokenizer(builder.text(HISTORY), add_special_tokens=False)["input_ids"]
    length = len(builder.ids(HISTORY[:1]))
    for budget in range(length - 2, length + 1):  # where a text is cut, too
        check_marks(tokenizer, PromptBuilder(tokenizer, template, budget, 3).ids(HISTORY[:1]), num_bos)


@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_has_the_bos_of_its_template_and_no_eos_at_the_end(
    layout: tuple[PreTrainedTokenizerFast, int], chat: str
) -> None:
    tokenizer, _ = layout
    tokenizer.chat_template = CHATS[chat]
    builder = PromptBuilder(tokenizer, "chat", 500, 3)
    ids = builder.ids(HISTORY)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids[-1] != eos
    if bos is not None and bos != eos:
        assert (ids.count(bos), ids[0]) == (1, bos)
    own = tokenizer.apply_chat_template(
        [{"role": "user", "content": builder.text(HISTORY)}], add_generation_prompt=True, return_dict=False
    )
    assert ids == (own[:-1] if chat == "bos_and_eos" else own)


@pytest.mark.parametrize("template", ["plain", "compact", "chat"])
def test_a_folder_and_a_server_ask_alike(
    tmp_path: Path, layout: tuple[PreTrainedTokenizerFast, int], template: str
) -> None:
    tokenizer, _ = layout
    tokenizer.chat_template = CHATS["bos_and_eos"]
    builder = PromptBuilder(tokenizer, template, 500, 3)
    ids = builder.ids(HISTORY)
    request = [{"role": "user", "content": builder.text(HISTORY)}]
    served = serving_tokenizer(builder)
    assert served.apply_chat_template(request, add_generation_prompt=True, return_dict=False) == ids
    folder = save_model_folder(tiny_llama(), tokenizer, tmp_path / "model", {}, prompts=builder)
    assert load_prompt_settings(folder).builder(load_tokenizer(str(folder))).ids(HISTORY) == ids
    saved = AutoTokenizer.from_pretrained(folder)
    assert saved.apply_chat_template(request, add_generation_prompt=True, return_dict=False) == ids


def test_the_decoder_spells_prompt_and_response_without_marks(layout: tuple[PreTrainedTokenizerFast, int]) -> None:
    tokenizer, _ = layout
    decoder = TokenDecoder(tokenizer)
    response = tokenizer(RESPONSE, add_special_tokens=False)["input_ids"]
    prompt = PromptBuilder(tokenizer, "compact", 500, 3).ids(HISTORY)
    for ids in (prompt, response, [*response, tokenizer.eos_token_id], [*prompt, *response, tokenizer.eos_token_id]):
        text, spans = decoder(ids)
        assert text == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert len(spans) == len(ids)
        assert all((end == start) for id_, (start, end) in zip(ids, spans, strict=True)
                   if id_ in tokenizer.all_special_ids)  # fmt: skip
        assert [end for _, end in spans[:-1]] == [start for start, _ in spans[1:]]
        assert (spans[0][0], spans[-1][1]) == (0, len(text))
