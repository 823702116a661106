"""One request to an OpenAI-compatible endpoint: repeated where that helps, counted, and never beyond the budget."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass
from typing import Any

from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, DefaultAsyncHttpxClient
from openai.types.chat import ChatCompletion

from common.errors import InputError
from common.feedback.llm.keys import without_key
from common.feedback.llm.options import EndpointOptions, api_key, extra_body, is_local

Messages = list[dict[str, str]]

# What no repeat mends: a wrong key, no leave, a wrong address or model.
_FATAL = {401: "is its key right?", 403: "may this key use it?", 404: "are --base_url and --model right?"}
# A request that the server cannot read, or whose form it does not know.
_REFUSED = (400, 405, 415, 422, 501)
# Errors of validation, which some servers (llama-cpp-python) answer with 500: pydantic's words, or the field's name.
_INVALID = re.compile(r"validation error|Input should be|[\"']loc[\"']\s*:|response_format|json_schema", re.IGNORECASE)
_SHOWN_ERROR = 300
_UNREADABLE_DELAY = 0.5  # seconds before an unreadable answer is asked for again, as the client waits after an error


class NoAnswer(Exception):
    """The endpoint gave no readable answer to one request, also when it was repeated."""


class Refused(NoAnswer):
    """The endpoint cannot take the request as it is, whatever is tried: no repeat helps, another form may."""


class BudgetReached(Exception):
    """`--max_requests` or `--max_cost` allows no further request."""


@dataclass
class Meter:
    """What was asked and what it cost: HTTP requests (repeats included), answers, tokens."""

    options: EndpointOptions
    requests: int = 0
    answers: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0

    @property
    def cost(self) -> float:
        """In the unit of the two prices."""
        return price(self.options, self.prompt_tokens, self.answer_tokens)

    @property
    def cost_text(self) -> str:
        """The cost as the end of a list; empty where no price is known."""
        return f", cost {self.cost:.2f}" if self.options.price_in or self.options.price_out else ""

    def count_request(self) -> None:
        """Count a request that is about to be sent; raises `BudgetReached` where none may be."""
        if self.options.max_requests and self.requests >= self.options.max_requests:
            raise BudgetReached(f"--max_requests {self.options.max_requests} is reached")
        if self.options.max_cost and self.cost >= self.options.max_cost:
            raise BudgetReached(f"--max_cost {self.options.max_cost:g} is reached: the answers cost {self.cost:.2f}")
        self.requests += 1

    def count_answer(self, answer: Answer) -> None:
        """Count an answer's tokens."""
        self.answers += 1
        self.prompt_tokens += answer.prompt_tokens
        self.answer_tokens += answer.answer_tokens


