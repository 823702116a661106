"""Which preset a run takes: by the size of the model and the memory of the machine, as the planner counts it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import BertConfig, LongformerConfig, Qwen2Config, Qwen3Config

from common.errors import InputError
from common.planning.plan import Machine
from pipeline.hardware import Hardware
from pipeline.presets import (
    EMPTY,
    Models,
    _planned_steps,
    adaptations,
    choose_preset,
    config_files,
    is_encoder,
    possible_presets,
)
from tests.planning.architectures import ARCHITECTURES, config_file
from tests.tiny_models import tiny_llama

QWEN = {"vocab_size": 151_936, "num_key_value_heads": 2}
SIZES = {
    "0.5b": Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, tie_word_embeddings=True,
        **QWEN,
    ),
    "1.5b": Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        tie_word_embeddings=True, **QWEN,
    ),
    "8b": ARCHITECTURES["llama_3_8b"],
    "14b": Qwen3Config(
        hidden_size=5120, intermediate_size=17_408, num_hidden_layers=40, num_attention_heads=40, head_dim=128,
        tie_word_embeddings=False, **QWEN | {"num_key_value_heads": 8},
    ),
    "70b": ARCHITECTURES["llama_3_70b"],
    "encoder": LongformerConfig(
        architectures=["LongformerForMaskedLM"], vocab_size=50_265, max_position_embeddings=4098,
        attention_window=[512] * 12,
    ),
}  # fmt: skip
ALL = ("step1", "step2", "step3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json of each size; no weights."""
    made = tmp_path_factory.mktemp("models")
    for name, config in SIZES.items():
        config.save_pretrained(made / name)
    return made


def gpus(monkeypatch: pytest.MonkeyPatch, ranks: int, gib: int) -> Hardware:
    monkeypatch.setattr(Hardware, "memory", lambda self: gib << 30)
    return Hardware(min(ranks, 8), ranks)


def planned(preset: str, models: Models, hardware: Hardware) -> list[int]:
    """The planned peak of each step, in bytes a GPU."""
    machine = Machine(hardware.ranks, hardware.memory(), cuda=True)
    return [plan(config, machine).peak for _, config, plan in _planned_steps(preset, models, hardware, ALL)]


@pytest.mark.parametrize(
    ("model", "reward", "ranks", "gib", "preset"),
    [
        ("0.5b", "", 1, 80, "8x80gb_full"),
        ("0.5b", "", 1, 24, "8x80gb_lora"),
        ("1.5b", "encoder", 1, 24, "1x24gb_lora"),
        ("8b", "", 8, 80, "8x80gb_full"),
        ("14b", "", 16, 80, "2x8x80gb_full"),
    ],
)
def test_the_first_preset_that_the_planner_finds_room_for_is_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, reward: str, ranks: int, gib: int, preset: str
) -> None:
    models, hardware = Models(str(folder / model), reward and str(folder / reward)), gpus(monkeypatch, ranks, gib)
    chosen, reason = choose_preset(models, hardware)
    assert chosen == preset and preset in possible_presets(models, hardware)
    peaks = planned(preset, models, hardware)
    assert max(peaks) <= gib << 30
    stated = [float(number) for number in re.findall(r"([\d.]+) GiB in step", reason)]
    assert stated == pytest.approx([peak / 2**30 for peak in peaks], abs=0.006)


@pytest.mark.parametrize(
    ("model", "ranks", "gib", "problem"),
    [
        ("1.5b", 1, 24, "1x24gb_lora: step 2 needs"),
        ("8b", 1, 24, "8x80gb_full: step 1 needs"),
        ("70b", 1, 80, "70b_lora: step 1 needs"),
    ],
)
def test_where_none_fits_the_message_names_what_is_lacking_and_the_remedies(
    folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, ranks: int, gib: int, problem: str
) -> None:
    models, hardware = Models(str(folder / model), ""), gpus(monkeypatch, ranks, gib)
    with pytest.raises(InputError) as refused:
        choose_preset(models, hardware)
    message = str(refused.value)
    assert problem in message and "smaller model or more GPUs" in message and "--preset NAME" in message
    assert "--reward_model" in message and "scripts/plan.py" in message
    for name, step, needed in re.findall(r"(\w+): step (\d) needs ([\d.]+) GiB", message):
        peak = planned(name, models, hardware)[int(step) - 1]
        assert float(needed) == pytest.approx(peak / 2**30, abs=0.006) and peak > gib << 30


