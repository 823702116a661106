"""From a record to a chat prompt: versioned templates, and text from logs and models that stays data.

A template is a Jinja file with a block `user` and, where the model takes one, a block `system`. Its hash is a part of
every label's annotator name and of every stored answer's key: an edited template is another annotator.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.data.privacy import MASK, mask_private
from common.data.prompts import MAX_EVENT_CHARS
from common.data.records import Event
from common.errors import InputError
from common.feedback.annotator import words_by_query
from common.text import split_queries

TEMPLATE_DIR = Path(__file__).parent / "templates"

# Marks that delimit a prompt, or that a server's chat template may read as control tokens ("<|im_end|>", "[INST]").
_LOOK_ALIKES = str.maketrans("<>[]", "‹›()")
_BLOCKS = ("system", "user")


@dataclass(frozen=True)
class Template:
    """A prompt template, with the name and hash that labels and answers carry."""

    name: str
    digest: str
    _template: Any

    @property
    def title(self) -> str:
        """Name and hash: `label_words_v1@0123456789ab`."""
        return f"{self.name}@{self.digest[:12]}"

    def messages(self, **values: Any) -> list[dict[str, str]]:
        """The chat messages; raises `InputError` for a template that does not render."""
        try:
            return [
                {"role": role, "content": "".join(block(self._template.new_context(values))).strip()}
                for role in _BLOCKS
                if (block := self._template.blocks.get(role))
            ]
        except TemplateError as error:
            raise InputError(f"template {self.name} does not render: {error}") from None


def load_template(name: str) -> Template:
    """The template called `name`, or in the file `name`; raises `InputError` where there is no usable one."""
    path = TEMPLATE_DIR / f"{name}.jinja"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in TEMPLATE_DIR.glob("*.jinja")))
        raise InputError(f"template {name!r} is neither a file nor one of {known}")
    content = path.read_bytes()
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False
    )
    try:
        template = environment.from_string(content.decode("utf-8-sig"))
    except (TemplateError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a valid Jinja template ({error})") from None
    if "user" not in template.blocks:
        raise InputError(f"{path}: a template for a language model needs a block named user")
    return Template(path.stem, hashlib.sha256(content).hexdigest(), template)


def shown_history(history: Sequence[Event], limit: int) -> list[dict[str, str]]:
    """What a template sees of the newest `limit` events, oldest first: `type` and `text`."""
    return [{"type": event.type, "text": as_data(event.text)[:MAX_EVENT_CHARS]} for event in history[-limit:]]


def shown_queries(response: str) -> list[dict[str, Any]]:
    """What a template sees of a response: `text` and `words` of each line that has words (see `lines_with_words`).

    The words are those that labels belong to, each cut from the masked line, so that their number never changes.
    """
    shown: list[dict[str, Any]] = []
    texts, start = response.split("\n"), 0
    words = words_by_query(response)
    for line in range(len(split_queries(response))):
        if words[line]:
            masked = mask_private(texts[line])
            cut = [masked[word.start - start : word.end - start] for word in words[line]]
            # What holds nothing visible is shown as a mark: its number must stand for something.
            shown.append({"text": as_data(texts[line]) or MASK, "words": [as_data(word) or MASK for word in cut]})
        start += len(texts[line]) + 1
    return shown


def lines_with_words(response: str) -> list[int]:
    """The lines that a language model is asked about, in the order of `shown_queries`; the others score 0."""
    return [line for line, words in enumerate(words_by_query(response)) if words]


def as_data(text: str) -> str:
    """Untrusted text as one line in which private data is masked and no mark can end its place in a prompt.

    Control and invisible characters become spaces or nothing, angle and square brackets their look-alikes.
    """
    masked = mask_private(text)
    spaced = "".join(" " if unicodedata.category(char) in ("Cc", "Zl", "Zp") else char for char in masked)
    visible = "".join(char for char in spaced if unicodedata.category(char) not in ("Cf", "Cs"))
    return " ".join(visible.translate(_LOOK_ALIKES).split())
