"""The documentation against the code: links lead somewhere, commands and their flags exist, snippets compile."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.data.readers import read_log
from common.data.records import Event
from common.feedback.annotator import Annotation, FeedbackItem
from common.feedback.own import OwnAnnotator
from step2_token_reward.evaluation import METRIC_NAMES
from step3_tppo.metrics import REWARD_PARTS
from tests.commands import (
    LAUNCHER,
    PACKAGES,
    ROOT,
    SCRIPTS,
    config_of,
    flags_of,
    flags_of_script,
    module_name,
    modules,
    source,
)

PAGES = sorted(
    {
        page
        for pattern in ("*.md", "docs/**/*.md", "*/README.md", "benchmarks/**/*.md", "examples/**/*.md")
        for page in ROOT.glob(pattern)
    }
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`((?:PYTHONPATH=\S+ )?(?:python|bash|torchrun) [^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_ASSIGNMENT = re.compile(r"\w+=")


def fences(page: Path, *languages: str) -> list[str]:
    return [text for language, text in _FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def shell_lines(page: Path) -> Iterator[str]:
    """Every command line of a page, continued lines joined: in fences and between back-ticks."""
    for block in fences(page, "bash", "sh"):
        yield from (line for line in block.replace("\\\n", " ").splitlines() if not line.startswith("#!"))
    yield from _INLINE.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))


def commands(line: str) -> Iterator[list[str]]:
    """The simple commands of a line as words, those inside `bash -c '...'` and of a loop too."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|(){}")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for token in [*lexer, ";"]:
        if set(token) <= set(";&|(){}"):
            if words:
                yield words
            words = []
        elif " " in token and re.search(r"\bpython\b", token):
            yield from commands(token)
        else:
            words.append(token)


def problem_with(words: list[str]) -> str | None:
    """Why the repository cannot run this command; None if it can, or if the command is not the repository's."""
    while words and (_ASSIGNMENT.match(words[0]) or words[0] in ("exec", "export", "source")):
        words = words[1:]
    if not words or words[0] not in ("bash", "python", "torchrun", "deepspeed"):
        return None
    place = next((i for i, word in enumerate(words) if word.endswith((".py", ".sh"))), None)
    module_flag = words.index("-m") if words[0] == "python" and "-m" in words else None
    if module_flag is not None:
        place = module_flag + 1
        module = words[place]
        if importlib.util.find_spec(module.split(".")[0]) is None or not (ROOT / module.split(".")[0]).is_dir():
            return None  # sglang.launch_server
        if not (ROOT / (module.replace(".", "/") + ".py")).is_file():
            return f"no module {module}"
        known = flags_of(module)
    elif place is None:
        return None
    elif not (ROOT / words[place]).is_file():
        return f"no file {words[place]}"
    elif words[place].endswith(".sh"):
        if Path(words[place]).name == "run_tests.sh":  # pytest's flags
            return None
        known = flags_of_script(words[place])
    else:
        known = flags_of(module_name(ROOT / words[place]))
    flags = {word[2:].split("=")[0] for word in words[place + 1 :] if word.startswith("--")}
    return f"no flags {sorted(flags - known)}" if flags - known else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_of_a_page_leads_to_a_file(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [target.split("#")[0] for target in _LINK.findall(text) if not re.match(r"https?:|mailto:|#", target)]
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_exists_and_takes_the_flags_that_it_is_given(page: Path) -> None:
    problems = {
        " ".join(words): problem for line in shell_lines(page) for words in commands(line)
        if (problem := problem_with(words)) is not None
    }  # fmt: skip
    assert not problems


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_presets_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"[\w/]+/configs/\w+\.yaml", page.read_text(encoding="utf-8"))
    assert not [name for name in named if not (ROOT / name).is_file()]