def test_a_model_made_from_the_log_gets_tiny_and_a_pretrained_one_never(folder: Path, tmp_path: Path) -> None:
    here = Hardware(0, 2)
    assert choose_preset(Models("", ""), here) == ("tiny", "the model is made from the log")
    tiny_llama().config.save_pretrained(tmp_path / "made")
    chosen, reason = choose_preset(Models(str(tmp_path / "made"), ""), here)
    assert chosen == "tiny" and "made from a log" in reason
    small = ARCHITECTURES["llama_3_3b"].__class__(
        vocab_size=32_000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    small.save_pretrained(tmp_path / "pretrained")
    chosen, reason = choose_preset(Models(str(tmp_path / "pretrained"), ""), here)
    assert chosen == "cpu_lora" and "is pretrained" in reason and "2 CPU ranks" in reason and "in step 3" in reason


def test_one_step_alone_is_planned_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = gpus(monkeypatch, 1, 24)
    with pytest.raises(InputError, match="step 2 needs"):
        choose_preset(Models(str(folder / "1.5b"), ""), hardware)
    chosen, reason = choose_preset(Models(str(folder / "1.5b"), ""), hardware, ["step1"])
    assert chosen == "8x80gb_lora" and "step 2" not in reason
    encoder = str(folder / "encoder")
    assert is_encoder(encoder) and not is_encoder(str(folder / "0.5b"))
    _, reason = choose_preset(Models(encoder, encoder), hardware, ["step2"])
    assert "in step 2" in reason and "step 1" not in reason


def test_a_history_is_cut_to_what_an_encoder_can_read_beside_the_response(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """all-MiniLM-L6 has 512 positions, and the preset of one GPU reads 1024 tokens of history and 128 of response."""
    BertConfig(architectures=["BertForMaskedLM"], num_hidden_layers=6).save_pretrained(folder / "bert")
    models, hardware = Models(str(folder / "1.5b"), str(folder / "bert"), 512), gpus(monkeypatch, 1, 24)
    files = config_files("step2", "1x24gb_lora", models, hardware)
    assert adaptations("step2", files, models) == {"max_prompt_tokens": "368"}
    assert adaptations("step2", files, models._replace(reward_positions=4096)) == {}
    assert adaptations("step3", config_files("step3", "1x24gb_lora", models, hardware), models) == {}
    on_cpu = config_files("step2", "cpu_lora", models, Hardware(0, 2))
    assert adaptations("step2", on_cpu, models) == {}, "192 and 128 fit"
    assert choose_preset(models, hardware)[0] == "1x24gb_lora"


def test_settings_files_of_a_preset() -> None:
    here, there = Hardware(0, 2), Hardware(1, 1)
    names = lambda *args: [Path(path).name for path in config_files(*args)]  # noqa: E731
    assert names("step3", "tiny", Models("", ""), here) == ["recipe.yaml", "tiny.yaml"]
    assert names("sample", "tiny", Models("", ""), here) == ["recipe_sample.yaml", "tiny_sample.yaml"]
    assert names("sample", "70b_lora", Models("m", ""), there) == ["recipe_sample.yaml", "8x80gb_sample.yaml"]
    assert names("step2", "8x80gb_full", Models("m", "r"), there) == ["recipe.yaml", "1x24gb_encoder.yaml"]
    assert names("step2", "tiny", Models("", "r"), here) == ["recipe.yaml", "cpu_lora.yaml"]
    assert config_files("step1", "none", Models("", ""), here) == [EMPTY]
    with pytest.raises(InputError, match=r"--preset 9x9gb: no such file in .*; there are .*tiny"):
        config_files("step1", "9x9gb", Models("", ""), here)


@pytest.mark.parametrize("preset", ["tiny", "cpu_lora", *possible_presets(Models("m", ""), Hardware(8, 8))])
def test_every_preset_that_may_be_chosen_has_files_for_all_programs(preset: str) -> None:
    for program in (*ALL, "sample"):
        for models in (Models("m", ""), Models("m", "r")):
            assert all(Path(path).is_file() for path in config_files(program, preset, models, Hardware(8, 8)))


def test_architectures_are_those_of_their_names(folder: Path, tmp_path: Path) -> None:
    assert Path(config_file("llama_3_70b", tmp_path)).read_text() == (folder / "70b" / "config.json").read_text()
