"""Every answer of a language model, kept: an append-only file, so that no answer is lost and none is paid for twice."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from common.access import naming
from common.errors import InputError
from common.files import lock, mend_last_line
from common.private import only_mine

_ROW_START = b'{"key": "'
_KEY_DIGITS = 32


class AnswerStore:
    """A JSONL file of answers by key, open in one process at a time; see `answer_key`.

    A row is written with one system call once its answer is there, so that a killed process leaves whole rows and at
    most one half row, which the next one cuts off. Memory holds each key's place in the file, not the answers. The
    file can be read by its owner alone: answers speak of a user's searches.

    Raises `InputError` when another process has the file open, or when it holds something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = only_mine(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            lock(self._file, self.path, "give another --answers")
        except InputError:
            os.close(self._file)
            raise
        mend_last_line(self.path, _ROW_START)
        self._places = self._index()

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._places

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> dict[str, Any] | None:
        """The row of `key`, None when there is none."""
        place = self._places.get(bytes.fromhex(key))
        if place is None:
            return None
        start, length = place
        return json.loads(os.pread(self._file, length, start))

    def put(self, key: str, row: dict[str, Any]) -> None:
        """Append the row of a new key; it is the operating system's when this returns."""
        line = (json.dumps({"key": key, **row}, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        start = os.fstat(self._file).st_size
        with naming(self.path):
            written = os.write(self._file, line)
        if written != len(line):  # the disk is full now
            raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes of an answer written", str(self.path))
        self._places[bytes.fromhex(key)] = (start, len(line))

    def _index(self) -> dict[bytes, tuple[int, int]]:
        places: dict[bytes, tuple[int, int]] = {}
        start = 0
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                key = line[len(_ROW_START) : len(_ROW_START) + _KEY_DIGITS]
                try:
                    places[bytes.fromhex(key.decode("ascii"))] = (start, len(line))
                except ValueError:
                    raise InputError(
                        f"{self.path}:{number}: no answer of a language model; give another --answers"
                    ) from None
                start += len(line)
        return places


def answer_key(model: str, template: str, messages: Any, sampling: Any, schema: Any) -> str:
    """Thirty-two hexadecimal digits for a request: equal requests, and only they, share an answer.

    `template` is the template's hash; the others are JSON values.
    """
    text = json.dumps([model, template, messages, sampling, schema], sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:_KEY_DIGITS]
