"""How a model's prompts are made, kept beside its weights: whoever loads the folder asks it as it was trained.

Two readers are served. This project reads `query_generation.json` and `prompt_template.jinja`. A server (`transformers
serve`, vLLM) reads the tokenizer's chat template: the one user message of a request is the rendered history, and the
template makes of it the very token ids of training.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from common.data.prompts import CHAT, PromptBuilder, added_ids
from common.errors import InputError
from common.files import read_json, write_json

SETTINGS_NAME = "query_generation.json"
TEMPLATE_NAME = "prompt_template.jinja"

_REFUSAL = "this model was trained on one user message, the rendered history of a user"
# What a prompt may begin with: there tokenizers differ.
_PROBES = ("red shoes", "> red shoes\nnext:\n", "42", "北京 天气", " red", "\nred", "Ünï")


@dataclass(frozen=True, slots=True)
class PromptSettings:
    """What a `PromptBuilder` needs beside the tokenizer; `prompt_template` is a name or a path."""

    prompt_template: str
    num_queries: int
    max_prompt_tokens: int

    def builder(self, tokenizer: PreTrainedTokenizerBase, today: date | None = None) -> PromptBuilder:
        """The prompt builder of these settings; `today` as in `PromptBuilder`."""
        return PromptBuilder(tokenizer, self.prompt_template, self.max_prompt_tokens, self.num_queries, today)


def save_prompt_settings(builder: PromptBuilder, folder: str | Path) -> None:
    """Write `query_generation.json` and `prompt_template.jinja`, the template's text as it is now, into `folder`."""
    folder = Path(folder)
    template = CHAT if builder.template == CHAT else TEMPLATE_NAME
    (folder / TEMPLATE_NAME).write_text(builder.template_source, encoding="utf-8")
    settings = PromptSettings(template, builder.num_queries, builder.max_prompt_tokens)
    write_json(folder / SETTINGS_NAME, asdict(settings))


def load_prompt_settings(
    folder: str | Path, prompt_template: str = "", num_queries: int = 0, max_prompt_tokens: int = 0
) -> PromptSettings:
    """The settings that `folder` records; those given as arguments win, and may stand in for a record.

    Raises `InputError` when the folder records none and not all of them are given, or when its record is damaged.
    """
    given = {
        "prompt_template": prompt_template, "num_queries": num_queries, "max_prompt_tokens": max_prompt_tokens
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value}
    path = Path(folder) / SETTINGS_NAME
    if not path.is_file():
        missing = ", ".join(f"--{name}" for name in PromptSettings.__slots__ if name not in given)
        if missing and not Path(folder).is_dir():
            raise InputError(f"{folder}: no such folder; if it is a hub name, add {missing} as in the model's training")
        if missing:
            raise InputError(
                f"{folder}: does not say how its prompts are made (no {SETTINGS_NAME}); give a model folder that steps "
                f"1 or 3 wrote, or add {missing} as in the model's training"
            )
        return PromptSettings(**given)
    recorded = _read_record(path)
    if recorded["prompt_template"] == TEMPLATE_NAME:
        recorded["prompt_template"] = str(path.with_name(TEMPLATE_NAME))
    return PromptSettings(**recorded | given)


def serving_tokenizer(builder: PromptBuilder) -> PreTrainedTokenizerBase:
    """A copy of the builder's tokenizer whose chat template gives the ids of `builder.ids` for `builder.text`.

    With the template `chat` that is the tokenizer's own, with the date that it showed in training; where it takes a
    list of parts, a server must send them, as vLLM does. Where no chat template can give the ids, the copy has none, so
    that a server refuses instead of asking otherwise than in training; this is printed.
    """
    tokenizer = copy.deepcopy(builder.tokenizer)
    if builder.chat:
        tokenizer.chat_template = builder.chat.source
        return tokenizer
    # Some SentencePiece tokenizers put a space before a text, but not before what follows a special token.
    for content in ("messages[0].content", "('' if messages[0].content[:1] == ' ' else ' ') + messages[0].content"):
        tokenizer.chat_template = _text_as_chat(tokenizer, content)
        if all(_served_ids(tokenizer, text) == builder.encode(text) for text in _PROBES):
            return tokenizer
    tokenizer.chat_template = None
    print(
        f"note: no chat template gives the prompts of {type(tokenizer).__name__} token by token, so the exported "
        "folder has none: ask servers for completions of token ids, or use scripts/predict.py",
        flush=True,
    )
    return tokenizer


def _text_as_chat(tokenizer: PreTrainedTokenizerBase, content: str) -> str:
    """A chat template that sets `content`, an expression, after the special tokens that any text begins with."""
    before = _literal("".join(tokenizer.convert_ids_to_tokens(added_ids(tokenizer)[0])))
    return (
        "{%- if messages | length != 1 or messages[0].role != 'user' -%}"
        f"{{{{ raise_exception({_literal(_REFUSAL)}) }}}}"
        "{%- endif -%}"
        f"{{{{ {before} + {content} }}}}"
    )


def _literal(text: str) -> str:
    """`text` as a Jinja string."""
    return json.dumps(text, ensure_ascii=False)


def _served_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What a server makes of a request."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
    )


def _read_record(path: Path) -> dict[str, str | int]:
    row = read_json(path)
    if not isinstance(row, dict) or set(row) != set(PromptSettings.__slots__):
        raise InputError(f"{path}: expected the fields {', '.join(PromptSettings.__slots__)}; export the model again")
    if row["prompt_template"] not in (CHAT, TEMPLATE_NAME):
        raise InputError(f"{path}: prompt_template is neither {CHAT} nor {TEMPLATE_NAME}; export the model again")
    for name in ("num_queries", "max_prompt_tokens"):
        if type(row[name]) is not int or row[name] < 1:
            raise InputError(f"{path}: {name} is no whole number above 0; export the model again")
    return row
