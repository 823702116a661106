"""From a history to the prompt's tokens: newest events first, within a token budget, text from logs kept as data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from common.data.chat_template import ChatTemplate
from common.data.records import Event
from common.errors import InputError
from common.files import read_text

TEMPLATE_DIR = Path(__file__).parent / "templates"
CHAT = "chat"
MAX_EVENT_CHARS = 200


class PromptEvent(NamedTuple):
    """What a template sees of an event."""

    type: str
    text: str
    query: str
    url: str


class PromptBuilder:
    """Renders a history with a Jinja template and keeps the newest events that fit.

    `template` is `plain`, `compact`, a path to a template file, or `chat`: then the plain rendering becomes the user
    turn of the tokenizer's own chat template (`ChatTemplate`; `today` is the date that it shows, None: the clock's). A
    template sees `events` (oldest first, see `PromptEvent`) and `num_queries`; `template_source` is its text. Raises
    `InputError` for a template that is missing or does not render, or a chat template that the tokenizer lacks.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, max_prompt_tokens: int, num_queries: int,
        today: date | None = None,
    ) -> None:  # fmt: skip
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.num_queries = num_queries
        self.template = template
        self.chat = ChatTemplate(tokenizer, today or date.today()) if template == CHAT else None
        path = _template_path("plain" if self.chat else template)
        self.template_source = read_text(path)
        self._template = _compile(self.template_source, path)
        self._special = _special_pattern(tokenizer)
        before, after = added_ids(tokenizer)
        self._num_after = len(after)
        self._begins_with_bos = tokenizer.bos_token_id in before

    def ids(self, history: Sequence[Event]) -> list[int]:
        """Token ids of the prompt, at most `max_prompt_tokens`; the oldest events are left out where they do not fit,
        and the newest one is cut where it does not fit alone.

        Raises `InputError` for an empty history, and when the template alone is longer than the budget.
        """
        return self._fit(history)[1]

    def text(self, history: Sequence[Event]) -> str:
        """The prompt's text, with the events that `ids` keeps."""
        return self._fit(history)[0]

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered prompt, whatever their number.

        Without a chat template they begin with the special tokens that the tokenizer puts before any text. What it puts
        after one (EOS, with `add_eos_token`) is left out: the answer goes on from here.
        """
        if self.chat:
            return self.tokenizer(self.chat.render(text), add_special_tokens=False)["input_ids"]
        ids = self.tokenizer(text, add_special_tokens=True)["input_ids"]
        return ids[: len(ids) - self._num_after]

    def clean(self, text: str) -> str:
        """One line of plain text: no line breaks, no special token of the tokenizer, at most `MAX_EVENT_CHARS`."""
        return " ".join(self._special.sub(" ", text).split())[:MAX_EVENT_CHARS].rstrip()

    def response_text(self, queries: Sequence[str]) -> str:
        """Queries as the response that a model learns to write: one a line."""
        return "\n".join(self.clean(query) for query in queries)

    def _fit(self, history: Sequence[Event]) -> tuple[str, list[int]]:
        events = [
            PromptEvent(event.type, self.clean(event.text), self.clean(event.query or ""), self.clean(event.url or ""))
            for event in history[-self.max_prompt_tokens :]
        ]
        if not events:
            raise InputError("an empty history: a prompt needs at least one event")
        # The length grows with the number of events kept, so the largest number that fits is found by bisection;
        # most histories fit whole, so that is tried first.
        fits, too_many = 0, len(events) + 1
        best: tuple[str, list[int]] | None = None
        kept = len(events)
        while too_many - fits > 1:
            text = self._render(events[len(events) - kept :])
            ids = self.encode(text)
            if len(ids) <= self.max_prompt_tokens:
                fits, best = kept, (text, ids)
            else:
                too_many = kept
            kept = (fits + too_many) // 2
        return best or self._fit_part(events[-1])

    def _fit_part(self, event: PromptEvent) -> tuple[str, list[int]]:
        """The prompt with the longest beginning of one event's text that fits: it alone exceeds the budget."""
        for length in range(len(event.text) - 1, -1, -1):
            text = self._render([event._replace(text=event.text[:length])])
            ids = self.encode(text)
            if len(ids) <= self.max_prompt_tokens:
                return text, ids
        raise InputError(
            f"the prompt template alone exceeds {self.max_prompt_tokens} tokens; raise max_prompt_tokens or shorten it"
        )

    def _render(self, events: Sequence[PromptEvent]) -> str:
        try:
            text = self._template.render(events=events, num_queries=self.num_queries)
        except TemplateError as error:
            raise InputError(f"the prompt template does not render: {error}") from None
        # A template file that was written for bare text may spell the marks that are none of its business here.
        bos = self.tokenizer.bos_token if self._begins_with_bos else None
        return text.removeprefix(bos or "").removesuffix(self.tokenizer.eos_token or "")


def _template_path(name: str) -> Path:
    path = TEMPLATE_DIR / f"{name}.jinja"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in TEMPLATE_DIR.glob("*.jinja")))
        raise InputError(f"prompt template {name!r} is neither a file nor one of {known}, {CHAT}")
    return path


def _compile(source: str, path: Path) -> Template:
    # Sandboxed: a template is configuration, but it may come with somebody else's model.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise InputError(f"{path}: not a valid Jinja template ({error})") from None


def added_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after any text: BOS, EOS, [CLS], [SEP], or none."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, is_added = encoded["input_ids"], encoded["special_tokens_mask"]
    first, last = is_added.index(0), len(ids) - is_added[::-1].index(0)
    return ids[:first], ids[last:]


def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches every text that the tokenizer would read as a special token: in a log it is a user's text, not a mark."""
    texts = {str(token) for token in tokenizer.all_special_tokens}
    texts |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    alternatives = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True) if text)
    return re.compile(alternatives or r"(?!)")
