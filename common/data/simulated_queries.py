"""What a simulated user means to search: topics with their words, templates, and reformulations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from string import Formatter
from typing import NamedTuple

from common.files import read_json

TOPICS_FILE = Path(__file__).with_name("simulator_topics.json")

# Slots and stop words only: a template adds no word of its own that would need a score.
TEMPLATES = (
    "{attribute} {entity}",
    "{entity} {noun}",
    "{noun} for {entity}",
    "{verb} {entity}",
    "how to {verb} {entity}",
    "{entity} or {other}",
    "{attribute} {entity} {noun}",
    "{noun} for {attribute} {entity}",
    "{verb} {attribute} {entity}",
    "how to {verb} {attribute} {entity}",
    "{attribute} {entity} or {other}",
    "{entity} and {other} {noun}",
)

FOCUS_ATTRIBUTE_RATE = 0.7  # the other attributes are drawn from the whole topic
SWAP_RATE = 0.5  # of reformulations; the others add or drop a word


class Topic(NamedTuple):
    """A field of interest and its words; entities and attributes belong to no other topic."""

    name: str
    entities: tuple[str, ...]
    attributes: tuple[str, ...]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]


class Interest(NamedTuple):
    """A topic as one user has it: how often, and which of its entities and attributes."""

    topic: Topic
    weight: float
    entities: tuple[str, ...]
    attributes: tuple[str, ...]


class Intention(NamedTuple):
    """What a user means to search: a template and the words of its slots."""

    interest: Interest
    template: str
    slots: dict[str, str]

    @property
    def text(self) -> str:
        """The query, free of noise."""
        return self.template.format(**self.slots)


@cache
def load_topics() -> tuple[Topic, ...]:
    """The topics of `simulator_topics.json`, in the file's order."""
    return tuple(
        Topic(name, *map(tuple, (row["entities"], row["attributes"], row["intents"]["nouns"], row["intents"]["verbs"])))
        for name, row in read_json(TOPICS_FILE).items()
    )


def truth_words(interests: Sequence[Interest]) -> dict[str, int]:
    """Score of each word that a user with these interests finds relevant: focus 2, the rest of the topics 1."""
    topics = [interest.topic for interest in interests]
    words = {word: 1 for topic in topics for word in topic.entities + topic.attributes + topic.nouns + topic.verbs}
    words |= {word: 2 for interest in interests for word in interest.entities + interest.attributes}
    return dict(sorted(words.items()))


def new_intention(rng: random.Random, interest: Interest) -> Intention:
    """A query about the interest, of any template."""
    return _fill(rng, interest, rng.choice(TEMPLATES), {})


def reformulate(rng: random.Random, last: Intention) -> Intention:
    """Swap one word for another of its kind, or go to a template with one slot more or less."""
    if rng.random() < SWAP_RATE:
        slot = rng.choice(list(last.slots))
        word = draw_word(rng, last.interest, slot, set(last.slots.values()))
        return last._replace(slots=last.slots | {slot: word})
    near = [template for template in TEMPLATES if len(_slots(template) ^ last.slots.keys()) == 1]
    return _fill(rng, last.interest, rng.choice(near), last.slots)


def draw_word(rng: random.Random, interest: Interest, slot: str, taken: set[str]) -> str:
    """A word of the interest for a template's slot, none of `taken`: the entity always from the user's focus."""
    topic = interest.topic
    focused = slot == "attribute" and rng.random() < FOCUS_ATTRIBUTE_RATE
    words = {
        "entity": interest.entities,
        "other": topic.entities,
        "attribute": interest.attributes if focused else topic.attributes,
        "noun": topic.nouns,
        "verb": topic.verbs,
    }[slot]
    return rng.choice([word for word in words if word not in taken])


def _fill(rng: random.Random, interest: Interest, template: str, known: dict[str, str]) -> Intention:
    slots: dict[str, str] = {}
    for slot in sorted(_slots(template)):  # a set of texts has no order that the next process would repeat
        slots[slot] = known.get(slot) or draw_word(rng, interest, slot, set(slots.values()) | set(known.values()))
    return Intention(interest, template, slots)


@cache
def _slots(template: str) -> frozenset[str]:
    return frozenset(slot for _, slot, _, _ in Formatter().parse(template) if slot)
