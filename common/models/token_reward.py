"""The token-level reward model: any token classifier over (history, response) pairs, and the scorer made of it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common.access import naming
from common.alignment import NO_LINE, pool_token_scores, token_words
from common.config import ModelOptions
from common.data.prompts import CHAT, TEMPLATE_DIR
from common.data.records import Event
from common.errors import InputError, TrainingDiverged, one_line
from common.files import read_json, write_json
from common.models.kernels import apply_liger, settle_dtype
from common.models.layouts import MASKED_KERNELS, PROMPT, ModelRows, accepts, forward_arguments, lay_out
from common.models.loading import DTYPES, check_machine, load_fast_tokenizer, load_model_config
from common.models.query_score import QueryRule, compose_query_scores
from common.models.reward_encoder import EncodedResponse, RewardEncoder, response_begin, takes_segments
from common.models.reward_losses import judges_words, predicted_sentences, without_class_weights
from common.models.reward_options import MAX_SCORE, RewardInputOptions
from common.models.sequences import pad_sequences
from common.text import split_queries

SETTINGS_NAME = "token_reward.json"
TEMPLATE_NAME = "prompt_template.jinja"
LABEL_NAMES = ("irrelevant", "relevant", "very relevant")
SENTENCE_NAME = "query relevance"
MISSING_WORD = (1.0, 0.0, 0.0)  # irrelevant: what the model cannot see is not to be paid for


class RewardScores(NamedTuple):
    """Of each response: `words`, the expected score in 0..2 of each word of `split_words`; `queries`, the score in 0..1
    of each line of `split_queries`, 0 for a line without a word. `missing` words of all responses had no token (cut
    off, or removed by the tokenizer) and count as irrelevant."""

    words: list[list[float]]
    queries: list[list[float]]
    missing: int


class TokenRewardModel:
    """Scores responses with `module`, a token classifier; one forward call a batch, whatever the batch holds.

    `class_weights` (3,), those of its local loss, are taken out of the outputs (`without_class_weights`). Queries are
    judged by their words (`compose_query_scores` with `query_rule`). A sentence-level model judges queries alone: each
    word then carries its query's score, on the words' scale. `module` may be in DeepSpeed's hands: it is called as it
    is, on the device that its weights are on.
    """

    def __init__(
        self,
        module: nn.Module,
        encoder: RewardEncoder,
        class_weights: Sequence[float] | None = None,
        query_rule: QueryRule | None = None,
    ) -> None:
        self.module = module
        self.encoder = encoder
        self._class_weights = None if class_weights is None else torch.tensor(class_weights)
        self._query_rule = query_rule
        self.shares_prompts = False

    @torch.no_grad()
    def score(self, histories: Sequence[Sequence[Event]], responses: Sequence[str]) -> RewardScores:
        """Word and sentence scores of one batch. Raises `TrainingDiverged` when a score is not finite."""
        encoded = [self.encoder.encode(*pair) for pair in zip(histories, responses, strict=True)]
        self.module.eval()
        logits = self._shared_logits(encoded) if self.shares_prompts else self._logits(encoded)
        if not logits.isfinite().all():
            raise TrainingDiverged("the reward model gives scores that are not finite; look at step 2's metrics")
        if self._class_weights is not None:
            logits = without_class_weights(logits, self._class_weights)
        words, queries, missing = [], [], 0
        for row, item, response in zip(logits, encoded, responses, strict=True):
            outputs, num_queries = row[: len(item.spans)], len(split_queries(response))
            seen = seen_words(item)
            if judges_words(outputs):
                classes = word_probabilities(outputs, item)
                words.append((classes[:, 1] + MAX_SCORE * classes[:, 2]).tolist())
                queries.append(compose_query_scores(item.words, classes.tolist(), num_queries, self._query_rule))
            else:
                queries.append(sentence_scores(outputs, item, num_queries))
                rows = zip(item.words, seen, strict=True)
                words.append([MAX_SCORE * queries[-1][word.line] if is_seen else 0.0 for word, is_seen in rows])
            missing += seen.count(False)
        return RewardScores(words, queries, missing)

    def _logits(self, encoded: Sequence[EncodedResponse]) -> torch.Tensor:
        batch = self.encoder.collate([item.tokens for item in encoded])
        device = next(self.module.parameters()).device
        return self.module(**{key: value.to(device) for key, value in batch.items()}).logits.float().cpu()

    def _shared_logits(self, encoded: Sequence[EncodedResponse]) -> torch.Tensor:
        """`_logits` where tokens of a response are, and 0 elsewhere, from rows that hold a history once."""
        ids = [item.tokens.input_ids.tolist() for item in encoded]
        begins = [response_begin(item.tokens) for item in encoded]
        prompts = [tuple(row[:begin]) for row, begin in zip(ids, begins, strict=True)]
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        responses = [row[begin:] for row, begin in zip(ids, begins, strict=True)]
        device = next(self.module.parameters()).device
        batch = pad_sequences(prompts, responses, 0, device)
        batch = batch._replace(prompt_index=torch.tensor([numbers[prompt] for prompt in prompts], device=device))
        rows = lay_out(batch, "shared", at_tokens=True)
        found = logits_of_rows(self.module, rows, self.encoder.options.prefix_attention).cpu()
        logits = found.new_zeros(*batch.input_ids.shape, found.shape[-1])
        logits[batch.predicting.roll(1, dims=1).cpu()] = found
        return logits


def logits_of_rows(module: PreTrainedModel, rows: ModelRows, prefix_attention: bool) -> torch.Tensor:
    """A classifier's outputs (M, N) in fp32 at the response tokens of rows that hold a history once."""
    arguments = forward_arguments(module, rows, causal=not prefix_attention)
    if takes_segments(module):
        arguments["token_type_ids"] = (rows.segments > PROMPT).long()
    return module(**arguments).logits[rows.keep][rows.index].float()