def texts(module: str) -> Iterator[str]:
    """Every text in a module's source, with a word in the place of each value that is put in."""
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "value" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_commands_that_commands_end_with_exist_and_take_their_flags() -> None:
    every = "\n".join(text for module in modules() for text in texts(module))
    told = re.findall(r"^next: +((?:python|bash|deepspeed) .*)", every, re.MULTILINE)
    problems = {line: found for line in told for words in commands(line) if (found := problem_with(words))}
    assert len(told) >= 10 and not problems


def test_a_wrong_command_is_found() -> None:
    for line, problem in {
        "python -m common.data.prepare --log a --outptu_dir b": "no flags ['outptu_dir']",
        "PYTHONPATH=. python -m common.data.nowhere": "no module common.data.nowhere",
        "bash scripts/run_step3.sh --num_gpus 8 --actor a": "no flags ['actor']",
        "bash scripts/run_all.sh --logs a": "no flags ['logs']",
        "bash scripts/run_all.sh --total_steps 5 --config a.yaml": "no flags ['config', 'total_steps']",
        "bash step1_sft/launch/single_gpu.sh --num_gpus 1 --total_steps 5": "no flags ['total_steps']",
        "bash step2_token_reward/launch/sample.sh --labels a --data_dir b": "no flags ['labels']",
        "bash scripts/nowhere.sh": "no file scripts/nowhere.sh",
        "srun bash -c 'RANK=1 exec python step1_sft/main.py --x 1' || { true; }": "no flags ['x']",
    }.items():
        assert [found for words in commands(line) if (found := problem_with(words))] == [problem]
    right = "a=1 python step3_tppo/main.py --no_tensorboard --debug; bash scripts/run_all.sh --hostfile h --resume #--x"
    assert [problem_with(words) for words in commands(right)] == [None, None]


def cited_sections(text: str) -> list[int]:
    """The sections of docs/method.md that a text cites. Raises `ValueError` for a citation in any other form."""
    flat = re.sub(r"\s+(?:# )?", " ", text)
    found = [int(number) for number in re.findall(r"\bdocs/method\.md, section (\d+)", flat)]
    loose = re.findall(r"\bmethod, section \d|(?<![\w/(])method\.md|docs/method\.md(?!, section \d|\))", flat)
    if loose:
        raise ValueError(f"cite docs/method.md, section N, and not {loose}")
    return found


def test_every_section_of_the_method_that_is_cited_exists() -> None:
    page = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    sections = [int(number) for number in re.findall(r"^## (\d+)\. \w", page, re.MULTILINE)]
    assert sections == list(range(1, len(sections) + 1))
    files = [path for package in (*PACKAGES, "tests") for path in (ROOT / package).rglob("*.py")]
    cited = {path: cited_sections(path.read_text(encoding="utf-8")) for path in files if path != Path(__file__)}
    assert len([path for path, numbers in cited.items() if numbers]) >= 10
    assert not {path: numbers for path, numbers in cited.items() if set(numbers) - set(sections)}


def test_a_citation_in_another_form_is_found() -> None:
    assert cited_sections("see docs/method.md,\n# section 12; docs/method.md, section 3") == [12, 3]
    for text in ("method, section 3", "that of method.md;", "docs/method.md says"):
        with pytest.raises(ValueError, match="cite docs"):
            cited_sections(text)


@pytest.mark.parametrize("page", [page for page in PAGES if fences(page, "python")], ids=lambda page: page.name)
def test_python_snippets_of_a_page_compile(page: Path) -> None:
    for snippet in fences(page, "python"):
        compile(snippet, str(page), "exec")


def test_the_annotator_that_the_documentation_shows_scores_as_it_says(tmp_path: Path) -> None:
    (snippet,) = (text for text in fences(ROOT / "docs/own_annotator.md", "python") if "my_scores.py" in text)
    (tmp_path / "my_scores.py").write_text(snippet)
    history = (Event("search", query="Red hat"), Event("click", title="Suede boots"))
    item = FeedbackItem("example", "user", history, (), "red boots\nblue, hat!")
    annotation = OwnAnnotator(f"{tmp_path / 'my_scores.py'}:score").annotate(item)
    assert annotation == Annotation(((1, 2), (0, 1)), (2, 0))


