"""A command for the tests of the job runner: appends a word to a file, or fails."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    path, word = sys.argv[1:]
    if word == "fail":
        raise SystemExit(7)
    with Path(path).open("a", encoding="utf-8") as stream:
        stream.write(word + "\n")
