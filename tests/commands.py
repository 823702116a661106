"""Every command of the repository and the flags that each takes, for the tests of `--help` and of the documentation."""

from __future__ import annotations

import dataclasses
import importlib
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "step1_sft", "step2_token_reward", "step3_tppo", "baselines", "study", "benchmarks")
# What a script hands its flags to, beside those of its own.
SCRIPTS = {
    "convert_checkpoint.sh": "common.engine.universal",
    "run_step1.sh": "step1_sft.main",
    "run_step2.sh": "step2_token_reward.main",
    "run_step3.sh": "step3_tppo.main",
    "evaluate.sh": "common.evaluation.evaluate",
    "reproduce.sh": "study.main",
}
STEPS = ("step1_sft.main", "step2_token_reward.main", "step3_tppo.main")
_ALWAYS = {"config", "debug", "help"}
# What `launch` in scripts/environment.sh takes out of the flags, and torchrun's and deepspeed's own.
LAUNCHER = {"num_gpus", "num_nodes", "hostfile", "include", "exclude", "master_addr", "master_port", "launcher"}


def modules() -> list[str]:
    """All modules that can be run with `python -m`."""
    files = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return [module_name(path) for path in files if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")]


def module_name(path: Path) -> str:
    """The dotted name of a file of the repository."""
    return ".".join(path.resolve().relative_to(ROOT).with_suffix("").parts)


def config_of(module: str) -> type | None:
    """The dataclass that a command fills from its flags; None for one that reads its flags itself."""
    found = re.search(r"parse_config\((\w+)\)", source(module))
    return getattr(importlib.import_module(module), found[1]) if found else None


@cache
def flags_of(module: str) -> set[str]:
    """The flags that a module takes, without dashes; those of its command where it is a script that only starts one."""
    started = re.search(r"^from ([\w.]+) import main$", source(module), re.MULTILINE)
    if started:
        return flags_of(started[1])
    if module == "scripts.plan":  # beside its own, those of the step that is planned
        return set(re.findall(r'"--(\w+)"', source(module))).union(*map(flags_of, STEPS))
    config = config_of(module)
    if config is None:
        switches = re.findall(r"read_switches\(__doc__, (\w+)=", source(module))
        return {*switches, *re.findall(r'"--(\w+)"', source(module)), "help"}
    fields = dataclasses.fields(config)
    return {field.name for field in fields} | {f"no_{f.name}" for f in fields if f.default is True} | _ALWAYS


@cache
def flags_of_script(name: str) -> set[str]:
    """The flags that scripts/`name` takes: those of its `case` and those of the command that it starts."""
    text = (ROOT / "scripts" / name).read_text(encoding="utf-8")
    cases = [line for line in text.splitlines() if re.match(r" +[-|\w]+\)", line)]
    own = set(re.findall(r"--(\w+)", "\n".join(cases)))
    handed_on = flags_of(SCRIPTS[name]) if name in SCRIPTS else set()
    return own | handed_on | (LAUNCHER if "launch " in text else set())


def source(module: str) -> str:
    """The text of a module."""
    return (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
