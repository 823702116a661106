"""The flags of run_all.sh and of run_step1.sh to run_step3.sh, which mean the same in all four.

Only Python's own library is imported: a wrong flag is refused before anything is loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from common.errors import InputError
from common.feedback.names import ANNOTATORS, LLM, is_own
from common.files import read_json, write_json

KNOWN = (*ANNOTATORS, LLM)
LLM_ONLY = ("base_url", "annotator_model", "judge_model", "judge_url", "llm_flags")
# What a step whose inputs are all the user's has no use for.
OF_A_RUN = ("run_name", "log", "log_format", "model", "reward_model", "annotator", *LLM_ONLY)
# What a folder of the run is made from: once that is there, a command may leave the flag out, but not change it.
MADE_FROM = {
    "log": "data", "log_format": "data", "model": "data", "miniature": "data",
    "reward_model": "step2_token_reward", "annotator": "step2_token_reward",
}  # fmt: skip
SETTINGS_NAME = "run.json"

EXAMPLES = """examples:
  bash scripts/run_all.sh                                     the embedded search log, a tiny model, two CPU ranks
  bash scripts/run_all.sh --model smollm2-135m --reward_model minilm-l6 --log examples/logs/cast_ikat.jsonl
  bash scripts/run_step3.sh --run_name mine --total_steps 50  one step; what an earlier step lacks is made first
"""


@dataclass
class PipelineOptions:
    """The settings of a run; an empty text is one that was not given."""

    run_name: str = ""
    log: list[str] = field(default_factory=list)
    log_format: str = ""
    model: str = ""
    reward_model: str = ""
    preset: str = ""
    annotator: str = ""
    base_url: str = ""
    annotator_model: str = ""
    judge_model: str = ""
    judge_url: str = ""
    llm_flags: str = ""
    num_gpus: str = ""
    hostfile: str = ""
    seed: str = ""
    miniature: bool = False
    resume: bool = False
    overwrite: bool = False
    config: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where the run's outputs lie, relative to the folder of the user."""
        return Path("outputs") / self.run_name


def parse_options(argv: Sequence[str], step: int | None) -> tuple[PipelineOptions, list[str]]:
    """The options in `argv`, and the flags that are not ours: those of `step`'s main.py; for None there may be none.

    Raises `InputError` for a flag that cannot be, and for a file or folder that is not there.
    """
    parser = _parser(step)
    known, rest = (parser.parse_args(argv), []) if step is None else parser.parse_known_args(argv)
    options = PipelineOptions(**vars(known))
    _check_given(options)
    return options, rest


def settle(options: PipelineOptions, anew: bool = False) -> PipelineOptions:
    """`options` with what an earlier command of the same run was given, unless it begins `anew`, and with the defaults.

    Raises `InputError` for options that contradict each other or the run.
    """
    run_name = options.run_name or ("log" if options.log else "demo")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run_name):
        raise InputError(f"--run_name {run_name!r} may hold letters, digits, . _ - and begins with a letter or digit")
    options = dataclasses.replace(options, run_name=run_name, log=[str(Path(log).resolve()) for log in options.log])
    if not anew:
        options = _with_settings_of_the_run(options)
    real = bool(options.log)
    options = dataclasses.replace(
        options,
        log_format=options.log_format or "auto",
        preset=options.preset or "auto",
        annotator=options.annotator or ("lexical" if real else "simulated"),
        seed=options.seed or "0",
    )
    if real and options.annotator == "simulated":
        raise InputError("only the embedded log has a truth for --annotator simulated; leave --log or --annotator out")
    if options.annotator == "llm":
        if not options.base_url or not options.annotator_model:
            raise InputError("--annotator llm needs --base_url and --annotator_model")
        judge = options.judge_model or options.annotator_model, options.judge_url or options.base_url
        options = dataclasses.replace(options, judge_model=judge[0], judge_url=judge[1])
    elif given := [f"--{name}" for name in LLM_ONLY if getattr(options, name)]:
        raise InputError(f"{', '.join(given)}: for --annotator llm, not {options.annotator}")
    return options


def keep_settings(options: PipelineOptions) -> None:
    """Note in the run's folder what it is made from, for later commands."""
    kept = {
        name: value
        for name, value in dataclasses.asdict(options).items()
        if name not in ("run_name", "num_gpus", "hostfile", "resume", "overwrite", "config")
    }
    write_json(options.folder / SETTINGS_NAME, kept)


def _with_settings_of_the_run(options: PipelineOptions) -> PipelineOptions:
    path = options.folder / SETTINGS_NAME
    if not path.is_file():
        return options
    kept = read_json(path)
    changes = {}
    for name, value in kept.items():
        given = getattr(options, name)
        if name in LLM_ONLY and options.annotator not in ("", kept["annotator"]):
            continue  # of an annotator that is replaced
        if not given:
            changes[name] = value
        elif given != value and name in MADE_FROM and (options.folder / MADE_FROM[name]).exists():
            raise InputError(
                f"{options.folder} was begun with {_flag(name, value)}, not {_flag(name, given)}; leave the flag out, "
                "choose another --run_name, or replace the whole run with run_all.sh --overwrite"
            )
    return dataclasses.replace(options, **changes)


