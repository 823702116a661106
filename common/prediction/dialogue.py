"""A dialogue: somebody types what a user did and sees the queries that a model expects next."""

from __future__ import annotations

from collections.abc import Callable

from common.data.cleaning import tidy_event
from common.data.records import Event
from common.prediction.predictor import Prediction
from common.prediction.terminal import escape, legend, show_tokens

# Those of the template `compact`.
MARKS = {">": "click", "$": "purchase", "@": "visit"}
WELCOME = """Type what a user did, oldest first, one event a line:
  red shoes         searched
  > Shoes for rain  clicked on; in the same way "$ " bought and "@ " visited
An empty line asks for the next queries. Ctrl-D or Ctrl-C ends."""

Predict = Callable[[list[Event], int], list[Prediction]]


def run_dialogue(predict: Predict, num_queries: int, *, ask: Callable[[str], str], depth: int) -> None:
    """Ask for histories and show what `predict(history, number of the turn)` gives, until there is no more input.

    `ask(prompt)` gives a line, as `input` does; its `EOFError` ends the history that was begun and then the dialogue,
    `KeyboardInterrupt` ends it at once. `depth` is the terminal's (`colour_depth`).
    """
    print(WELCOME, flush=True)
    turn, open_ = 0, True
    try:
        while open_:
            history, open_ = read_history(ask)
            if history:
                show(predict(history, turn), num_queries, depth, with_legend=turn == 0)
                turn += 1
    except KeyboardInterrupt:
        print()
    print("bye", flush=True)


def read_history(ask: Callable[[str], str]) -> tuple[list[Event], bool]:
    """The events up to an empty line, and whether more can be read after it."""
    history: list[Event] = []
    while True:
        try:
            line = ask("history> ").removeprefix("\ufeff").strip()  # what is piped in may begin with a byte order mark
        except EOFError:
            print()
            return history, False
        if not line:
            return history, True
        event = parse_event(line)
        if event is None:
            print("  nothing to go on in this line; type a query, or a mark and a title")
        else:
            history.append(event)


def parse_event(line: str) -> Event | None:
    """The event that a line stands for; None for a line without a text, such as a mark alone."""
    mark, _, title = line.partition(" ")
    event = tidy_event(Event(MARKS[mark], title=title) if mark in MARKS else Event("search", query=line))
    return event if event.text else None


def show(predictions: list[Prediction], num_queries: int, depth: int, *, with_legend: bool) -> None:
    """Print the queries of each prediction, with the scores that there are."""
    for number, prediction in enumerate(predictions, start=1):
        print(f"next queries (sample {number} of {len(predictions)}):" if len(predictions) > 1 else "next queries:")
        for place, query in enumerate(prediction.queries):
            if prediction.query_scores is None or prediction.tokens is None:
                print(f"  {place + 1}. {escape(query)}")
            else:
                shown = show_tokens(prediction.tokens[place], depth)
                print(f"  {place + 1}. {shown}  {prediction.query_scores[place]:.2f}")
        if len(prediction.queries) < num_queries:
            print(f"  (the model wrote {len(prediction.queries)} of {num_queries} queries)")
        if not prediction.finished:
            print("  (cut off at --max_response_tokens)")
    if with_legend and predictions[0].query_scores is not None:
        print(f"  {legend(depth)}")
    print(flush=True)
