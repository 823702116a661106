"""Step 2's samples: rows, parts, ranks, restarts, and responses made worse."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from datetime import date
from typing import Any, ClassVar

import pytest

from common.data.prompts import PromptBuilder
from common.data.records import Event, Example
from common.errors import InputError, Preempted
from common.feedback.labels import read_samples
from common.files import write_jsonl
from common.text import split_queries, split_words
from step2_token_reward import sample
from step2_token_reward.corruptions import corrupt, duplicate_line, repeat_word, swap_words
from step2_token_reward.sample import choose_examples, main
from step2_token_reward.sample_config import SampleConfig, check_config
from tests.distributed.ranks import run_on_ranks
from tests.tiny_models import ordinary_tokenizer, tiny_llama

RESPONSE = "red hat price\nblue shoes, cheap\n北 big hat"


def words_of(text: str) -> list[str]:
    return [word.text for word in split_words(text)]


class TestCorruptions:
    def test_a_repeated_word_is_in_its_own_line_and_all_else_stays(self):
        for seed in range(50):
            worse = repeat_word(RESPONSE, split_words(RESPONSE), random.Random(seed))
            added = Counter(words_of(worse)) - Counter(words_of(RESPONSE))
            assert sum(added.values()) == 1 and not Counter(words_of(RESPONSE)) - Counter(words_of(worse))
            repeats = [len(line) - len(set(line)) for line in map(words_of, worse.split("\n"))]
            assert sum(repeats) == 1

    def test_swapped_words_come_from_the_other_user_and_lines_stay(self):
        counts = set()
        for seed in range(50):
            worse = swap_words(RESPONSE, split_words(RESPONSE), ["zebra", "yak"], random.Random(seed))
            pairs = list(zip(words_of(RESPONSE), words_of(worse), strict=True))
            changed = [new for old, new in pairs if old != new]
            assert set(changed) <= {"zebra", "yak"}
            assert [len(words_of(line)) for line in worse.split("\n")] == [3, 3, 3]
            counts.add(len(changed))
        assert counts == {1, 2, 3}

    def test_a_duplicated_line_takes_the_place_of_another(self):
        lines = RESPONSE.split("\n")
        for seed in range(20):
            worse = duplicate_line(RESPONSE, random.Random(seed)).split("\n")
            assert len(worse) == 3 and len(set(worse)) == 2
            assert sum(new != old for new, old in zip(worse, lines, strict=True)) == 1

    def test_every_fault_that_there_is_room_for_is_drawn(self):
        assert {corrupt("red hat", "", random.Random(seed)) for seed in range(40)} == {
            "red red hat", "red hat red", "red hat hat"
        }  # fmt: skip
        assert all(corrupt(RESPONSE, "zebra", random.Random(seed)) != RESPONSE for seed in range(40))

    @pytest.mark.parametrize("response", ["", "\n", "...\n!"])
    def test_without_words_nothing_changes(self, response):
        assert corrupt(response, "zebra", random.Random(0)) == response


@pytest.fixture
def folders(tmp_path):
    """A model folder, and data of 11 train and 3 dev users."""
    tiny_llama(initializer_range=0.05).save_pretrained(tmp_path / "model")
    ordinary_tokenizer().save_pretrained(tmp_path / "model")
    for split, count in (("train", 11), ("dev", 3)):
        rows = (
            Example(
                f"{split}/{i}", f"{split}-{i}", f"{split}-{i}", "invented", split,
                tuple(Event("search", query=f"hat {n}") for n in range(1 + i % 3)), (f"red hat {i}", "blue hat"),
            ).to_dict()
            for i in range(count)
        )  # fmt: skip
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    return tmp_path


def arguments(folders, name: str, **changes: Any) -> list[str]:
    given = {
        "model_name_or_path": folders / "model", "data_dir": folders / "data", "output_dir": folders / name,
        "num_queries": 2, "max_prompt_tokens": 120, "max_response_tokens": 9, "batch_size": 1, "samples_per_prompt": 2,
        "corrupt_share": 0.5,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in (given | changes).items()]


def run_main(rank: int, world_size: int, flags: list[str]) -> str:
    """The command as this rank; returns its error, if it has one."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["sample.py", *flags])
            main()
    except InputError as error:
        return str(error)
    return ""


