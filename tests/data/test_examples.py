"""Targets, histories and splits: nothing of the future in a history, no group in two splits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.cleaning import RuleTally
from common.data.examples import ExampleBuilder, ExampleOptions, HashSample, is_navigational, load_examples
from common.data.records import Event, Example, Record
from common.errors import InputError


def search(query: str, ts: float | None = None) -> Event:
    return Event("search", query=query, ts=ts)


def build(record: Record, tally: RuleTally | None = None, seed: int = 0, **options) -> list[Example]:
    return list(ExampleBuilder(ExampleOptions(**options), seed).build(record, tally or RuleTally()))


def test_the_last_searches_are_targets_and_everything_from_the_first_on_is_cut() -> None:
    events = (
        Event("visit", title="home"), search("a"), Event("click", "a", "A"), search("b"), Event("click", "b", "B"),
        search("c"), Event("purchase", title="C"), search("d"), Event("click", "d", "D"),
    )
    record = Record("u", events, source="log", group="g", split="dev", session_id="s7")
    assert build(record) == [Example("log/u/s7@1", "u", "g", "log", "dev", events[:3], ("b", "c", "d"))]
    assert build(record, num_targets=1) == [Example("log/u/s7@3", "u", "g", "log", "dev", events[:7], ("d",))]
    # A visit before the first search is a history too; without it that place has none.
    assert [example.targets for example in build(record, windows=0)] == [("a", "b", "c"), ("b", "c", "d")]
    without_visit = Record("u", events[1:], source="log", group="g")
    assert [example.targets for example in build(without_visit, windows=0)] == [("b", "c", "d")]


def test_too_few_searches_give_no_example() -> None:
    tally = RuleTally()
    assert build(Record("u", (search("a"), search("b"), search("c")), "log", "g"), tally) == []
    assert (tally.kept["enough_targets"], tally.dropped["enough_targets"]) == (0, 1)


def test_windows_keep_the_newest() -> None:
    record = Record("u", tuple(search(letter) for letter in "abcdefg"), "log", "g")
    tally = RuleTally()
    newest = build(record, tally, windows=2)
    assert [("".join(event.query for event in e.history), "".join(e.targets)) for e in newest] == [
        ("abc", "def"), ("abcd", "efg")
    ]
    assert [e.id for e in newest] == ["log/u@3", "log/u@4"]
    assert (tally.kept["windows"], tally.dropped["windows"]) == (2, 2)


def test_navigational_queries_are_no_targets_but_stay_in_a_history() -> None:
    record = Record("u", tuple(search(q) for q in ("www.a.example", "x", "b.com", "y", "c com", "z")), "log", "g")
    (found,) = build(record, num_targets=2, windows=1)
    assert found.targets == ("y", "z")
    assert [event.query for event in found.history] == ["www.a.example", "x", "b.com"]
    (found,) = build(record, num_targets=2, windows=1, navigational_targets=True)
    assert found.targets == ("c com", "z")


@pytest.mark.parametrize(
    "query",
    ["www.example.com", "example.com", "http://a.example/b?c", "mail.example.co.uk", "example com", "www example com",
     "Example.ORG/page", "my-shop.de"],
)
def test_navigational(query: str) -> None:
    assert is_navigational(query)


@pytest.mark.parametrize(
    "query", ["example", "how to use example.com", "node.js", "dot com bubble", "version 2.0", "communication", "u.s."]
)
def test_not_navigational(query: str) -> None:
    assert not is_navigational(query)


def test_history_limit_keeps_the_newest_and_is_counted() -> None:
    record = Record("u", tuple(search(letter) for letter in "abcdef"), "log", "g")
    tally = RuleTally()
    (found,) = build(record, tally, max_history_events=2)
    assert [event.query for event in found.history] == ["b", "c"]
    assert tally.dropped["max_history_events"] == 1
    (found,) = build(record, tally, max_history_events=0)
    assert [event.query for event in found.history] == ["a", "b", "c"]


def test_ids_tell_records_of_one_user_apart() -> None:
    builder = ExampleBuilder(ExampleOptions(), 0)
    record = Record("u", tuple(search(letter) for letter in "abcd"), "log", "g")
    ids = [example.id for _ in range(3) for example in builder.build(record, RuleTally())]
    assert ids == ["log/u@1", "log/u/2@1", "log/u/3@1"]


kinds = st.sampled_from(["search", "search", "search", "click", "visit", "purchase"])


@settings(max_examples=150, deadline=None)
@given(st.lists(kinds, max_size=25), st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_no_history_holds_the_future(kind_list: list[str], num_targets: int, windows: int, navigational: bool) -> None:
    queries = [f"q{place}.com" if navigational and place % 4 == 0 else f"q{place}" for place in range(len(kind_list))]
    events = tuple(
        Event(kind, query=query, title=None if kind == "search" else f"t{place}", ts=float(place))
        for place, (kind, query) in enumerate(zip(kind_list, queries, strict=True))
    )
    found = build(Record("u", events, "log", "g"), num_targets=num_targets, windows=windows)
    wanted = []
    for first in range(1, len(events)):
        ahead = [e for e in events[first:] if e.type == "search" and not e.query.endswith(".com")][:num_targets]
        if len(ahead) == num_targets and ahead[0] is events[first]:
            wanted.append((events[:first], tuple(event.query for event in ahead)))
    assert [(e.history, e.targets) for e in found] == (wanted[-windows:] if windows else wanted)
    for one in found:
        first_target = next(event.ts for event in events if event.query == one.targets[0])
        assert all(event.ts < first_target for event in one.history)
        assert one.history


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 30)), min_size=1, max_size=40), st.integers(0, 5))
def test_no_group_lies_in_two_splits(rows: list[tuple[int, int]], seed: int) -> None:
    builder = ExampleBuilder(ExampleOptions(dev_share=0.3, test_share=0.4), seed)
    splits: dict[str, set[str]] = {}
    for group, user in rows:
        record = Record(f"u{user}", tuple(search(letter) for letter in "abcd"), "log", f"g{group}")
        for one in builder.build(record, RuleTally()):
            splits.setdefault(one.group, set()).add(one.split)
    assert all(len(found) == 1 for found in splits.values())
    # The order of the records and who else is there make no difference.
    alone = ExampleBuilder(ExampleOptions(dev_share=0.3, test_share=0.4), seed)
    record = Record("other", tuple(search(letter) for letter in "abcd"), "log", f"g{rows[-1][0]}")
    assert {one.split for one in alone.build(record, RuleTally())} == splits[f"g{rows[-1][0]}"]


def test_shares_of_the_splits() -> None:
    builder = ExampleBuilder(ExampleOptions(dev_share=0.1, test_share=0.3), 4)
    events = tuple(search(letter) for letter in "abcd")
    splits = [
        one.split for n in range(3000) for one in builder.build(Record(f"u{n}", events, "log", f"u{n}"), RuleTally())
    ]
    assert splits.count("dev") / 3000 == pytest.approx(0.1, abs=0.02)
    assert splits.count("test") / 3000 == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("other", ["test", None])
def test_a_group_with_two_named_splits_is_an_error(other: str | None) -> None:
    builder = ExampleBuilder(ExampleOptions(), 0)
    events = tuple(search(letter) for letter in "abcd")
    list(builder.build(Record("u1", events, "log", "g", split="train"), RuleTally()))
    with pytest.raises(InputError, match=r"group 'g': one record names the split train, another \('u2'\)"):
        list(builder.build(Record("u2", events, "log", "g", split=other), RuleTally()))


@pytest.mark.parametrize(
    ("split", "targets"), [("train", ["bc", "cd"]), ("dev", ["bc", "cd"]), ("test", ["ef"])]
)
def test_split_time(split: str, targets: list[str]) -> None:
    events = tuple(search(letter, ts=float(10 * place)) for place, letter in enumerate("abcdef"))
    tally = RuleTally()
    # d at 30 lies before 40, e at 40 lies at it: the pair d, e belongs to neither side.
    found = build(Record("u", events, "log", "g", split=split), tally, num_targets=2, windows=0, split_time="40")
    assert ["".join(e.targets) for e in found] == targets
    assert (tally.kept["split_time"], tally.dropped["split_time"]) == (len(targets), 4 - len(targets))


def test_split_time_takes_the_newest_window_on_its_side() -> None:
    events = tuple(search(letter, ts=float(10 * place)) for place, letter in enumerate("abcdef"))
    record = Record("u", events, "log", "g", split="train")
    (found,) = build(record, num_targets=2, split_time="1970-01-01T00:00:40")
    assert found.targets == ("c", "d")
    untimed = Record("u", tuple(search(letter) for letter in "abcd"), "log", "g", split="train")
    tally = RuleTally()
    assert build(untimed, tally, num_targets=2, split_time="40") == []
    assert tally.dropped["split_time (no time)"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_targets": 0}, "--num_targets"),
        ({"windows": -1}, "--windows"),
        ({"dev_share": 0.6, "test_share": 0.5}, "--dev_share 0.6"),
        ({"split_time": "May"}, "--split_time: time 'May'"),
        ({"split_time": "nan"}, "--split_time"),
    ],
)
def test_options_without_sense(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ExampleBuilder(ExampleOptions(**options), 0)


def test_hash_sample_does_not_depend_on_the_order() -> None:
    examples = [Example(f"id{n}", "u", "g", "s", "test", (search("a"),), ("b",)) for n in range(50)]
    forward, backward = HashSample(10, 0), HashSample(10, 0)
    for one, other in zip(examples, reversed(examples), strict=True):
        forward.offer(one)
        backward.offer(other)
    assert forward.offered == 50
    assert len(forward.examples()) == 10
    assert forward.examples() == backward.examples()[::-1] == [e for e in examples if e in backward.examples()]
    other_seed = HashSample(10, 1)
    everything = HashSample(0, 0)
    for one in examples:
        other_seed.offer(one)
        everything.offer(one)
    assert other_seed.examples() != forward.examples()
    assert everything.examples() == examples


def test_load_examples(tmp_path: Path) -> None:
    one = Example("id", "u", "g", "s", "train", (search("a", 1.5),), ("b", "c"))
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(one.to_dict()) + "\n")
    assert load_examples(tmp_path, "train") == [one]
    path.write_text(json.dumps(one.to_dict()) + '\n{"id": "x"}\n')
    with pytest.raises(InputError, match=r"train\.jsonl:2: not an example"):
        load_examples(tmp_path, "train")
    path.write_text("{")
    with pytest.raises(InputError, match=r"train\.jsonl:1: not valid JSON"):
        load_examples(tmp_path, "train")
    path.write_text("\n")
    with pytest.raises(InputError, match=r"train\.jsonl: holds no example, and training needs some"):
        load_examples(tmp_path, "train")
    with pytest.raises(InputError, match=r"dev\.jsonl: no such file; make it with"):
        load_examples(tmp_path, "dev")
    with pytest.raises(InputError, match="split 'valid' is none of"):
        load_examples(tmp_path, "valid")
