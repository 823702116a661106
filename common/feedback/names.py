"""What an annotator is called; read without any annotator's code."""

from __future__ import annotations

from collections.abc import Collection

from common.errors import InputError

ANNOTATORS = ("simulated", "lexical")
LLM = "llm"
LLM_TEMPLATE = "label_words_v1"
OWN = "FILE.py:FUNCTION"


def is_own(name: str) -> bool:
    """Whether `name` has the form of an annotator of the user's own, `FILE.py:FUNCTION`."""
    file, _, function = name.rpartition(":")
    return file.endswith(".py") and function.isidentifier()


def check_annotator_name(name: str, flag: str, *, known: Collection[str]) -> None:
    """Raise `InputError` unless `name` is one of `known` or of the form `FILE.py:FUNCTION`; opens nothing."""
    if name not in known and not is_own(name):
        raise InputError(f"--{flag} {name!r} is none of {', '.join(filter(None, known))}, nor of the form {OWN}")
