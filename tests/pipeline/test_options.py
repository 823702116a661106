"""The flags of the four scripts: what is taken, what is refused, and what later commands of a run inherit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import InputError
from pipeline.options import EXAMPLES, PipelineOptions, keep_settings, parse_options, settle
from pipeline.stages import SETTINGS
from tests.commands import fields_of

LLM = ["--annotator", "llm", "--base_url", "http://h/v1", "--annotator_model", "m"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "c.yaml", "scores.py"):
        Path(name).touch()


def settled(*argv: str, step: int | None = None) -> PipelineOptions:
    return settle(parse_options(argv, step)[0])


def begun(*argv: str, made: tuple[str, ...] = ()) -> None:
    """A command that has kept its settings and made these folders of the run."""
    options = settled(*argv)
    keep_settings(options)
    for name in made:
        (options.folder / name).mkdir(parents=True, exist_ok=True)


def test_the_same_flags_mean_the_same_in_all_four_scripts() -> None:
    argv = ["--run_name", "r", "--seed", "3", "--miniature", "--log", "a.jsonl", "--preset", "tiny", "--num_gpus", "2"]
    parsed = [parse_options(argv, step) for step in (None, 1, 2, 3)]
    assert all(found == parsed[0] for found in parsed)
    assert parsed[0][0].seed == "3" and parsed[0][1] == []


def test_flags_of_a_steps_main_are_handed_on_and_run_all_takes_none() -> None:
    options, rest = parse_options(["--total_steps", "5", "--seed", "1", "--gamma=0.9"], 3)
    assert (options.seed, rest) == ("1", ["--total_steps", "5", "--gamma=0.9"])
    with pytest.raises(InputError, match="unrecognized arguments: --total_steps 5"):
        parse_options(["--total_steps", "5"], None)
    with pytest.raises(InputError, match="unrecognized arguments: --config"):
        parse_options(["--config", "c.yaml"], None)


def test_no_flag_is_taken_from_a_main_py_but_those_that_it_is_given_too() -> None:
    """What the scripts take away from a main.py is given to it again: its seed, and how its folder may be repeated."""
    ours = fields_of(PipelineOptions)
    for settings in SETTINGS.values():
        assert ours & fields_of(settings.config) == {"seed", "resume", "overwrite"}


def test_logs_add_up_and_files_of_settings_replace_each_other() -> None:
    options = settled("--log", "a.jsonl", "--log", "b.jsonl")
    assert options.log == [str(Path(name).resolve()) for name in ("a.jsonl", "b.jsonl")]
    assert options == settled("--log", "a.jsonl", "b.jsonl")
    assert settled().log == []  # nothing is left from the call before
    Path("d.yaml").touch()
    assert parse_options(["--config", "c.yaml", "--config", "d.yaml"], 1)[0].config == ["d.yaml"]


def test_defaults_of_the_embedded_log_and_of_a_real_one() -> None:
    demo, real = settled(), settled("--log", "a.jsonl")
    assert (demo.run_name, demo.annotator, demo.preset, demo.seed, demo.log_format) == (
        "demo", "simulated", "auto", "0", "auto",
    )  # fmt: skip
    assert (real.run_name, real.annotator) == ("log", "lexical")
    assert demo.folder == Path("outputs/demo")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_gpus", "two"], "--num_gpus is a whole number, not 'two'"),
        (["--num_gpus", "0"], "--num_gpus must be 1 or more, not 0"),
        (["--seed", "-1"], "--seed is a whole number, not '-1'"),
        (["--run_name", "../x"], "--run_name '../x' may hold"),
        (["--run_name", "a b"], "--run_name 'a b' may hold"),
        (["--log", "missing.jsonl"], "--log missing.jsonl: no such file"),
        (["--log", "a.jsonl", "missing.jsonl"], "--log missing.jsonl: no such file"),
        (["--log"], "expected at least one argument"),
        (["--config", "missing.yaml"], "--config missing.yaml: no such file"),
        (["--hostfile", "missing.txt"], "--hostfile missing.txt: no such file"),
        (["--resume", "--overwrite"], "contradict each other"),
        (["--preset", "tiny", "--config", "c.yaml"], "contradict each other"),
        (["--model", "./missing"], "--model ./missing: no such folder"),
        (["--reward_model", "a/b/c"], "--reward_model a/b/c: no such folder"),
        (["--annotator", "oracle"], "is none of simulated, lexical, llm, nor of the form FILE.py:FUNCTION"),
        (["--annotator", "scores.py"], "is none of"),
        (["--annotator", "scores.py:"], "is none of"),
        (["--annotator", "missing.py:score"], "no such file as missing.py"),
        (["--annotator", "simulated", "--log", "a.jsonl"], "only the embedded log has a truth"),
        (["--annotator", "llm"], "needs --base_url and --annotator_model"),
        (["--annotator", "llm", "--base_url", "http://h"], "needs --base_url and --annotator_model"),
        (["--llm_flags=--timeout 3", "--judge_url", "u"], "--judge_url, --llm_flags: for --annotator llm"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(InputError) as refused:
        settled(*argv, step=1)
    assert message in str(refused.value)


def test_an_own_annotator_and_a_language_model() -> None:
    assert settled("--annotator", "scores.py:score").annotator == "scores.py:score"
    options = settled(*LLM, "--llm_flags=--timeout 3 --concurrency 64")
    assert (options.judge_model, options.judge_url) == ("m", "http://h/v1")
    assert options.llm_flags == "--timeout 3 --concurrency 64"
    options = settled(*LLM, "--judge_model", "j", "--judge_url", "http://j")
    assert (options.judge_model, options.judge_url) == ("j", "http://j")


def test_later_commands_inherit_the_settings_of_the_first() -> None:
    first = ("--seed", "7", "--miniature", "--preset", "tiny", "--log", "a.jsonl", "--run_name", "r")
    begun(*first, made=("data", "step2_token_reward"))
    later = settled("--run_name", "r", step=3)
    assert later == settled(*first) and later.miniature and later.seed == "7"
    # How a command is run is its own affair.
    begun("--run_name", "s", "--num_gpus", "3", "--resume")
    later = settled("--run_name", "s", step=3)
    assert (later.num_gpus, later.resume) == ("", False)
    # A run that is begun anew inherits nothing.
    assert settle(parse_options(["--run_name", "r", "--overwrite"], None)[0], anew=True).seed == "0"


@pytest.mark.parametrize(
    ("flag", "made", "message"),
    [
        (("--miniature",), "data", "was begun with --miniature false, not --miniature true"),
        (("--log", "b.jsonl", "--annotator", "lexical"), "data", "with --log at its default, not --log /"),
        (("--model", "smollm2-135m"), "data", "begun with --model at its default, not --model smollm2-135m"),
        (("--annotator", "lexical"), "step2_token_reward", "begun with --annotator simulated"),
        (("--reward_model", "minilm-l6"), "step2_token_reward", "begun with --reward_model at its default"),
    ],
)
def test_what_contradicts_the_run_is_refused_once_something_is_made_from_it(
    flag: tuple[str, ...], made: str, message: str
) -> None:
    begun()
    assert settled("--run_name", "demo", *flag)  # nothing is made yet
    begun(made=(made,))
    with pytest.raises(InputError, match=r"run_all\.sh --overwrite") as refused:
        settled("--run_name", "demo", *flag)
    assert message in str(refused.value)


def test_the_same_setting_may_be_given_again() -> None:
    first = ("--run_name", "r", "--log", "a.jsonl", "--annotator", "lexical", "--miniature")
    begun(*first, made=("data", "step2_token_reward"))
    assert settled(*first) == settled("--run_name", "r")


def test_another_annotator_does_not_inherit_the_language_models_settings() -> None:
    begun(*LLM)
    assert settled().base_url == "http://h/v1"
    other = settled("--annotator", "lexical")
    assert (other.annotator, other.base_url, other.judge_model) == ("lexical", "", "")


def test_the_settings_are_json_with_the_defaults() -> None:
    begun("--annotator", "scores.py:score")
    kept = json.loads(Path("outputs/demo/run.json").read_text())
    assert kept["annotator"] == "scores.py:score" and kept["seed"] == "0" and "num_gpus" not in kept


def test_the_examples_of_the_help_can_be_parsed() -> None:
    Path("examples/logs").mkdir(parents=True)
    Path("examples/logs/cast_ikat.jsonl").touch()
    lines = [line.split("  ")[1:] for line in EXAMPLES.splitlines()[1:]]
    commands = [line[0].split() for line in lines]
    assert len(commands) == 3
    for _, script, *argv in commands:
        parse_options(argv, None if script.endswith("run_all.sh") else int(script[-4]))
