"""A loopback endpoint in a thread, options that point to it, and records to ask about."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.annotator_server import Endpoint, score_of
from common.data.records import Event
from common.feedback.annotator import Annotation, FeedbackItem, Unlabelled, words_by_query
from common.feedback.llm.annotator import LLMAnnotator
from common.feedback.llm.options import EndpointOptions
from common.feedback.load import open_annotator
from common.feedback.names import LLM, LLM_TEMPLATE

MODEL = "tiny/annotator"


@contextmanager
def serving(endpoint: Endpoint) -> Iterator[str]:
    """The endpoint on a free port of 127.0.0.1; yields its base URL."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(endpoint.start(), loop).result(10)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        asyncio.run_coroutine_threadsafe(_stop(server), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _stop(server: asyncio.Server) -> None:
    """Close the server and every connection that it still serves."""
    server.close()
    serving_tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in serving_tasks:
        task.cancel()
    await asyncio.gather(*serving_tasks, return_exceptions=True)


def options(base_url: str, **changes: Any) -> EndpointOptions:
    """Options of a quick test: few repeats, short waits, one way to hold the endpoint to a form."""
    settings = {
        "base_url": base_url, "model": MODEL, "timeout": 2.0, "max_retries": 2, "max_failure_share": 1.0,
        "structured_output": "json_schema",
    }  # fmt: skip
    return EndpointOptions(**{**settings, **changes})


@contextmanager
def annotator(endpoint: EndpointOptions, answers: Path, template: str = LLM_TEMPLATE) -> Iterator[LLMAnnotator]:
    """The annotator as the commands open it."""
    with open_annotator(LLM, truth_path="", seed=0, endpoint=endpoint, template=template, answers=answers) as opened:
        yield opened


def annotate(
    endpoint: EndpointOptions, answers: Path, items: list[FeedbackItem], template: str = LLM_TEMPLATE
) -> list[Annotation | Unlabelled | None]:
    """The results in the order of the items."""
    results: list[Annotation | Unlabelled | None] = [None] * len(items)
    with annotator(endpoint, answers, template) as opened:
        opened.annotate_all(items, results.__setitem__, "test")
    return results


def item(number: int, response: str) -> FeedbackItem:
    """A record of a user of its own."""
    history = (Event("search", query=f"running shoes {number}"), Event("click", title="Shoes for flat feet"))
    return FeedbackItem(f"u{number}@0", f"u{number}", history, (), response)


def expected(response: str) -> Annotation:
    """What the endpoint's right answer says about a response without repeated words."""
    lines = [[score_of(word.text) for word in words] for words in words_by_query(response)]
    return Annotation(tuple(map(tuple, lines)), tuple(max(line, default=0) for line in lines))
