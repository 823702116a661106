"""A key is in no message, in whatever form a server or a library quotes it; and a short one spoils no word."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

import pytest

from common.errors import InputError
from common.feedback.annotator import Unlabelled
from common.feedback.llm.keys import read_key, without_key
from tests.feedback.endpoint import annotate, item, options
from tests.feedback.test_llm_endpoint import answering

KEY = "sk-Ab/3+c'd\"4=%"


@pytest.mark.parametrize(
    "quoted",
    [
        KEY, f"Bearer {KEY}", f"?key={quote(KEY, safe='')}&x=1", quote(KEY, safe="").lower().replace("ab", "Ab"),
        json.dumps({"key": KEY}), repr({"authorization": f"Bearer {KEY}".encode()}), repr(KEY), f"xx{KEY}yy",
        "Basic c2stQWIvMytjJ2QiND0l",
    ],
)  # fmt: skip
def test_a_key_is_replaced_in_every_form(quoted: str) -> None:
    shown = without_key(quoted, KEY)
    assert "<key>" in shown and not any(part in shown for part in ("sk-", "3+c", "3%2", "c2st"))


@pytest.mark.parametrize(
    ("key", "text", "shown"),
    [
        ("x", "the next text: x", "the next text: <key>"),
        ("x", "Bearer x, not x1", "Bearer <key>, not x1"),
        ("none", "nonexistent, b'Bearer none'", "nonexistent, b'Bearer <key>'"),
        ("abc123", '{"key": "abc123"}', '{"key": "<key>"}'),
        ("", "text", "text"),
        ("sk-secret-0123", "keysk-secret-0123.", "key<key>."),
    ],
)
def test_a_short_key_is_replaced_where_it_stands_alone(key: str, text: str, shown: str) -> None:
    assert without_key(text, key) == shown


def test_a_servers_words_stay_readable_beside_a_short_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with answering(400) as (url, _):
        (result,) = annotate(options(url), tmp_path / "answers.jsonl", [item(0, "trail shoes")])
    assert isinstance(result, Unlabelled) and result.reason == "HTTP 400: bad key Bearer <key>"


@pytest.mark.parametrize("key", ["sk-secret-0123\n", "sk-secret 0123", "sk-secret-0123\r", "sk-geheim-ü", "\ud800"])
def test_what_cannot_be_a_key_is_refused_without_showing_it(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The HTTP library would quote the header with it."""
    monkeypatch.setattr("os.environ", {"MY_KEY": key})
    with pytest.raises(InputError, match="MY_KEY holds no key") as caught:
        annotate(options("http://127.0.0.1:9/v1", api_key_env="MY_KEY"), tmp_path / "a.jsonl", [item(0, "shoes")])
    assert "sk-" not in str(caught.value) and read_key("OTHER_KEY") == ""
