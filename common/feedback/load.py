"""An annotator by its name."""

from __future__ import annotations

from common.errors import InputError
from common.feedback.annotator import Annotator
from common.feedback.lexical import LexicalAnnotator
from common.feedback.simulated import SimulatedAnnotator

ANNOTATORS = ("simulated", "lexical")


def load_annotator(name: str, *, truth_path: str = "", word_error_rate: float = 0.0, seed: int = 0) -> Annotator:
    """The annotator called `name`; raises `InputError` for an unknown name or options that it does not take.

    `simulated` needs `truth_path` (the simulator's truth.jsonl) and takes `word_error_rate` and `seed`.
    """
    if name == "simulated":
        if not truth_path:
            raise InputError("annotator 'simulated' reads the simulator's truth: give --truth <log folder>/truth.jsonl")
        return SimulatedAnnotator(truth_path, word_error_rate=word_error_rate, seed=seed)
    if name == "lexical":
        if truth_path or word_error_rate:
            raise InputError(
                "annotator 'lexical' takes neither --truth nor --word_error_rate: they are for 'simulated'"
            )
        return LexicalAnnotator()
    raise InputError(f"annotator {name!r} is none of {', '.join(ANNOTATORS)}")
