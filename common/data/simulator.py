"""The embedded search log: users with latent interests whose searches are written as an ordinary log.

A user has two or three interests (topics with weights), each with a focus of three entities and three attributes. The
user searches in sessions about one interest, reformulates inside a session, clicks on some results, and often
returns to the last session's interest. What a user means to search is the **intention**; what the log shows differs
from it with probability `history_noise` or, for the last `num_targets` searches, `target_noise`. So a model that
only imitates the log learns the noise too, and a reward has something to teach.

`sessions.jsonl` has the generic schema (docs/data_formats.md) and nothing latent. `truth.jsonl` beside it tells the
score of every word for every user; only the annotator `simulated` and the evaluation may read it:

    {"user_id": "...", "interests": ["coffee", ...], "words": {"espresso": 2, "latte": 1, ...}}

2 is a word of the user's focus, 1 another word of the user's topics (entity, attribute or intent); a word that is not
there scores 0. An intention always has a focus entity and no word outside its topic, so it is always relevant, and
every kind of noise makes a query irrelevant.

Command: `python -m common.data.simulator --output_dir outputs/<run>/log --num_users 3000 --seed 0`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from common.config import MAX_SEED, check_numbers, option, parse_config
from common.data.records import Event, Record
from common.data.simulated_queries import (
    Intention,
    Interest,
    draw_word,
    load_topics,
    new_intention,
    reformulate,
    truth_words,
)
from common.errors import InputError, run_command
from common.files import claim_output_dir, write_jsonl
from common.text import STOP_WORDS

SESSIONS_NAME = "sessions.jsonl"
TRUTH_NAME = "truth.jsonl"
RUN_FLAGS = frozenset({"output_dir", "resume", "overwrite"})

SITES = ("Handbook", "Almanac", "Digest", "Gazette", "Compass", "Tribune")

FOCUS_WORDS = 3  # entities, and as many attributes
PERSISTENCE = 0.4  # the next session is about the same interest again
CLICK_RATE = 0.4
FOREIGN_QUERY_SHARE = 0.5  # of noise: the whole query belongs to a topic that the user has no interest in
FOREIGN_WORD_SHARE = 0.35  # of noise: one word does; the rest of the noise is a word said twice

LOG_START = 1_704_067_200  # 2024-01-01 00:00 UTC
DAY = 86_400

MAX_SEARCHES = 100  # a user's searches all differ, and an interest has some hundreds of intentions


@dataclass
class SimulatorConfig:
    """Write the embedded search log and its latent truth."""

    output_dir: str = option(
        "", "Folder for sessions.jsonl and truth.jsonl; it must be new, or see resume and overwrite.",
        group="what is written",
    )
    resume: bool = option(False, "Keep the log that output_dir holds if it is complete; else write it.")
    overwrite: bool = option(False, "Replace the log that output_dir holds.")
    num_users: int = option(3000, "Users in the log.", group="the log", minimum=1)
    num_targets: int = option(
        3, "A user's last searches with the target noise: the queries to be predicted.", minimum=1
    )
    min_history: int = option(6, "Fewest searches before the targets.", minimum=1)
    max_history: int = option(8, "Most searches before the targets.", minimum=1)
    history_noise: float = option(0.1, "Share of noisy searches before the targets.", maximum=1)
    target_noise: float = option(0.35, "Share of noisy searches among the targets.", maximum=1)
    dev_share: float = option(0.1, "Share of users in the split dev.", maximum=1)
    test_share: float = option(0.15, "Share of users in the split test.", maximum=1)
    seed: int = option(0, "Seed; the same seed writes the same bytes.", maximum=MAX_SEED)


class SimulatedUser(NamedTuple):
    """A user's log record, the truth behind it, and the noise-free text of each search."""

    record: Record
    interests: tuple[Interest, ...]
    intentions: tuple[str, ...]


def simulate(config: SimulatorConfig) -> Iterator[SimulatedUser]:
    """Yield the users one by one. User i has a random stream of its own, so it does not depend on `num_users`.

    Raises `InputError` for settings that make no log.
    """
    _check(config)
    splits = _splits(config)
    for index, split in enumerate(splits):
        yield _simulate_user(random.Random(f"user {config.seed} {index}"), f"sim-{index:06d}", split, config)


def write_log(config: SimulatorConfig, folder: Path) -> None:
    """Write the truth and then the log itself into `folder`: where `sessions.jsonl` is, both are complete."""
    users = list(simulate(config))
    truth = (
        {
            "user_id": user.record.user_id,
            "interests": [interest.topic.name for interest in user.interests],
            "words": truth_words(user.interests),
        }
        for user in users
    )
    write_jsonl(folder / TRUTH_NAME, truth)
    write_jsonl(folder / SESSIONS_NAME, (user.record.to_dict() for user in users))


def _check(config: SimulatorConfig) -> None:
    check_numbers(config)
    if not 1 <= config.min_history <= config.max_history:
        raise InputError(
            f"--min_history {config.min_history} and --max_history {config.max_history}: "
            "the first must be at least 1 and not above the second"
        )
    if config.max_history + config.num_targets > MAX_SEARCHES:
        raise InputError(f"--max_history plus --num_targets must not exceed {MAX_SEARCHES}")
    sizes = _split_sizes(config)
    if min(sizes.values()) < 1:
        raise InputError(f"the splits would have {sizes} users: raise --num_users or change --dev_share, --test_share")