def run_here(flags: list[str]) -> str:
    """The command in this process, without a process group."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.engine.distributed.start", lambda hang_timeout: "cpu")
        return run_main(0, 1, flags)


def test_rows_of_every_example(folders):
    assert run_here(arguments(folders, "out")) == ""
    path = folders / "out" / "samples.jsonl"
    rows = read_samples(path)  # what label.py reads
    assert [entry.name for entry in sorted(path.parent.iterdir())] == ["heartbeat", "run_config.json", "samples.jsonl"]
    assert Counter(row["split"] for row in rows.values() if row["origin"] == "gold") == {"train": 11, "dev": 3}
    for number in range(11):
        gold = rows[f"train/{number}#gold"]
        assert gold["response"] == f"red hat {number}\nblue hat" and gold["finished"]
        assert gold["targets"] == [f"red hat {number}", "blue hat"] and gold["user_id"] == f"train-{number}"
        assert gold["history"] == [{"type": "search", "query": f"hat {n}"} for n in range(1 + number % 3)]
        sampled = [rows[f"train/{number}#{n}"] for n in range(2)]
        assert {row["origin"] for row in sampled} == {"sample"} and sampled[0]["response"] != sampled[1]["response"]
    corrupted = [row for row in rows.values() if row["origin"] == "corrupted"]
    assert 2 <= len(corrupted) <= 12, "half of 14, give or take"
    for row in corrupted:
        own = [rows[f"{row['example_id']}#{n}"]["response"] for n in range(2)]
        assert row["response"] not in own or not any(map(split_queries, own))


@pytest.mark.distributed
def test_two_ranks_and_a_restart_write_the_same_samples(folders):
    assert run_here(arguments(folders, "one")) == ""
    expected = (folders / "one" / "samples.jsonl").read_bytes()
    assert run_on_ranks(run_main, 2, arguments(folders, "two")) == ["", ""]
    assert (folders / "two" / "samples.jsonl").read_bytes() == expected


def test_a_signal_ends_sampling_and_keeps_the_parts_that_are_complete(folders, monkeypatch):
    assert run_here(arguments(folders, "whole")) == ""
    real = sample.sample_part

    def signalled_in_the_third_part(examples, number, *rest):
        if number == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(examples, number, *rest)

    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(sample, "sample_part", signalled_in_the_third_part)
    with pytest.raises(Preempted, match="the parts that were complete are saved, the same command with --resume"):
        run_here(arguments(folders, "out"))
    assert signal.getsignal(signal.SIGUSR1) is before
    assert [part.name for part in sorted((folders / "out" / "parts").iterdir())] == ["000000.jsonl", "000001.jsonl"]
    monkeypatch.setattr(sample, "sample_part", real)
    assert run_here([*arguments(folders, "out"), "--resume"]) == ""
    whole, found = (folders / name / "samples.jsonl" for name in ("whole", "out"))
    assert found.read_bytes() == whole.read_bytes()


def test_a_killed_run_goes_on_with_the_parts_that_are_missing(folders, monkeypatch):
    assert run_here(arguments(folders, "whole")) == ""
    expected = (folders / "whole" / "samples.jsonl").read_bytes()
    real, done = sample.sample_part, []

    def killed_in_the_third_part(examples, number, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(number)
        return real(examples, number, *rest)

    monkeypatch.setattr(sample, "sample_part", killed_in_the_third_part)
    with pytest.raises(KeyboardInterrupt):
        run_here(arguments(folders, "out"))
    assert not (folders / "out" / "samples.jsonl").exists()
    monkeypatch.setattr(sample, "sample_part", lambda examples, number, *rest: done.append(number) or real(
        examples, number, *rest))  # fmt: skip
    assert "--resume" in run_here(arguments(folders, "out"))
    assert "temperature: was 1.0, now 0.5" in run_here([*arguments(folders, "out", temperature=0.5), "--resume"])
    assert run_here([*arguments(folders, "out"), "--resume"]) == ""
    assert sorted(done) == [0, 1, 2, 3], "14 examples in parts of 4, each once"
    assert (folders / "out" / "samples.jsonl").read_bytes() == expected
    # Once it is complete, resume changes nothing, and overwrite begins anew.
    assert run_here([*arguments(folders, "out"), "--resume"]) == ""
    assert len(done) == 4
    assert run_here([*arguments(folders, "out", seed=1), "--overwrite"]) == ""
    assert (folders / "out" / "samples.jsonl").read_bytes() != expected


class Bar:
    """Stands for a progress bar, and keeps what it is told."""

    made: ClassVar[list[Bar]] = []

    def __init__(self, total: int, **settings: Any) -> None:
        self.total, self.steps = total, []
        self.made.append(self)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, count: int) -> None:
        self.steps += [count] if count else []


def bar_of(rank: int, world_size: int, flags: list[str]) -> tuple[int, list[int]]:
    """The total of this rank's bar, and how far each update moved it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "progress", Bar)
        patch.setattr(Bar, "made", [])
        assert run_main(rank, world_size, flags) == ""
        (bar,) = Bar.made
    return bar.total, bar.steps


