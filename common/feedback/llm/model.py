"""A language model that is asked: its answer comes from the store, else from the endpoint, and is corrected by it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from common.feedback.annotator import Unlabelled
from common.feedback.llm.answers import AnswerStore, answer_key
from common.feedback.llm.client import ChatClient, Messages, Meter, NoAnswer, price, sampling
from common.feedback.llm.options import EndpointOptions
from common.feedback.llm.prompts import Template
from common.feedback.llm.schemas import AnswerError, response_format

REPAIRS = 2  # correction turns after an answer that does not fit
_CHARS_A_TOKEN = 4  # of English in the tokenizers of today's models; an estimate before anything is sent
_TOKENS_A_SCORE = 12  # {"i": 12, "score": 2}, with its comma

Value = TypeVar("Value")


@dataclass(frozen=True)
class Question(Generic[Value]):
    """What is asked about one record, and how its answer is read.

    `read` raises `AnswerError` for an answer that does not fit; `scores` is how many scores the answer will hold.
    """

    template: Template
    messages: Messages
    form: type[BaseModel]
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

    async def ask(self, client: ChatClient, question: Question[Value]) -> Value | Unlabelled:
        """What `question` reads from the answer, or from one of at most `REPAIRS` corrections.

        An answer that does not fit is given back with the error. `Unlabelled` says why there is no valid answer.
        Raises `BudgetReached` and `InputError` as `ChatClient.complete` does.
        """
        messages = list(question.messages)
        replies: list[str] = []
        for _ in range(1 + REPAIRS):
            try:
                reply, finish_reason = await self._answer(client, question, messages)
            except NoAnswer as error:
                return Unlabelled(str(error), tuple(replies))
            replies.append(reply)
            try:
                return question.read(reply)
            except AnswerError as error:
                cut = f" (cut off at {self.options.max_answer_tokens} tokens)" if finish_reason == "length" else ""
                problem = f"{error}{cut}"
            messages = [
                *messages,
                {"role": "assistant", "content": reply},
                {"role": "user", "content": f"That answer is not valid: {problem}. Answer again, with the JSON alone."},
            ]
        return Unlabelled(problem, tuple(replies))

    def estimate(self, questions: Iterable[Question[Any]]) -> Estimate:
        """What asking would take. Corrections and repeats are not counted in; equal questions are one call."""
        seen: set[str] = set()
        records = stored = prompt_chars = scores = 0
        for question in questions:
            records += 1
            key = self._key(question, question.messages)
            if key not in seen and key in self.store:
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

    async def _answer(self, client: ChatClient, question: Question[Any], messages: Messages) -> tuple[str, str]:
        """Text and finish reason of the answer to `messages`."""
        key = self._key(question, messages)
        row = self.store.get(key)
        if row is None:
            task = self._under_way.get(key)
            if task is None:
                task = asyncio.create_task(self._request(client, question, messages, key))
                self._under_way[key] = task
                task.add_done_callback(lambda _: self._under_way.pop(key))
            await task
            row = self.store.get(key)
        return row["reply"], row["finish_reason"]

    async def _request(self, client: ChatClient, question: Question[Any], messages: Messages, key: str) -> None:
        answer = await client.complete(messages, self._form(question))
        row = asdict(answer)
        self.store.put(key, {
            "template": question.template.title, "model": self.options.model, "reply": row.pop("text"), **row,
            "time": round(time.time(), 3),
        })  # fmt: skip

    def _key(self, question: Question[Any], messages: Messages) -> str:
        template, form = question.template.digest, self._form(question)
        return answer_key(self.options.model, template, messages, sampling(self.options), form)

    def _form(self, question: Question[Any]) -> dict[str, Any] | None:
        """What the endpoint is held to; None where the prompt alone asks for the form."""
        return response_format(question.form) if self.options.structured_output == "json_schema" else None
