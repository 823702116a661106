"""How far two annotators agree on the same samples: a language model with people, another model or another template.

    python -m step2_token_reward.agreement --samples samples.jsonl --labels labels.jsonl --reference gold.tsv
    python -m step2_token_reward.agreement --samples samples.jsonl --labels labels.jsonl --reference second.jsonl

The paper's figure to compare with: people agreed with its annotator on 91.18 % of the words.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import option, parse_config
from common.errors import InputError, run_command
from common.feedback.agreement import measure_agreement, render_agreement
from common.feedback.annotator import Annotation
from common.feedback.labels import read_existing_labels, read_samples
from common.files import read_jsonl, write_json
from step2_token_reward.gold import SUFFIX, read_gold


@dataclass
class AgreementConfig:
    """Compare two annotators' labels of the same samples."""

    samples: str = option("", "The responses that were labelled: samples.jsonl.")
    labels: str = option("", "The labels that are judged: labels.jsonl.")
    reference: str = option(
        "", "What they are compared with: another labels file, or a gold table (.tsv) that people filled in."
    )
    output: str = option("", "Also write the measures to this JSON file.")


def main() -> None:
    """Print the agreement over the samples that both have labelled."""
    config = parse_config(AgreementConfig)
    for name in ("samples", "labels", "reference"):
        if not getattr(config, name):
            raise InputError(f"--{name} is needed")
    samples = read_samples(config.samples)
    labels, first = _read(config.labels, samples)
    reference, second = _read(config.reference, samples)
    shared = [id_ for id_ in labels if id_ in reference]
    if not shared:
        raise InputError(f"{config.reference}: labels none of the samples that {config.labels} labels")
    agreement = measure_agreement((labels[id_], reference[id_]) for id_ in shared)
    print(render_agreement(agreement, first, second, len(shared)))
    if config.output:
        write_json(
            config.output, {"first": first, "second": second, "responses": len(shared), **agreement.to_dict()}
        )
        print(f"\nmeasures: {config.output}")
    print("\nnext: what these numbers mean and what to change stands in docs/ai_feedback.md, 'Trust it, or not'")


def _read(path: str, samples: dict[str, dict[str, Any]]) -> tuple[dict[str, Annotation], str]:
    """Annotations by sample id, and who made them."""
    if path.endswith(SUFFIX):
        return read_gold(path, samples), f"people ({Path(path).name})"
    annotations = read_existing_labels(path, samples)
    return annotations, next((str(row["annotator"]) for _, row in read_jsonl(path)), "nobody")


if __name__ == "__main__":
    run_command(main)
