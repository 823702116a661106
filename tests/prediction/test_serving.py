"""An exported folder without this project: plain transformers, and the real server `transformers serve`.

The Python of docs/using_the_model.md is what runs here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import InternalServerError, OpenAI
from transformers import AutoTokenizer

from common.config import ModelOptions
from common.data.prompt_settings import load_prompt_settings
from common.data.prompts import PromptBuilder
from common.data.records import Event
from common.generation.sampling import Sampling
from common.prediction.predictor import first_queries, load_predictor
from tests.prediction.models import HISTORIES, LEARNT
from tests.transformers_server import transformers_serve

DOCUMENT = Path("docs/using_the_model.md")
FOLDER, PORT = "outputs/RUN/step3_tppo/model", "http://localhost:8000/v1"


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with transformers_serve(model_folder, tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(scope="module")
def builder(model_folder: Path) -> PromptBuilder:
    return load_prompt_settings(model_folder).builder(AutoTokenizer.from_pretrained(model_folder))


def code_of_the_document(**changes: str) -> list[str]:
    """Its Python blocks, with a text replaced in each place where it stands."""
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    for old, new in changes.items():
        assert any(old in block for block in blocks)
        blocks = [block.replace(old, new) for block in blocks]
    return blocks


def test_the_documents_code_gives_the_queries_of_the_model(
    server: str, model_folder: Path, builder: PromptBuilder
) -> None:
    plain, client = code_of_the_document(**{FOLDER: str(model_folder), PORT: server})
    names: dict[str, Any] = {}
    exec(plain, names)
    assert names["inputs"]["input_ids"].tolist() == [builder.ids(HISTORIES[0])]
    assert names["queries"] == LEARNT[0]
    exec(client, names)
    assert names["served"] == LEARNT[0]


def test_a_served_chat_reads_the_prompt_of_training_and_answers_greedily_as_the_command_does(
    server: str, model_folder: Path, builder: PromptBuilder
) -> None:
    unknown = (Event("visit", url="https://hats.example/red-hats"), Event("search", query="best hat for a bicycle"))
    histories = [*HISTORIES, unknown]
    predictor = load_predictor(str(model_folder), load_prompt_settings(model_folder), 32, "", ModelOptions())
    predictions = predictor.predict(histories, Sampling(32, temperature=0.0), rows=4, reward_rows=1)
    client = OpenAI(base_url=server, api_key="none")
    for history, prediction in zip(histories, predictions, strict=True):
        completion = client.chat.completions.create(
            model=str(model_folder), messages=[{"role": "user", "content": builder.text(history)}], temperature=0,
            max_tokens=32,
        )  # fmt: skip
        (choice,) = completion.choices
        assert first_queries(choice.message.content, 2) == prediction.queries
        assert (choice.finish_reason == "stop") == prediction.finished
        assert completion.usage.prompt_tokens == len(builder.ids(history))


def test_a_served_chat_in_another_form_is_refused(server: str, model_folder: Path) -> None:
    messages = [{"role": "system", "content": "be nice"}, {"role": "user", "content": "red hat"}]
    with pytest.raises(InternalServerError):
        OpenAI(base_url=server, api_key="none", max_retries=0).chat.completions.create(
            model=str(model_folder), messages=messages, max_tokens=8
        )
