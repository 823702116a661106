"""What is kept back of the libraries' output: the lines that are named, and no other."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from common.config import ModelOptions
from common.errors import InputError
from common.files import read_json
from common.models.token_reward import load_token_reward_model, load_token_reward_scorer, save_token_reward_model
from common.models.value_model import load_value_model
from common.output import hide_known_noise
from tests import commands
from tests.models.reward_fixtures import INPUTS, save_tiny
from tests.tiny_models import ordinary_tokenizer

BOLD, PLAIN = "\033[1m", "\033[0m"
HEADER = "Key | Status |\n----+--------+\n"


# Peers: they run in a process of their own, and print numbers alone.
WITHOUT_THE_PROJECT = {"benchmarks.trl_rloo", "benchmarks.trl_sft", "benchmarks.trainer_reward"}


@pytest.mark.parametrize("module", sorted({*commands.modules(), "pipeline.main"} - WITHOUT_THE_PROJECT))
def test_every_command_tolerates_characters_that_its_output_lacks(module: str) -> None:
    """`run_command` sees to it (tests/test_errors.py); a command that calls its `main` itself ends at the first one."""
    end = commands.source(module).partition('if __name__ == "__main__":')[2]
    assert "run_command(" in end or "run_rank_command(" in end


def report(model: str, *rows: str) -> str:
    """As transformers writes it; the folder's name holds a number, which is no layer."""
    return f"{BOLD}{model} LOAD REPORT{PLAIN} from: runs/v.2/model\n{HEADER}" + "\n".join(rows)


@pytest.mark.parametrize(
    ("logger", "message", "shown"),
    [
        ("modeling_utils", report("LlamaForTokenClassification", "score.weight | MISSING |"), False),
        ("modeling_utils", report("LlamaModel", "score.weight | UNEXPECTED |"), False),
        ("modeling_utils", report("LlamaModel", "layers.{2, 3}.norm.weight | UNEXPECTED |"), True),
        ("modeling_utils", report("BertForTokenClassification", "bert.layer.0.bias | MISSING |"), True),
        ("modeling_utils", report("BertForTokenClassification", "classifier.bias | CONVERSION |"), True),
        ("modeling_utils", report("LlamaForCausalLM", "score.weight | UNEXPECTED |"), True),
        ("modeling_utils", report("GPT2LMHeadModel", "score.weight | UNEXPECTED |"), True),
        ("trainer_utils", "mtime may not be reliable on this filesystem, falling back to numerical ordering", False),
        ("trainer_utils", "another warning", True),
    ],
)
def test_log_lines(logger: str, message: str, shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    hide_known_noise()
    handler = logging.StreamHandler()
    transformers_logging.add_handler(handler)
    try:
        logging.getLogger(f"transformers.{logger}").warning(message)
    finally:
        transformers_logging.remove_handler(handler)
    assert (message in capsys.readouterr().err) == shown


@pytest.mark.parametrize(
    ("category", "message", "shown"),
    [
        (FutureWarning, "`torch.distributed.all_gather_into_tensor` is deprecated. Please use another", False),
        (FutureWarning, "`is_gradient_checkpointing` is deprecated and will be removed in v6.", False),
        (FutureWarning, "`torch.distributed.all_to_all` is deprecated", True),
        (UserWarning, "`is_gradient_checkpointing` is deprecated and will be removed in v6.", True),
    ],
)
def test_warnings(category: type[Warning], message: str, shown: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hide_known_noise()
        warnings.warn(message, category, stacklevel=1)
    assert len(caught) == shown


def test_weights_that_a_hidden_report_would_have_named_are_refused(tmp_path: Path) -> None:
    """A scorer without its head, and a critic without a part of its trunk."""
    options = ModelOptions(attn_implementation="eager")
    base = save_tiny("llama", tmp_path / "base")
    with pytest.raises(InputError, match="weights are missing or of another size"):
        copy_settings(base, options, tmp_path / "made", tmp_path / "headless")
        load_token_reward_scorer(str(tmp_path / "headless"), options)
    load_token_reward_scorer(str(tmp_path / "made"), options)
    config = tmp_path / "base" / "config.json"
    layers = read_json(config)["num_hidden_layers"]
    deeper = config.read_text().replace(f'"num_hidden_layers": {layers}', f'"num_hidden_layers": {layers + 1}')
    config.write_text(deeper)
    with pytest.raises(InputError, match=r"of its weights are missing \(layers"):
        load_value_model(base, options)


def copy_settings(base: str, options: ModelOptions, made: Path, headless: Path) -> None:
    """A reward model of `base`, and `base` itself under the same settings."""
    model = load_token_reward_model(base, options)
    save_token_reward_model(made, model, ordinary_tokenizer(), INPUTS, {})
    headless.mkdir()
    for source in (*Path(base).iterdir(), made / "token_reward.json"):
        (headless / source.name).write_bytes(source.read_bytes())
