"""The study's jobs: which command makes what, from which inputs.

Names are folders: `s1/k3/sft` is the SFT model of seed 1 for three queries a response. What is measured has three
parts in its name, `axis/s1/system`, and leaves a record; see `study.main`.

Steps read their preset `tiny.yaml` without the `recipe.yaml` that it follows elsewhere. The recipe of step 3 holds what
this study chose: an arm that leaves a setting to it would be trained with the outcome of the comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study.jobs import Command, Job
from study.settings import (
    CONTROLS,
    CREDIT,
    DEFAULT_NOISE,
    MINI_BATCH,
    PPO_SYSTEMS,
    SAMPLES,
    SENTENCE_COEF,
    TEMPERATURE,
    Scale,
)


@dataclass(frozen=True)
class World:
    """What a run stands on: seed, queries a response, labelled users (0: all), and the labels' noise."""

    seed: int
    k: int = 3
    users: int = 0
    noise: float = DEFAULT_NOISE
    real: bool = False

    @property
    def base(self) -> str:
        """Folder of what depends on seed and log alone."""
        return f"s{self.seed}/{'real' if self.real else f'k{self.k}'}"

    @property
    def labels(self) -> str:
        """Folder of the labelled samples."""
        return f"{self.base}/n{self.users}_noise{self.noise:g}"

    @property
    def data(self) -> str:
        """Folder of log and examples."""
        return "log/real" if self.real else f"log/k{self.k}"

    @property
    def tokens(self) -> tuple[int, int]:
        """Budgets of a prompt and of a response."""
        return (256, 96) if self.real else (160, {3: 32, 5: 48, 10: 96}[self.k])

# One evaluation and one checkpoint, at the end.
_RARE_EVALUATION = {"eval_steps": 100_000, "save_steps": 100_000}


