"""Ask an endpoint about one invented record, before hours of work depend on its answers.

    python -m common.feedback.llm.check --base_url http://localhost:8000/v1 --model meta-llama/Llama-3.3-70B-Instruct
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from common.access import scratch_folder
from common.config import option, parse_config
from common.data.records import Event
from common.errors import InputError, run_command
from common.feedback.annotator import Annotation, FeedbackItem, Unlabelled, words_by_query
from common.feedback.llm.options import EndpointOptions
from common.feedback.load import open_annotator
from common.feedback.names import LLM, LLM_TEMPLATE

ITEM = FeedbackItem(
    "check", "nobody",
    (Event("search", query="trail running shoes"), Event("click", title="Best trail shoes for flat feet")),
    (), "trail shoes flat feet\nbanana bread recipe",
)  # fmt: skip


@dataclass
class CheckConfig(EndpointOptions):
    """Ask an endpoint about one invented record and print its labels."""

    template: str = option(LLM_TEMPLATE, "The prompt, by name or as a file.")


def main() -> None:
    """Print the labels; raises `InputError` when the endpoint gives none."""
    config = parse_config(CheckConfig)
    results: list[Annotation | Unlabelled] = []
    # A threshold of 1 lets the one record fail, so that its own reason is shown.
    endpoint = replace(config, max_failure_share=1.0, max_retries=min(config.max_retries, 2))
    with scratch_folder("check-") as folder, open_annotator(
        LLM, truth_path="", seed=0, endpoint=endpoint, template=config.template, answers=folder / "answers.jsonl"
    ) as annotator:
        annotator.annotate_all([ITEM], lambda _, result: results.append(result), "check")
    (result,) = results
    if isinstance(result, Unlabelled):
        replies = "".join(f"\nanswer: {reply[:300]!r}" for reply in result.replies)
        raise InputError(f"{config.base_url}: {config.model} gives no valid labels: {result.reason}{replies}")
    for line, scores, score in zip(
        words_by_query(ITEM.response), result.word_scores, result.query_scores, strict=True
    ):
        print(f"{score}  " + "  ".join(f"{word.text} {value}" for word, value in zip(line, scores, strict=True)))
    print(f"{config.model} at {config.base_url} answers as it should")
    print(
        "next: python -m step2_token_reward.label --samples ... --labels ... --annotator llm "
        f"--base_url {config.base_url} --model {config.model}   (with --dry_run: its cost alone)"
    )


if __name__ == "__main__":
    run_command(main)
