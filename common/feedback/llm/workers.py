"""Many records at a time: bounded concurrency, one progress line, and an end before much is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from tqdm import tqdm

from common.errors import InputError
from common.feedback.annotator import Unlabelled
from common.feedback.llm.client import BudgetReached, ChatClient, Meter
from common.feedback.llm.model import LanguageModel, Question
from common.feedback.llm.options import AUTO

JUDGED_FROM = 100  # records from which on the share of failures is looked at
ALL_FAILED_FROM = 6  # records that fail without one that succeeds: no share of them will do better

Item = TypeVar("Item")
Value = TypeVar("Value")
Done = Callable[[int, "Value | Unlabelled"], None]


def ask_all(
    model: LanguageModel,
    items: Sequence[Item],
    question: Callable[[Item], Question[Value] | Value],
    done: Done[Value],
    progress: str,
    before: int = 0,
) -> None:
    """Ask about each item and give `done(place, value)`, in the order in which they are ready.

    `question` makes an item's question, or gives its value where nothing need be asked. At most
    `options.concurrency` items are in work at a time, and no other question is held in memory. `before` counts items
    that got their values in an earlier run.

    Where the endpoint's way to hold to a form is open, it is found out and printed first (`LanguageModel.settle`).

    Raises `InputError` when the budget is reached, when more than `options.max_failure_share` of the items failed, or
    when the first `ALL_FAILED_FROM` of this run all did (unless that share is 1); what is ready by then has been given
    to `done`, and every answer is in the model's store.
    """
    asyncio.run(_Run(model, items, question, done, progress, before).run())


class _Run:
    def __init__(
        self, model: LanguageModel, items: Sequence, question: Callable, done: Done, progress: str, before: int
    ) -> None:
        self._model = model
        self._items = items
        self._question = question
        self._done = done
        self._places = iter(range(len(items)))
        self._total = before + len(items)
        self._before = before
        self._ready, self._failed = before, 0
        self._first_failure = ""
        self._stop = ""
        self._bar = tqdm(
            desc=progress, unit="record", initial=before, total=self._total, dynamic_ncols=True, mininterval=0.5
        )

    async def run(self) -> None:
        workers = min(self._model.options.concurrency, len(self._items))
        with self._bar:
            async with ChatClient(self._model.options, self._model.meter) as client:
                await self._settle(client)
                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(workers):
                            group.create_task(self._work(client))
                except* InputError as errors:  # each worker may have met the same one
                    raise errors.exceptions[0] from None
        if not self._stop and self._too_many_failures(self._ready):
            self._stop = self._failures()
        if self._stop:
            raise InputError(
                f"{self._stop}. {self._ready} of {self._total} records are done; the same command goes on from here, "
                f"every answer being kept in {self._model.store.path}"
            )

    async def _settle(self, client: ChatClient) -> None:
        questions = (asked for item in self._items if isinstance(asked := self._question(item), Question))
        try:
            if found := await self._model.settle(client, questions):
                tqdm.write(found)
        except BudgetReached as reached:
            self._stop = str(reached)

    async def _work(self, client: ChatClient) -> None:
        for place in self._places:
            if self._stop:
                return
            asked = self._question(self._items[place])
            try:
                value = await self._model.ask(client, asked) if isinstance(asked, Question) else asked
            except BudgetReached as reached:
                self._stop = str(reached)
                return
            self._ready += 1
            if isinstance(value, Unlabelled):
                self._failed += 1
                self._first_failure = self._first_failure or value.reason
            self._done(place, value)
            self._bar.set_postfix_str(describe(self._model.meter, self._failed), refresh=False)
            self._bar.update()
            if self._too_many_failures(max(self._ready, JUDGED_FROM)):
                self._stop = self._failures()  # the others finish what is paid for

    def _too_many_failures(self, ready: int) -> bool:
        share = self._model.options.max_failure_share
        all_failed = self._failed == self._ready - self._before >= ALL_FAILED_FROM and share < 1
        return all_failed or self._failed > share * ready

    def _failures(self) -> str:
        options = self._model.options
        auto = "" if options.structured_output == AUTO else "--structured_output auto, which tries every way; "
        return (
            f"{self._failed} of {self._ready - self._before} records got no valid answer, more than "
            f"--max_failure_share {options.max_failure_share:g} allows; the first reason: {self._first_failure}. "
            f"What may help: {auto}another --model; a larger --max_answer_tokens where answers are cut off, a larger "
            "--timeout where none comes"
        )


def describe(meter: Meter, failed: int) -> str:
    """The progress line's end: requests, cost where prices are known, failures."""
    return f"{meter.requests} requests{meter.cost_text}, {failed} failed"