def word_probabilities(logits: torch.Tensor, encoded: EncodedResponse) -> torch.Tensor:
    """Each word's class probabilities (W, 3), those of its tokens pooled; logits (T, 3). See `MISSING_WORD`."""
    columns = logits.float().softmax(-1).T.tolist()
    pooled = [
        pool_token_scores(encoded.words, column, encoded.spans, missing)
        for column, missing in zip(columns, MISSING_WORD, strict=True)
    ]
    return torch.tensor(pooled).T.reshape(-1, len(MISSING_WORD))


def seen_words(encoded: EncodedResponse) -> list[bool]:
    """Whether any token holds a part of each word (W)."""
    covered = pool_token_scores(encoded.words, [1.0] * len(encoded.spans), encoded.spans, missing=0.0)
    return [share > 0 for share in covered]


def sentence_scores(logits: torch.Tensor, encoded: EncodedResponse, num_queries: int) -> list[float]:
    """What the global loss trains, from a response's outputs (T, N): `predicted_sentences`, 0 for a query without a
    token."""
    index = torch.tensor([query_index(encoded)])
    predicted, present = predicted_sentences(logits.unsqueeze(0), index, num_queries)
    return predicted.masked_fill(~present, 0.0)[0].tolist()


def query_index(encoded: EncodedResponse) -> list[int]:
    """The query of each token in the valid zone, `NO_LINE` for all others; (T,)."""
    owners = token_words(encoded.words, encoded.spans)
    return [encoded.words[owner].line if owner >= 0 else NO_LINE for owner in owners]


