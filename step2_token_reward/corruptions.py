"""Responses made worse on purpose, so that the reward model sees faults that the SFT model seldom makes.

A reward model that has never seen a repeated word rates it like any other, and a policy finds that out.
"""

from __future__ import annotations

import random

from common.text import Word, split_words


def corrupt(response: str, foreign: str, rng: random.Random) -> str:
    """`response` with one fault: a word repeated, words of another user's response put in, or a line duplicated.

    `foreign` is the other user's response. Which fault and where is drawn from `rng`, among the faults that there are
    words and lines for; without any word the response comes back as it was.
    """
    words = split_words(response)
    if not words:
        return response
    strangers = [word.text for word in split_words(foreign)]
    faults = [lambda: repeat_word(response, words, rng)]
    if strangers:
        faults.append(lambda: swap_words(response, words, strangers, rng))
    if "\n" in response:
        faults.append(lambda: duplicate_line(response, rng))
    return rng.choice(faults)()


def repeat_word(response: str, words: list[Word], rng: random.Random) -> str:
    """One of `words` is said again, after any word of its line."""
    word = rng.choice(words)
    place = rng.choice([other for other in words if other.line == word.line])
    return f"{response[: place.end]} {word.text}{response[place.end :]}"


def swap_words(response: str, words: list[Word], strangers: list[str], rng: random.Random) -> str:
    """One to three of `words` make way for words drawn from `strangers`."""
    chosen = rng.sample(words, min(rng.randint(1, 3), len(words)))
    for word in sorted(chosen, key=lambda word: -word.start):  # from the end, so that spans stay true
        response = f"{response[: word.start]}{rng.choice(strangers)}{response[word.end :]}"
    return response


def duplicate_line(response: str, rng: random.Random) -> str:
    """One line is overwritten with a copy of another."""
    lines = response.split("\n")
    source, target = rng.sample(range(len(lines)), 2)
    lines[target] = lines[source]
    return "\n".join(lines)