@pytest.mark.distributed
def test_the_bar_counts_the_responses_that_a_rank_has_yet_to_decode(folders, monkeypatch):
    """14 examples with 2 responses each, in parts of 4 examples."""
    seven, seven_again = run_on_ranks(bar_of, 2, arguments(folders, "out"))
    assert [seven[0], seven_again[0]] == [16, 12], "parts of 4, 4, 4 and 2 examples, in turn"
    for total, steps in (seven, seven_again):
        assert sum(steps) == total and len(steps) > 4, "it moves within a part"
    # Ranks without a part: one part of 14.
    whole, idle = run_on_ranks(bar_of, 2, arguments(folders, "one_part", batch_size=14))
    assert (whole[0], sum(whole[1]), idle) == (28, 28, (0, []))

    # A killed run goes on: what is there is not counted, and the ranks share the rest.
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "merge", killed)
        with pytest.raises(KeyboardInterrupt):
            run_here(arguments(folders, "killed"))
    parts = sorted((folders / "killed" / "parts").iterdir())
    assert len(parts) == 4
    for part in (parts[1], parts[3]):
        part.unlink()
    (first, _), (second, _) = run_on_ranks(bar_of, 2, [*arguments(folders, "killed"), "--resume"])
    assert (first, second) == (8, 4)
    assert len((folders / "killed" / "samples.jsonl").read_text().splitlines()) == len(
        (folders / "out" / "samples.jsonl").read_text().splitlines()
    )


def test_few_examples_make_parts_of_one_batch():
    """So that several ranks share them; how many ranks there are plays no part."""
    sizes = {count: [len(part) for part in sample.cut_into_parts(range(count), 8)] for count in (5, 20, 32, 33, 70)}
    assert sizes == {5: [5], 20: [8, 8, 4], 32: [8, 8, 8, 8], 33: [32, 1], 70: [32, 32, 6]}


def test_limits_draw_examples_at_random_but_in_order(folders):
    def chosen(**changes: Any) -> list[str]:
        settings = {"model_name_or_path": "m", "data_dir": str(folders / "data"), "output_dir": "o"} | changes
        return [example.id for example in choose_examples(SampleConfig(**settings))]

    everything = [f"train/{i}" for i in range(11)] + [f"dev/{i}" for i in range(3)]
    assert chosen() == everything
    few = chosen(max_train_examples=5, max_dev_examples=1)
    assert Counter(id_.split("/")[0] for id_ in few) == {"train": 5, "dev": 1}
    assert few == [id_ for id_ in everything if id_ in few]
    assert few == chosen(max_train_examples=5, max_dev_examples=1)
    assert len({tuple(chosen(max_train_examples=5, seed=seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize("split", ["train", "dev"])
def test_an_empty_split_is_refused_by_its_file(folders, split):
    (folders / "data" / f"{split}.jsonl").write_text("")
    assert f"{split}.jsonl: holds no example" in run_here(arguments(folders, "out"))
    assert not (folders / "out").exists()


def test_a_resumed_run_asks_with_the_date_of_its_first_day(folders, monkeypatch):
    asked = []

    def building(*arguments):
        asked.append(arguments[-1])
        return PromptBuilder(*arguments)

    monkeypatch.setattr(sample, "PromptBuilder", building)
    assert run_here(arguments(folders, "out")) == ""
    record = folders / "out" / "run_config.json"
    settings = json.loads(record.read_text())
    assert settings["prompt_date"] == asked[0].isoformat()
    record.write_text(json.dumps(settings | {"prompt_date": "2024-07-26"}))
    assert run_here([*arguments(folders, "out"), "--resume"]) == ""
    assert asked[1] == date(2024, 7, 26)


def test_gold_and_corrupted_rows_are_options(folders):
    assert run_here(arguments(folders, "out", gold=False, corrupt_share=0, samples_per_prompt=1)) == ""
    rows = [json.loads(line) for line in (folders / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 14 and {row["origin"] for row in rows} == {"sample"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_dir": ""}, "--data_dir is missing"),
        ({"temperature": 0.0}, "--temperature must be above 0"),
        ({"corrupt_share": 1.5}, "--corrupt_share must lie between 0 and 1"),
        ({"samples_per_prompt": 0}, "--samples_per_prompt must be 1 or more"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    settings = {"model_name_or_path": "m", "data_dir": "d", "output_dir": "o"}
    check_config(SampleConfig(**settings))
    with pytest.raises(InputError, match=message):
        check_config(SampleConfig(**settings | changes))
