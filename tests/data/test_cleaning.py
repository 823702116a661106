"""Each cleaning rule by hand, the private-data patterns, and that nothing private gets through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.data.cleaning import Cleaner, CleaningOptions, RuleTally, busiest_day, hash_fraction
from common.data.examples import ExampleBuilder, ExampleOptions
from common.data.privacy import frequent_queries, has_private_data, mask_url
from common.data.records import Event, Record
from common.errors import InputError

OFF = {
    "max_queries_per_day": 0, "max_queries": 0, "min_chars": 0, "max_chars": 0, "max_words": 0, "pii_filter": False,
    "merge_repeats": False, "min_queries": 1,
}


def searches(*queries: str) -> Record:
    return Record("u", tuple(Event("search", query=query) for query in queries), source="s", group="g")


def clean(record: Record, frequent: frozenset[str] = frozenset(), **options) -> tuple[list[str] | None, RuleTally]:
    """Texts of the cleaned record's queries with only the given rules on, and the counts."""
    tally = RuleTally()
    cleaned = Cleaner(CleaningOptions(**OFF | options), 3, 0, frequent).clean(record, tally)
    return None if cleaned is None else [event.query for event in cleaned.events], tally


def counts(tally: RuleTally, rule: str) -> tuple[int, int]:
    return tally.kept[rule], tally.dropped[rule]


def test_withheld_and_wordless_queries_go() -> None:
    queries, tally = clean(searches("-", "tea", " \t", "?!", "null"))
    assert queries == ["tea", "null"]
    assert counts(tally, "no_words") == (2, 3)


def test_length_rules() -> None:
    words20 = " ".join("abcdefghijklmnopqrst")
    queries, tally = clean(searches("a", "ab", "b" * 100, "b" * 101), min_chars=2, max_chars=100)
    assert queries == ["ab", "b" * 100]
    assert (counts(tally, "min_chars"), counts(tally, "max_chars")) == ((3, 1), (2, 1))
    queries, tally = clean(searches(words20, words20 + " u"), max_words=20)
    assert queries == [words20]
    assert counts(tally, "max_words") == (1, 1)


def test_white_space_and_control_characters_become_one_space() -> None:
    record = Record(
        "u",
        (
            Event("search", query=" green\n\ttea "),
            Event("click", query="green\ttea", title="\r \tTea\x00 shop", url=" http://t.example "),
            Event("visit", title="\n", url="http://t.example"),
        ),
        source="s",
        group="g",
    )
    cleaned = Cleaner(CleaningOptions(**OFF), 3, 0).clean(record, RuleTally())
    assert cleaned.events == (
        Event("search", query="green tea"),
        Event("click", query="green tea", title="Tea shop", url="http://t.example"),
        Event("visit", url="http://t.example"),
    )


def test_a_click_goes_with_its_query() -> None:
    record = Record(
        "u",
        (
            Event("search", query="call 555-0199 now"),
            Event("click", query="call 555-0199 now", title="Phones"),
            Event("click", title="Phones"),
            Event("search", query="tea 2014"),
            Event("click", query="tea 2014", title="2014 555 teas"),
            Event("click", query="tea 2014", title="Mail me: tea@shop.example"),
        ),
        source="s",
        group="g",
    )
    tally = RuleTally()
    cleaned = Cleaner(CleaningOptions(**OFF | {"pii_filter": True}), 3, 0).clean(record, tally)
    assert cleaned.events == (
        Event("click", title="Phones"),
        Event("search", query="tea 2014"),
        Event("click", query="tea 2014", title="2014 555 teas"),
    )
    assert counts(tally, "pii_filter") == (3, 3)


def test_direct_repeats_merge_over_clicks_and_spelling() -> None:
    record = Record(
        "u",
        (
            Event("search", query="Green Tea"),
            Event("click", query="Green Tea", title="one"),
            Event("search", query="green tea!"),
            Event("click", query="green tea!", title="two"),
            Event("search", query="black tea"),
            Event("search", query="green tea"),
        ),
        source="s",
        group="g",
    )
    tally = RuleTally()
    cleaned = Cleaner(CleaningOptions(**OFF | {"merge_repeats": True}), 3, 0).clean(record, tally)
    assert [event.title or event.query for event in cleaned.events] == [
        "Green Tea", "one", "two", "black tea", "green tea"
    ]
    assert counts(tally, "merge_repeats") == (3, 1)


