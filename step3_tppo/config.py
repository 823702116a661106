"""Settings of step 3; every default names its source where it has one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

from common.config import (
    HANG_TIMEOUT,
    LoraOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    ZeroOptions,
    check_numbers,
    option,
)
from common.engine.adapter_options import check_adapters, check_dora
from common.errors import InputError
from common.feedback.names import ANNOTATORS, OWN, check_annotator_name

DORA_NEEDS_WHOLE_WEIGHTS = (
    "--lora_dora needs whole weights in a rollout (--hybrid_weights gathered): peft reads its matrices for the norms, "
    "sharded as they are. Make room (--offload_states, more GPUs), use --zero_stage 2, or leave --lora_dora out"
)


@dataclass
class Step3Config(RunOptions, ModelOptions, LoraOptions, OptimizerOptions, ZeroOptions):
    """Token-level PPO: tune the model of step 1 with the reward model of step 2."""

    actor_path: str = option(
        "", "Model folder or hub name that is tuned; also the reference. Step 1's model.", group="models and data",
    )
    reward_path: str = option("", "Token reward model, step 2's model.")
    critic_path: str = option("", "Model whose trunk the critic starts from; empty: the actor's.")
    critic_lora_r: int = option(
        0, "Rank of adapters on the critic's trunk, made as --lora_* say; its head is trained whole. 0 trains all "
        "weights, at 16 bytes each."
    )
    data_dir: str = option("", "Folder with train.jsonl, made by common.data.prepare.")
    pad_token: str = option(
        "", "Token to pad with when the tokenizer has none: 'eos' or a token.", group="prompts and responses",
    )
    prompt_template: str = option("plain", "plain, compact, chat, or a Jinja file. As in step 1.")
    num_queries: int = option(3, "k, queries a response (paper: 3 for AOL, 10 for the industrial log).", minimum=1)
    max_prompt_tokens: int = option(512, "Budget of the prompt in tokens; the oldest events are left out.", minimum=1)
    max_response_tokens: int = option(48, "Longest response in tokens, EOS included.", minimum=1)

    total_steps: int = option(
        200, "Rollouts to make, each followed by its PPO updates.", group="rollouts and batches", minimum=1,
    )
    rollout_batch_size: int = option(64, "Prompts a rollout, over all ranks.", minimum=1)
    samples_per_prompt: int = option(1, "Responses sampled for each prompt.", minimum=1)
    mini_batch_size: int = option(32, "Responses an optimiser step, over all ranks.", minimum=1)
    micro_batch_size: int = option(8, "Responses a forward and backward pass, on each rank.", minimum=1)
    micro_batch_tokens: int = option(
        0, "Tokens a forward and backward pass, prompts and padding included, in place of micro_batch_size; 0: off."
    )
    scoring_batch_size: int = option(32, "Responses a pass without gradients, on each rank.", minimum=1)
    scoring_batch_tokens: int = option(
        0, "As micro_batch_tokens, for a pass without gradients, which needs far less memory."
    )
    decode_rows: int = option(0, "Responses decoded at once, on each rank; 0: all of its rollout.")
    cuda_graphs: bool = option(False, "Record decoding passes as CUDA graphs. Written, but not yet run on a GPU.")
    sequence_layout: str = option(
        "auto", "How passes read finished responses: padded, packed without padding (for flash attention), or shared, "
        "each prompt once for all its responses. auto: packed with flash attention, else shared.",
        choices=["auto", "padded", "packed", "shared"],
    )
    ppo_epochs: int = option(1, "Passes over each rollout.", minimum=1)
    temperature: float = option(1.0, "Sampling temperature; log-probs are those of the same distribution.", above=0)

    actor_learning_rate: float = option(
        1e-6, "Peak learning rate of the actor (full fine-tuning of 7B class models).", group="optimisers",
    )
    critic_learning_rate: float = option(5e-6, "Peak learning rate of the critic (2 to 10 times the actor's).")
    lr_schedule: str = option(
        "constant", "After the warm-up: constant, or linear to 0.", choices=["constant", "linear"]
    )
    warmup_steps: int = option(0, "Steps of linear learning-rate warm-up.")
    weight_decay: float = option(0.0, "AdamW's weight decay.")
    adam_epsilon: float = option(1e-5, "AdamW's epsilon (summarize_from_feedback_details, detail of PPO).", above=0)
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    critic_warmup_steps: int = option(5, "First steps in which the critic alone learns.")

    baseline: str = option(
        "critic", "What is subtracted from a token's reward-to-go: a critic's value (GAE), or without a critic the "
        "mean of the other responses to the prompt at the same place (group; samples_per_prompt of 2 or more).",
        choices=["critic", "group"],
        group="PPO and the KL",
    )
    gamma: float = option(1.0, "Discount.", maximum=1)
    line_gamma: float = option(
        1.0, "Further discount across a line break; 0: each query of a list is an episode of its own.", maximum=1
    )
    lam: float = option(0.95, "Lambda of generalised advantage estimation.", maximum=1)
    clip_range: float = option(0.2, "PPO's epsilon for the policy.", above=0)
    clip_range_high: float = option(0.0, "Epsilon above 1 (clip-higher, DAPO: 0.28); 0: the same as clip_range.")
    dual_clip: float = option(0.0, "c > 1: bounds a negative advantage's objective at c A (verl: 3); 0: off.")
    entropy_coef: float = option(0.0, "Weight of the policy's entropy as a bonus in the loss.")
    value_clip_range: float = option(0.2, "Epsilon of the clipped value loss.", above=0)
    whiten_advantages: bool = option(True, "Whiten advantages over the response tokens of all ranks.")
    kl_coef: float = option(0.08, "beta: cost of a nat of KL to the reference, at each token.")
    kl_in: str = option(
        "reward", "Where the KL stands: in each token's reward (paper), or as a term of the policy's loss.",
        choices=["reward", "loss"],
    )
    kl_estimator: str = option(
        "k1", "The KL of a sampled token; k1 in the reward, k2 (its gradient is the KL's) or k3 in the loss.",
        choices=["k1", "k2", "k3"],
    )
    kl_target: float = option(0.0, "Steer kl_coef to this KL, in nats a response (Ziegler et al.); 0: keep it.")
    kl_horizon: int = option(
        10_000, "With kl_target: responses over which a KL 20 % off changes kl_coef by 20 %.", minimum=1
    )
    max_kl: float = option(100.0, "End the run once the KL to the reference exceeds so many nats a response; 0: never.")
    target_kl: float = option(0.1, "Skip what is left of a rollout's updates once approx_kl exceeds it; 0: never.")

    reward_level: str = option(
        "token", "Where the reward stands: each token (TPPO), each query's end, or the response's end (PPO).",
        choices=["token", "query", "response"],
        group="rewards",
    )
    reward_spread: str = option(
        "split", "A word's score on its tokens: copied to each, or split over them.", choices=["split", "copy"]
    )
    centre_rewards: bool = option(True, "Score 0..2 becomes -1..1: an all-positive reward pays for length.")
    normalise_rewards: bool = option(True, "Divide by the query's words: long queries are not worth more.")
    reward_scale: float = option(1.0, "Factor on all rewards but the KL's.", above=0)
    reward_norm: str = option(
        "none", "Divide rewards by their running deviation (running), or whiten them at each place (position).",
        choices=["none", "running", "position"],
    )
    length_alpha: float = option(
        0.9, "Length-weighted penalty: factor for each token past the suggested length.", maximum=1
    )
    suggested_length: int = option(0, "sl, in tokens a query; 0: the median over the training targets (paper).")
    sentence_coef: float = option(
        2.0, "Weight of a query's score, which stands at its last token, where its words together weigh 1."
    )
    list_cost: float = option(1.0, "Cost of each missing line, and of a missing EOS, in worst queries.")

    monitor: str = option(
        "", "Annotator that judges every rollout beside the reward model (judge/* in TensorBoard): "
        f"{', '.join(ANNOTATORS)}, or a function of your own, {OWN}.",
        group="a judge beside the reward",
    )
    truth: str = option("", "For the monitor simulated: truth.jsonl of the embedded log.")
    reward_from: str = option(
        "model", "Who gives the scores that rewards are made of: the reward model, or the monitor's annotator itself, "
        "which shows what a better reward model would be worth.",
        choices=["model", "monitor"],
    )
    monitor_margin: float = option(
        0.0, "Stop once the judged relevance rate is this far below its best although the reward is not; 0: never.",
        maximum=1
    )

    hybrid_weights: str = option(
        "auto", "Weights during rollout under ZeRO-3: gathered (fast), sharded (little memory), or what memory allows.",
        choices=["auto", "gathered", "sharded"],
        group="speed and memory",
    )
    offload_states: bool = option(False, "Optimisers' states rest in host memory during rollout.")
    old_logprobs: str = option(
        "auto", "PPO's old log-probs: recomputed by a pass like the training's, or those of sampling, which saves that "
        "pass and differs by rollout/mismatch_* (TensorBoard). auto: sampled in fp32; else recomputed, but for the "
        "first mini-batch, whose own pass gives them.",
        choices=["auto", "recomputed", "sampled"],
    )
    plan: str = option(
        "stop", "Before weights are loaded, plan what a rank will hold; stop, or warn, where it has not that much.",
        choices=["off", "warn", "stop"],
    )
    save_steps: int = option(
        50, "Checkpoint every so many steps, and at the end.", group="checkpoints and samples", minimum=1
    )
    keep_checkpoints: int = option(
        2, "Newest checkpoints to keep, besides the one of the highest judged relevance (without a monitor: reward).",
        minimum=1
    )
    hang_timeout: float = option(
        HANG_TIMEOUT, "End the job when a rank makes no progress in a phase (rollout, update, checkpoint) for so many "
        "seconds; 0: never."
    )
    sample_steps: int = option(20, "Show sampled responses with each token's reward every so many steps.", minimum=1)

    def of_critic(self) -> Self:
        """The settings that the critic's adapters are made of: `critic_lora_r` is their rank, and nothing is quantised.

        `lora_alpha` is not scaled with the rank: with Adam the first updates' effect grows with alpha alone, because r
        terms of the same size are summed and divided by r.
        """
        return replace(self, lora_r=self.critic_lora_r, quantize="none")

    def wanted_layout(self) -> Literal["padded", "packed", "shared"]:
        """What `sequence_layout` stands for, before the models are asked whether they can share prompts."""
        if self.sequence_layout != "auto":
            return self.sequence_layout
        if self.attn_implementation == "flash_attention_2":
            return "packed"
        return "shared" if self.samples_per_prompt > 1 else "padded"

    def sampling_is_exact(self) -> bool:
        """Whether decoding gives the log-probs of a training pass but for fp32's rounding."""
        return self.dtype == "fp32" and self.quantize == "none"

    def validate(self, world_size: int) -> None:
        """Refuse settings that cannot work together; raises `InputError` that says what to change."""
        for name in ("output_dir", "actor_path", "reward_path", "data_dir"):
            if not getattr(self, name):
                raise InputError(f"--{name} is missing (see --help, or give a --config that holds it)")
        check_numbers(self)
        check_annotator_name(self.monitor, "monitor", known=("", *ANNOTATORS))
        if self.baseline == "group" and self.samples_per_prompt < 2:
            raise InputError("--baseline group compares the responses to a prompt: give --samples_per_prompt 2 or more")
        if self.monitor_margin > 0 and not self.monitor:
            raise InputError("--monitor_margin needs --monitor: without a judge there is nothing to compare with")
        if self.reward_from == "monitor" and not self.monitor:
            raise InputError("--reward_from monitor needs --monitor: it says which annotator gives the scores")
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise InputError("--kl_in loss needs --kl_estimator k2 or k3: k1 as a loss has no gradient in expectation")
        if self.offload_states and self.offload != "none":
            raise InputError("--offload_states has nothing to move: with --offload states rest in host memory anyway")
        # What kind of adapters is said for the critic's too, which may be the only ones.
        check_adapters(replace(self, lora_rslora=False, lora_dora=False) if self.critic_lora_r else self)
        check_dora(self)
        if self.lora_dora and self.hybrid_weights == "sharded":
            raise InputError(DORA_NEEDS_WHOLE_WEIGHTS)
        if self.lora_dropout > 0:
            raise InputError("--lora_dropout must be 0 in step 3: log-probs of two passes are compared")
        if 0 < self.dual_clip <= 1:
            raise InputError(f"--dual_clip must be above 1, or 0 for none, not {self.dual_clip}")
        _check_divides("rollout_batch_size", self.rollout_batch_size, world_size, "the number of ranks")
        _check_divides("mini_batch_size", self.mini_batch_size, world_size, "the number of ranks")
        responses = self.rollout_batch_size * self.samples_per_prompt
        _check_divides("rollout_batch_size x samples_per_prompt", responses, self.mini_batch_size, "mini_batch_size")


def _check_divides(name: str, value: int, divisor: int, divisor_name: str) -> None:
    if value % divisor:
        raise InputError(f"{name} is {value}, which {divisor_name} ({divisor}) does not divide; change one of them")
