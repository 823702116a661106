"""An annotator by its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import InputError
from common.feedback.annotator import Annotator, BatchAnnotator
from common.feedback.lexical import LexicalAnnotator
from common.feedback.llm.annotator import LLMAnnotator
from common.feedback.llm.answers import AnswerStore
from common.feedback.llm.client import Meter
from common.feedback.llm.model import LanguageModel
from common.feedback.llm.options import EndpointOptions, check_endpoint
from common.feedback.llm.prompts import load_template
from common.feedback.names import ANNOTATORS, LLM, OWN, is_own
from common.feedback.own import OwnAnnotator
from common.feedback.simulated import SimulatedAnnotator


def load_annotator(name: str, *, truth_path: str = "", word_error_rate: float = 0.0, seed: int = 0) -> Annotator:
    """The annotator called `name`; raises `InputError` for another name or options that it takes not.

    `name` is one of `ANNOTATORS`, or `FILE.py:FUNCTION`, which runs that file (see common/feedback/own.py). `simulated`
    needs `truth_path` (the simulator's truth.jsonl) and takes `word_error_rate` and `seed`.
    """
    if name == "simulated":
        if not truth_path:
            raise InputError("annotator 'simulated' reads the simulator's truth: give --truth <log folder>/truth.jsonl")
        return SimulatedAnnotator(truth_path, word_error_rate=word_error_rate, seed=seed)
    if name == "lexical":
        _refuse_truth(name, truth_path, word_error_rate)
        return LexicalAnnotator()
    if is_own(name):
        _refuse_truth(name, truth_path, word_error_rate)
        return OwnAnnotator(name)
    raise InputError(f"annotator {name!r} is none of {', '.join(ANNOTATORS)}, nor of the form {OWN}")


@contextmanager
def open_annotator(
    name: str,
    *,
    truth_path: str,
    word_error_rate: float = 0.0,
    seed: int,
    endpoint: EndpointOptions,
    template: str,
    answers: str | Path,
) -> Iterator[Annotator | BatchAnnotator]:
    """As `load_annotator`, with `llm` too: a language model at `endpoint`, whose answers are kept in `answers`.

    Raises `InputError` also for an endpoint that may not be asked (`options.check_endpoint`).
    """
    if name != LLM:
        if endpoint.base_url or endpoint.model:
            raise InputError(f"annotator {name!r} asks no language model: --base_url and --model are for {LLM!r}")
        yield load_annotator(name, truth_path=truth_path, word_error_rate=word_error_rate, seed=seed)
        return
    _refuse_truth(name, truth_path, word_error_rate)
    check_endpoint(endpoint)
    prompt = load_template(template)
    with AnswerStore(answers) as store:
        yield LLMAnnotator(LanguageModel(endpoint, store, Meter(endpoint)), prompt)


def _refuse_truth(name: str, truth_path: str, word_error_rate: float) -> None:
    if truth_path or word_error_rate:
        raise InputError(f"annotator {name!r} takes neither --truth nor --word_error_rate: they are for 'simulated'")
