"""A long run that is killed goes on where it was, and its output is that of a run that was not."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from common.errors import InputError
from common.files import write_jsonl
from common.prediction.partial import PartialOutput
from common.prediction.predictor import Predictor
from tests.prediction.models import HISTORIES
from tests.prediction.test_command import run

COUNT = 120  # histories; with --batch_size 1 four responses are a part
SAMPLED = {"temperature": 3, "samples": 2, "seed": 5}
ROW = {"id": "h/u", "queries": ["caf\u00e9"]}


@pytest.fixture(scope="module")
def flags(model_folder: Path, reward_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("log") / "history.jsonl"
    events = [[event.to_dict() for event in HISTORIES[place % 3]] for place in range(COUNT)]
    write_jsonl(path, ({"user_id": f"u{place}", "events": of_user} for place, of_user in enumerate(events)))
    return {"model": model_folder, "reward": reward_folder, "history": path, "batch_size": 1}


def partial_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial.jsonl")


def test_a_run_that_goes_on_another_day_keeps_the_date_of_its_first_prompt(tmp_path: Path) -> None:
    first, next_day = ({"seed": 1, "prompt_date": f"2026-11-{day}"} for day in (28, 29))
    with PartialOutput(tmp_path / "p", first, total_rows=10, part_rows=4) as partial:
        assert partial.settings == first
        partial.append([ROW] * 4)
    with PartialOutput(tmp_path / "p", next_day, total_rows=10, part_rows=4) as partial:
        assert (partial.rows, partial.settings) == (4, first)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("drawn", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_killed_run_goes_on_and_gives_the_bytes_of_one_that_was_not(
    flags: dict, drawn: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flags | drawn
    run(**flags, output=tmp_path / "whole")
    argv = [f"--{name}={value}" for name, value in (flags | {"output": tmp_path / "cut"}).items()]
    partial, deadline = partial_of(tmp_path / "cut"), time.monotonic() + 300
    process = subprocess.Popen([sys.executable, "scripts/predict.py", *argv], stderr=subprocess.DEVNULL)
    try:
        while lines(partial) < 10:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert stat.S_IMODE(partial.stat().st_mode) == 0o600 and not (tmp_path / "cut").exists()
    answered = (lines(partial) - 1) // 4 * 4
    capsys.readouterr()
    with mock.patch.object(Predictor, "predict", autospec=True, side_effect=Predictor.predict) as predict:
        run(**flags, output=tmp_path / "cut")
    samples = drawn.get("samples", 1)
    assert f"going on after {answered} of {COUNT * samples} responses" in capsys.readouterr().out
    asked = [len(call.args[1]) for call in predict.call_args_list]
    assert sum(asked) == COUNT - answered // samples and max(asked) == 4 // samples  # none twice, few at a time
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not partial.exists()


def test_the_bar_moves_within_a_part(flags: dict, tmp_path: Path) -> None:
    """One part of all histories; nothing but the end of single responses can move the bar before the last."""
    with mock.patch("common.prediction.batch.progress") as progress:
        run(**flags | {"batch_size": 30} | SAMPLED, output=tmp_path / "p")
    bar = progress.return_value.__enter__.return_value
    steps = [call.args[0] for call in bar.update.call_args_list]
    assert progress.call_args.kwargs["total"] == sum(steps) == COUNT * 2
    assert max(steps) <= 30


def test_what_is_sampled_depends_on_the_place_and_not_on_the_batch(flags: dict, tmp_path: Path) -> None:
    # Without a reward model: a batch is padded, so its scores differ by their rounding.
    flags = {name: value for name, value in flags.items() if name != "reward"} | SAMPLED
    run(**flags, output=tmp_path / "one")
    run(**flags | {"batch_size": 64}, output=tmp_path / "many")
    one = (tmp_path / "one").read_text()
    assert one == (tmp_path / "many").read_text()
    queries = [tuple(json.loads(line)["queries"]) for line in one.splitlines()]
    assert len(set(queries[::6] + queries[1::6])) > COUNT // 3  # of the same history, yet drawn anew


def test_other_settings_are_refused_and_named_and_nothing_is_lost(
    flags: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, partial = tmp_path / "p", partial_of(tmp_path / "p")
    predict = Predictor.predict

    def interrupted(self: Predictor, *args: object, **named: object) -> object:
        if lines(partial) > 5:
            raise KeyboardInterrupt
        return predict(self, *args, **named)

    with mock.patch.object(Predictor, "predict", interrupted), pytest.raises(SystemExit, match="130"):
        run(**flags, output=output)
    assert "was not written, the same command goes on after 8 responses" in capsys.readouterr().err
    kept = partial.read_bytes()
    other = tmp_path / "history.jsonl"
    other.write_text(flags["history"].read_text().replace('"u119"', '"u120"'))
    for changes, message in (
        ({"temperature": 1}, "other settings .temperature: was 0.0, now 1.0.. Give those again to go on"),
        ({"history": other, "max_bad_lines": 1}, "other settings .histories: was '[0-9a-f]{16}', now '[0-9a-f]{16}'."),
        ({"num_queries": 1, "overwrite": True}, "num_queries: was 2, now 1"),
    ):
        with pytest.raises(InputError, match=message):
            run(**flags | changes, output=output)
    weights = flags["reward"] / "model.safetensors"
    times = weights.stat()
    weights.touch()
    with pytest.raises(InputError, match="reward files: was"):  # trained anew under the same name
        run(**flags, output=output)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert partial.read_bytes() == kept
    run(**flags, output=output)
    assert lines(output) == COUNT


@pytest.mark.parametrize(
    ("tail", "rows"),
    [(b"", 4), (b'{"id": "h', 4), (b"{}\n" * 3, 4), (b"{}\n" * 3 + b"{", 4), (b"{}\n" * 4, 8), (b"{}\n" * 6, 10)],
)
def test_only_complete_parts_are_kept(tmp_path: Path, tail: bytes, rows: int) -> None:
    with PartialOutput(tmp_path / "p", {"seed": 1}, total_rows=10, part_rows=4) as partial:
        partial.append([ROW] * 4)
    with partial.path.open("ab") as stream:
        stream.write(tail)
    with PartialOutput(tmp_path / "p", {"seed": 1}, total_rows=10, part_rows=4) as partial:
        assert partial.rows == rows
        partial.append([{"last": 1}])
        assert [*partial.read()] == [ROW] * 4 + [{}] * (rows - 4) + [{"last": 1}]


def test_one_process_at_a_time_and_no_file_of_others(tmp_path: Path) -> None:
    with PartialOutput(tmp_path / "p", {}, 1, 1), pytest.raises(InputError, match="another process is writing here"):
        PartialOutput(tmp_path / "p", {}, 1, 1)
    assert list(tmp_path.iterdir()) == []
    for text in ("mine\n", "[1]\n", '{"settings": 1}\n'):
        partial_of(tmp_path / "p").write_text(text)
        with pytest.raises(InputError, match="not begun by this command; move it away"):
            PartialOutput(tmp_path / "p", {}, 1, 1)
        assert partial_of(tmp_path / "p").read_text() == text


def test_histories_that_change_while_they_are_read_give_no_output(flags: dict, tmp_path: Path) -> None:
    history = tmp_path / "history.jsonl"
    history.write_bytes(flags["history"].read_bytes())
    fewer = history.read_bytes().splitlines(keepends=True)[: COUNT - 8]
    predict = Predictor.predict

    def shortened(self: Predictor, *args: object, **named: object) -> object:
        history.write_bytes(b"".join(fewer))
        return predict(self, *args, **named)

    with mock.patch.object(Predictor, "predict", shortened), pytest.raises(InputError, match="changed while it was"):
        run(**flags | {"history": history}, output=tmp_path / "p")
    assert not (tmp_path / "p").exists()
