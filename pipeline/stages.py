"""The stages of a run in their order, and what each hands to the next. Nowhere else are they listed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from common.access import check_writable
from common.config import parse_config
from pipeline.hardware import Hardware
from pipeline.options import PipelineOptions
from pipeline.presets import ROOT, SETTINGS, Models, adaptations, config_files
from step1_sft.config import check_config as check_step1
from step2_token_reward.config import check_config as check_step2
from step2_token_reward.sample_config import check_config as check_sample
from step3_tppo.config import Step3Config

DATA, EVALUATION = 0, 4  # before step 1, after step 3
STEP_FOLDERS = {1: "step1_sft", 2: "step2_token_reward", 3: "step3_tppo"}
CHECKS = {"step1": check_step1, "sample": check_sample, "step2": check_step2}
# What a step's main.py reads: flags by which a user may give other paths than the run's.
INPUTS = {
    1: ("model_name_or_path", "data_dir"),
    2: ("model_name_or_path", "samples", "labels"),
    3: ("actor_path", "reward_path", "data_dir"),
}

# Real logs have longer queries than the embedded one, and corrupted responses are longer than sampled ones.
TINY_ON_A_REAL_LOG = {"max_prompt_tokens": "256", "max_response_tokens": "96"}
WORD_ERROR_RATE = "0.09"  # people agreed with the paper's annotator on 91.18 % of the words
# The cuts of --miniature: for the tiny model, and for a pretrained one, which needs seconds where the other needs none.
MINIATURE = {
    "simulate": {"num_users": "160"},
    "step1": {"num_train_epochs": "1"},
    "sample": {"max_train_examples": "48", "max_dev_examples": "16"},
    "step2": {"num_train_epochs": "1"},
    "step3": {
        "total_steps": "3", "critic_warmup_steps": "1", "rollout_batch_size": "16", "mini_batch_size": "16",
        "micro_batch_size": "8", "save_steps": "2",
    },
    "evaluate": {"max_examples": "24", "resamples": "200"},
}  # fmt: skip
PRETRAINED_MINIATURE = MINIATURE | {
    "prepare": {"user_share": "0.2"},
    "step1": {"max_steps": "2"},
    "sample": {"max_train_examples": "12", "max_dev_examples": "4"},
    "step2": {"max_steps": "2"},
    "step3": {
        "total_steps": "2", "critic_warmup_steps": "1", "rollout_batch_size": "4", "samples_per_prompt": "2",
        "mini_batch_size": "4", "micro_batch_size": "2", "save_steps": "2",
    },
    "evaluate": {"max_examples": "4", "resamples": "200"},
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A command of a run, the step that it belongs to, and what it makes in the run's folder.

    `check` raises `InputError` for settings that cannot work. A stage that is not `recorded` writes to a folder of the
    user's own, so that it is never done.
    """

    name: str
    step: int
    command: Sequence[str]
    makes: Path
    check: Callable[[], Any] = field(default=lambda: None)
    recorded: bool = True


