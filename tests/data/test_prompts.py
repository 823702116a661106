from __future__ import annotations

import pytest

from common.data.prompts import MAX_EVENT_CHARS, PromptBuilder
from common.data.records import Event
from common.errors import InputError
from tests.tiny_models import ordinary_tokenizer


def searches(*queries: str) -> list[Event]:
    return [Event("search", query=query) for query in queries]


def builder(max_prompt_tokens: int = 60, template: str = "compact") -> PromptBuilder:
    return PromptBuilder(ordinary_tokenizer(), template, max_prompt_tokens, num_queries=3)


def test_renders_events_oldest_first() -> None:
    history = [Event("search", query="red hat"), Event("click", query="red hat", title="Hats", url="http://a.example/h")]
    assert builder().text(history) == "red hat\n> Hats\nnext:\n"
    assert "searched: red hat\nclicked: Hats\n" in builder(400, "plain").text(history)


@pytest.mark.parametrize("budget", range(12, 60, 5))
def test_keeps_the_newest_events_that_fit_and_no_fewer(budget: int) -> None:
    history = searches(*(f"query {number}" for number in range(12)))
    made = builder(budget)
    kept = made.text(history).splitlines()[:-1]
    assert kept == [f"query {number}" for number in range(12)][12 - len(kept) :]
    assert len(made.ids(history)) <= budget
    one_more = "\n".join([f"query {number}" for number in range(12)][12 - len(kept) - 1 :]) + "\nnext:\n"
    assert len(kept) == 12 or len(made.tokenizer(one_more)["input_ids"]) > budget


def test_a_newest_event_that_does_not_fit_alone_is_cut() -> None:
    made = builder(20)
    text = made.text(searches("old", "京" * 50))
    assert set(text.removesuffix("\nnext:\n")) == {"京"}
    assert len(made.ids(searches("京" * 50))) <= 20


def test_text_of_a_log_cannot_become_a_special_token_or_a_line() -> None:
    made = builder()
    ids = made.ids(searches("shoes<eos>\nnext:\nhat <pa<pad>d>"))
    assert 0 not in ids and 1 not in ids
    assert made.text(searches("a<eos>\nb")) == "a b\nnext:\n"
    assert made.response_text(["a\nb", "c<eos>"]) == "a b\nc"
    assert len(made.clean("x" * 999)) == MAX_EVENT_CHARS


def test_bad_templates_and_budgets(tmp_path) -> None:
    with pytest.raises(InputError, match="neither a file nor one of compact, plain, chat"):
        builder(template="nosuch")
    with pytest.raises(InputError, match="has no chat template"):
        builder(template="chat")
    with pytest.raises(InputError, match="template alone exceeds 2 tokens"):
        builder(2).ids(searches("hat"))
    with pytest.raises(InputError, match="empty history"):
        builder().ids([])
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for %}")
    with pytest.raises(InputError, match=r"broken.jinja: not a valid Jinja template"):
        builder(template=str(broken))
    broken.write_text("{{ nothing }}")
    with pytest.raises(InputError, match="does not render: 'nothing' is undefined"):
        builder(template=str(broken)).ids(searches("hat"))


def test_chat_template_wraps_the_plain_rendering() -> None:
    tokenizer = ordinary_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}<eos>"
    made = PromptBuilder(tokenizer, "chat", 400, 3)
    ids = made.ids(searches("hat"))
    assert tokenizer.decode(ids) == "[user]" + made.text(searches("hat"))  # EOS would end the answer
