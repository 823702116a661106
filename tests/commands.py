"""Every command of the repository and the flags that each takes, for the tests of `--help` and of the documentation."""

from __future__ import annotations

import dataclasses
import importlib
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "step1_sft", "step2_token_reward", "step3_tppo", "baselines", "study", "benchmarks", "scripts")
# What a script hands its flags to; those that start the pipeline take its flags too.
SCRIPTS = {
    "run_step1.sh": "step1_sft.main",
    "run_step2.sh": "step2_token_reward.main",
    "run_step3.sh": "step3_tppo.main",
    "evaluate.sh": "common.evaluation.evaluate",
    "reproduce.sh": "study.main",
    "convert_checkpoint.sh": "common.engine.universal",
}
STEPS = ("step1_sft.main", "step2_token_reward.main", "step3_tppo.main")
_ALWAYS = {"config", "debug", "help"}
# What `launch` in scripts/environment.sh takes out of the flags, and torchrun's and deepspeed's own.
LAUNCHER = {"num_gpus", "num_nodes", "hostfile", "include", "exclude", "master_addr", "master_port", "launcher"}


def modules() -> list[str]:
    """All commands that can be run with `python -m`; a module that the scripts alone run reads `sys.argv` by place."""
    files = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    ends = {path: path.read_text(encoding="utf-8").partition('if __name__ == "__main__":')[2] for path in files}
    return [module_name(path) for path, end in ends.items() if end and "sys.argv[" not in end]


def module_name(path: Path) -> str:
    """The dotted name of a file of the repository."""
    return ".".join(path.resolve().relative_to(ROOT).with_suffix("").parts)


def config_of(module: str) -> type | None:
    """The dataclass that a command, or the `main` that it imports, fills; None for one that reads its flags itself."""
    text = source(module)
    if imported := re.search(r"^ *from ([\w.]+) import main$", text, re.MULTILINE):
        return config_of(imported[1])
    found = re.search(r"parse_config\((\w+)\)", text)
    return getattr(importlib.import_module(module), found[1]) if found else None


@cache
def flags_of(module: str) -> set[str]:
    """The flags that a module takes, without dashes; those of its command where it is a script that only starts one."""
    started = re.search(r"^ *from ([\w.]+) import main$", source(module), re.MULTILINE)
    if started:
        return flags_of(started[1])
    if module == "scripts.plan":  # beside its own, those of the step that is planned
        return set(re.findall(r'"--(\w+)"', source(module))).union(*map(flags_of, STEPS))
    config = config_of(module)
    if config is not None:
        return fields_of(config) | _ALWAYS
    switches = re.findall(r"read_switches\(__doc__, (\w+)=", source(module))
    flags = {*switches, *re.findall(r'"--(\w+)"', source(module))}
    # One that hands the rest of its flags to a config, chosen by one of its own (scripts/plan.py).
    if "parse_known_args" in source(module):
        configs = [value for name, value in vars(importlib.import_module(module)).items() if name.endswith("Config")]
        flags |= _ALWAYS.union(*map(fields_of, configs))
    return flags | {"help"}


def fields_of(config: type) -> set[str]:
    """The flags that a config dataclass takes."""
    fields = dataclasses.fields(config)
    return {field.name for field in fields} | {f"no_{field.name}" for field in fields if field.default is True}


@cache
def flags_of_script(name: str) -> set[str]:
    """The flags that the script `name`, from the root, takes: those of the command that it starts, or of several, or
    those that it reads itself, in a `case`."""
    path = ROOT / name
    if path.parent.parent.name == "benchmarks":
        return set(re.findall(r"--(\w+)(?=[|)])", path.read_text(encoding="utf-8")))
    if path.parent.name == "launch":
        program = "sample" if path.name == "sample.sh" else "main"
        return flags_of(f"{path.parent.parent.name}.{program}") | LAUNCHER
    handed_on = flags_of(SCRIPTS[path.name]) if path.name in SCRIPTS else set()
    if "pipeline.main" in path.read_text(encoding="utf-8"):
        handed_on = handed_on | (flags_of("pipeline.options") - {"config"})
    return handed_on


def source(module: str) -> str:
    """The text of a module."""
    return (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