def test_min_queries_counts_different_queries() -> None:
    record = searches("a b", "c d", "A b", "e f", "c d")
    assert clean(record, min_queries=3)[0] is not None
    queries, tally = clean(record, min_queries=4)
    assert queries is None
    assert counts(tally, "min_queries") == (0, 1)
    # 0 stands for num_targets + 1, here 4
    assert clean(record, min_queries=0)[0] is None
    assert clean(searches("a b", "c d", "e f", "g h"), min_queries=0)[0] is not None


def test_bots() -> None:
    day = 86_400.0
    times = [0.0, 10.0, day - 1, day, day + 1, None]
    record = Record("u", tuple(Event("search", query=f"q{n}", ts=ts) for n, ts in enumerate(times)), "s", "g")
    assert busiest_day(record.events) == 3
    assert clean(record, max_queries_per_day=3)[0] is not None
    queries, tally = clean(record, max_queries_per_day=2)
    assert queries is None
    assert counts(tally, "max_queries_per_day") == (0, 1)
    assert clean(record, max_queries=6)[0] is not None
    assert clean(record, max_queries=5)[0] is None


def test_adult_words_drop_the_user(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("Rudeword\n\nvery rude phrase\n")
    for query in ("a RUDEWORD!", "some very rude phrase here"):
        queries, tally = clean(searches("tea", query), adult_words=str(words))
        assert queries is None
        assert counts(tally, "adult_words") == (0, 1)
    assert clean(searches("rudewords", "very rude", "phrase"), adult_words=str(words))[0] is not None
    words.write_text("\n--\n")
    with pytest.raises(InputError, match=r"words\.txt: holds no word"):
        clean(searches("tea"), adult_words=str(words))
    with pytest.raises(InputError, match=r"--adult_words .*none\.txt: no such file"):
        clean(searches("tea"), adult_words=str(tmp_path / "none.txt"))
    words.write_bytes("böse\n".encode("utf-16"))
    with pytest.raises(InputError, match=r"--adult_words .*words\.txt: not UTF-8"):
        clean(searches("tea"), adult_words=str(words))


def test_k_anonymity_counts_users_not_searches() -> None:
    def user(name: str, *queries: str) -> Record:
        return Record(name, tuple(Event("search", query=query) for query in queries), "s", name)

    records = [
        user("a", "tea", "Tea", "my name"), user("b", "tea!", "coffee"), user("b", "coffee"), user("c", "coffee")
    ]
    frequent = frequent_queries(records, 2)
    assert frequent == {"tea", "coffee"}
    queries, tally = clean(records[0], frequent, k_anonymity=2)
    assert queries == ["tea", "Tea"]
    assert counts(tally, "k_anonymity") == (2, 1)
    assert frequent_queries(records, 3) == frozenset()


def test_user_share_samples_groups() -> None:
    def kept(share: float) -> set[int]:
        cleaner = Cleaner(CleaningOptions(**OFF | {"user_share": share}), 3, 0)
        records = {n: Record(f"u{n}", (Event("search", query="tea"),), "s", f"g{n}") for n in range(1000)}
        return {n for n, record in records.items() if cleaner.clean(record, RuleTally())}

    quarter = kept(0.25)
    assert 200 < len(quarter) < 300
    assert quarter < kept(0.5)
    assert len(kept(1.0)) == 1000


def test_hash_fraction_is_even_and_depends_on_everything() -> None:
    values = [hash_fraction("split", 0, f"user {n}") for n in range(4000)]
    assert all(0 <= value < 1 for value in values)
    for quarter in range(4):
        assert 900 < sum(quarter / 4 <= value < (quarter + 1) / 4 for value in values) < 1100
    assert len({hash_fraction(*key) for key in [("a", 0, "x"), ("b", 0, "x"), ("a", 1, "x"), ("a", 0, "y")]}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_chars": -1}, "--max_chars must not be negative"),
        ({"user_share": 0.0}, "--user_share"),
        ({"min_chars": 9, "max_chars": 8}, "--min_chars 9 is above --max_chars 8"),
    ],
)
def test_options_without_sense(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Cleaner(CleaningOptions(**options), 3, 0)


@pytest.mark.parametrize(
    "text",
    [
        "jane.doe@mail.example", "write to a+b@c-d.co.uk please", "12345", "order 00123456", "555-0199", "555.0199",
        "(212) 555 0199", "212-555-0199", "+1 212 555 0199", "020 7946 0958", "078-05-1120", "078 05 1120",
        "4111 1111 1111 1111", "１２３４５", "٤٤٤٤٤",
    ],
)
def test_private_data_is_found(text: str) -> None:
    assert has_private_data(text)


@pytest.mark.parametrize(
    "text",
    [
        "world cup 2014", "2010-2011 season", "form 1040", "403(b) plan", "windows 365 2023", "mail @ home", "@handle",
        "3.14159"[:6], "24/7 pharmacy", "boeing 747-400", "1 800 flowers", "route 66", "c++ 11 vs 14",
    ],
)
def test_ordinary_queries_are_not_private(text: str) -> None:
    assert not has_private_data(text)


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("http://a.example/mortgage-crisis-14704400", "http://a.example/mortgage-crisis-*"),
        ("http://a.example/?to=jane%40mail.example&x=1", "http://a.example/?to=*&x=1"),
        ("http://a.example/call%20555-0199", "http://a.example/call,*"),
        ("http://a.example/caf%C3%A9?page=2", "http://a.example/caf%C3%A9?page=2"),
    ],
)
def test_urls_are_masked(url: str, masked: str) -> None:
    assert mask_url(url) == masked


