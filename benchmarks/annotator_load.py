"""Labelling 2,000 records at concurrency 64 while a fifth of the requests fail: what is lost, and how fast it goes.

    python benchmarks/annotator_load.py

The endpoint (`annotator_server.py`, a process of its own) answers 16 requests at a time in 0.1 s each, as a server of a
language model has a fixed throughput. Its limit is measured by a bare client that sends one request over and over.
Random records are labelled by the command that users run, `step2_token_reward.label`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.annotator_server import score_of  # noqa: E402
from benchmarks.measuring import save  # noqa: E402
from common.config import MAX_SEED, option, parse_config  # noqa: E402
from common.errors import run_command  # noqa: E402
from common.feedback.annotator import words_by_query  # noqa: E402
from common.feedback.labels import quarantine_path  # noqa: E402
from common.files import read_jsonl, write_jsonl  # noqa: E402

WORDS = "trail running shoes flat feet best cheap recipe pasta garlic laptop stand desk lamp lisbon hotel".split()


@dataclass
class LoadConfig:
    """Label many records at an endpoint that fails often."""

    records: int = option(2000, "Records to label.", minimum=1)
    concurrency: int = option(64, "Requests under way at a time.", minimum=1)
    fault_rate: float = option(0.2, "Share of requests that fail.", maximum=1)
    slots: int = option(16, "Requests that the endpoint answers at a time.", minimum=1)
    seconds: float = option(0.1, "Time that it takes for one.")
    seed: int = option(0, "Seed of the records and the faults.", maximum=MAX_SEED)


def main() -> None:
    """Measure, print and write results/annotator_load.json."""
    config = parse_config(LoadConfig)
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.jsonl"
        write_jsonl(samples, records(config.records, config.seed))
        with endpoint(config, 0.0) as url:
            limit = asyncio.run(bare_requests_per_second(url, config.concurrency, config.records))
        calm = labelled(config, samples, Path(folder) / "calm.jsonl", fault_rate=0.0)
        stormy = labelled(config, samples, Path(folder) / "stormy.jsonl", fault_rate=config.fault_rate)
        instant = labelled(config, samples, Path(folder) / "instant.jsonl", fault_rate=0.0, seconds=0.0, slots=1000)
        few = Path(folder) / "few.jsonl"
        write_jsonl(few, records(config.records // 10, config.seed))
        small = labelled(config, few, Path(folder) / "small.jsonl", fault_rate=0.0, seconds=0.0, slots=1000)
    result = {
        "records": config.records,
        "fault_rate": config.fault_rate,
        **{name: stormy[name] for name in ("labelled", "quarantined", "lost", "duplicated", "wrong", "outcomes")},
        "requests_per_second": stormy["requests_per_second"],
        "requests_per_second_without_faults": calm["requests_per_second"],
        "server_limit_per_second": round(limit, 1),
        "share_of_limit": round(stormy["requests_per_second"] / limit, 3),
        "share_of_limit_without_faults": round(calm["requests_per_second"] / limit, 3),
        "client_limit_per_second": instant["requests_per_second"],
        "peak_memory_mb": stormy["peak_memory_mb"],
        "peak_memory_mb_with_a_tenth_of_the_records": small["peak_memory_mb"],
        "settings": vars(config),
    }
    for name, value in result.items():
        print(f"{name}: {value}")
    save("annotator_load", result)


def records(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Sample rows with invented histories and three queries of different words."""
    chance = random.Random(seed)
    for number in range(count):
        history = [{"type": "search", "query": " ".join(chance.sample(WORDS, 3))} for _ in range(6)]
        response = "\n".join(" ".join(chance.sample(WORDS, chance.randint(2, 4))) for _ in range(3))
        yield {
            "id": f"u{number}#0", "example_id": f"u{number}", "user_id": f"u{number}", "group": f"u{number}",
            "split": "train", "origin": "sample", "history": history, "targets": [], "response": response,
            "finished": True,
        }  # fmt: skip


def labelled(
    config: LoadConfig, samples: Path, labels: Path, *, fault_rate: float, seconds: float | None = None,
    slots: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run the label command once; what became of the records, and of the requests."""
    with endpoint(config, fault_rate, seconds, slots) as url:
        command = [
            sys.executable, "-m", "step2_token_reward.label", "--samples", str(samples), "--labels", str(labels),
            "--annotator", "llm", "--base_url", url, "--model", "stand-in", "--concurrency", str(config.concurrency),
            "--timeout", "3",
        ]  # fmt: skip
        log = labels.with_suffix(".log")
        with log.open("w") as stream:
            process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"label.py failed: {log.read_text()[-2000:]}")
        stats = json.loads(urlopen(url.removesuffix("/v1") + "/stats").read())
    asked = {row["id"]: row for _, row in read_jsonl(samples)}
    rows = [row for _, row in read_jsonl(labels)]
    failed = [row["id"] for _, row in read_jsonl(path)] if (path := quarantine_path(labels)).exists() else []
    ids = [row["id"] for row in rows] + failed
    return {
        "labelled": len(rows),
        "quarantined": len(failed),
        "lost": len(asked.keys() - set(ids)),
        # Labels written twice, and right answers paid for twice.
        "duplicated": len(ids) - len(set(ids)) + stats["answered_twice"],
        "wrong": sum(row["words"] != right_words(asked[row["id"]]["response"]) for row in rows),
        "outcomes": stats["outcomes"],
        "requests_per_second": round(stats["requests"] / stats["seconds"], 1),
        "peak_memory_mb": round(usage.ru_maxrss / 1024, 1),
    }


def right_words(response: str) -> list[list[int]]:
    """The endpoint's scores."""
    return [[score_of(word.text) for word in words] for words in words_by_query(response)]


@contextmanager
def endpoint(
    config: LoadConfig, fault_rate: float, seconds: float | None = None, slots: int | None = None
) -> Iterator[str]:
    """The stand-in endpoint as a process of its own; yields its base URL."""
    command = [
        sys.executable, "-m", "benchmarks.annotator_server", "--fault_rate", str(fault_rate),
        "--seconds", str(config.seconds if seconds is None else seconds), "--slots", str(slots or config.slots),
        "--seed", str(config.seed),
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


async def bare_requests_per_second(url: str, concurrency: int, count: int) -> float:
    """What the endpoint answers at most: connections that send the same bytes again once an answer is there."""
    parts = urlsplit(url)
    message = {"role": "user", "content": "words of query 1: 1=trail  2=shoes"}
    content = json.dumps({"model": "stand-in", "messages": [message]}).encode()
    head = f"POST {parts.path}/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: {len(content)}"
    request = head.encode() + b"\r\n\r\n" + content
    left = iter(range(count))

    async def send() -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        for _ in left:
            writer.write(request)
            answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            await reader.readexactly(int(re.search(r"Content-Length: (\d+)", answer).group(1)))
        writer.close()

    begun = time.monotonic()
    await asyncio.gather(*(send() for _ in range(concurrency)))
    return count / (time.monotonic() - begun)


if __name__ == "__main__":
    run_command(main)
