"""The embedded log: repeatable, read by the ordinary reader, noisy by the set amounts, its truth kept apart."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from common.data.readers import read_log
from common.data.records import Record
from common.data.simulated_queries import load_topics, truth_words
from common.data.simulator import (
    CLICK_RATE,
    FOREIGN_QUERY_SHARE,
    FOREIGN_WORD_SHARE,
    PERSISTENCE,
    SESSIONS_NAME,
    SITES,
    TRUTH_NAME,
    SimulatedUser,
    SimulatorConfig,
    simulate,
    write_log,
)
from common.errors import InputError
from common.feedback.annotator import FeedbackItem
from common.feedback.simulated import SimulatedAnnotator
from common.text import STOP_WORDS, content_words, normalise

SESSION_GAP = 1800
CONFIG = SimulatorConfig(num_users=1000, seed=3)


def assert_share(count: int, trials: int, share: float) -> None:
    """A binomial count lies within four standard deviations (missed by chance once in 16,000 seeds)."""
    assert abs(count / trials - share) <= 4 * math.sqrt(share * (1 - share) / trials), (count / trials, share)


@pytest.fixture(scope="module")
def users() -> list[SimulatedUser]:
    return list(simulate(CONFIG))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    write_log(CONFIG, folder)
    return folder


def queries(user: SimulatedUser) -> list[str]:
    return [event.query for event in user.record.events if event.type == "search"]


def noise_kind(user: SimulatedUser, query: str, intention: str) -> str:
    """What was done to an intention. A foreign query that differs in one word only is taken for a foreign word;
    that needs the same template and the same intent in two topics, about one foreign query in 500."""
    if query == intention:
        return "none"
    words, meant = query.split(), intention.split()
    if len(set(words)) < len(words):
        return "repeat"
    differing = sum(a != b for a, b in zip(words, meant, strict=False))
    return "word" if len(words) == len(meant) and differing == 1 else "query"


def test_topics_have_the_promised_words() -> None:
    topics = load_topics()
    own = [word for topic in topics for word in topic.entities + topic.attributes]
    intents = {word for topic in topics for word in topic.nouns + topic.verbs}
    assert len(topics) == 32
    assert all(len(topic.entities) == len(topic.attributes) == 8 for topic in topics)
    assert all(len(topic.nouns + topic.verbs) == 4 for topic in topics)
    assert len(set(own)) == len(own) == 512
    assert not intents & set(own)
    assert not STOP_WORDS & (intents | set(own))
    assert all(re.fullmatch("[a-z]+", word) and normalise(word) == word for word in intents | set(own))


def test_same_seed_writes_the_same_bytes_in_any_process(log: Path, tmp_path: Path) -> None:
    config = [f"--num_users={CONFIG.num_users}", f"--seed={CONFIG.seed}", f"--output_dir={tmp_path / 'log'}"]
    command = [sys.executable, "-m", "common.data.simulator", *config]
    result = subprocess.run(
        command, env=os.environ | {"PYTHONHASHSEED": "77"}, capture_output=True, text=True, check=True
    )
    assert "1000 users (750 train, 100 dev, 150 test)" in result.stdout
    for name in (SESSIONS_NAME, TRUTH_NAME):
        assert (tmp_path / "log" / name).read_bytes() == (log / name).read_bytes()


def test_another_seed_is_another_log_and_a_smaller_log_has_the_same_users(users: list[SimulatedUser]) -> None:
    fewer = list(simulate(SimulatorConfig(num_users=40, seed=CONFIG.seed)))
    other = list(simulate(SimulatorConfig(num_users=40, seed=CONFIG.seed + 1)))
    assert [user.record.events for user in fewer] == [user.record.events for user in users[:40]]
    assert not {user.record.events for user in other} & {user.record.events for user in fewer}


def test_ordinary_reader_reads_the_log_back(log: Path, users: list[SimulatedUser]) -> None:
    assert list(read_log(log / SESSIONS_NAME)) == [user.record for user in users]


def test_log_has_no_latent_field(log: Path) -> None:
    record_fields = {"user_id", "events", "source", "group", "split"}
    event_fields = {"type", "query", "title", "url", "ts", "rank"}
    for line in (log / SESSIONS_NAME).read_text().splitlines():
        row = json.loads(line)
        assert row.keys() == record_fields and row["source"] == "simulated"
        assert all(event.keys() <= event_fields for event in row["events"])


def test_truth_row_holds_focus_words_as_2_and_the_rest_of_the_topics_as_1(
    log: Path, users: list[SimulatedUser]
) -> None:
    topics = {topic.name: topic for topic in load_topics()}
    rows = [json.loads(line) for line in (log / TRUTH_NAME).read_text().splitlines()]
    assert [row["user_id"] for row in rows] == [user.record.user_id for user in users]
    for row, user in zip(rows, users, strict=True):
        assert row.keys() == {"user_id", "interests", "words"}
        own = [topics[name] for name in row["interests"]]
        assert len(own) in (2, 3)
        assert row["words"].keys() == {word for topic in own for group in topic[1:] for word in group}
        for topic, interest in zip(own, user.interests, strict=True):
            assert {word for word in topic.entities if row["words"][word] == 2} == set(interest.entities)
            assert {word for word in topic.attributes if row["words"][word] == 2} == set(interest.attributes)
            assert len(interest.entities) == len(interest.attributes) == 3
            assert {row["words"][word] for word in topic.nouns + topic.verbs} == {1}


def test_searches_are_distinct_short_and_as_many_as_asked_for(users: list[SimulatedUser]) -> None:
    lengths = set()
    for user in users:
        texts = queries(user)
        lengths.add(len(texts) - CONFIG.num_targets)
        assert len(set(texts)) == len(texts) == len(user.intentions)
        assert all(2 <= len(text.split()) <= 5 for text in user.intentions)
    assert lengths == set(range(CONFIG.min_history, CONFIG.max_history + 1))


def test_noise_has_the_set_shares(users: list[SimulatedUser]) -> None:
    kinds: dict[bool, list[str]] = {True: [], False: []}
    for user in users:
        texts = queries(user)
        for place, (text, intention) in enumerate(zip(texts, user.intentions, strict=True)):
            is_target = place >= len(texts) - CONFIG.num_targets
            kinds[is_target].append(noise_kind(user, text, intention))
    for is_target, share in ((True, CONFIG.target_noise), (False, CONFIG.history_noise)):
        noisy = [kind for kind in kinds[is_target] if kind != "none"]
        assert_share(len(noisy), len(kinds[is_target]), share)
        assert_share(noisy.count("query"), len(noisy), FOREIGN_QUERY_SHARE)
        assert_share(noisy.count("word"), len(noisy), FOREIGN_WORD_SHARE)


def test_intentions_are_relevant_and_logged_targets_as_often_as_the_noise_lets(
    log: Path, users: list[SimulatedUser]
) -> None:
    annotator = SimulatedAnnotator(log / TRUTH_NAME)

    def relevant(user: SimulatedUser, texts: list[str]) -> int:
        item = FeedbackItem(user.record.user_id, user.record.user_id, (), (), "\n".join(texts))
        return sum(score >= 1 for score in annotator.annotate(item).query_scores)

    for user in users:
        assert relevant(user, list(user.intentions)) == len(user.intentions)
    targets = sum(relevant(user, queries(user)[-CONFIG.num_targets :]) for user in users)
    assert_share(targets, CONFIG.num_targets * len(users), 1 - CONFIG.target_noise)


def test_noise_always_makes_a_query_irrelevant(users: list[SimulatedUser]) -> None:
    for user in users:
        truth = truth_words(user.interests)
        for text, intention in zip(queries(user), user.intentions, strict=True):
            content = content_words(text)
            is_clean = all(truth.get(word, 0) for word in content) and len(set(content)) == len(content)
            assert is_clean == (text == intention)


def test_sessions_keep_one_interest_which_persists(users: list[SimulatedUser]) -> None:
    """Session s + 1 is about the topic of s with probability p + (1 - p) w_s, w the normalised interest weights."""
    topic_of = {word: topic.name for topic in load_topics() for word in topic.entities}
    same = 0
    expected = variance = 0.0
    for user in users:
        weights = {interest.topic.name: interest.weight for interest in user.interests}
        sessions: list[set[str]] = []
        last = -math.inf
        searches = [event for event in user.record.events if event.type == "search"]
        for event, intention in zip(searches, user.intentions, strict=True):
            if event.ts - last > SESSION_GAP:
                sessions.append(set())
            sessions[-1] |= {topic_of[word] for word in intention.split() if word in topic_of}
            last = event.ts
        assert all(len(topics) == 1 for topics in sessions)
        names = [topics.pop() for topics in sessions]
        for before, after in pairwise(names):
            chance = PERSISTENCE + (1 - PERSISTENCE) * weights[before] / sum(weights.values())
            expected += chance
            variance += chance * (1 - chance)
            same += before == after
    assert abs(same - expected) <= 4 * math.sqrt(variance)


def test_searches_of_a_session_are_reformulations_of_the_one_before(users: list[SimulatedUser]) -> None:
    """A reformulation swaps, adds or drops one content word; only one that the user has searched before is replaced
    by a new query, so nearly all steps are small."""
    steps = []
    for user in users:
        searches = [event for event in user.record.events if event.type == "search"]
        for place in range(1, len(searches)):
            if searches[place].ts - searches[place - 1].ts < SESSION_GAP:
                before, after = (set(content_words(user.intentions[place - 1 + step])) for step in (0, 1))
                steps.append(len(before ^ after))
    assert steps.count(1) > 0.2 * len(steps) and steps.count(2) > 0.2 * len(steps)
    assert sum(step <= 2 for step in steps) > 0.95 * len(steps)


def test_clicks_follow_their_search_with_title_and_url(users: list[SimulatedUser]) -> None:
    searches = clicks = 0
    for user in users:
        events = user.record.events
        assert all(before.ts < after.ts for before, after in pairwise(events))
        for place, event in enumerate(events):
            searches += event.type == "search"
            if event.type != "click":
                continue
            clicks += 1
            assert events[place - 1].type == "search" and events[place - 1].query == event.query
            assert 1 <= event.rank <= 10
            words, site = event.title.split(" - ")
            assert site in SITES and words == words.capitalize()
            assert len(words.split()) == 3
            assert event.url == f"https://www.{site.lower()}.example/{words.lower().replace(' ', '-')}"
    assert_share(clicks, searches, CLICK_RATE)


def test_splits_have_the_set_sizes(users: list[SimulatedUser]) -> None:
    splits = [user.record.split for user in users]
    assert {split: splits.count(split) for split in splits} == {"train": 750, "dev": 100, "test": 150}


def test_more_targets_and_no_noise() -> None:
    config = SimulatorConfig(
        num_users=20, num_targets=10, history_noise=0, target_noise=0, min_history=2, max_history=2
    )
    for user in simulate(config):
        assert queries(user) == list(user.intentions)
        assert len(user.intentions) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_noise": 1.5}, "--target_noise must lie between 0 and 1"),
        ({"num_targets": 0}, "--num_targets must be 1 or more"),
        ({"min_history": 9, "max_history": 8}, "--min_history 9 and --max_history 8"),
        ({"max_history": 100}, "must not exceed 100"),
        ({"num_users": 2}, "raise --num_users"),
        ({"dev_share": 0.6, "test_share": 0.6}, "change --dev_share"),
    ],
)
def test_settings_without_a_log_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        next(simulate(SimulatorConfig(**settings)))


def test_resume_keeps_a_complete_log_and_finishes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from common.data.simulator import main

    folder = tmp_path / "log"
    flags = ["simulator", f"--output_dir={folder}", "--num_users=20"]
    monkeypatch.setattr(sys, "argv", flags)
    main()
    written = (folder / SESSIONS_NAME).read_bytes()
    with pytest.raises(InputError, match="--resume"):
        main()
    monkeypatch.setattr(sys, "argv", [*flags, "--resume"])
    (folder / SESSIONS_NAME).unlink()
    main()
    assert (folder / SESSIONS_NAME).read_bytes() == written
    stamp = (folder / SESSIONS_NAME).stat().st_mtime_ns
    main()
    assert (folder / SESSIONS_NAME).stat().st_mtime_ns == stamp
    assert str(folder / SESSIONS_NAME) in capsys.readouterr().out
    assert all(isinstance(record, Record) for record in read_log(folder / SESSIONS_NAME))
