"""A stand-in for an OpenAI-compatible endpoint that answers at a set speed and fails in every way that endpoints fail.

    python -m benchmarks.annotator_server --port 8000 --slots 16 --seconds 0.1 --fault_rate 0.2

It reads the numbered words and queries out of the prompt and scores each by its letters, so that right answers are
known. `GET /stats` says what it was asked. A real endpoint's protocol is tested with `transformers serve`; this one is
for what a real one does rarely.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

from common.config import MAX_SEED, option, parse_config
from common.errors import run_command

# What becomes of a request: an HTTP failure, an answer without content, or an answer whose content does not fit.
HTTP_FAULTS = ("429", "500", "slow", "cut", "broken_body", "no_choices")
CONTENT_FAULTS = ("broken_json", "short", "extra", "wrong_score", "duplicate")
FAULTS = (*HTTP_FAULTS, *CONTENT_FAULTS)
RIGHT = "right"

# The ways of `response_format` that a server may know; llama-cpp-python's server knows the first two.
FORMATS = ("text", "json_object", "json_schema")
# What that server answers to another one, with status 500.
_UNKNOWN_FORMAT = (
    "[{'type': 'literal_error', 'loc': ('body', 'response_format', 'type'), 'msg': \"Input should be 'text' or "
    "'json_object'\", 'input': 'json_schema', 'ctx': {'expected': \"'text' or 'json_object'\"}}]"
)
UNKNOWN_FORMAT, PROSE = "unknown_format", "prose"

# How a request is met, by its number and its body.
Choice = Callable[[int, dict[str, Any]], str]

_QUERY = re.compile(r"^query (\d+): (.*)$", re.MULTILINE)
_WORDS = re.compile(r"^words of query (\d+): (.*)$", re.MULTILINE)
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 429: "Too Many Requests", 500: "Internal Server Error"}


@dataclass
class ServerConfig:
    """An endpoint that answers at a set speed and fails at a set rate."""

    port: int = option(0, "Port on 127.0.0.1; 0 takes a free one, which is printed.")
    slots: int = option(16, "Requests answered at a time; the others wait.", minimum=1)
    seconds: float = option(0.1, "Time that a request takes.")
    fault_rate: float = option(0.0, "Share of requests that fail, all ways alike.", maximum=1)
    slow_seconds: float = option(8.0, "Time that a slow request takes.")
    retry_after: float = option(0.2, "Seconds that a 429 asks to wait.")
    seed: int = option(0, "Seed of the faults.", maximum=MAX_SEED)


@dataclass
class Endpoint:
    """The server: `choose` says how each request is met, `seen` holds what was asked.

    It knows the `formats` of an answer. One that `chats` answers in prose unless it is held to a schema.
    """

    choose: Choice = lambda number, body: RIGHT
    formats: Sequence[str] = FORMATS
    chats: bool = False
    slots: int = 64
    seconds: float = 0.0
    slow_seconds: float = 5.0
    retry_after: float = 0.2
    seen: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    right_by_dialogue: Counter[int] = field(default_factory=Counter)
    keep: bool = True
    under_way: int = 0
    most_under_way: int = 0
    first: float = 0.0
    last: float = 0.0

    async def start(self, port: int = 0) -> asyncio.Server:
        """Listen on 127.0.0.1."""
        self._free = asyncio.Semaphore(self.slots)
        return await asyncio.start_server(self._serve, "127.0.0.1", port, backlog=1024)

    def stats(self) -> dict[str, Any]:
        """Requests by outcome, seconds from the first to the last, and answers to dialogues answered rightly before."""
        return {
            "requests": sum(self.outcomes.values()),
            "seconds": self.last - self.first,
            "outcomes": dict(self.outcomes),
            "answered_twice": sum(count - 1 for count in self.right_by_dialogue.values()),
        }

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A client that is gone ends its connection.
        with closing(writer), suppress(ConnectionError, asyncio.IncompleteReadError):
            while request := await _read_request(reader):
                if not await self._respond(writer, *request):
                    break

    async def _respond(self, writer: asyncio.StreamWriter, path: str, headers: dict[str, str], content: bytes) -> bool:
        """Answer one request; whether the connection stays open."""
        if path == "/stats":
            return await _send(writer, 200, self.stats())
        if not path.endswith("/chat/completions"):
            return await _send(writer, 404, {"error": {"message": f"no {path} here"}})
        body = json.loads(content)
        outcome = self._outcome(body)
        self.outcomes[outcome] += 1
        if self.keep:
            self.seen.append(body)
            self.headers.append(headers)
        self.first = self.first or time.monotonic()
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return await self._meet(writer, body, outcome)
        finally:
            self.under_way -= 1
            self.last = time.monotonic()

    def _outcome(self, body: dict[str, Any]) -> str:
        form = body.get("response_format", {"type": "text"})
        if form["type"] not in self.formats:
            return UNKNOWN_FORMAT
        if self.chats and not form.keys() & {"json_schema", "schema"}:
            return PROSE
        return self.choose(sum(self.outcomes.values()), body)

    async def _meet(self, writer: asyncio.StreamWriter, body: dict[str, Any], outcome: str) -> bool:
        if outcome == "429":
            return await _send(writer, 429, {"error": {"message": "later"}}, {"Retry-After": f"{self.retry_after:g}"})
        if outcome == "slow":
            await asyncio.sleep(self.slow_seconds)
        async with self._free:
            await asyncio.sleep(self.seconds)
        if outcome == "500":
            return await _send(writer, 500, {"error": {"message": "out of memory"}})
        if outcome == "400":
            return await _send(writer, 400, {"error": {"message": "the messages are too long"}})
        if outcome == UNKNOWN_FORMAT:
            return await _send(writer, 500, {"error": {"message": _UNKNOWN_FORMAT, "type": "internal_server_error"}})
        completion = complete(body, outcome)
        text = json.dumps(completion)
        if outcome in ("cut", "broken_body"):
            half = text[: len(text) // 2].encode()
            # Cut: fewer bytes come than were announced. Broken: all come, but they are no JSON.
            length = len(text) if outcome == "cut" else len(half)
            writer.write(_head(200, length) + half)
            await writer.drain()
            return outcome != "cut"
        if outcome == RIGHT:
            self.right_by_dialogue[zlib.crc32(json.dumps(body["messages"]).encode())] += 1
        return await _send(writer, 200, completion)


def random_faults(rate: float, seed: int) -> Choice:
    """Each request fails with probability `rate`, every fault being as likely."""
    generator = random.Random(seed)
    return lambda number, body: generator.choice(FAULTS) if generator.random() < rate else RIGHT


def complete(body: dict[str, Any], outcome: str) -> dict[str, Any]:
    """A chat completion for a request of ours, spoilt as `outcome` says."""
    text = answer_text(body, outcome)
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    prompt_tokens = sum(len(message["content"]) for message in body["messages"]) // 4
    return {
        "id": "chatcmpl-0", "object": "chat.completion", "created": 0, "model": body["model"],
        "choices": [] if outcome == "no_choices" else [choice],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": len(text) // 4, "total_tokens": 0},
    }  # fmt: skip


def answer_text(body: dict[str, Any], outcome: str) -> str:
    """The answer in the form that the prompt asks for."""
    if outcome == PROSE:
        return "These are fine queries, and the user will like them."
    prompt = next(message["content"] for message in body["messages"] if message["role"] == "user")
    with_words = _WORDS.search(prompt) is not None
    if '<list name="' in prompt:
        answer = _verdict(prompt, with_words)
    elif with_words:
        answer = {"queries": _scored(prompt)}
    else:
        answer = {"queries": {number: score_of(text) for number, text in _QUERY.findall(prompt)}}
    if outcome in CONTENT_FAULTS and "queries" in answer:
        _spoil(answer["queries"], outcome)
    text = json.dumps(answer)
    if outcome == "duplicate":
        text = re.sub(r'("1": \d)', r"\1, \1", text, count=1)
    return text[:-5] if outcome == "broken_json" else text


def score_of(text: str) -> int:
    """The score of a word or query: 0, 1 or 2 by its letters."""
    return zlib.crc32(text.encode()) % 3


def _scored(prompt: str) -> dict[str, dict[str, Any]]:
    queries = {}
    for number, listed in _WORDS.findall(prompt):
        words = [word.partition("=")[2] for word in listed.split("  ")]
        scores = {str(i): score_of(word) for i, word in enumerate(words, start=1)}
        queries[number] = {"words": scores, "score": max(scores.values())}
    return queries


def _verdict(prompt: str, with_words: bool) -> dict[str, Any]:
    """The list with the larger sum of query scores, after all scores where there are words."""
    lists = prompt.split('<list name="')[1:]
    sums = [sum(score_of(text) for _, text in _QUERY.findall(part)) for part in lists]
    verdict = {"verdict": "A" if sums[0] > sums[1] else "B" if sums[1] > sums[0] else "tie"}
    if not with_words:
        return verdict
    return {"a": _scored(lists[0]), "b": _scored(lists[1]), **verdict}


def _spoil(queries: dict[str, Any], outcome: str) -> None:
    """One of the errors that models make; an answer about whole queries loses or gains a query."""
    scores = queries["1"]["words"] if isinstance(queries["1"], dict) else queries
    if outcome == "short":
        scores.popitem()
    elif outcome == "extra":
        scores[str(len(scores) + 1)] = 0
    elif outcome == "wrong_score":
        scores["1"] = 3


async def _read_request(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes] | None:
    """Path, headers and content of the next request; None at the connection's end."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    except asyncio.IncompleteReadError:
        return None
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    return head[0].split(" ")[1], headers, await reader.readexactly(int(headers.get("content-length", 0)))


async def _send(
    writer: asyncio.StreamWriter, status: int, value: dict[str, Any], headers: dict[str, str] | None = None
) -> bool:
    content = json.dumps(value).encode()
    writer.write(_head(status, len(content), headers) + content)
    await writer.drain()
    return True


def _head(status: int, length: int, headers: dict[str, str] | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status} {_REASONS[status]}", "Content-Type: application/json", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def main() -> None:
    """Serve until the process is ended."""
    asyncio.run(_serve_forever(parse_config(ServerConfig)))


async def _serve_forever(config: ServerConfig) -> None:
    endpoint = Endpoint(
        choose=random_faults(config.fault_rate, config.seed), slots=config.slots, seconds=config.seconds,
        slow_seconds=config.slow_seconds, retry_after=config.retry_after, keep=False,
    )  # fmt: skip
    server = await endpoint.start(config.port)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    run_command(main)
