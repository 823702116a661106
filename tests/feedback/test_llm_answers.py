"""The store of answers: whole after a kill, one writer at a time, readable by its owner alone."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from common.errors import InputError
from common.feedback.llm.answers import AnswerStore, answer_key

KEYS = [f"{number:032x}" for number in (7, 8, 9)]
ROWS = [{"reply": "{}", "seconds": 0.5}, {"reply": 'Straße "☕" \ud800\n', "seconds": 1.0}, {"reply": "", "seconds": 2}]


def fill(path: Path, count: int = 3) -> None:
    with AnswerStore(path) as store:
        for key, row in zip(KEYS[:count], ROWS, strict=False):
            store.put(key, row)


def test_answers_are_there_again(tmp_path: Path) -> None:
    fill(tmp_path / "answers.jsonl")
    with AnswerStore(tmp_path / "answers.jsonl") as store:
        assert len(store) == 3
        assert store.get(KEYS[0]) == {"key": KEYS[0], **ROWS[0]}
        # A lone surrogate, which no file can hold, comes back as the text of its escape.
        assert store.get(KEYS[1])["reply"] == 'Straße "☕" \ud800\n'
        assert KEYS[2] in store and "0" * 32 not in store
        assert store.get("0" * 32) is None


def test_killed_at_any_byte_of_the_last_answer(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    fill(path)
    whole = path.read_bytes()
    for end in range(whole.rindex(b"\n", 0, -1) + 1, len(whole)):
        path.write_bytes(whole[:end])
        with AnswerStore(path) as store:
            complete = end == len(whole) - 1  # all but its line break
            assert len(store) == (3 if complete else 2)
            if not complete:
                store.put(KEYS[2], ROWS[2])
        assert path.read_bytes() == whole


def test_another_process_may_not_write_there(tmp_path: Path) -> None:
    with AnswerStore(tmp_path / "answers.jsonl"), pytest.raises(InputError, match="another process is writing here"):
        AnswerStore(tmp_path / "answers.jsonl")
    AnswerStore(tmp_path / "answers.jsonl").__exit__()


def test_only_its_owner_reads_it(tmp_path: Path) -> None:
    fill(tmp_path / "new" / "answers.jsonl")
    assert stat.S_IMODE((tmp_path / "new" / "answers.jsonl").stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b'{"id": "x"}\n', b'{"key": "12"}\n', b"half"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"answers\.jsonl"):
        AnswerStore(path)
    assert path.read_bytes() == content


def test_whatever_changes_an_answer_changes_its_key() -> None:
    base = ("model", "template", [{"role": "user", "content": "a"}], {"temperature": 0}, {"type": "json_schema"})
    others = [
        ("other", *base[1:]),
        (base[0], "edited", *base[2:]),
        (*base[:2], [{"role": "user", "content": "b"}], *base[3:]),
        (*base[:3], {"temperature": 1}, base[4]),
        (*base[:4], None),
    ]
    keys = {answer_key(*arguments) for arguments in (base, *others)}
    assert len(keys) == 6 and answer_key(*base) in keys
