"""A language model that is asked: its answer comes from the store, else from the endpoint, and is corrected by it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from common.errors import InputError, one_line
from common.feedback.annotator import Unlabelled
from common.feedback.llm.answers import AnswerStore, answer_key
from common.feedback.llm.client import ChatClient, Messages, Meter, NoAnswer, Refused, price, sampling
from common.feedback.llm.options import AUTO, WAYS, EndpointOptions
from common.feedback.llm.prompts import Template
from common.feedback.llm.schemas import AnswerError, Form, fits, response_format

REPAIRS = 2  # correction turns after an answer that does not fit
_CHARS_A_TOKEN = 4  # of English in the tokenizers of today's models; an estimate before anything is sent
_TOKENS_A_SCORE = 8  # "12": 2, with its comma, and a share of the frame around a query's words
_TRIED_RECORDS = 3  # on which `settle` tries each way

_SHOWN_REPLY = 80
_WAY_TEXTS = {
    "json_schema": "json_schema",
    "json_object": "json_object with the schema",
    "none": "none, the prompt alone asks for the form",
}

Value = TypeVar("Value")


@dataclass(frozen=True)
class Question(Generic[Value]):
    """What is asked about one record, and how its answer is read.

    `read` raises `AnswerError` for an answer that does not fit; `scores` is how many scores the answer will hold.
    """

    template: Template
    messages: Messages
    form: Form
    read: Callable[[str], Value]
    scores: int


@dataclass(frozen=True)
class Estimate:
    """Questions, how many different ones the store answers and how many must be sent; tokens and cost of the latter."""

    questions: int
    stored: int
    calls: int
    prompt_tokens: float
    answer_tokens: float
    cost: float


class LanguageModel:
    """Asks questions, keeps every answer in `store`, and counts what was asked in `meter`.

    The same question asked twice at a time is sent once.
    """

    def __init__(self, options: EndpointOptions, store: AnswerStore, meter: Meter) -> None:
        self.options = options
        self.store = store
        self.meter = meter
        self._under_way: dict[str, asyncio.Task[str]] = {}
        # How the endpoint is held to the form; empty until `settle` has found out.
        #
        # It is a part of an answer's key (an answer that does not fit must not be found again once the endpoint is held
        # to the form) and no part of a label's annotator: whichever way, the labels come from the same model and prompt
        # and pass the same check. So labelling may go on at a server that knows another way.
        self.way = "" if options.structured_output == AUTO else options.structured_output

    async def settle(self, client: ChatClient, questions: Iterable[Question[Any]]) -> str:
        """Find out, where that is left open, how the endpoint is held to the form; what was found, for the user.

        The first way is taken whose answer to the first question has the form; the prompt alone where none has.
        Where the endpoint answers no way at all the next question is tried, for a failure may be one record's own.
        Raises `InputError` when it answers none of the first `_TRIED_RECORDS`, else as `ChatClient.complete` does.
        """
        if self.way:
            return ""
        failures: list[str] = []
        for question in islice(questions, _TRIED_RECORDS):
            failures = []
            try:
                self.way = self._stored_way(question) or await self._find_way(client, question, failures)
            except NoAnswer as error:  # a failure that has nothing to do with the form
                failures.append(str(error))
            if self.way:
                others = f" ({'; '.join(failures)})" if failures else ""
                return f"structured output: {_WAY_TEXTS[self.way]}{others}"
        if not failures:
            return ""
        raise InputError(
            f"{self.options.base_url} answers no question of {self.options.model}: {'; '.join(failures)}. Look at the "
            "server's log; python -m common.feedback.llm.check asks about one invented record"
        )

    def _stored_way(self, question: Question[Any]) -> str:
        """The way whose answer to `question` is stored and has the form; empty where there is none."""
        rows = {way: self.store.get(self._key(question, question.messages, way)) for way in WAYS}
        return next((way for way, row in rows.items() if row and fits(row["reply"], question.form)), "")

    async def _find_way(self, client: ChatClient, question: Question[Any], failures: list[str]) -> str:
        """The first way whose answer has the form; `none` if none has but one came; empty where each is refused."""
        answered = False
        for way in WAYS:
            try:
                reply, finish_reason = await self._answer(client, question, question.messages, way)
            except Refused as error:
                failures.append(f"{way}: {error}")
                continue
            answered = True
            if fits(reply, question.form):
                return way
            cut = self._cut_off(finish_reason)
            failures.append(f"{way}: the answer{cut} does not have the form: {one_line(repr(reply), _SHOWN_REPLY)}")
        return "none" if answered else ""

    async def ask(self, client: ChatClient, question: Question[Value]) -> Value | Unlabelled:
        """What `question` reads from the answer, or from one of at most `REPAIRS` corrections.

        An answer that does not fit is given back with the error. `Unlabelled` says why there is no valid answer.
        Raises `BudgetReached` and `InputError` as `ChatClient.complete` does.
        """
        messages = list(question.messages)
        replies: list[str] = []
        for _ in range(1 + REPAIRS):
            try:
                reply, finish_reason = await self._answer(client, question, messages, self.way)
            except NoAnswer as error:
                return Unlabelled(str(error), tuple(replies))
            replies.append(reply)
            try:
                return question.read(reply)
            except AnswerError as error:
                problem = f"{error}{self._cut_off(finish_reason)}"
            messages = [
                *messages,
                {"role": "assistant", "content": reply},
                {"role": "user", "content": f"That answer is not valid: {problem}. Answer again, with the JSON alone."},
            ]
        return Unlabelled(problem, tuple(replies))

    def _cut_off(self, finish_reason: str) -> str:
        return f" (cut off at {self.options.max_answer_tokens} tokens)" if finish_reason == "length" else ""

    def estimate(self, questions: Iterable[Question[Any]]) -> Estimate:
        """What asking would take. Corrections and repeats are not counted in; equal questions are one call."""
        seen: set[str] = set()
        records = stored = prompt_chars = scores = 0
        for question in questions:
            records += 1
            ways = [self.way] if self.way else WAYS
            key, *others = (self._key(question, question.messages, way) for way in ways)
            if key not in seen and any(each in self.store for each in (key, *others)):
                stored += 1
            elif key not in seen:
                prompt_chars += sum(len(message["content"]) for message in question.messages)
                scores += question.scores
            seen.add(key)
        prompt, answer = prompt_chars / _CHARS_A_TOKEN, float(_TOKENS_A_SCORE * scores)
        return Estimate(records, stored, len(seen) - stored, prompt, answer, price(self.options, prompt, answer))

    def describe(self) -> str:
        """What was asked so far, for the end of a command."""
        meter = self.meter
        return (
            f"asked {self.options.model}: {meter.requests} requests, {meter.answers} answers, {meter.prompt_tokens} "
            f"prompt tokens, {meter.answer_tokens} answer tokens{meter.cost_text}; "
            f"{len(self.store)} answers in {self.store.path}"
        )

    async def _answer(
        self, client: ChatClient, question: Question[Any], messages: Messages, way: str
    ) -> tuple[str, str]:
        """Text and finish reason of the answer to `messages`."""
        key = self._key(question, messages, way)
        row = self.store.get(key)
        if row is None:
            task = self._under_way.get(key)
            if task is None:
                task = asyncio.create_task(self._request(client, question, messages, way))
                self._under_way[key] = task
                task.add_done_callback(lambda _: self._under_way.pop(key))
            await task
            row = self.store.get(key)
        return row["reply"], row["finish_reason"]

    async def _request(self, client: ChatClient, question: Question[Any], messages: Messages, way: str) -> None:
        answer = await client.complete(messages, response_format(question.form, way))
        row = asdict(answer)
        self.store.put(self._key(question, messages, way), {
            "template": question.template.title, "model": self.options.model, "reply": row.pop("text"), **row,
            "time": round(time.time(), 3),
        })  # fmt: skip

    def _key(self, question: Question[Any], messages: Messages, way: str) -> str:
        template, form = question.template.digest, response_format(question.form, way)
        return answer_key(self.options.model, template, messages, sampling(self.options), form)
