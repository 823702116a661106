"""What is asked of models without storage, by the planner and by the steps themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.models.token_scores import VOCABULARY_PIECE
from common.planning.models import ModelSpec, gives_own_logits
from tests.families import ACTORS, family_config


def _spec(folder: Path, family: str = "llama", vocabulary: int = VOCABULARY_PIECE + 1, **lora: int | str) -> ModelSpec:
    family_config(ACTORS[family], vocab_size=vocabulary).save_pretrained(folder)
    return ModelSpec(str(folder), "causal_lm", eager=ACTORS[family].kernel == "eager", **lora)


@pytest.mark.parametrize(("vocabulary", "chunks"), [(VOCABULARY_PIECE, False), (VOCABULARY_PIECE + 1, True)])
def test_a_vocabulary_of_one_piece_is_read_as_a_whole(vocabulary: int, chunks: bool, tmp_path: Path) -> None:
    assert gives_own_logits(_spec(tmp_path, vocabulary=vocabulary)) == chunks


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_what_a_model_does_to_its_logits_is_noticed(family: str, tmp_path: Path) -> None:
    """Gemma 2 caps them, Granite divides them."""
    assert not gives_own_logits(_spec(tmp_path, family))


@pytest.mark.parametrize(("target", "chunks"), [("q_proj", True), ("lm_head", False)])
def test_adapters_on_the_output_layer_are_not_passed_over(target: str, chunks: bool, tmp_path: Path) -> None:
    assert gives_own_logits(_spec(tmp_path, lora_r=4, lora_target_modules=target)) == chunks