def load_token_reward_model(
    path: str, options: ModelOptions, bidirectional: bool = False, heads: str = "token", new_head: bool = True
) -> PreTrainedModel:
    """A token classifier with the outputs of `heads` (see `HEAD_OUTPUTS`) from any model folder or hub name with one.

    A causal language model (step 1's) or another classifier gets a new head, unless `new_head` is off: then one without
    a fitting head is refused. `bidirectional` makes a decoder read both
    ways, so that a word is judged in the light of those after it. The setting is saved with the model, so a folder of
    such a model needs no flag.

    Raises `InputError` for a model without a token classifier, without trained weights, with an attention kernel that
    cannot run, or for `bidirectional` on a model that is no decoder.
    """
    check_machine(path, options)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=options.trust_remote_code)
        names = output_names(heads)
        config.num_labels = len(names)
        config.id2label, config.label2id = names, {name: label for label, name in names.items()}
        if bidirectional:
            config.is_causal = False  # what transformers builds its attention masks by
        model, report = AutoModelForTokenClassification.from_pretrained(
            path,
            config=config,
            dtype=DTYPES[settle_dtype(options).dtype],
            attn_implementation=options.attn_implementation,
            trust_remote_code=options.trust_remote_code,
            ignore_mismatched_sizes=True,  # a head of other classes gives way to ours; checked below
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise InputError(f"{path}: cannot load a token classifier ({str(error).splitlines()[0]})") from error
    except RuntimeError as error:
        # transformers leaves heads of other sizes out, but not where it shards weights as it loads them.
        raise InputError(
            f"{path}: cannot load a token classifier ({one_line(error)}); if it is its head of other classes that does "
            "not fit, add --zero_stage 2"
        ) from error
    _check_weights(path, model, report, new_head)
    if reads_both_ways(model):
        _switch_off_causality(path, model)
    if options.liger:
        apply_liger(model)
    return model


def token_classifier_skeleton(path: str, options: ModelOptions) -> PreTrainedModel:
    """The classifier under `path` without storage, to be asked before weights are read (and before ZeRO-3 is set up).

    Raises `InputError` where the family has no token classifier.
    """
    config = load_model_config(path, options.trust_remote_code)
    try:
        with torch.device("meta"):
            return AutoModelForTokenClassification.from_config(config, trust_remote_code=options.trust_remote_code)
    except (ValueError, ImportError) as error:
        raise InputError(f"{path}: cannot build a token classifier ({str(error).splitlines()[0]})") from error


def output_names(heads: str) -> dict[int, str]:
    """The model's outputs by index, as its configuration names them."""
    return dict(enumerate([SENTENCE_NAME] if heads == "sentence" else LABEL_NAMES))


def reads_both_ways(model: PreTrainedModel) -> bool:
    """Whether `model` is a decoder that was made bidirectional."""
    return not getattr(model.config, "is_causal", True)


def load_token_reward_scorer(path: str, options: ModelOptions) -> TokenRewardModel:
    """The scorer in a folder that step 2 wrote. Raises `InputError` for any other folder."""
    folder = Path(path)
    if not (folder / SETTINGS_NAME).is_file():
        raise InputError(f"{path}: no token reward model (no {SETTINGS_NAME}); give the model folder that step 2 wrote")
    saved = read_json(folder / SETTINGS_NAME)
    settings = RewardInputOptions(**saved["inputs"])
    if settings.prompt_template == TEMPLATE_NAME:
        settings = RewardInputOptions(**asdict(settings) | {"prompt_template": str(folder / TEMPLATE_NAME)})
    heads = saved.get("heads", "token")
    # Liger's kernels are for what is trained, and the encoder may be of a family that has none.
    model = load_token_reward_model(path, replace(options, liger=False), heads=heads, new_head=False)
    tokenizer = load_fast_tokenizer(path, options.trust_remote_code)
    class_weights = saved.get("class_weights") if heads == "token" else None
    rule = QueryRule(**saved["query_rule"]) if saved.get("query_rule") else None
    return TokenRewardModel(model.eval(), RewardEncoder(tokenizer, settings, model), class_weights, rule)


def save_token_reward_model(
    path: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: RewardInputOptions,
    facts: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a complete folder: safetensors, config, tokenizer, the prompt template and `token_reward.json`.

    `facts` (JSON values) go into the last, beside how inputs are made. It is written last: a folder without it is not
    complete. `state_dict` are the whole weights where the model's own are sharded. Call it on one process.
    """
    path = Path(path)
    if path.exists():
        shutil.rmtree(path)
    settings = asdict(inputs)
    with naming(path):
        model.save_pretrained(path, state_dict=state_dict)
        tokenizer.save_pretrained(path)
        if _is_file(inputs.prompt_template):
            shutil.copyfile(inputs.prompt_template, path / TEMPLATE_NAME)
            settings["prompt_template"] = TEMPLATE_NAME
    write_json(path / SETTINGS_NAME, {"inputs": settings, **facts})


def _check_weights(path: str, model: PreTrainedModel, report: dict[str, Any], new_head: bool) -> None:
    """Only the head may be new, and only where `new_head` allows it."""
    trained = f"{model.base_model_prefix}." if new_head else ""
    lacking = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    missing = {key for key in lacking if key.startswith(trained)}
    if missing:
        what = "encoder" if new_head else "reward model"
        raise InputError(
            f"{path}: {len(missing)} of the {what}'s weights are missing or of another size ({min(missing)}, ...), so "
            "it would be random; give a folder with a trained model"
        )


def reads_causally(model: PreTrainedModel) -> bool:
    """Whether `model` is a decoder: its attention modules are causal. Weights may be without storage."""
    return bool(_causal_modules(model))


def may_share_histories(model: PreTrainedModel, prefix_attention: bool) -> bool:
    """Whether a history may be read once for all its responses: by a causal model, or with prefix attention.

    In any other model the history would see the responses. Weights may be without storage.
    """
    return prefix_attention or (reads_causally(model) and not reads_both_ways(model))


def takes_prefix_attention(model: PreTrainedModel, kernel: str) -> bool:
    """Whether a token classifier can read with prefix attention and share histories.

    Decoders without a sliding window can, and encoders of BERT's own kind, which take positions as numbers. Weights may
    be without storage.
    """
    config = model.config.get_text_config()
    decoder = reads_causally(model) and not getattr(config, "sliding_window", None)
    return (
        (decoder or config.model_type == "bert")
        and kernel in MASKED_KERNELS
        and accepts(model.base_model, "position_ids")
    )


def _causal_modules(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if getattr(module, "is_causal", None) is True]


def _switch_off_causality(path: str, model: PreTrainedModel) -> None:
    """Tell each attention module what the configuration tells the mask: some kernels ask the module."""
    causal = _causal_modules(model)
    if not causal:
        raise InputError(
            f"{path}: {type(model).__name__} has no causal attention that could be switched off; --bidirectional is "
            "for decoders, an encoder reads both ways anyway"
        )
    for module in causal:
        module.is_causal = False


def _is_file(template: str) -> bool:
    return template != CHAT and not (TEMPLATE_DIR / f"{template}.jinja").is_file()
