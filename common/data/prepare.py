"""From search logs to train, dev and test examples: read, clean, cut, split, and report what was kept and dropped.

Command: `python -m common.data.prepare --log LOG [LOG ...] --output_dir outputs/<run>/data`.
It writes train.jsonl, dev.jsonl, test.jsonl (common.data.records.Example) and data_report.json (docs/data_formats.md).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from json import dumps
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from common.config import MAX_SEED, option, parse_config
from common.data.cleaning import Cleaner, CleaningOptions, RuleTally
from common.data.examples import ExampleBuilder, ExampleOptions, HashSample
from common.data.privacy import frequent_queries
from common.data.readers import AUTO, READERS, detect_format, read_log
from common.data.records import EVENT_TYPES, SPLITS, Example, Record
from common.errors import InputError, run_command
from common.files import RUN_CONFIG_NAME, atomic_write, claim_output_dir, write_json
from common.inputs import log_files
from common.text import normalise

REPORT_NAME = "data_report.json"
QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


@dataclass
class PrepareConfig(CleaningOptions, ExampleOptions):
    """Make train, dev and test examples from search logs."""

    log: list[str] = option(
        [], "Search logs: files or folders (docs/data_formats.md); may be given several times.", action="extend",
        group="what is read and written",
    )
    log_format: str = option(AUTO, "Format of every log; auto goes by each name.", choices=[AUTO, *READERS])
    max_bad_lines: int = option(0, "Lines of each log that may be skipped because they cannot be read.")
    output_dir: str = option("", "Folder for the examples; it must be new, or see resume and overwrite.")
    resume: bool = option(False, "Keep what output_dir holds if it is complete; else make it again.")
    overwrite: bool = option(False, "Replace the examples that output_dir holds.")
    seed: int = option(0, "Seed of the splits and of every choice by hash.", maximum=MAX_SEED)


@dataclass
class LogReport:
    """What one log held and what became of it."""

    log: str
    log_format: str
    reader: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    records: int = 0
    rules: RuleTally = field(default_factory=RuleTally)
    examples: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, one entry of `logs` in the report."""
        return {
            "log": self.log,
            "format": self.log_format,
            "bad_lines": self.reader["bad_lines"],
            "reader_counts": {name: count for name, count in self.reader.items() if name != "bad_lines"},
            "records": self.records,
            "events": {kind: self.events[kind] for kind in EVENT_TYPES},
            "rules": self.rules.to_dict(),
            "examples": {split: self.examples[split] for split in SPLITS},
        }


@dataclass
class SplitReport:
    """Figures of one split's examples, gathered one by one."""

    examples: int = 0
    users: set[str] = field(default_factory=set)
    groups: set[str] = field(default_factory=set)
    history_events: array[int] = field(default_factory=lambda: array("L"))
    targets: int = 0
    repeated_targets: int = 0

    def add(self, example: Example) -> None:
        """Take in one example. A repeated target is a query that the history holds already."""
        seen = {normalise(event.query) for event in example.history if event.type == "search"}
        self.examples += 1
        self.users.add(example.user_id)
        self.groups.add(example.group)
        self.history_events.append(len(example.history))
        self.targets += len(example.targets)
        self.repeated_targets += sum(normalise(target) in seen for target in example.targets)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; a share or quantile of nothing is null."""
        return {
            "examples": self.examples,
            "users": len(self.users),
            "groups": len(self.groups),
            "history_events": quantiles(sorted(self.history_events)) if self.examples else None,
            "share_of_targets_in_history": self.repeated_targets / self.targets if self.targets else None,
        }


def quantiles(ordered: list[int]) -> dict[str, int]:
    """Nearest-rank quantiles of a sorted list that is not empty: the values at `QUANTILES`."""
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in QUANTILES.items()}


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write the three splits into `config.output_dir` and return the report, which is written last.

    Raises `InputError` for a bad log and when a split would be empty; then none is written.
    """
    folder = Path(config.output_dir)
    logs = [LogReport(path, detect_format(path, config.log_format)) for path in config.log]
    frequent: frozenset[str] = frozenset()
    if config.k_anonymity:
        records = chain.from_iterable(_read(log, config, Counter(), "counting users") for log in logs)
        frequent = frequent_queries(records, config.k_anonymity)
    cleaner = Cleaner(config, config.num_targets, config.seed, frequent)
    builder = ExampleBuilder(config, config.seed)
    sample = HashSample(config.max_test_examples, config.seed)
    splits = {split: SplitReport() for split in SPLITS}
    with ExitStack() as stack:
        files = {split: atomic_write(folder / f"{split}.jsonl", private=True) for split in SPLITS}
        streams = {split: stack.enter_context(file) for split, file in files.items()}
        for log in logs:
            for example in _examples(log, config, cleaner, builder):
                if example.split == "test":
                    sample.offer(example)
                else:
                    _write(example, streams[example.split], splits[example.split])
        for example in sample.examples():
            _write(example, streams["test"], splits["test"])
        rules = _total(logs, sample.offered, splits["test"].examples)
        _check_not_empty(splits, rules)
    report = {
        "logs": [log.to_dict() for log in logs],
        "rules": rules.to_dict(),
        "splits": {split: splits[split].to_dict() for split in SPLITS},
    }
    write_json(folder / REPORT_NAME, report)
    return report


