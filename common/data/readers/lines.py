"""What every reader needs: lines with their numbers, plain or gzip, and a tally of lines that cannot be read."""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common.data.records import MissingId
from common.errors import InputError, one_line


class ReadTally:
    """Counts what a reader met: bad lines, of which `max_bad_lines` may be skipped, and the quirks of its format."""

    def __init__(self, max_bad_lines: int = 0, counter: Counter[str] | None = None) -> None:
        self.max_bad_lines = max_bad_lines
        self.counts: Counter[str] = Counter() if counter is None else counter
        self._bad_lines = 0

    def reject(self, place: str, reason: str | Exception, context: str = "") -> None:
        """Skip and count a bad line, and under `rows_without_id` one whose `reason` is a `MissingId`.

        Raises `InputError` with `place` (file:line), `context` and `reason` once too many are bad.
        """
        self._bad_lines += 1
        if self._bad_lines > self.max_bad_lines:
            raise InputError(
                f"{place}: {one_line(f'{context}{reason}')}. Mend it, or skip such lines with --max_bad_lines "
                f"(now {self.max_bad_lines}); each one is counted"
            )
        self.counts["bad_lines"] += 1
        if isinstance(reason, MissingId):
            self.counts["rows_without_id"] += 1


def read_byte_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield `(line number, line with its end)` of a file that is gzip when its name ends in .gz.

    Raises `InputError` for a file that cannot be opened or a gzip file that is cut off.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}:{number + 1}: not a whole gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def read_lines(path: Path, tally: ReadTally) -> Iterator[tuple[int, str]]:
    """Yield `(line number, text without line end)`; a line that is not UTF-8 is rejected, a byte order mark dropped."""
    for number, data in read_byte_lines(path):
        try:
            line = data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            tally.reject(f"{path}:{number}", f"byte {error.start + 1} is not UTF-8")
            continue
        yield number, line.rstrip("\r\n")
