"""What an exported folder says of its prompts, to this project and to a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.data.prompt_settings import (
    SETTINGS_NAME,
    TEMPLATE_NAME,
    PromptSettings,
    load_prompt_settings,
    save_prompt_settings,
    serving_tokenizer,
)
from common.data.prompts import PromptBuilder
from common.data.records import EVENT_TYPES, Event
from common.errors import InputError
from common.models.loading import save_model_folder
from tests import tokenizer_factory
from tests.tiny_models import ordinary_tokenizer, tiny_llama
from tests.unicode_texts import texts

CHAT_TEMPLATE = "{% for m in messages %}<s>[{{ m.role }}] {{ m.content | trim }}{% endfor %}{{ '</s>' }}"
HISTORY = [Event("search", query="red hat"), Event("click", title="Hats")]


def space_at_the_start_alone() -> PreTrainedTokenizerFast:
    """Llama 2 without its legacy mode: a space goes before a text, but not before what follows a special token."""
    backend = json.loads(tokenizer_factory.sentencepiece_bpe().backend_tokenizer.to_str())
    backend["normalizer"] = None
    backend["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


TOKENIZERS = {"space_at_the_start_alone": space_at_the_start_alone, **tokenizer_factory.ALL}
BUILT: dict[tuple[str, str], tuple[PromptBuilder, PreTrainedTokenizerBase]] = {}


def built(name: str, template: str) -> tuple[PromptBuilder, PreTrainedTokenizerBase]:
    """A builder with the tokenizer `name`, which brings a chat template of its own, and what would be exported."""
    if (name, template) not in BUILT:
        tokenizer = TOKENIZERS[name]()
        tokenizer.chat_template = CHAT_TEMPLATE
        builder = PromptBuilder(tokenizer, template, 10_000, 3)
        BUILT[name, template] = builder, serving_tokenizer(builder)
        assert tokenizer.chat_template == CHAT_TEMPLATE  # the tokenizer at hand is left alone
    return BUILT[name, template]


def events() -> st.SearchStrategy[list[Event]]:
    event = st.builds(
        lambda kind, text: Event(kind, query=text) if kind == "search" else Event(kind, query=text, title=text),
        st.sampled_from(EVENT_TYPES), texts(),
    )  # fmt: skip
    return st.lists(event, min_size=1, max_size=4)


def served_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize("template", ["plain", "compact", "chat"])
@pytest.mark.parametrize("name", TOKENIZERS)
@given(history=events())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_server_asks_with_the_token_ids_of_training(name: str, template: str, history: list[Event]) -> None:
    builder, served = built(name, template)
    assert served_ids(served, builder.text(history)) == builder.ids(history)


def test_the_tokenizers_of_this_test_differ_in_what_they_need() -> None:
    templates = {name: built(name, "plain")[1].chat_template for name in TOKENIZERS}
    assert "' ') + messages" in templates["space_at_the_start_alone"]
    assert '{{ "" + messages[0].content }}' in templates["byte_level"]
    assert '{{ "<s>" + messages[0].content }}' in templates["unigram"]


def test_anything_but_one_user_message_is_refused() -> None:
    _, served = built("byte_level", "plain")
    for messages in ([("system", "be nice"), ("user", "hat")], [("assistant", "hat")]):
        with pytest.raises(TemplateError, match="one user message"):
            served.apply_chat_template([{"role": role, "content": text} for role, text in messages])


def test_a_tokenizer_that_no_chat_template_can_serve_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = ordinary_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    builder = PromptBuilder(tokenizer, "plain", 400, 3)
    builder.encode = lambda text: [7, *tokenizer(text)["input_ids"]]  # an id that no text spells
    assert serving_tokenizer(builder).chat_template is None
    assert "no chat template gives the prompts" in capsys.readouterr().out


@pytest.mark.parametrize("template", ["plain", "file", "chat"])
def test_a_folder_gives_back_the_builder_that_it_was_written_with(tmp_path: Path, template: str) -> None:
    tokenizer = ordinary_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (tmp_path / "own.jinja").write_text("{% for event in events %}\n* {{ event.text }}\n{% endfor %}\n")
    name = str(tmp_path / "own.jinja") if template == "file" else template
    builder = PromptBuilder(tokenizer, name, 150, 5)
    folder = save_model_folder(tiny_llama(), tokenizer, tmp_path / "model", {}, prompts=builder)
    (tmp_path / "own.jinja").unlink()
    loaded = load_prompt_settings(folder)
    assert (loaded.num_queries, loaded.max_prompt_tokens) == (5, 150)
    saved = AutoTokenizer.from_pretrained(folder)
    history = 20 * HISTORY  # more than fits
    assert loaded.builder(saved).ids(history) == builder.ids(history)
    assert served_ids(saved, builder.text(history)) == builder.ids(history)


def test_settings_that_are_given_win_and_can_stand_in_for_a_record(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no query_generation.json.*--num_queries, --max_prompt_tokens as in"):
        load_prompt_settings(tmp_path, prompt_template="compact")
    with pytest.raises(InputError, match="no such folder; if it is a hub name, add --prompt_template"):
        load_prompt_settings(tmp_path / "nowhere")
    given = PromptSettings("compact", 4, 99)
    assert load_prompt_settings(tmp_path, "compact", 4, 99) == given
    save_prompt_settings(PromptBuilder(ordinary_tokenizer(), "plain", 60, 3), tmp_path)
    assert load_prompt_settings(tmp_path) == PromptSettings(str(tmp_path / TEMPLATE_NAME), 3, 60)
    assert load_prompt_settings(tmp_path, num_queries=7).num_queries == 7


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "expected the fields prompt_template, num_queries, max_prompt_tokens"),
        ({"prompt_template": "chat", "num_queries": 3}, "expected the fields"),
        ({"prompt_template": "/etc/passwd", "num_queries": 3, "max_prompt_tokens": 9}, "is neither chat nor"),
        ({"prompt_template": "chat", "num_queries": True, "max_prompt_tokens": 9}, "num_queries is no whole number"),
        ({"prompt_template": "chat", "num_queries": 3, "max_prompt_tokens": 0}, "max_prompt_tokens is no whole"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, row: object, message: str) -> None:
    (tmp_path / SETTINGS_NAME).write_text(json.dumps(row))
    with pytest.raises(InputError, match=message):
        load_prompt_settings(tmp_path)


def test_a_template_cannot_change_what_it_is_given(tmp_path: Path) -> None:
    """A template may come with somebody else's model."""
    (tmp_path / "evil.jinja").write_text("{{ events.clear() }}")
    with pytest.raises(InputError, match="does not render"):
        PromptBuilder(ordinary_tokenizer(), str(tmp_path / "evil.jinja"), 60, 3).ids(HISTORY)
