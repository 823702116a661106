from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from common.config import RunOptions, option, parse_config
from common.errors import InputError


@dataclass
class Toy(RunOptions):
    """A config for the tests."""

    rate: float = option(0.1, "A rate.")
    names: list[str] = option(["a"], "Some names.")
    kind: str = option("x", "A kind.", choices=["x", "y"])


def parse(*argv: str) -> Toy:
    return parse_config(Toy, list(argv))


def yaml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "toy.yaml"
    path.write_text(text)
    return str(path)


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    path = yaml(tmp_path, "rate: 1e-4\nnames: [b, c]\nresume: true\nkind:\n")
    config = parse("--config", path, "--rate", "2")
    assert (config.rate, config.names, config.resume, config.kind, config.seed) == (2.0, ["b", "c"], True, "x", 0)
    # YAML 1.1 reads 1e-4 as a text; both sources pass through the same conversion.
    assert parse("--config", path).rate == 1e-4
    assert parse(f"--config={path}", "--resume", "false").resume is False
    assert parse().names == ["a"]
    parse().names.append("z")
    assert parse().names == ["a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rat: 1", "toy.yaml: unknown key 'rat'; did you mean 'rate'?"),
        ("rate: fast", "invalid float value: 'fast'"),
        ("kind: z", "invalid choice: 'z'"),
        ("- 1", "expected `key: value` lines"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse("--config", yaml(tmp_path, text))
    assert message in str(error.value)


def test_bad_flags() -> None:
    with pytest.raises(InputError, match="did you mean '--rate'"):
        parse("--ratee", "1")
    with pytest.raises(InputError, match="no such file"):
        parse("--config", "missing.yaml")


def test_the_launchers_rank_flag_is_ignored() -> None:
    assert parse("--local_rank=1") == parse()


def test_a_value_of_any_length_gives_one_short_paragraph() -> None:
    with pytest.raises(InputError) as error:
        parse("--rate", "1e" + "[" * 3000)
    assert "argument --rate: invalid float value" in str(error.value) and len(str(error.value)) < 1000