@given(st.text(alphabet="ab@.-+ 0123456789%()/*٤", max_size=40))
@example("%00000")
@example("0 @0.-00000")
def test_a_masked_url_holds_nothing_private(url: str) -> None:
    assert not has_private_data(mask_url(url))


digit = st.sampled_from("0123456789")


def digits(count: int) -> st.SearchStrategy[str]:
    return st.text(digit, min_size=count, max_size=count)


word = st.text("abcdefgh", min_size=2, max_size=6)
secret = st.one_of(
    st.builds("{}.{}@{}.example".format, word, word, word),
    st.builds("{}-{}-{}".format, digits(3), digits(2), digits(4)),
    st.builds("({}) {}-{}".format, digits(3), digits(3), digits(4)),
    st.builds("{}.{}".format, digits(3), digits(4)),
    digits(5),
    digits(16),
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.lists(word, min_size=1, max_size=3), st.sampled_from(["none", "query", "title", "url"])),
             min_size=5, max_size=12),
    st.lists(secret, min_size=12, max_size=12),
)
def test_private_data_never_reaches_an_example(rows: list[tuple[list[str], str]], secrets: list[str]) -> None:
    events: list[Event] = []
    for (words, where), hidden in zip(rows, secrets, strict=False):
        text = " ".join(words)
        put = {name: f"{text} {hidden} {text}" if name == where else text for name in ("query", "title")}
        url = f"http://x.example/{hidden.replace(' ', '%20')}/page" if where == "url" else "http://x.example/page"
        events += [Event("search", query=put["query"]), Event("click", put["query"], put["title"], url)]
    record = Record("user", tuple(events), source="s", group="g")
    cleaned = Cleaner(CleaningOptions(min_queries=1), 1, 0).clean(record, RuleTally())
    built = ExampleBuilder(ExampleOptions(num_targets=1, windows=0), 0).build(cleaned, RuleTally())
    shown = json.dumps([example.to_dict() for example in built])
    for (_, where), hidden in zip(rows, secrets, strict=False):
        if where != "none":
            assert hidden not in shown
            assert hidden.replace(" ", "%20") not in shown
