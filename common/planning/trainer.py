"""The plan of a step that trains one model with `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Iterable

from common.engine.deepspeed_config import trainer_deepspeed_config
from common.engine.trainer_options import TrainerOptions
from common.planning.advice import Change, common_changes, halvings, last_changes, slow_changes
from common.planning.models import ModelSpec, weights_of
from common.planning.passes import Pass
from common.planning.plan import Machine, Phase, Plan
from common.planning.sharding import Sharding


def plan_trainer(
    name: str, config: TrainerOptions, machine: Machine, spec: ModelSpec, update: Pass, evaluation: Pass
) -> Plan:
    """Phases of training `spec`: `update` is a micro-batch's pass, `evaluation` that of a batch of held-out rows."""
    sharding = Sharding.of(trainer_deepspeed_config(config), machine.ranks, machine.cuda)
    weights = weights_of(spec, trained=True)
    kept = sharding.shards_weights
    rest = {
        "weights": sharding.weights(weights),
        "optimiser": sharding.optimizer(weights),
        "gradients": sharding.gradients(weights) if kept else 0,
        "buckets": sharding.buckets(weights) if kept else 0,
    }
    gradients = {"gradients": sharding.gradients(weights)}
    early, reduction = sharding.reduces_early(weights), sharding.reduction(weights)
    training = gradients | {
        "buckets": sharding.buckets(weights) + (reduction if early else 0),
        "gathered": sharding.live(weights, backward=True),
        "activations": update.peak if early else max(update.peak, reduction),
    }
    step = gradients | {"optimiser": rest["optimiser"] + sharding.step(weights)}
    evaluating = {"gathered": sharding.live(weights, backward=False), "activations": evaluation.peak}
    seconds = config.gradient_accumulation_steps * update.flops / machine.flops
    return Plan(
        f"{name} on {machine.ranks} {'GPUs' if machine.cuda else 'CPU ranks'}, ZeRO-{int(sharding.zero.stage)}, "
        f"{config.dtype}: what each holds at most in each phase",
        machine,
        [
            Phase("load", rest | {"optimiser": sharding.masters(weights), "gathered": sharding.on_file(weights)}),
            Phase("forward, backward", rest | training, seconds),
            Phase("optimiser step", rest | step),
            Phase("evaluation", rest | evaluating),
            Phase("export", rest | {"gathered": sharding.on_file(weights)}),
        ],
        updates=config.max_steps,
        host=sharding.host(weights),
    )


def trainer_changes(config: TrainerOptions, machine: Machine) -> Iterable[Change]:
    """What can be changed in such a step, cheapest first."""
    yield from common_changes(config, machine)
    for setting, cost in (
        ("per_device_train_batch_size", "double gradient_accumulation_steps as often, for the same optimiser step"),
        ("per_device_eval_batch_size", "evaluation in smaller batches"),
    ):
        yield Change(setting, halvings(getattr(config, setting)), cost)
    yield from slow_changes(config, machine)
    yield from last_changes(config, machine)
