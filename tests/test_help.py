"""`--help` of every command: it runs, and shows each setting once, under a heading, with its default."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import subprocess
import sys

import pytest

from common.command_help import field_groups, shown_default
from common.config import RunOptions, option, parse_config
from tests.commands import ROOT, config_of, modules


def help_of(module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What `python -m module --help` prints; fails unless it ends with 0."""
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delitem(sys.modules, module, raising=False)
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, capsys.readouterr().err
    return capsys.readouterr().out


def default_of(field: dataclasses.Field) -> object:
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


@pytest.mark.parametrize("module", modules())
def test_every_command_shows_each_setting_with_its_default(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if module in ("benchmarks.trl_rloo", "benchmarks.trl_sft"):
        pytest.importorskip("trl")
    shown = help_of(module, monkeypatch, capsys)
    assert shown.startswith("usage: ")
    config = config_of(module)
    if config is None:
        return
    entries = dict(re.findall(r"^  --(\w+)(.*?)(?=^  --|^\S|\Z)", shown, re.DOTALL | re.MULTILINE))
    fields = dataclasses.fields(config)
    assert entries.keys() == {field.name for field in fields} | {"config", "debug"}
    for field in fields:
        entry = " ".join(entries[field.name].split())
        default = shown_default(default_of(field))
        negation = f"; --no_{field.name}: false" if field.default is True else ""
        assert entry.endswith(f"(default: {default}{negation})"), entry
        assert field.metadata["help"].split()[0] in entry


@pytest.mark.parametrize(
    ("script", "usages", "shown"),
    [
        ("scripts/run_all.sh", ["bash scripts/run_all.sh"], ["--log ", "The main job, end to end"]),
        ("scripts/run_step1.sh", ["bash scripts/run_step1.sh", "main.py"], ["--log ", "--config ", "--learning_rate"]),
        ("step1_sft/launch/cpu.sh", ["main.py"], ["--learning_rate"]),
    ],
)
def test_scripts_explain_themselves_once_and_start_no_ranks(script: str, usages: list[str], shown: list[str]) -> None:
    environment = os.environ | {"TPPO_VENV": "none"}
    ran = subprocess.run(
        ["bash", script, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert re.findall(r"^usage: (.*?)(?: \[|$)", ran.stdout, re.MULTILINE) == usages
    assert ran.stdout.startswith("usage: ") and not [text for text in [*shown, "--seed"] if text not in ran.stdout]


@dataclasses.dataclass
class Toy(RunOptions):
    """A config for the tests."""

    first: int = option(1, "Rises by 20 % of what it was.")
    second: str = option("", "A text.", group="more")
    third: list[str] = option(["a", "b"], "Two texts.")
    seed: int = option(7, "Another default for an inherited setting.")


def test_own_settings_come_first_and_a_heading_holds_until_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    where = "Where a run writes and how it may be repeated"
    inherited = dict.fromkeys(("output_dir", "resume", "overwrite", "seed", "tensorboard"), where)
    groups = {"first": "settings", "second": "more", "third": "more", **inherited}
    assert list(field_groups(Toy).items()) == list(groups.items())
    with pytest.raises(SystemExit):
        parse_config(Toy, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    places = [shown.index(text) for text in (
        "settings: --first N Rises by 20 % of what it was. (default: 1)",
        "more: --second TEXT A text. (default: empty) --third TEXT [TEXT ...] Two texts. (default: a b)",
        f"{where}: --output_dir TEXT",
        "--resume [true|false] Go on from the last complete checkpoint in output_dir. (default: false)",
        "--seed N Another default for an inherited setting. (default: 7)",
        "(default: true; --no_tensorboard: false)",
    )]  # fmt: skip
    assert places == sorted(places)
    assert parse_config(Toy, ["--no_tensorboard", "--no-tensorboard"]).tensorboard is False
