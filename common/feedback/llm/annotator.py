"""The language model as annotator: words and queries of a response, scored in one call."""

from __future__ import annotations

from collections.abc import Sequence

from common.feedback.annotator import Annotation, Done, FeedbackItem, words_by_query
from common.feedback.llm.model import LanguageModel, Question
from common.feedback.llm.prompts import Template, lines_with_words, shown_history, shown_queries
from common.feedback.llm.schemas import parse_annotation, word_form
from common.feedback.llm.workers import ask_all


class LLMAnnotator:
    """Scores responses with a language model and a template of the form of label_words.

    It sees the history and the response, never the logged next queries. One record is one conversation, so that
    nothing in one record's text can reach another's labels.
    """

    def __init__(self, model: LanguageModel, template: Template) -> None:
        self.model = model
        self.template = template

    @property
    def name(self) -> str:
        """`llm:<model>:<template>@<hash>`."""
        return f"llm:{self.model.options.model}:{self.template.title}"

    def annotate_all(
        self, items: Sequence[FeedbackItem], done: Done, progress: str, before: int = 0
    ) -> None:
        """Give `done(place, annotation)` for each item as it is ready; see `workers.ask_all` for what it raises."""
        ask_all(self.model, items, self.question, done, progress, before)

    def question(self, item: FeedbackItem) -> Question[Annotation] | Annotation:
        """What is asked about a response; a response without a word is scored without asking: all 0."""
        words = words_by_query(item.response)
        if not any(words):
            return Annotation(tuple(() for _ in words), (0,) * len(words))
        messages = self.template.messages(
            history=shown_history(item.history, self.model.options.history_events), queries=shown_queries(item.response)
        )
        scores = sum(map(len, words)) + len(lines_with_words(item.response))
        form = word_form(item.response)
        return Question(self.template, messages, form, lambda text: parse_annotation(text, item.response), scores)
