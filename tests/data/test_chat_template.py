"""Chat templates as public models have them: dates, parts, errors, EOS. Every folder asks tomorrow as it does today."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from pathlib import Path

import pytest
import transformers.utils.chat_template_utils as chat_template_utils
from transformers import AutoTokenizer

from common.data.prompt_settings import load_prompt_settings
from common.data.prompts import PromptBuilder
from common.data.records import Event
from common.engine.run_date import date_record, run_date
from common.errors import RUN_CONFIG_NAME, InputError
from common.files import write_json
from common.models.loading import save_model_folder
from tests.tiny_models import ordinary_tokenizer, tiny_llama

HISTORY = [Event("search", query="red hat"), Event("click", title="Hats")]
DAY = date(2024, 7, 26)

# How Llama 3.2, Mistral Small 3 and Granite 3 ask for the date, each with the date of DAY.
DATED = {
    "llama": (
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        "{%- set date_string = strftime_now(\"%d %b %Y\") %}{%- else %}{%- set date_string = \"1 Jan 2000\" %}"
        "{%- endif %}{%- endif %}Today Date: {{ date_string }}\n{% for m in messages %}[{{ m.content }}]{% endfor %}",
        "Today Date: 26 Jul 2024\n",
    ),
    "mistral": (
        "{%- set today = strftime_now(\"%Y-%m-%d\") %}The current date is {{ today }}.{{ messages[0].content }}",
        "The current date is 2024-07-26.",
    ),
    "granite": (
        "{%- macro system() -%}{{ \"Today's Date: \" + strftime_now( format='%B %d, %Y' ) + \".\\n\" }}{%- endmacro -%}"
        "{{ system() }}{{ messages[0]['content'] }}",
        "Today's Date: July 26, 2024.",
    ),
}


@pytest.fixture(params=[1, 400])
def days_later(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes wrong: whatever asks transformers or this project for the date gets another day each time."""
    shift = {"days": 0}

    def moved() -> datetime:
        shift["days"] += request.param
        return datetime(2025, 1, 1) + timedelta(days=shift["days"])

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return moved()

    class Calendar(date):
        @classmethod
        def today(cls) -> date:
            return moved().date()

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    monkeypatch.setattr("common.data.prompts.date", Calendar)
    monkeypatch.setattr("common.engine.run_date.date", Calendar)


def builder(template: str | dict[str, str], today: date | None = None) -> PromptBuilder:
    tokenizer = ordinary_tokenizer()
    tokenizer.chat_template = template
    tokenizer.name_or_path = "models/mine"
    return PromptBuilder(tokenizer, "chat", 400, 3, today)


@pytest.mark.parametrize("kind", DATED)
def test_a_date_is_shown_in_the_templates_own_format(kind: str) -> None:
    template, shown = DATED[kind]
    made = builder(template, DAY)
    assert shown in made.tokenizer.decode(made.ids(HISTORY))
    assert "red hat" in made.tokenizer.decode(made.ids(HISTORY))


@pytest.mark.parametrize("kind", DATED)
@pytest.mark.usefixtures("days_later")
def test_ids_do_not_change_from_day_to_day(tmp_path: Path, kind: str) -> None:
    made = builder(DATED[kind][0])
    ids = made.ids(HISTORY)
    assert made.ids(HISTORY) == ids
    assert builder(DATED[kind][0]).ids(HISTORY) != ids  # the clock has moved: the test can fail
    # From folder to folder: what step 1 writes is what step 3 starts from and writes again, and what predicts.
    folder = save_model_folder(tiny_llama(), made.tokenizer, tmp_path / "step1", {}, prompts=made)
    for name in ("step3", "merged"):
        loaded = load_prompt_settings(folder).builder(AutoTokenizer.from_pretrained(folder))
        assert loaded.ids(HISTORY) == ids
        folder = save_model_folder(tiny_llama(), loaded.tokenizer, tmp_path / name, {}, prompts=loaded)
    served = AutoTokenizer.from_pretrained(folder)
    request = [{"role": "user", "content": made.text(HISTORY)}]
    assert served.apply_chat_template(request, add_generation_prompt=True, return_dict=False) == ids


@pytest.mark.usefixtures("days_later")
def test_a_resumed_run_keeps_the_day_on_which_it_began(tmp_path: Path) -> None:
    begun = run_date(tmp_path, resume=False)
    write_json(tmp_path / RUN_CONFIG_NAME, date_record(begun))
    assert run_date(tmp_path, resume=True) == begun
    assert run_date(tmp_path, resume=False) > begun
    write_json(tmp_path / RUN_CONFIG_NAME, {})  # begun before dates were recorded
    assert run_date(tmp_path, resume=True) > begun


def test_a_date_that_cannot_be_pinned_is_refused() -> None:
    with pytest.raises(InputError, match=r"models/mine: .*today's date in a format .*--prompt_template plain"):
        builder("{% set f = '%Y' %}{{ strftime_now(f) }}{{ messages[0].content }}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('a system message is needed') }}", "a system message is needed"),
        ("{{ messages[0].content }}{{ custom.setting }}", "'custom' is undefined"),
        ("{{ messages[1].content.text }}", "no element 1"),
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("{{ messages[0].content.encode().decode('utf-9') }}", "unknown encoding"),
        ("{% for %}", "Expected an expression"),
        ("a constant", "leaves out the user's message"),
        ("{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}", "leaves out the user's message"),
    ],
)
def test_a_template_that_cannot_ask_names_its_folder_and_the_remedy(template: str, message: str) -> None:
    with pytest.raises(InputError, match=r"^models/mine: its chat template .*--prompt_template plain") as error:
        builder(template)
    assert message in str(error.value)


def test_a_template_that_fails_on_some_messages_alone() -> None:
    made = builder("{% if 'Hats' in messages[0].content %}{{ raise_exception('no hats') }}{% endif %}"
                   "{{ messages[0].content }}")  # fmt: skip
    assert made.ids(HISTORY[:1])
    with pytest.raises(InputError, match=r"models/mine: .*no hats"):
        made.ids(HISTORY)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
        "{% endif %}{% endfor %}{% endfor %}",
        "[{{ messages[0].role }}]{{ messages[0]['content'][0]['text'] }}",
        "[user]{{ messages[0].content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join }}",
    ],
)
def test_a_template_of_parts_shows_the_message(template: str) -> None:
    made = builder(template)
    assert made.tokenizer.decode(made.ids(HISTORY)) == "[user]" + made.text(HISTORY)


def test_of_several_templates_the_default_one_is_taken() -> None:
    assert builder({"default": "<{{ messages[0].content }}>", "tool_use": "x"}).chat.source.startswith("<")
    with pytest.raises(InputError, match="models/mine: the tokenizer has no chat template"):
        builder({"tool_use": "{{ messages[0].content }}"})
