"""The command from data and model folders to the report, with a judge whose scores can be computed again."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import pytest

from benchmarks.annotator_server import RIGHT, Endpoint
from common.config import parse_config
from common.errors import InputError
from common.evaluation import evaluate
from common.evaluation.evaluate import EvaluateConfig, choose_examples, parse_systems, read_timings
from common.evaluation.metrics import relevance_rate
from common.evaluation.summary import CORPUS_MEASURES, MEASURES
from common.files import read_jsonl, write_json, write_jsonl
from tests.evaluation.factory import LetterJudge, make_examples, save_tiny_model
from tests.feedback.endpoint import serving

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six test examples and two tiny models."""
    folder = tmp_path_factory.mktemp("inputs")
    write_jsonl(folder / "test.jsonl", (example.to_dict() for example in make_examples()))
    save_tiny_model(folder / "sft", seed=26)
    save_tiny_model(folder / "tppo", seed=41)
    return folder


@pytest.fixture
def run(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command with further flags and returns report.json, read as strict JSON."""
    monkeypatch.setattr(evaluate, "open_annotator", lambda *args, **settings: nullcontext(LetterJudge()))
    write_json(tmp_path / "seconds.json", {"step1": 61.5, "step3": 120})

    def run_command(*flags: str) -> dict[str, Any]:
        argv = [
            "evaluate", "--data_dir", str(inputs), "--output_dir", str(tmp_path), "--prompt_template", "compact",
            "--systems", f"sft={inputs / 'sft'}", f"tppo={inputs / 'tppo'}", "--max_prompt_tokens", "128",
            "--max_new_tokens", "20", "--resamples", "200", "--timings", str(tmp_path / "seconds.json"), *flags,
        ]
        monkeypatch.setattr("sys.argv", argv)
        evaluate.main()
        text = (tmp_path / "report.json").read_text(encoding="utf-8")
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    return run_command


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--output_dir", "/dev/null/here"), r"/null/here: no file can be written .*; choose another --output_dir"),
        (("--systems", "sft={inputs}/sft", "tppo={inputs}/none"), "none: cannot load a tokenizer"),
        (("--systems", "sft={inputs}/sft", "tppo={inputs}/unread"), r"unread/model.safetensors: you may not read it"),
    ],
)
def test_what_cannot_work_is_refused_before_a_response_is_written(
    run: Run, inputs: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], message: str
) -> None:
    shutil.copytree(inputs / "sft", inputs / "unread", dirs_exist_ok=True)
    monkeypatch.setattr(evaluate, "generate_and_score", lambda *arguments: pytest.fail("the first system has begun"))
    opened = Path.open

    def refuse_one(path: Path, *arguments: Any, **settings: Any) -> IO[Any]:  # root may read what others may not
        if path.match("unread/model.safetensors"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", refuse_one)
    with pytest.raises(InputError, match=message):
        run(*(flag.format(inputs=inputs) for flag in flags))


def test_the_report(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run()
    assert list(report["systems"]) == ["sft", "tppo"]
    for metrics in report["systems"].values():
        assert set(metrics) == {*MEASURES, *CORPUS_MEASURES, "greedy"}
        for estimate in [metrics[name] for name in MEASURES] + [metrics["greedy"][name] for name in MEASURES]:
            assert set(estimate) == {"value", "low", "high", "n"}
            if estimate["low"] is not None:
                assert estimate["low"] <= estimate["value"] + 1e-12
                assert estimate["value"] <= estimate["high"] + 1e-12
    assert report["references"]["gold"]["recall"]["value"] == 1.0
    assert report["timings"].keys() == {"step1", "step3", "evaluation"}
    assert (report["timings"]["step1"], report["timings"]["step3"]) == (61.5, 120.0)
    assert report["data"] == {"split": "test", "examples": 6, "users": 5}
    assert report["decoding"]["main"] == "sampled"
    assert report["settings"]["max_new_tokens"] == 20
    printed = capsys.readouterr().out
    assert printed.splitlines()[-2] == f"report: {tmp_path / 'report.md'}"
    assert f"{report['systems']['tppo']['mean_word_score']['value']:.3f} [" in printed
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert markdown.startswith("# Evaluation: sft, tppo\n")
    assert markdown.count("\n### ") == 5


def test_figures_agree_with_the_written_generations(run: Run, tmp_path: Path) -> None:
    report = run("--resamples", "50")
    examples = make_examples()
    rates: dict[tuple[str, str], list[int]] = {}
    for name in ("sft", "tppo"):
        for decoding in ("sampled", "greedy"):
            rows = [row for _, row in read_jsonl(tmp_path / "generations" / f"{name}_{decoding}.jsonl")]
            assert [row["id"] for row in rows] == [example.id for example in examples]
            relevant = [sum(score >= 1 for score in row["queries"][:3]) for row in rows]
            rates[name, decoding] = relevant
            metrics = report["systems"][name] if decoding == "sampled" else report["systems"][name]["greedy"]
            assert metrics["relevance_rate"]["value"] == pytest.approx(sum(relevant) / 18)
            lengths = [row["tokens"] for row in rows]
            assert metrics["tokens_per_response"]["value"] == pytest.approx(sum(lengths) / 6)
    for decoding, comparison in (
        ("sampled", report["comparisons"]["tppo_vs_sft"]), ("greedy", report["comparisons"]["tppo_vs_sft"]["greedy"])
    ):
        pairs = list(zip(rates["tppo", decoding], rates["sft", decoding], strict=True))
        assert comparison["win"] == pytest.approx(sum(later > earlier for later, earlier in pairs) / 6)
        assert comparison["tie"] == pytest.approx(sum(later == earlier for later, earlier in pairs) / 6)
        assert comparison["lose"] == pytest.approx(sum(later < earlier for later, earlier in pairs) / 6)
        assert comparison["intervals"]["win"]["value"] == comparison["win"]
        assert comparison["differences"]["relevance_rate"]["value"] == pytest.approx(
            sum(later - earlier for later, earlier in pairs) / 18
        )


def test_a_seed_repeats_the_report_and_a_report_is_not_lost(run: Run, tmp_path: Path) -> None:
    def figures(report: dict[str, Any]) -> dict[str, Any]:
        return {key: report[key] for key in ("systems", "references", "comparisons")}

    first = run("--seed", "3")
    with pytest.raises(InputError, match=r"report\.json exists; add --overwrite"):
        run("--seed", "3")
    assert figures(run("--seed", "3", "--overwrite")) == figures(first)
    other = run("--seed", "4", "--overwrite")
    scores = [report["systems"]["tppo"]["mean_word_score"] for report in (first, other)]
    assert scores[0]["value"] != scores[1]["value"]
    # Greedy decoding draws nothing, so that only the bootstrap differs.
    greedy = [report["systems"]["tppo"]["greedy"]["mean_word_score"] for report in (first, other)]
    assert greedy[0]["value"] == greedy[1]["value"]
    assert (greedy[0]["low"], greedy[0]["high"]) != (greedy[1]["low"], greedy[1]["high"])


def test_greedy_alone_is_the_main_decoding(run: Run, tmp_path: Path) -> None:
    report = run("--decoding", "greedy", "--max_examples", "4", "--shown_examples", "0")
    assert (report["decoding"]["main"], report["decoding"]["beside"]) == ("greedy", None)
    assert set(report["systems"]["sft"]) == {*MEASURES, *CORPUS_MEASURES}
    assert report["systems"]["sft"]["relevance_rate"]["n"] == report["data"]["examples"] == 4
    written = sorted(path.name for path in (tmp_path / "generations").iterdir())
    assert written == ["sft_greedy.jsonl", "tppo_greedy.jsonl"]
    assert "## Examples" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_judge_that_taught_the_reward_model_is_named(run: Run) -> None:
    assert any("its own teacher" in warning for warning in run("--reward_annotator", "lexical")["warnings"])


def test_every_later_system_is_compared_with_every_earlier_one(run: Run, inputs: Path) -> None:
    report = run("--decoding", "greedy", "--systems", *(f"{name}={inputs / 'sft'}" for name in ("a", "b", "c")))
    assert list(report["comparisons"]) == ["b_vs_a", "c_vs_a", "c_vs_b"]
    # The same model three times: every item is a tie, and the paired difference is exactly nothing.
    for comparison in report["comparisons"].values():
        assert (comparison["win"], comparison["tie"], comparison["lose"]) == (0.0, 1.0, 0.0)
        assert comparison["differences"]["token_f1"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 6}


def test_random_examples_keep_their_order() -> None:
    examples = make_examples()
    chosen = choose_examples(examples, 3, seed=1)
    places = [examples.index(example) for example in chosen]
    assert len(set(places)) == 3
    assert places == sorted(places)
    assert choose_examples(examples, 0, seed=1) == choose_examples(examples, 9, seed=1) == examples
    assert {tuple(e.id for e in choose_examples(examples, 3, seed=s)) for s in range(5)} > {tuple(e.id for e in chosen)}
    with pytest.raises(InputError, match="no examples"):
        choose_examples([], 3, seed=1)


def test_systems_keep_their_order() -> None:
    assert list(parse_systems(["b=x/y", "a=z=1"]).items()) == [("b", "x/y"), ("a", "z=1")]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "at least one system"),
        (["sft"], "expected name=model folder"),
        (["sft="], "expected name=model folder"),
        (["../x=y"], "expected name=model folder"),
        (["a|b=y"], "expected name=model folder"),
        (["sft=a", "sft=b"], "'sft' is taken"),
        (["gold=a"], "'gold' is taken"),
    ],
)
def test_systems_that_cannot_be_meant(items: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_systems(items)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_queries", "0"], "--num_queries must be 1 or more, not 0"),
        (["--max_examples", "-1"], "--max_examples must not be negative"),
        (["--data_dir", ""], "--data_dir is needed"),
        (["--decoding", "sampled", "--temperature", "0"], "temperature must be above 0"),
        (["--split", "train"], r"train\.jsonl: no such file"),
        (["--systems", "sft=nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_settings_that_cannot_be_meant(run: Run, flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(*flags)


def test_timings_are_merged_and_checked(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    write_json(first, {"step1": 2, "step2": 3.5})
    write_json(second, {"step2": 4.5})
    assert read_timings([str(first), str(second)]) == {"step1": 2.0, "step2": 4.5}
    assert read_timings([]) == {}
    for content, message in (("[1]", "expected"), ('{"a": "1"}', "'a' has '1'"), ('{"a": NaN}', "'a' has nan")):
        first.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            read_timings([str(first)])


def test_flags_and_yaml_reach_the_config(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text("systems: [sft=a, tppo=b]\nmax_prompt_tokens: 99\ntimings: [t.json]\n", encoding="utf-8")
    config = parse_config(EvaluateConfig, ["--config", str(path), "--split", "dev"])
    assert (config.systems, config.max_prompt_tokens, config.timings, config.split) == (
        ["sft=a", "tppo=b"], 99, ["t.json"], "dev"
    )


def test_a_language_model_judges(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command with a loopback endpoint that gives one example's responses no valid answer."""
    third = "searched: trail 2\n"
    examples = make_examples()
    write_jsonl(tmp_path / "data" / "test.jsonl", (
        {**example.to_dict(), "history": [{"type": "search", "query": f"trail {place}"}]}
        for place, example in enumerate(examples)
    ))  # fmt: skip
    endpoint = Endpoint(choose=lambda _, body: "broken_json" if third in body["messages"][1]["content"] else RIGHT)
    with serving(endpoint) as url:
        argv = [
            "evaluate", "--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path), "--systems",
            f"sft={inputs / 'sft'}", f"tppo={inputs / 'tppo'}", "--max_prompt_tokens", "128", "--max_new_tokens", "20",
            "--resamples", "200", "--prompt_template", "compact", "--annotator", "llm", "--base_url", url,
            "--model", "judge/one", "--reward_annotator", "judge/one", "--max_failure_share", "0.9",
        ]  # fmt: skip
        monkeypatch.setattr("sys.argv", argv)
        evaluate.main()
        asked = len(endpoint.seen)
        monkeypatch.setattr("sys.argv", [*argv, "--overwrite"])
        evaluate.main()
    assert len(endpoint.seen) == asked  # every answer was kept
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    judge = report["judge"]
    assert (judge["model"], report["annotator"]) == ("judge/one", "judge/one")
    for name in ("sft", "tppo"):
        rows = read_rows(tmp_path / "generations" / f"{name}_sampled.jsonl")
        assert [row["queries"] is None for row in rows] == [place == 2 for place in range(len(rows))]
        rates = [relevance_rate(row["queries"], 3) for row in rows if row["queries"] is not None]
        assert judge["relevance"]["words"][name]["relevance_rate"]["value"] == pytest.approx(sum(rates) / len(rates))
        assert judge["relevance"]["words"][name]["relevance_rate"] == report["systems"][name]["relevance_rate"]
        assert judge["relevance"]["sentence"][name]["failure_rate"] == pytest.approx(1 / len(rows))
    for level in ("words", "sentence"):
        pair = judge["comparisons"][level]["tppo_vs_sft"]
        assert pair["undecided"] == 1
        assert sum(pair[outcome]["value"] for outcome in ("win", "tie", "lose")) == pytest.approx(1)
        assert pair["flip_rate"] == 0.0
    assert any("judge (judge/one) is the annotator" in warning for warning in report["warnings"])
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "## The judge's two templates\n\njudge&#47;one, main decoding" in markdown
    assert "verdicts" in capsys.readouterr().out
    assert report["settings"]["base_url"].startswith("http://127.0.0.1")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