def price(options: EndpointOptions, prompt_tokens: float, answer_tokens: float) -> float:
    """What so many tokens cost, in the unit of `--price_in` and `--price_out`, which are by the million."""
    return (prompt_tokens * options.price_in + answer_tokens * options.price_out) / 1e6


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: its text, why it ended, who says to have written it, and what it took."""

    text: str
    finish_reason: str
    served_model: str
    prompt_tokens: int
    answer_tokens: int
    seconds: float


class ChatClient:
    """Asks one endpoint; to be entered within the event loop that uses it.

    Repeats with growing delays, and after the time that `Retry-After` asks for, are the `openai` client's own; a server
    error that refuses the request's form (`is_refusal`) is not repeated. An answer that cannot be read, or that holds
    no choice, is asked for again in the same way. Redirects are not followed and, for an endpoint on this machine, no
    proxy is used: a history goes where `--base_url` says and nowhere else.
    """

    def __init__(self, options: EndpointOptions, meter: Meter) -> None:
        self._options = options
        self._meter = meter
        self._sampling = sampling(options)

    async def __aenter__(self) -> ChatClient:
        async def count(_: Any) -> None:
            self._meter.count_request()

        http = DefaultAsyncHttpxClient(
            follow_redirects=False, trust_env=not is_local(self._options), timeout=self._options.timeout,
            event_hooks={"request": [count], "response": [_mark_refusal]},
        )  # fmt: skip
        self._client = AsyncOpenAI(
            api_key=api_key(self._options) or "none", base_url=self._options.base_url, http_client=http,
            timeout=self._options.timeout, max_retries=self._options.max_retries,
        )  # fmt: skip
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def complete(self, messages: Messages, response_format: dict[str, Any] | None) -> Answer:
        """The answer to `messages`, held to `response_format` where there is one.

        Raises `Refused` when the endpoint cannot take this request, `NoAnswer` when it fails for good, `BudgetReached`
        when it may not be sent, and `InputError` when no request can succeed.
        """
        body = {**self._sampling, **({"response_format": response_format} if response_format else {})}
        reason = ""
        for attempt in range(self._options.max_retries + 1):
            if attempt:
                await asyncio.sleep(min(_UNREADABLE_DELAY * 2 ** (attempt - 1), 8.0))
            begun = time.monotonic()
            try:
                completion = await self._client.chat.completions.create(
                    model=self._options.model, messages=messages, extra_body=body
                )
                answer = read_completion(completion, time.monotonic() - begun)
            except json.JSONDecodeError as error:
                reason = f"the answer is not JSON ({error.msg})"
            except _Unreadable as error:
                reason = str(error)
            except APIStatusError as error:
                raise self._status_error(error) from None
            except APITimeoutError:
                raise NoAnswer(f"no answer within {self._options.timeout:g} seconds") from None
            except APIConnectionError as error:
                raise NoAnswer(self._without_key(f"no connection ({error.__cause__ or error})")) from None
            else:
                self._meter.count_answer(answer)
                return answer
        raise NoAnswer(self._without_key(reason))

    def _status_error(self, error: APIStatusError) -> Exception:
        # Not every server writes OpenAI's {"error": {"message": ...}}: then its own words are the best there is.
        said = error.body.get("message") if isinstance(error.body, dict) else None
        message = self._without_key(f"HTTP {error.status_code}: {said or error.response.text or error.message}")
        if error.status_code in _FATAL:
            return InputError(f"{self._options.base_url} refuses: {message}; {_FATAL[error.status_code]}")
        return Refused(message) if is_refusal(error.status_code, error.response.text) else NoAnswer(message)

    def _without_key(self, text: str) -> str:
        """An error's text on one line, cut to a readable length; a server may quote the key that it was sent."""
        return " ".join(without_key(text, api_key(self._options)).split())[:_SHOWN_ERROR]


class _Unreadable(Exception):
    """A completion that holds no answer."""


def is_refusal(status: int, body: str) -> bool:
    """Whether an error is about the request's form, so that the same request can only fail again."""
    return status in _REFUSED or (status >= 500 and _INVALID.search(body) is not None)


async def _mark_refusal(response: Any) -> None:
    """Have the `openai` client, which repeats after every 5xx, give up on a refusal, by the header that it obeys."""
    if response.status_code < 500:
        return
    body = await response.aread()
    if is_refusal(response.status_code, body.decode(errors="replace")):
        response.headers["x-should-retry"] = "false"


def sampling(options: EndpointOptions) -> dict[str, Any]:
    """The request's fields besides model, messages and form: greedy, and the user's own ones last."""
    return {"temperature": 0, "seed": 0, "max_tokens": options.max_answer_tokens, **extra_body(options)}


def read_completion(completion: Any, seconds: float) -> Answer:
    """The answer that a completion holds. The client checks no types, so nothing is taken for granted here."""
    choices = completion.choices if isinstance(completion, ChatCompletion) else None
    if not isinstance(choices, list) or not choices:
        raise _Unreadable("the answer holds no choices")
    message = getattr(choices[0], "message", None)
    # An answer without text was paid for too: a refusal, or a model that thought until its tokens were used up.
    text = getattr(message, "content", None) or getattr(message, "refusal", None) or ""
    if not isinstance(text, str):
        raise _Unreadable("the answer's content is no text")
    usage = completion.usage
    return Answer(
        text=text,
        finish_reason=str(choices[0].finish_reason),
        served_model=str(completion.model),
        prompt_tokens=_count(getattr(usage, "prompt_tokens", 0)),
        answer_tokens=_count(getattr(usage, "completion_tokens", 0)),
        seconds=round(seconds, 3),
    )


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0
