"""What step 3 will hold on each GPU, phase by phase, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.engine import distributed
from common.engine.deepspeed_config import inference_config, training_config
from common.engine.memory import WeightMode, cache_bytes, free_bytes, mode_that_fits
from common.errors import InputError, one_line
from common.files import read_json
from common.models.layouts import lacks_for_sharing, without_wrapper
from common.models.loading import has_attention
from common.models.reward_encoder import usable_positions
from common.models.reward_options import RewardInputOptions
from common.models.sequences import whole_groups
from common.models.token_reward import SETTINGS_NAME, may_share_histories, token_classifier_skeleton
from common.planning.advice import Change, advice_line, advise, common_changes, halvings, last_changes, slow_changes
from common.planning.models import ModelSpec, Weights, meta_model, weights_of
from common.planning.passes import Pass, Rows, classifier_pass, decoding, scoring_pass, update_pass
from common.planning.plan import Machine, Phase, Plan, shown
from common.planning.sharding import Sharding
from step3_tppo.config import Step3Config


@dataclass(frozen=True)
class _Model:
    """One of the four: what it is, its weights, and how DeepSpeed holds it."""

    spec: ModelSpec
    weights: Weights
    sharding: Sharding


class Step3Plan:
    """Makes the plan of a config on a machine: see `plan_step3`."""

    def __init__(self, config: Step3Config, machine: Machine) -> None:
        self._config = config
        self._machine = machine
        config.validate(machine.ranks)
        training = training_config(
            config,
            micro_batch_size=config.micro_batch_size,
            world_size=machine.ranks,
            max_grad_norm=config.max_grad_norm,
        )
        trained, frozen = (
            Sharding.of(settings, machine.ranks, machine.cuda)
            for settings in (training, inference_config(config, world_size=machine.ranks))
        )
        zero3 = trained.shards_weights
        actor = ModelSpec.of(config.actor_path, "causal_lm", config, config, zero3=zero3)
        self._actor = _Model(actor, weights_of(actor, trained=True), trained)
        self._critic = None
        if config.baseline == "critic":
            path = config.critic_path or config.actor_path
            critic = ModelSpec.of(path, "value_model", config, config.of_critic(), zero3=zero3)
            self._critic = _Model(critic, weights_of(critic, trained=True), trained)
        self._trained = [model for model in (self._actor, self._critic) if model is not None]
        self._reference = None if config.lora_r else _Model(actor, weights_of(actor, trained=False), frozen)
        reward = reward_spec(config, zero3)
        self._reward = _Model(reward, weights_of(reward, trained=False), frozen)
        self._reward_inputs = reward_inputs(config, reward)
        self._models = [
            model for model in (self._actor, self._critic, self._reference, self._reward) if model is not None
        ]
        self._responses = config.rollout_batch_size * config.samples_per_prompt // machine.ranks
        self._weights_mode = self._choose_mode()

    def plan(self) -> Plan:
        """All phases."""
        config, machine = self._config, self._machine
        zero = f"ZeRO-{config.zero_stage}" if not config.deepspeed_config else config.deepspeed_config
        kind = "GPUs" if machine.cuda else "CPU ranks"
        return Plan(
            f"step 3 on {machine.ranks} {kind}, {zero}, {config.dtype}: what each holds at most in each phase",
            machine,
            [
                self._load(), self._generation(), *self._scoring(),
                *([self._update("critic update", self._critic)] if self._critic else []),
                self._update("actor update", self._actor), self._optimiser_step(), self._export(),
            ],
            updates=config.total_steps,
            host=sum(model.sharding.host(model.weights) for model in self._models),
            notes=self._notes(),
        )

    def _notes(self) -> list[str]:
        notes = []
        if self._sharded:
            slow = ", each layer at every token, which the seconds leave out" if self._weights_mode == "sharded" else ""
            notes.append(f"weights in the rollout: {self._weights_mode}{slow} (--hybrid_weights)")
        if self._critic and self._config.lora_r and not self._config.critic_lora_r:
            sharding, weights = self._critic.sharding, self._critic.weights
            size = sharding.optimizer(weights) + sharding.host(weights)
            notes.append(
                f"the critic is trained whole; its states take {shown(size)}: --critic_lora_r 16 trains adapters alone"
            )
        return notes

    @property
    def _sharded(self) -> bool:
        return self._actor.sharding.shards_weights

    def _choose_mode(self) -> WeightMode:
        """What `--hybrid_weights auto` will choose once all models are there."""
        if self._config.hybrid_weights != "auto":
            return self._config.hybrid_weights
        needed = max(model.sharding.gathered(model.weights) for model in self._models)
        free = self._machine.memory - sum(self._rest(in_rollout=False).values())
        return mode_that_fits(needed, self._cache(), free)

    def _cache(self) -> int:
        config, model = self._config, without_wrapper(meta_model(self._actor.spec))
        rows = config.decode_rows or self._responses
        columns = config.max_prompt_tokens + config.max_response_tokens
        return cache_bytes(model.config.get_text_config(), min(rows, self._responses), columns, model.dtype)

    def _rest(self, in_rollout: bool) -> dict[str, int]:
        """What all models hold between two passes; with ZeRO-3 gradients and buckets are never let go."""
        trained = self._trained
        resting = in_rollout and self._config.offload_states and self._machine.cuda
        keep = self._sharded
        return {
            "weights": sum(model.sharding.weights(model.weights) for model in self._models),
            "optimiser": 0 if resting else sum(model.sharding.optimizer(model.weights) for model in trained),
            "gradients": sum(model.sharding.gradients(model.weights) for model in trained) if keep else 0,
            "buckets": sum(model.sharding.buckets(model.weights) for model in trained) if keep else 0,
        }

    def _load(self) -> Phase:
        """Before the first step there are no moments. CPU ranks hold most while they read a model, before any engine is
        made."""
        parts = self._rest(in_rollout=False)
        if self._machine.cuda:
            parts["optimiser"] = sum(m.sharding.masters(m.weights) for m in self._trained)
        else:
            parts = {"weights": parts["weights"]}
        return Phase("load", parts | {"gathered": max(m.sharding.on_file(m.weights) for m in self._models)})

    def _generation(self) -> Phase:
        config, machine, actor = self._config, self._machine, self._actor
        prompts = Rows(config.rollout_batch_size // machine.ranks, config.max_prompt_tokens, config.max_response_tokens)
        found = decoding(actor.spec, prompts, config.samples_per_prompt, config.decode_rows)
        gathered = self._whole(actor)
        if self._weights_mode == "gathered" or not self._sharded:
            gathered += actor.weights.adapted * actor.weights.itemsize  # copies that adapters are merged into
        reading = found.blocks * found.read.flops / machine.flops
        bytes_read = actor.weights.total * actor.weights.itemsize + found.cache
        drawing = found.draws * max(found.draw.flops / machine.flops, bytes_read / machine.bandwidth)
        parts = {
            "gathered": gathered, "KV cache": self._cache(), "activations": max(found.read.peak, found.draw.peak)
        }
        return Phase("generation", self._rest(in_rollout=True) | parts, reading + drawing)

    def _scoring(self) -> list[Phase]:
        """The passes of a rollout without gradients, of each model."""
        config = self._config
        rows = self._rows(config.scoring_batch_size, config.scoring_batch_tokens)
        times = self._responses / rows.rows
        passes = {}
        if config.lora_r or not (config.old_logprobs == "sampled" or config.sampling_is_exact()):
            passes["actor scoring"] = (self._actor, scoring_pass(self._actor.spec, rows))
        if self._reference is not None:
            passes["reference scoring"] = (self._reference, scoring_pass(self._reference.spec, rows))
        if self._critic is not None:
            passes["critic scoring"] = (self._critic, scoring_pass(self._critic.spec, rows))
        phases = [self._scored(name, model, found, times) for name, (model, found) in passes.items()]
        block = self._reward_rows()
        reward = classifier_pass(self._reward.spec, block, self._reward_inputs.prefix_attention)
        return [*phases, self._scored("reward scoring", self._reward, reward, self._responses / block.rows)]

    def _scored(self, name: str, model: _Model, found: Pass, times: float) -> Phase:
        parts = {"gathered": self._whole(model), "activations": found.peak}
        return Phase(name, self._rest(in_rollout=True) | parts, times * found.flops / self._machine.flops)

    def _whole(self, model: _Model) -> int:
        """What seeing a model's weights outside training adds."""
        if self._weights_mode == "gathered":
            return model.sharding.gathered(model.weights)
        return model.sharding.live(model.weights, backward=False)

    def _update(self, name: str, model: _Model) -> Phase:
        config, sharding, weights = self._config, model.sharding, model.weights
        rows = self._rows(config.micro_batch_size, config.micro_batch_tokens)
        found = update_pass(model.spec, rows)
        parts = self._rest(in_rollout=False)
        if not self._sharded:
            parts["gradients"] = sum(m.sharding.gradients(m.weights) for m in self._trained)
            parts["buckets"] = sharding.buckets(weights)
        reduction = sharding.reduction(weights)
        early = sharding.reduces_early(weights)
        parts["buckets"] += reduction if early else 0
        parts["gathered"] = sharding.live(weights, backward=True)
        parts["activations"] = found.peak if early else max(found.peak, reduction)
        times = config.ppo_epochs * self._responses / rows.rows
        return Phase(name, parts, times * found.flops / self._machine.flops)

    def _optimiser_step(self) -> Phase:
        parts = self._rest(in_rollout=False)
        if not self._sharded:
            parts["gradients"] = sum(model.sharding.gradients(model.weights) for model in self._trained)
        parts["optimiser"] += max(model.sharding.step(model.weights) for model in self._trained)
        return Phase("optimiser step", parts)

    def _export(self) -> Phase:
        """Rank 0 collects whole weights in host memory, which is all that CPU ranks have."""
        largest = max(model.sharding.on_file(model.weights) for model in self._trained)
        return Phase("export", self._rest(in_rollout=False) | {"gathered": largest})

    def _rows(self, size: int, tokens: int) -> Rows:
        """The largest block of responses of a pass."""
        config = self._config
        prompt, response = config.max_prompt_tokens, config.max_response_tokens
        samples = config.samples_per_prompt if config.wanted_layout() == "shared" else 1
        if tokens:
            size = max(1, tokens // (prompt + samples * response)) * samples
            if prompt + samples * response > tokens:
                size = max(1, (tokens - prompt) // response)
        else:
            size = whole_groups(size, samples)
        return Rows(min(size, self._responses), prompt, response, samples)

    def _reward_rows(self) -> Rows:
        """The largest block of responses that the reward model reads at once."""
        config, inputs, model = self._config, self._reward_inputs, meta_model(self._reward.spec)
        size = min(whole_groups(config.scoring_batch_size, config.samples_per_prompt), self._responses)
        shares = (
            config.wanted_layout() == "shared"
            and may_share_histories(model, inputs.prefix_attention)
            and not lacks_for_sharing(model)
        )
        samples = config.samples_per_prompt if shares else 1
        return Rows(size, inputs.max_prompt_tokens, inputs.max_response_tokens, samples)


def plan_step3(config: Step3Config, machine: Machine) -> Plan:
    """The plan of step 3. Raises `InputError` for a model whose configuration cannot be read."""
    return Step3Plan(config, machine).plan()


def step3_changes(config: Step3Config, machine: Machine) -> Iterable[Change]:
    """What can be changed in step 3, cheapest first."""
    yield from common_changes(config, machine)
    for setting, least in (("micro_batch_size", 1), ("scoring_batch_size", 1)):
        tokens = setting.replace("size", "tokens")
        name = tokens if getattr(config, tokens) else setting
        yield Change(name, halvings(getattr(config, name), least), "more and smaller passes")
    if machine.cuda and config.offload == "none":
        yield Change("offload_states", [True], "optimisers' states are moved twice an update")
    responses = config.rollout_batch_size * config.samples_per_prompt // machine.ranks
    rows = halvings(config.decode_rows or responses, config.samples_per_prompt)
    yield Change("decode_rows", rows, "fewer responses drawn at once, more passes")
    adapt_critic = Change(
        "critic_lora_r", [16], "of the critic adapters and head alone are trained; raise its learning rate tenfold"
    )
    whole_critic = config.baseline == "critic" and not config.critic_lora_r
    if config.lora_r and whole_critic:
        yield adapt_critic
    if config.hybrid_weights != "sharded":
        yield Change("hybrid_weights", ["sharded"], "rollouts gather weights layer by layer at every token: slow")
    yield from slow_changes(config, machine)
    if not config.lora_r and whole_critic:
        yield adapt_critic
    yield from last_changes(config, machine)


def check_memory(config: Step3Config, device: torch.device) -> None:
    """Plan this run with the memory that its fullest rank has free, and say so; all ranks must call.

    Raises `InputError` for one that cannot fit, unless `--plan warn`. Where no plan can be made the run goes on.
    """
    if config.plan == "off":
        return
    free = -distributed.largest_over_ranks(-free_bytes(device))
    machine = Machine(distributed.world_size(), free, device.type == "cuda")
    distributed.on_main_first(lambda: _check(config, machine))


def _check(config: Step3Config, machine: Machine) -> None:
    try:
        plan = plan_step3(config, machine)
    except Exception as error:  # of any library: a model that cannot be planned may well be trained
        print(f"memory plan: none, {type(error).__name__}: {one_line(error)}", flush=True)
        return
    print(f"memory plan: {plan.summary()}", flush=True)
    if plan.verdict != "does not fit":
        return
    advice = advice_line(advise(config, machine, plan_step3, step3_changes(config, machine)))
    message = f"this run takes more memory than there is: {plan.summary()}; {advice}. scripts/plan.py shows every phase"
    if config.plan == "stop":
        raise InputError(f"{message}; --plan warn goes on all the same")
    print(f"warning: {message}", flush=True)


def reward_spec(config: Step3Config, zero3: bool) -> ModelSpec:
    """The reward model that step 2 wrote; without one that it could be: the actor's trunk reading both ways."""
    settings = _reward_settings(config)
    path = config.reward_path or config.actor_path
    if not has_attention(token_classifier_skeleton(path, config), config.attn_implementation):
        config = replace(config, attn_implementation="eager")  # as it is loaded then
    return ModelSpec.of(
        path, "token_classifier", config, heads=settings.get("heads", "token"), bidirectional=not settings, zero3=zero3
    )


def reward_inputs(config: Step3Config, spec: ModelSpec) -> RewardInputOptions:
    """What the reward model reads. One that step 2 has still to make reads as much as the actor, if it can."""
    inputs = _reward_settings(config).get("inputs")
    if inputs:
        return RewardInputOptions(**inputs)
    response = config.max_response_tokens
    tokens = config.max_prompt_tokens + response
    tokens = min(tokens, usable_positions(meta_model(spec)) or tokens)
    return RewardInputOptions(config.prompt_template, config.num_queries, tokens - response, response)


def _reward_settings(config: Step3Config) -> dict:
    file = Path(config.reward_path) / SETTINGS_NAME
    return read_json(file) if file.is_file() else {}