class Planner:
    """Makes jobs below `root`, each once."""

    def __init__(self, root: Path, scale: Scale, real_logs: tuple[str, ...] = ()) -> None:
        self._root = root
        self._scale = scale
        self._real_logs = real_logs
        self.jobs: dict[str, Job] = {}

    def sft_record(self, axis: str, world: World, split: str = "test") -> None:
        """Measure the SFT model itself."""
        name = f"{axis}/s{world.seed}/sft"
        self._add(name, [self._measure(name, world, self._model(world), split)], [self._sft(world)])

    def controls(self, axis: str, world: World) -> None:
        """Measure the systems without a model."""
        for control in CONTROLS:
            name = f"{axis}/s0/{control}"
            self._add(name, [self._measure(name, world, "", "test", control)], [self._data(world)])

    def ppo(
        self,
        axis: str,
        world: World,
        system: str,
        chosen: Mapping[str, Any],
        *,
        w: float = 0.5,
        changes: Mapping[str, str] | None = None,
        split: str = "test",
        label: str = "",
    ) -> None:
        """Train and measure one arm of step 3; `label` is its name where it is not the system's."""
        name = f"{axis}/s{world.seed}/{label or system}"
        reward = self._reward(world, PPO_SYSTEMS[system]["heads"], w)
        settings = {
            "actor_path": self._model(world),
            "reward_path": self._path(reward, "reward/model"),
            "critic_path": self._path(reward, "reward/model"),
            "data_dir": self._path(self._data(world), "data"),
            "output_dir": self._path(name, "run"),
            "reward_level": PPO_SYSTEMS[system]["level"],
            "sentence_coef": SENTENCE_COEF if PPO_SYSTEMS[system]["heads"] == "token" else 0.0,
            "total_steps": self._scale.ppo_steps,
            "save_steps": self._scale.ppo_steps,
            "zero_stage": 1,
            "mini_batch_size": MINI_BATCH,
            "scoring_batch_size": 16,
            "critic_warmup_steps": 3,
            "target_kl": 0,
            "temperature": TEMPERATURE,
            "monitor": "lexical" if world.real else "simulated",
            "tensorboard": "false",
            "seed": world.seed,
            "overwrite": "true",
            **({} if world.real else {"truth": self._truth(world)}),
            **{key: value for key, value in chosen.items() if key != "credit"},
            **CREDIT[chosen["credit"]],
            **self._lengths(world),
            **(changes or {}),
        }
        model = self._path(name, "run/model")
        self._add(
            name,
            [self._step("step3_tppo.main", "step3_tppo/configs/tiny.yaml", settings),
             self._measure(name, world, model, split)],
            [self._sft(world), reward],
            ("run/checkpoints", "run/model", "run/critic"),
        )  # fmt: skip

    def dpo(self, axis: str, world: World, chosen: Mapping[str, Any], split: str = "test", label: str = "") -> None:
        """Train and measure DPO."""
        name = f"{axis}/s{world.seed}/{label or 'dpo'}"
        labels = self._labels(world)
        settings = {
            "model_name_or_path": self._model(world),
            **self._labelled_files(labels),
            "output_dir": self._path(name, "run"),
            "zero_stage": 1,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 32,
            "num_train_epochs": 2,
            **_RARE_EVALUATION,
            "tensorboard": "false",
            "seed": world.seed,
            "overwrite": "true",
            "prompt_template": "compact",
            "num_queries": world.k,
            "max_prompt_tokens": world.tokens[0],
            "temperature": TEMPERATURE,
            **chosen,
        }
        self._add(
            name,
            [("baselines.dpo.main", _flags(settings)),
             self._measure(name, world, self._path(name, "run/model"), split)],
            [self._sft(world), labels],
            ("run/checkpoints", "run/model"),
        )  # fmt: skip

    def _data(self, world: World) -> str:
        name = world.data
        data = {"output_dir": self._path(name, "data"), "num_targets": world.k, "overwrite": "true"}
        if world.real:
            flags = ("--log", *self._real_logs, *_flags({**data, "windows": 0}))
            return self._add(name, [("common.data.prepare", flags)], [])
        log = {"num_users": self._scale.users, "num_targets": world.k, "overwrite": "true"}
        return self._add(
            name,
            [
                ("common.data.simulator", _flags({**log, "output_dir": self._path(name, "log")})),
                ("common.data.prepare", _flags({**data, "log": self._path(name, "log/sessions.jsonl")})),
            ],
            [],
        )

    def _sft(self, world: World) -> str:
        name, data = f"{world.base}/sft", self._data(world)
        examples = self._path(data, "data")
        base = {"data_dir": examples, "output_dir": self._path(name, "base"), "prompt_template": "compact",
                "num_queries": world.k, "seed": world.seed, "overwrite": "true"}  # fmt: skip
        settings = {
            "model_name_or_path": self._path(name, "base"),
            "data_dir": examples,
            "output_dir": self._path(name, "run"),
            "zero_stage": 1,
            "per_device_train_batch_size": 32,
            "num_train_epochs": self._scale.sft_epochs,
            **_RARE_EVALUATION,
            "tensorboard": "false",
            "seed": world.seed,
            "overwrite": "true",
            **self._lengths(world),
        }
        return self._add(
            name,
            [
                ("common.models.tiny", _flags(base)),
                self._step("step1_sft.main", "step1_sft/configs/tiny.yaml", settings),
            ],
            [data],
            ("run/checkpoints",),
        )

    def _model(self, world: World) -> str:
        """The SFT model's folder."""
        return self._path(self._sft(world), "run/model")

    def _labels(self, world: World) -> str:
        name = world.labels
        sampled = {
            "model_name_or_path": self._model(world),
            "data_dir": self._path(world.data, "data"),
            "output_dir": self._path(name, "samples"),
            "samples_per_prompt": 2,
            "temperature": TEMPERATURE,
            "corrupt_share": 0.3,
            "max_train_examples": world.users,
            "max_dev_examples": 300,
            "seed": world.seed,
            "overwrite": "true",
            **self._lengths(world),
        }
        labels = {**self._labelled_files(name), "seed": world.seed}
        if world.real:
            labels |= {"annotator": "lexical"}
        else:
            labels |= {"annotator": "simulated", "truth": self._truth(world), "word_error_rate": world.noise}
        return self._add(
            name,
            [
                self._step("step2_token_reward.sample", "step2_token_reward/configs/tiny_sample.yaml", sampled),
                ("step2_token_reward.label", _flags(labels)),
            ],
            [self._sft(world), world.data],
        )

    def _reward(self, world: World, heads: str, w: float) -> str:
        labels = self._labels(world)
        name = f"{labels}/{heads}" + (f"_w{w:g}" if heads != "sentence" else "")
        lengths = self._lengths(world)
        settings = {
            "model_name_or_path": self._model(world),
            **self._labelled_files(labels),
            "output_dir": self._path(name, "reward"),
            "heads": heads,
            "w": w,
            "zero_stage": 1,
            "per_device_train_batch_size": 32,
            "num_train_epochs": self._scale.label_epochs[world.users],
            "eval_steps": 100,
            "save_steps": 100_000,
            "tensorboard": "false",
            "seed": world.seed,
            "overwrite": "true",
            # The lexical annotator calls a query relevant that has a word out of place.
            **({"query_rule": "learned"} if world.real and heads == "token" else {}),
            **lengths,
            "max_response_tokens": 2 * lengths["max_response_tokens"],
        }
        return self._add(
            name,
            [self._step("step2_token_reward.main", "step2_token_reward/configs/tiny.yaml", settings)],
            [self._sft(world), labels],
            ("reward/checkpoints",),
        )

    def _measure(self, name: str, world: World, model: str, split: str, control: str = "") -> Command:
        settings = {
            "data_dir": self._path(world.data, "data"),
            "split": split,
            "output": self._path(name, "measure.json"),
            "temperature": TEMPERATURE,
            **({} if world.real else {"truth": self._truth(world)}),
            **({"control": control} if control else {"model": model, "samples": SAMPLES}),
            **self._lengths(world),
        }
        if not control:
            settings["reference"] = self._model(world)
        return "study.measure", _flags(settings)

    def _step(self, module: str, config: str, settings: Mapping[str, Any]) -> Command:
        return module, ("--config", config, *_flags(settings))

    def _labelled_files(self, labels: str) -> dict[str, str]:
        return {"samples": self._path(labels, "samples/samples.jsonl"), "labels": self._path(labels, "labels.jsonl")}

    def _lengths(self, world: World) -> dict[str, int]:
        prompt, response = world.tokens
        return {"num_queries": world.k, "max_prompt_tokens": prompt, "max_response_tokens": response}

    def _truth(self, world: World) -> str:
        return self._path(world.data, "log/truth.jsonl")

    def _path(self, job: str, below: str) -> str:
        return str(self._root / job / below)

    def _add(self, name: str, commands: list[Command], inputs: list[str], leftovers: tuple[str, ...] = ()) -> str:
        self.jobs.setdefault(name, Job(name, tuple(commands), tuple(inputs), leftovers))
        return name


def _flags(settings: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(part for key, value in settings.items() for part in (f"--{key}", str(value)))