def test_the_log_that_the_documentation_makes_from_a_table_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (snippet,) = fences(ROOT / "docs/own_log.md", "python")
    rows = ["user,time,query", "u1,2024-03-01T10:03:40,sleeper vienna", "u2,2024-03-01,tea", "u1,2024-03-01T10,trains"]
    (tmp_path / "searches.csv").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "own_log.md", "exec"), {})
    (shown,) = fences(ROOT / "docs/own_log.md", "json")
    with Path("sessions.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(" ".join(shown.split("\n")))
    found = {record.user_id: [event.text for event in record.events] for record in read_log("sessions.jsonl", "jsonl")}
    assert found == {
        "u1": ["trains", "sleeper vienna"], "u2": ["tea"],
        "u17": ["night trains", "Night trains of Europe", "sleeper vienna"],
    }  # fmt: skip


@pytest.mark.parametrize("page", ["docs/tuning.md", "step3_tppo/README.md", "step2_token_reward/README.md"])
def test_curves_that_a_page_names_are_logged(page: str) -> None:
    logged = {f"eval/{name}" for name in METRIC_NAMES} | {"train/loss", "train/local_loss", "train/global_loss"}
    logged |= {f"reward/{part}_per_{unit}" for part in (*REWARD_PARTS, "kl_penalty") for unit in ("token", "query")}
    for module in ("metrics", "monitor", "trainer", "updates"):
        logged |= set(re.findall(r'"(\w+/\w+)"', source(f"step3_tppo.{module}")))
    groups = {name.split("/")[0] for name in logged}
    named = re.findall(r"`(\w+)/(\w+)`", (ROOT / page).read_text(encoding="utf-8"))
    found = {f"{group}/{name}" for group, name in named if group in groups}
    assert len(found) > 5 and not found - logged


def stated_defaults(page: Path) -> Iterator[tuple[str, str]]:
    """Flags and their values in the tables of a page with a column `default`, where a row has as many of both."""
    in_table = False
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            in_table = False
        elif "default" in cells[1:2]:
            in_table = True
        elif in_table:
            flags = re.findall(r"`--(\w+)[^`]*`", cells[0])
            values = [re.sub(r" *\(.*\)", "", value.strip()) for value in cells[1].split(",")]
            if len(flags) == len(values):
                yield from zip(flags, values, strict=True)


@pytest.mark.parametrize(
    ("page", "module"),
    [
        ("step2_token_reward/README.md", "step2_token_reward.main"), ("step3_tppo/README.md", "step3_tppo.main"),
        ("docs/using_the_model.md", "common.prediction.main"), ("docs/data_formats.md", "common.data.prepare"),
    ],
)  # fmt: skip
def test_defaults_that_a_table_states_are_those_of_the_command(page: str, module: str) -> None:
    """Numbers, switches and choices; a value in words (`none`, "the actor's") stands for one that is empty."""
    config = config_of(module)()
    stated = dict(stated_defaults(ROOT / page))
    wrong = {}
    for name, value in stated.items():
        default = getattr(config, name)
        if isinstance(default, bool):
            right = value in (("on", "true") if default else ("off", "false"))
        elif isinstance(default, int | float):
            number = re.match(r"[\d.]+(e-?\d+)?", value)
            right = default == (float(number.group()) if number else 0)
        else:
            right = value == default or not default
        if not right:
            wrong[name] = (value, default)
    assert len(stated) >= 6 and not wrong


def test_scripts_that_hand_their_flags_on_are_those_that_are_listed() -> None:
    handing_on = {path.name for path in (ROOT / "scripts").glob("*.sh") if '"$@"' in path.read_text()}
    assert handing_on - {"environment.sh", "run_tests.sh", "run_all.sh"} == set(SCRIPTS)
    taken = re.findall(r"--(\w+)", (ROOT / "scripts/environment.sh").read_text())
    assert set(taken) >= LAUNCHER
