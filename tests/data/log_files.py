"""What the tests of the readers share: where the fixtures lie, times, and gzip copies."""

from __future__ import annotations

import gzip
from datetime import UTC, datetime
from pathlib import Path

FIXTURES = Path(__file__).parent.parent / "fixtures"
SHARED = Path(__file__).parents[2].parent / "shared" / "data"
SHIPPED = Path(__file__).parents[2] / "examples" / "logs" / "cast_ikat.jsonl"


def seconds(text: str) -> float:
    """Seconds of an ISO time in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def pack(source: Path, target: Path) -> Path:
    """Write `source` to `target` as gzip."""
    target.write_bytes(gzip.compress(source.read_bytes()))
    return target
