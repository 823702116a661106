"""A tokenizer's own chat template as this project asks with it: the same tomorrow as today, and without EOS at its end.

Some templates show today's date (`strftime_now`), so that one history would have other ids on another day. Some take a
message's content as a list of parts alone and leave out a text. Some end a user's turn with EOS, whatever the caller
wants.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from common.errors import InputError, one_line

_REMEDY = "add --prompt_template plain, or mend the template in that folder"
_DATE_CALL = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)""")
_ANY_DATE_CALL = re.compile(r"strftime_now\s*\(")
# What a template may raise by itself, and what Python raises where it computes with values of the wrong kind.
_RENDER_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
_PROBE = "zebra 4711 xylophone"  # a message that no template holds by itself

Form = Callable[[str], Any]


class ChatTemplate:
    """Renders one user message; `source` is the Jinja text that does it, which a server can use as well.

    Raises `InputError`, with the tokenizer's folder, for a template that is missing, does not render, leaves out the
    message, or shows a date in a way that cannot be pinned.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, today: date) -> None:
        self._tokenizer = tokenizer
        self._where = tokenizer.name_or_path or type(tokenizer).__name__
        self.source = self._pinned(self._own(), today)
        self._form = self._find_form()
        eos = tokenizer.eos_token
        if eos and self.render(_PROBE).endswith(eos):
            # A plus keeps the white space that Jinja would take away after and before a block.
            self.source = (
                f"{{% set prompt +%}}{self.source}{{%+ endset %}}{{{{ prompt.removesuffix({_literal(eos)}) }}}}"
            )

    def render(self, text: str) -> str:
        """The prompt of one user message, up to where the answer begins."""
        try:
            return self._render(self._form(text))
        except _RENDER_ERRORS as error:
            raise InputError(self._failure(error)) from None

    def _own(self) -> str:
        try:
            return self._tokenizer.get_chat_template()
        except ValueError:  # none, or several without a default
            raise InputError(f"{self._where}: the tokenizer has no chat template; {_REMEDY}") from None

    def _pinned(self, source: str, today: date) -> str:
        """`source` with the date written in the place of each call that asks for it."""
        pinned = _DATE_CALL.sub(lambda call: _literal(today.strftime(call[2])), source)
        if _ANY_DATE_CALL.search(pinned):
            raise InputError(
                f"{self._where}: its chat template asks for today's date in a format that it computes, so that prompts "
                f"would differ from day to day; {_REMEDY}"
            )
        return pinned

    def _find_form(self) -> Form:
        """How this template takes a message: as a text, or as a list of parts."""
        failures = []
        for form in (_as_text, _as_parts):
            try:
                if _PROBE in self._render(form(_PROBE)):
                    return form
            except _RENDER_ERRORS as error:
                failures.append(error)
        if failures:
            raise InputError(self._failure(failures[0]))
        raise InputError(f"{self._where}: its chat template leaves out the user's message; {_REMEDY}")

    def _failure(self, error: Exception) -> str:
        return f"{self._where}: its chat template does not render one user message ({one_line(error)}); {_REMEDY}"

    def _render(self, content: Any) -> str:
        return self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=self.source, add_generation_prompt=True,
            tokenize=False,
        )  # fmt: skip


def _as_text(text: str) -> str:
    return text


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _literal(text: str) -> str:
    """`text` as a Jinja string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