class Run:
    """A run's folder and all of its stages, under settled options.

    `models` are folders or hub names, `step` and `flags` what a user gives to the main.py of that step.
    """

    def __init__(
        self, options: PipelineOptions, hardware: Hardware, models: Models, preset: str, step: int | None,
        flags: Sequence[str],
    ) -> None:
        self.options = options
        self.folder = options.folder
        self._hardware = hardware
        self._models = models
        self._preset = preset
        self._step = step
        self._flags = list(flags)
        self._real_log = bool(options.log)
        self._pretrained = bool(models.base)
        self._cuts = (PRETRAINED_MINIATURE if self._pretrained else MINIATURE) if options.miniature else {}
        self.data = self.folder / "data"
        self.base = self.folder / "base_model"
        self.sft = self.folder / "step1_sft" / "model"
        self.samples = self.folder / "step2_token_reward" / "samples" / "samples.jsonl"
        self.labels = self.folder / "step2_token_reward" / "labels.jsonl"
        self.reward = self.folder / "step2_token_reward" / "reward" / "model"
        self.tppo = self.folder / "step3_tppo" / "model"

    def stages(self) -> list[Stage]:
        """All of them, from the log to the report."""
        return [*self._data_stages(), self._sft_stage(), *self._reward_stages(), self._tppo_stage(), self._report()]

    def is_done(self, stage: Stage) -> bool:
        """Whether a stage ended well and what it made is still there."""
        record = self.folder / "stages" / f"{stage.name}.json"
        return stage.recorded and record.is_file() and stage.makes.exists()

    @property
    def writes_elsewhere(self) -> bool:
        """Whether the user's --output_dir for the step is another folder than the run's."""
        given = flag_value(self._flags, "output_dir")
        own = {1: self.sft, 2: self.reward, 3: self.tppo}
        return bool(self._step and given) and Path(given).resolve() != own[self._step].parent.resolve()

    def inputs(self, step: int) -> dict[str, Path]:
        """The run's own inputs of a step, by the flags of its main.py."""
        base = Path(self._models.base or self.base)
        own = {
            "data_dir": self.data, "samples": self.samples, "labels": self.labels, "actor_path": self.sft,
            "reward_path": self.reward, "model_name_or_path": self.sft if step == 2 else base,
        }  # fmt: skip
        return {name: own[name] for name in INPUTS[step]}

    def holds(self, path: Path) -> bool:
        """Whether a path lies in the run's folder; a model's name does not."""
        return path.is_relative_to(self.folder)

    def endpoint_checks(self) -> list[list[str]]:
        """Commands that ask the annotator and the judge for an answer, where these are language models."""
        options = self.options
        if not self._asks_a_model:
            return []
        asked = {(options.base_url, options.annotator_model): None, (options.judge_url, options.judge_model): None}
        check = [sys.executable, "-m", "common.feedback.llm.check"]
        return [[*check, *_flags(base_url=url, model=model), *self._llm_flags] for url, model in asked]

    def alone(self, files: Sequence[str]) -> Stage:
        """The step that the user asks for, on nothing but his own flags and these settings files."""
        program = f"step{self._step}"
        seed = {"seed": self.options.seed} if self.options.seed else {}
        adapted = {} if self.options.config else adaptations(program, files, self._models)
        given = adapted | seed | self._cuts.get(program, {})
        flags = ["--config", *files, *_flags(**given), *self._flags]
        return self._launched(program, program, flags, Path(), alone=True)

    def _data_stages(self) -> list[Stage]:
        stages = []
        logs = self.options.log
        if not self._real_log:
            log = self.folder / "log"
            users = {"num_users": "6000"} | self._cuts.get("simulate", {})
            simulate = self._module("common.data.simulator", output_dir=log, overwrite=None, **users)
            stages.append(Stage("simulate", DATA, simulate, log))
            logs = [str(log / "sessions.jsonl")]
        # Real logs have few users, so that every window of a history is an example.
        windows = {"windows": "0"} if self._real_log else {}
        windows |= self._cuts.get("prepare", {})
        prepare = self._module(
            "common.data.prepare", log_format=self.options.log_format, output_dir=self.data, overwrite=None, **windows
        )
        stages.append(Stage("prepare", DATA, [*prepare, "--log", *logs], self.data))
        if not self._pretrained:
            base = self._module(
                "common.models.tiny", data_dir=self.data, output_dir=self.base,
                prompt_template="compact", overwrite=None,
            )  # fmt: skip
            stages.append(Stage("base_model", DATA, base, self.base))
        return stages

    def _sft_stage(self) -> Stage:
        base = self._models.base or self.base
        flags = self._program("step1", model_name_or_path=base, data_dir=self.data, output_dir=self.sft.parent)
        return self._launched("step1_sft", "step1", flags, self.sft)

    def _reward_stages(self) -> list[Stage]:
        sample = self._program(
            "sample", model_name_or_path=self.sft, data_dir=self.data, output_dir=self.samples.parent
        )
        train = self._program(
            "step2", model_name_or_path=self._models.reward or self.sft, samples=self.samples, labels=self.labels,
            output_dir=self.reward.parent,
        )  # fmt: skip
        return [
            self._launched("step2_sample", "sample", sample, self.samples, launcher="sample"),
            *self._label_stages(),
            self._launched("step2_reward", "step2", train, self.reward),
        ]

    def _label_stages(self) -> list[Stage]:
        options = self.options
        noise = {"word_error_rate": WORD_ERROR_RATE} if options.annotator == "simulated" else {}
        endpoint = {"base_url": options.base_url, "model": options.annotator_model} if self._asks_a_model else {}
        label = self._module(
            "step2_token_reward.label", samples=self.samples, labels=self.labels, annotator=options.annotator,
            **self._truth, **noise, **endpoint,
        ) + self._llm_flags  # fmt: skip
        stages = [Stage("step2_label", 2, label, self.labels)]
        if self._asks_a_model:
            # How steady the annotator is: a twentieth of the samples in other words.
            second = self.labels.with_name("labels_second.jsonl")
            again = self._module(
                "step2_token_reward.label", samples=self.samples, labels=second, annotator="llm",
                template="label_terse_v1", share="0.05", **endpoint,
            ) + self._llm_flags  # fmt: skip
            report = self.labels.with_name("agreement.json")
            compare = [sys.executable, "-m", "step2_token_reward.agreement"]
            compare += _flags(samples=self.samples, labels=self.labels, reference=second, output=report)
            stages += [
                Stage("step2_label_second", 2, again, second), Stage("step2_agreement", 2, compare, report)
            ]  # fmt: skip
        return stages

    def _tppo_stage(self) -> Stage:
        return self._launched("step3_tppo", "step3", self._tppo_flags, self.tppo)

    @cached_property
    def _tppo_flags(self) -> list[str]:
        # A critic reads the actor's tokens, so that it can start from a reward model with the same tokenizer alone.
        other = self._models.reward or (self._step == 3 and flag_value(self._flags, "reward_path"))
        critic = {} if other else {"critic_path": self.reward}
        return self._program(
            "step3", actor_path=self.sft, reward_path=self.reward, data_dir=self.data, output_dir=self.tppo.parent,
            **critic,
        )  # fmt: skip

    @cached_property
    def _tppo_config(self) -> Step3Config:
        return self._parsed("step3", self._tppo_flags)

    def _report(self) -> Stage:
        options, trained = self.options, self._tppo_config
        systems = [f"base={self._models.base}"] if self._pretrained else []
        systems += [f"sft={self.sft}", f"tppo={self.tppo}"]
        judge = {"base_url": options.judge_url, "model": options.judge_model} if self._asks_a_model else {}
        pad = {"max_examples": "500"} | self._cuts.get("evaluate", {})
        command = self._module(
            "common.evaluation.evaluate", data_dir=self.data, output_dir=self.folder, overwrite=None,
            prompt_template=trained.prompt_template, max_prompt_tokens=trained.max_prompt_tokens,
            max_new_tokens=trained.max_response_tokens, num_queries=trained.num_queries,
            temperature=trained.temperature, annotator=options.annotator,
            reward_annotator=options.annotator_model or options.annotator, **self._truth, **judge, **pad,
        )  # fmt: skip
        timings = [str(self.folder / "stages" / f"{name}.json") for name in self._timed]
        command += [*self._llm_flags, "--systems", *systems, "--timings", *timings]
        return Stage("evaluate", EVALUATION, command, self.folder / "report.json")

    @property
    def _timed(self) -> list[str]:
        before = [*self._data_stages(), self._sft_stage(), *self._reward_stages(), self._tppo_stage()]
        return [stage.name for stage in before]

    @property
    def _asks_a_model(self) -> bool:
        return self.options.annotator == "llm"

    @property
    def _llm_flags(self) -> list[str]:
        return self.options.llm_flags.split()

    @property
    def _truth(self) -> dict[str, Path]:
        return {"truth": self.folder / "log" / "truth.jsonl"} if self.options.annotator == "simulated" else {}

    def _module(self, name: str, **flags: Any) -> list[str]:
        return [sys.executable, "-m", name, *_flags(seed=self.options.seed, **flags)]

    def _program(self, name: str, **paths: Any) -> list[str]:
        """The flags of a program of `SETTINGS`: settings files, hand-offs, cuts; the user's own come last and win."""
        own = self.options.config if self._step and name == f"step{self._step}" else []
        files = own or config_files(name, self._preset, self._models, self._hardware)
        flags = {"seed": self.options.seed, **paths}
        if not own:
            flags |= adaptations(name, files, self._models)
        if self._real_log and self._preset == "tiny":
            flags |= TINY_ON_A_REAL_LOG
            if name == "step2":
                flags["max_response_tokens"] = str(2 * int(TINY_ON_A_REAL_LOG["max_response_tokens"]))
        if name == "step2" and self.options.annotator != "simulated":
            flags["query_rule"] = "learned"  # what a good query is, is the annotator's to decide
        flags |= self._cuts.get(name, {})
        mine = self._flags if self._step and name == f"step{self._step}" else []
        return [*(["--config", *files] if files else []), *_flags(**flags), *mine]

    def _launched(
        self, name: str, program: str, flags: Sequence[str], makes: Path, launcher: str = "", alone: bool = False
    ) -> Stage:
        step = int(name[len("step")])
        script = ROOT / STEP_FOLDERS[step] / "launch" / f"{launcher or self._hardware.launcher}.sh"
        # What the run holds was made under the same settings; a folder of the user's own is his to decide on.
        recorded = not (alone or (program == f"step{self._step}" and self.writes_elsewhere))
        begun = ["--resume"] if recorded else self._asked
        command = ["bash", str(script), *flags, *begun, *self._hardware.flags]

        def check() -> None:
            self._check(program, flags)
            if not recorded:
                check_writable(flag_value(flags, "output_dir"), "choose another --output_dir")

        return Stage(name, step, command, makes, check, recorded)

    @property
    def _asked(self) -> list[str]:
        return [f"--{name}" for name in ("resume", "overwrite") if getattr(self.options, name)]

    def _check(self, program: str, flags: Sequence[str]) -> None:
        config = self._parsed(program, flags)
        if isinstance(config, Step3Config):
            config.validate(self._hardware.ranks)
        else:
            CHECKS[program](config)

    def _parsed(self, name: str, flags: Sequence[str]) -> Any:
        return parse_config(SETTINGS[name].config, list(flags))


def flag_value(flags: Sequence[str], name: str) -> str:
    """The last value of `--name` in `flags`; '' where it is not."""
    value = ""
    for place, flag in enumerate(flags):
        if flag == f"--{name}" and place + 1 < len(flags):
            value = flags[place + 1]
        elif flag.startswith(f"--{name}="):
            value = flag.partition("=")[2]
    return value


def _flags(**values: Any) -> list[str]:
    """Values as flags; None stands for a switch."""
    return [str(token) for name, value in values.items() for token in (f"--{name}", value) if token is not None]
