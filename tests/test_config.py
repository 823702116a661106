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
    parts: int = option(2, "Some parts.", minimum=1)
    share: float = option(0.5, "A share.", maximum=1)
    mass: float = option(1.0, "Some mass.", above=0, below=2)
    weights: list[float] = option([], "Some weights.")


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


def test_a_folder_is_no_config_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        parse("--config", str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "-1"], "--seed must not be negative, not -1"),
        (["--seed", "4294967296"], "--seed must be 4294967295 or less, not 4294967296"),
        (["--rate", "nan"], "--rate must be a finite number, not nan"),
        (["--rate", "1e400"], "--rate must be a finite number, not inf"),
        (["--rate", "-0.1"], "--rate must not be negative, not -0.1"),
        (["--parts", "0"], "--parts must be 1 or more, not 0"),
        (["--share", "1.5"], "--share must lie between 0 and 1, not 1.5"),
        (["--mass", "0"], "--mass must be above 0, not 0.0"),
        (["--mass", "2"], "--mass must be below 2, not 2.0"),
        (["--weights", "1", "inf"], "--weights must be a finite number, not inf"),
    ],
)
def test_numbers_out_of_range_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        parse(*flags)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: -1", "--seed must not be negative, not -1"),
        ("rate: .nan", "--rate must be a finite number, not nan"),
        ("weights: [1, .inf]", "--weights must be a finite number, not inf"),
    ],
)
def test_numbers_of_a_file_are_checked_too(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse("--config", yaml(tmp_path, text))
    assert str(error.value) == message


def test_numbers_at_the_ends_of_their_ranges_are_taken() -> None:
    flags = ["--seed", "4294967295", "--rate", "0", "--parts", "1", "--share", "1", "--mass", "1e-9", "--weights", "0"]
    config = parse(*flags)
    assert (config.seed, config.rate, config.parts, config.share, config.mass) == (2**32 - 1, 0.0, 1, 1.0, 1e-9)
    assert config.weights == [0.0]


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