def _split_sizes(config: SimulatorConfig) -> dict[str, int]:
    dev = round(config.num_users * config.dev_share)
    test = round(config.num_users * config.test_share)
    return {"train": config.num_users - dev - test, "dev": dev, "test": test}


def _splits(config: SimulatorConfig) -> list[str]:
    splits = [split for split, size in _split_sizes(config).items() for _ in range(size)]
    random.Random(f"splits {config.seed}").shuffle(splits)
    return splits


def _simulate_user(rng: random.Random, user_id: str, split: str, config: SimulatorConfig) -> SimulatedUser:
    interests = _draw_interests(rng)
    num_history = rng.randint(config.min_history, config.max_history)
    sessions = _draw_sessions(rng, interests, num_history + config.num_targets)
    events: list[Event] = []
    queries: set[str] = set()
    time = LOG_START + rng.uniform(0, 30 * DAY)
    for session in sessions:
        time += rng.uniform(0.1, 4) * DAY
        for intention in session:
            noise = config.history_noise if len(queries) < num_history else config.target_noise
            query, meant = _log_query(rng, intention, interests, noise, queries)
            queries.add(query)
            time += rng.uniform(15, 240)
            events.append(Event("search", query=query, ts=round(time)))
            if rng.random() < CLICK_RATE:
                time += rng.uniform(3, 60)
                events.append(_click(rng, query, meant, round(time)))
    record = Record(user_id, tuple(events), source="simulated", group=user_id, split=split)
    return SimulatedUser(record, interests, tuple(intention.text for session in sessions for intention in session))


def _draw_interests(rng: random.Random) -> tuple[Interest, ...]:
    return tuple(
        Interest(
            topic,
            weight=rng.uniform(1, 3),
            entities=tuple(rng.sample(topic.entities, FOCUS_WORDS)),
            attributes=tuple(rng.sample(topic.attributes, FOCUS_WORDS)),
        )
        for topic in rng.sample(load_topics(), rng.randint(2, 3))
    )


def _draw_sessions(rng: random.Random, interests: Sequence[Interest], num_searches: int) -> list[list[Intention]]:
    """Sessions of one to three searches, `num_searches` in all, no intention twice."""
    sessions: list[list[Intention]] = []
    seen: set[str] = set()
    while len(seen) < num_searches:
        if not sessions or rng.random() >= PERSISTENCE:
            interest = rng.choices(interests, [interest.weight for interest in interests])[0]
        session: list[Intention] = []
        for _ in range(min(rng.randint(1, 3), num_searches - len(seen))):
            intention = reformulate(rng, session[-1]) if session else new_intention(rng, interest)
            while intention.text in seen:
                intention = new_intention(rng, interest)
            seen.add(intention.text)
            session.append(intention)
        sessions.append(session)
    return sessions


def _log_query(
    rng: random.Random, intention: Intention, interests: Sequence[Interest], noise: float, logged: set[str]
) -> tuple[str, Intention]:
    """The query as logged, never one of `logged`, and the intention that its results answer."""
    if rng.random() >= noise:
        return intention.text, intention
    query, meant = _add_noise(rng, intention, interests)
    while query in logged:
        query, meant = _add_noise(rng, intention, interests)
    return query, meant


def _add_noise(rng: random.Random, intention: Intention, interests: Sequence[Interest]) -> tuple[str, Intention]:
    own = {interest.topic.name for interest in interests}
    foreign = rng.choice([topic for topic in load_topics() if topic.name not in own])
    words = intention.text.split(" ")
    place = rng.choice([place for place, word in enumerate(words) if word not in STOP_WORDS])
    kind = rng.random()
    if kind < FOREIGN_QUERY_SHARE:
        meant = new_intention(rng, Interest(foreign, 1, foreign.entities, foreign.attributes))
        return meant.text, meant
    if kind < FOREIGN_QUERY_SHARE + FOREIGN_WORD_SHARE:
        words[place] = rng.choice(foreign.entities + foreign.attributes)
    else:
        words.insert(rng.randint(0, len(words)), words[place])
    return " ".join(words), intention


def _click(rng: random.Random, query: str, meant: Intention, ts: int) -> Event:
    """A result whose title has the searched entity; what the query left open is drawn as the user would."""
    words = [
        meant.slots.get(slot) or draw_word(rng, meant.interest, slot, set()) for slot in ("attribute", "entity", "noun")
    ]
    site = rng.choice(SITES)
    title = f"{' '.join(words).capitalize()} - {site}"
    url = f"https://www.{site.lower()}.example/{'-'.join(words)}"
    return Event("click", query=query, title=title, url=url, ts=ts, rank=1 + min(int(rng.expovariate(0.5)), 9))


def main() -> None:
    """Write the log, then say what was written and where."""
    config = parse_config(SimulatorConfig)
    if not config.output_dir:
        raise InputError("--output_dir is missing: the folder for the log, e.g. outputs/default/log")
    _check(config)
    folder = claim_output_dir(
        config.output_dir, asdict(config), resume=config.resume, overwrite=config.overwrite, may_differ=RUN_FLAGS
    )
    if not (folder / SESSIONS_NAME).is_file():
        write_log(config, folder)
    sizes = ", ".join(f"{size} {split}" for split, size in _split_sizes(config).items())
    print(f"{config.num_users} users ({sizes}): {folder / SESSIONS_NAME}, truth in {folder / TRUTH_NAME}")
    print(f"next: python -m common.data.prepare --log {folder / SESSIONS_NAME} --output_dir {folder.parent / 'data'}")


if __name__ == "__main__":
    run_command(main)