def _read(log: LogReport, config: PrepareConfig, counter: Counter[str], what: str) -> Iterator[Record]:
    records = read_log(log.log, log.log_format, config.max_bad_lines, counter)
    # disable=None: no bar where the output is not a terminal
    return tqdm(records, desc=f"{what}: {Path(log.log).name}", unit=" records", disable=None)


def _examples(
    log: LogReport, config: PrepareConfig, cleaner: Cleaner, builder: ExampleBuilder
) -> Iterator[Example]:
    for record in _read(log, config, log.reader, "reading"):
        log.records += 1
        log.events.update(event.type for event in record.events)
        cleaned = cleaner.clean(record, log.rules)
        if cleaned is not None:
            for example in builder.build(cleaned, log.rules):
                log.examples[example.split] += 1
                yield example


def _write(example: Example, stream: IO[str], report: SplitReport) -> None:
    stream.write(dumps(example.to_dict(), ensure_ascii=False, allow_nan=False) + "\n")
    report.add(example)


def _total(logs: list[LogReport], test_offered: int, test_kept: int) -> RuleTally:
    """The rules' counts over all logs, with the cap on test, which looks at all logs together."""
    total = RuleTally()
    for log in logs:
        total.add(log.rules)
    total.count("max_test_examples", "test examples", test_kept, test_offered - test_kept)
    return total


def _check_not_empty(splits: dict[str, SplitReport], rules: RuleTally) -> None:
    empty = [split for split in SPLITS if not splits[split].examples]
    if empty:
        counts = {split: report.examples for split, report in splits.items()}
        dropped = ", ".join(
            f"{rule} {rules.dropped[rule]} of {rules.dropped[rule] + rules.kept[rule]} {unit.split(',')[0]}"
            for rule, unit in rules.units.items()
            if rules.dropped[rule]
        )
        raise InputError(
            f"no example for {', '.join(empty)} (examples: {counts}). Dropped by rule: {dropped or 'nothing'}. "
            "Training, its evaluation (dev) and the final one (test) each need some. Loosen the rule that takes most "
            "(e.g. fewer --num_targets, lower --min_queries), or change --test_share, --dev_share or the records' own "
            "'split'"
        )


def summary(report: dict[str, Any], folder: Path) -> str:
    """The report as a few lines for a terminal."""
    lines = []
    for log in report["logs"]:
        counts = {f"{kind} events": count for kind, count in log["events"].items() if count}
        counts |= log["reader_counts"] | {"bad lines skipped": log["bad_lines"]}
        details = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
        lines.append(f"{log['log']} ({log['format']}): {log['records']} records, {details}")
    lines.append(f"{'rule':<22}{'kept':>10}{'dropped':>10}  of")
    lines += [
        f"{rule:<22}{row['kept']:>10}{row['dropped']:>10}  {row['unit']}" for rule, row in report["rules"].items()
    ]
    for split, row in report["splits"].items():
        line = f"{split}: {row['examples']} examples of {row['users']} users in {row['groups']} groups"
        if row["examples"]:
            length = row["history_events"]
            line += (
                f"; history of {length['min']} to {length['max']} events, median {length['median']}; "
                f"{row['share_of_targets_in_history']:.1%} of the targets repeat the history"
            )
        lines.append(line)
    lines.append(f"Examples: {folder}/train.jsonl, dev.jsonl, test.jsonl. Kept and dropped: {folder / REPORT_NAME}")
    lines.append(
        f"next: bash scripts/run_step1.sh --data_dir {folder} --output_dir {folder.parent / 'step1_sft'} "
        "--model_name_or_path ..."
    )
    return "\n".join(lines)


def check_config(config: PrepareConfig) -> None:
    """Raise `InputError` for what can be told before any log is read; say which format each log is read in."""
    if not config.log:
        raise InputError("--log is missing: one or more search logs (docs/data_formats.md tells the formats)")
    if not config.output_dir:
        raise InputError("--output_dir is missing: the folder for the examples, e.g. outputs/default/data")
    twice = [path for path, count in Counter(str(Path(path).resolve()) for path in config.log).items() if count > 1]
    if twice:
        raise InputError(f"--log names {twice[0]} twice; its users would count twice")
    Cleaner(config, config.num_targets, config.seed)
    ExampleBuilder(config, config.seed)
    for path in config.log:
        chosen = detect_format(path, config.log_format)
        print(f"{path}: read as {chosen} ({'by its name' if config.log_format == AUTO else '--log_format'})")


def main() -> None:
    """Prepare the data and print a summary."""
    config = parse_config(PrepareConfig)
    check_config(config)
    settings = {name: value for name, value in asdict(config).items() if name not in ("resume", "overwrite")}
    folder = claim_output_dir(
        config.output_dir, settings, resume=config.resume, overwrite=config.overwrite,
        inputs={"log": log_files(config.log), "adult_words": config.adult_words},
    )  # fmt: skip
    if (folder / REPORT_NAME).is_file():
        print(f"{folder} is complete already; nothing to do. Report: {folder / REPORT_NAME}")
        return
    try:
        report = prepare(config)
    except InputError:
        _give_up(folder)
        raise
    print(summary(report, folder))


def _give_up(folder: Path) -> None:
    """Leave no claim behind for a run that wrote nothing, so that the mended command runs without --overwrite."""
    if [file.name for file in folder.iterdir()] == [RUN_CONFIG_NAME]:
        (folder / RUN_CONFIG_NAME).unlink()
        folder.rmdir()


if __name__ == "__main__":
    run_command(main)