def _flag(name: str, value: object) -> str:
    if isinstance(value, list):
        value = " ".join(value)
    return f"--{name} {json.dumps(value) if isinstance(value, bool) else value or 'at its default'}"


def _check_given(options: PipelineOptions) -> None:
    if options.resume and options.overwrite:
        raise InputError("--resume and --overwrite contradict each other: give one of them")
    if options.preset and options.config:
        raise InputError("--preset and --config contradict each other: both choose the settings files")
    for flag, paths in (("log", options.log), ("config", options.config), ("hostfile", [options.hostfile])):
        for path in filter(None, paths):
            if not Path(path).exists():
                raise InputError(f"--{flag} {path}: no such file")
    if options.num_gpus.isdecimal() and int(options.num_gpus) < 1:
        raise InputError(f"--num_gpus must be 1 or more, not {options.num_gpus}")
    for name in ("num_gpus", "seed"):
        value = getattr(options, name)
        if value and not value.isdecimal():
            raise InputError(f"--{name} is a whole number, not {value!r}")
    file = options.annotator.rpartition(":")[0]
    if is_own(options.annotator):
        if not Path(file).is_file():
            raise InputError(f"--annotator {options.annotator}: no such file as {file}")
    elif options.annotator and options.annotator not in KNOWN:
        raise InputError(
            f"--annotator {options.annotator} is none of {', '.join(KNOWN)}, nor of the form FILE.py:FUNCTION"
        )
    for name in ("model", "reward_model"):
        value = getattr(options, name)
        if looks_like_a_path(value) and not Path(value).is_dir():
            raise InputError(f"--{name} {value}: no such folder")


def looks_like_a_path(name: str) -> bool:
    """Whether a model's name cannot be one on the hub, which has the form NAME or OWNER/NAME."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


class _Parser(argparse.ArgumentParser):
    """Raises `InputError` where argparse prints its whole usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists every flag)")


def _parser(step: int | None) -> argparse.ArgumentParser:
    name = "run_all.sh" if step is None else f"run_step{step}.sh"
    what = "The main job, end to end: log, SFT, token reward model, token-level PPO, report."
    parser = _Parser(
        prog=f"bash scripts/{name}", allow_abbrev=False, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=what if step is None else f"Step {step} of the run; all flags of its main.py may follow.",
    )  # fmt: skip
    run = parser.add_argument_group("the run")
    run.add_argument("--run_name", metavar="NAME", default="", help="outputs/NAME (demo; log with --log)")
    run.add_argument("--seed", metavar="N", default="", help="of every random choice (0)")
    run.add_argument("--miniature", action="store_true", help="a few minutes' check; its results mean nothing")
    run.add_argument("--resume", action="store_true", help="go on with a run, or a step, that was stopped")
    run.add_argument("--overwrite", action="store_true", help="replace what the command makes")
    data = parser.add_argument_group("data and models")
    data.add_argument(
        "--log", metavar="FILE", nargs="+", action="extend", default=[],
        help="your own logs (docs/data_formats.md); none: the embedded search log",
    )
    data.add_argument("--log_format", metavar="FORMAT", default="", help="of all logs (by file name)")
    data.add_argument(
        "--model", metavar="NAME", default="",
        help="base model: a folder, a hub name, or smollm2-135m (a tiny random one, made from the log)",
    )
    data.add_argument(
        "--reward_model", metavar="NAME", default="",
        help="what the reward model starts from: a folder, a hub name, or minilm-l6 (step 1's model)",
    )
    feedback = parser.add_argument_group("who labels words, and judges in the report")
    feedback.add_argument(
        "--annotator", metavar="NAME", default="",
        help="simulated, lexical, llm, or your own FILE.py:FUNCTION, which is run (simulated; lexical with --log)",
    )
    feedback.add_argument("--base_url", metavar="URL", default="", help="llm: an OpenAI-compatible endpoint")
    feedback.add_argument("--annotator_model", metavar="NAME", default="", help="llm: the model's name there")
    feedback.add_argument("--judge_model", metavar="NAME", default="", help="llm: who judges (the annotator)")
    feedback.add_argument("--judge_url", metavar="URL", default="", help="llm: the judge's endpoint (--base_url)")
    feedback.add_argument(
        "--llm_flags", metavar="FLAGS", default="", help='llm: more flags, as in --llm_flags="--concurrency 64"'
    )
    machine = parser.add_argument_group("settings and machine")
    machine.add_argument(
        "--preset", metavar="NAME", default="",
        help="a file in stepN_*/configs; auto: by model and machine; none: main.py's defaults (auto)",
    )
    machine.add_argument("--num_gpus", metavar="N", default="", help="GPUs, or CPU ranks without one (all; 2)")
    machine.add_argument("--hostfile", metavar="FILE", default="", help="many machines (scripts/hostfile.example)")
    if step is None:
        parser.set_defaults(config=[])
    else:
        machine.add_argument(
            "--config", metavar="FILE", nargs="+", default=[], help="your own settings files in place of a preset"
        )
    return parser
