"""The dialogue: what is typed, what is shown, and how it ends."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from common.data.records import Event
from common.pages.colours import reward_colour
from common.prediction.dialogue import parse_event, run_dialogue
from common.prediction.predictor import Prediction
from tests.prediction.models import HISTORIES, LEARNT

ANSWER = Prediction(
    ["red hat", "b\x1b[2Jlue"], True, [0.25, 1.0], [[2.0, 0.0], [1.0]],
    [[("re", 0.25), ("d", 0.25), (" hat", -0.5)], [("b\x1b[2Jlue", 0.0), ("\n", 0.0)]],
)  # fmt: skip


def typed(lines: Iterable[str | BaseException]) -> Callable[[str], str]:
    """An `input` that gives these lines, or raises, and then is at its end."""
    rest = iter(lines)

    def ask(prompt: str) -> str:
        line = next(rest, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return ask


def talk(lines: Iterable[str | BaseException], prediction: Prediction = ANSWER, depth: int = 0) -> list:
    """Hold the dialogue; returns what the model was asked."""
    asked = []

    def predict(history: list[Event], turn: int) -> list[Prediction]:
        asked.append((turn, history))
        return [prediction]

    run_dialogue(predict, 2, ask=typed(lines), depth=depth)
    return asked


@pytest.mark.parametrize(
    ("line", "event"),
    [
        ("red hat", Event("search", query="red hat")),
        (">  Hats in red", Event("click", title="Hats in red")),
        ("$ a hat", Event("purchase", title="a hat")),
        ("@ hats.example", Event("visit", title="hats.example")),
        (">hat", Event("search", query=">hat")),
        ("a\x1b[31mb", Event("search", query="a [31mb")),
        (">", None),
        ("\x07", None),
    ],
)
def test_a_line_is_an_event(line: str, event: Event | None) -> None:
    assert parse_event(line) == event


def test_an_empty_line_asks_and_the_end_of_input_asks_once_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert talk(["", "red hat", "> ", "> Hats", "", "", "shoes"]) == [
        (0, [Event("search", query="red hat"), Event("click", title="Hats")]),
        (1, [Event("search", query="shoes")]),
    ]
    shown = capsys.readouterr().out
    assert "nothing to go on in this line" in shown
    assert shown.count("  1. re(+0.25)d(+0.25) hat(-0.50)  0.25\n  2. b\\x1b[2Jlue(+0.00)  1.00\n") == 2
    assert shown.count("behind each token its reward") == 1 and shown.endswith("bye\n") and "\x1b" not in shown


def test_tokens_have_the_colour_of_their_reward(capsys: pytest.CaptureFixture[str]) -> None:
    talk(["shoes"], depth=24)
    shown = capsys.readouterr().out
    on = {reward: "\x1b[38;2;26;26;26;48;2;{};{};{}m".format(*reward_colour(reward)) for reward in (0.25, -0.5)}
    assert f"  1. {on[0.25]}re\x1b[0m{on[0.25]}d\x1b[0m {on[-0.5]}hat\x1b[0m  0.25\n" in shown
    assert f"{on[-0.5]} -0.50 \x1b[0m" in shown


@pytest.mark.parametrize("before", [[], ["red hat"]])
def test_ctrl_c_ends_at_once(capsys: pytest.CaptureFixture[str], before: list[str]) -> None:
    assert talk([*before, KeyboardInterrupt()]) == []
    assert capsys.readouterr().out.endswith("\nbye\n")


def test_without_scores_and_with_less_than_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    talk(["shoes"], Prediction(["red\u202ehat"], False), depth=24)
    shown = capsys.readouterr().out
    assert "  1. red\\u202ehat\n  (the model wrote 1 of 2 queries)\n  (cut off at --max_response_tokens)\n" in shown
    assert "score" not in shown and "\x1b" not in shown


def test_at_a_real_terminal(model_folder: Path, reward_folder: Path) -> None:
    left_out = ("PYTHONPATH", "NO_COLOR", "COLORTERM")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    argv = [sys.executable, "scripts/predict.py", f"--model={model_folder}", f"--reward={reward_folder}"]
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what began the tests may ignore it, and a child inherits that
        os.execve(argv[0], argv, environment)
    try:
        read_until(terminal, "history> ")
        for event in HISTORIES[0]:
            os.write(terminal, f"{'> ' if event.type == 'click' else ''}{event.text}\n".encode())
        os.write(terminal, b"\n")
        shown = read_until(terminal, "score, 0 to 1")
        assert "\x1b[38;5;16;48;5;" in shown
        plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
        assert all(f"  {number}. {query}  " in plain for number, query in enumerate(LEARNT[0], start=1)), shown
        read_until(terminal, "history> ")
        os.write(terminal, b"\x03")
        read_until(terminal, "bye")
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        process = 0
    finally:
        if process:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        os.close(terminal)


def read_until(terminal: int, text: str) -> str:
    """What the terminal shows up to and with `text`, and no byte more."""
    seen, deadline = b"", time.monotonic() + 300
    while not seen.endswith(text.encode()):
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no {text!r} in 300 s: {seen.decode()}"
        seen += os.read(terminal, 1)
    return seen.decode()
