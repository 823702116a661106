"""The stages of a run: their order, what each reads and makes, what is done, and what a command runs."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from common.errors import InputError
from pipeline.hardware import Hardware
from pipeline.main import check_folders, claimed_folder, make_room, own_inputs, refuse_to_replace, wanted_stages
from pipeline.options import parse_options, settle
from pipeline.presets import Models
from pipeline.stages import INPUTS, STEP_FOLDERS, Run, Stage, flag_value

LLM = ("--annotator", "llm", "--base_url", "http://h/v1", "--annotator_model", "m")
# What a stage reads, by the flags of its command; a flag may have several values.
READS = (
    "log", "data_dir", "model_name_or_path", "samples", "labels", "reference", "actor_path", "reward_path",
    "critic_path", "truth", "systems", "timings",
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "scores.py", "c.yaml"):
        Path(name).touch()


def run_of(*argv: str, step: int | None = None, preset: str = "") -> Run:
    options, flags = parse_options(argv, step)
    options = settle(options)
    models = Models(options.model, options.reward_model)
    return Run(options, Hardware(0, 2), models, preset or ("cpu_lora" if models.base else "tiny"), step, flags)


def wanted(*argv: str, step: int | None = None) -> list[str]:
    run = run_of(*argv, step=step)
    own = own_inputs(step, parse_options(argv, step)[1]) if step else []
    return [stage.name for stage in wanted_stages(run, step, own)]


def finish(run: Run, *names: str) -> None:
    """Leave what these stages leave."""
    for stage in run.stages():
        if stage.name in names:
            (run.folder / "stages").mkdir(parents=True, exist_ok=True)
            (run.folder / "stages" / f"{stage.name}.json").write_text("{}")
            stage.makes.mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize(("step", "folder"), [(None, "outputs/demo"), (2, "outputs/demo"), (3, "outputs/demo")])
def test_a_run_is_refused_where_nothing_can_be_written(step: int | None, folder: str) -> None:
    Path("outputs").touch()
    run = run_of(step=step)
    refused = rf"^{folder}: no file can be written in \S+/outputs \(Not a directory\); type the command in a folder of"
    with pytest.raises(InputError, match=refused):
        check_folders(run, wanted_stages(run, step, []))


@pytest.mark.parametrize("place", ["step2_token_reward/samples", "step3_tppo"])
def test_a_folder_in_the_run_that_cannot_be_written_is_found_before_the_first_stage(place: str) -> None:
    blocked = Path("outputs/demo", place)
    blocked.parent.mkdir(parents=True)
    blocked.touch()
    run = run_of()
    with pytest.raises(InputError, match=rf"^{blocked}: no file can be written"):
        check_folders(run, wanted_stages(run, None, []))
    assert not list(Path("outputs/demo").glob("log*"))


def test_a_folder_of_the_users_own_is_looked_at_too() -> None:
    Path("file").touch()
    (stage,) = [stage for stage in run_of("--output_dir", "file/mine", step=1).stages() if stage.step == 1]
    with pytest.raises(InputError, match=r"^file/mine: no file can be written .*; choose another --output_dir$"):
        stage.check()


def values(command: list[str], name: str) -> list[str]:
    """All values of a flag, which may be several words."""
    if f"--{name}" not in command:
        return []
    rest = command[command.index(f"--{name}") + 1 :]
    return list(itertools.takewhile(lambda word: not str(word).startswith("--"), rest))


NAMES = [
    "simulate", "prepare", "base_model", "step1_sft", "step2_sample", "step2_label", "step2_reward", "step3_tppo",
    "evaluate",
]  # fmt: skip


def test_the_order_of_the_stages() -> None:
    assert [stage.name for stage in run_of().stages()] == NAMES
    real = [stage.name for stage in run_of("--log", "a.jsonl", "--model", "m/m").stages()]
    assert real == [name for name in NAMES if name not in ("simulate", "base_model")]
    judged = [stage.name for stage in run_of(*LLM).stages()]
    assert judged == [*NAMES[:6], "step2_label_second", "step2_agreement", *NAMES[6:]]


OPTIONS = list(
    itertools.product(
        [(), ("--log", "a.jsonl")],
        [(), ("--model", "m/m")],
        [(), ("--reward_model", "r/r")],
        [(), ("--annotator", "lexical"), ("--annotator", "scores.py:score"), LLM],
        [(), ("--miniature",)],
        [(), ("--preset", "none")],
    )
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(itertools.chain(*options)) or "none")
def test_what_a_stage_reads_was_made_before_it_or_is_the_users(options: tuple[tuple[str, ...], ...]) -> None:
    run = run_of(*itertools.chain(*options), preset="none" if "--preset" in itertools.chain(*options) else "")
    made: list[Path] = []
    reads = 0
    for stage in run.stages():
        for name in READS:
            for value in values(list(stage.command), name):
                path = Path(str(value).rpartition("=")[2] if name == "systems" else value)
                if name == "timings":
                    assert path.stem in [before.name for before in run.stages()[: len(made)]]
                elif path == stage.makes:
                    assert name == "labels"  # what label.py writes has the name of what main.py reads
                elif run.holds(path):
                    assert any(path == there or path.is_relative_to(there) for there in made), (stage.name, name)
                    reads += 1
                else:
                    assert str(path) in ("m/m", "r/r", str(Path("a.jsonl").resolve())), (stage.name, name)
        assert run.holds(stage.makes)
        made.append(stage.makes)
    assert reads >= 10


def stage_named(run: Run, name: str) -> Stage:
    return next(stage for stage in run.stages() if stage.name == name)


def test_the_report_compares_a_pretrained_model_before_and_after() -> None:
    systems = values(list(stage_named(run_of("--model", "m/m"), "evaluate").command), "systems")
    assert systems == [
        "base=m/m", "sft=outputs/demo/step1_sft/model", "tppo=outputs/demo/step3_tppo/model",
    ]  # fmt: skip
    assert [name.split("=")[0] for name in values(list(stage_named(run_of(), "evaluate").command), "systems")] == [
        "sft", "tppo",
    ]  # fmt: skip


def test_the_critic_starts_from_the_reward_model_where_both_read_the_same_tokens() -> None:
    def critic(*argv: str) -> str:
        return flag_value(stage_named(run_of(*argv, step=3), "step3_tppo").command, "critic_path")

    assert critic() == "outputs/demo/step2_token_reward/reward/model"
    assert critic("--reward_model", "r/r") == ""
    assert critic("--reward_path", "mine") == "" and critic("--critic_path", "mine") == "mine"


def test_a_users_flags_go_to_the_main_of_the_step_alone_and_win() -> None:
    run = run_of("--seed", "5", "--max_response_tokens", "20", step=2)
    for stage in run.stages():
        assert flag_value(stage.command, "seed") in ("5", "")
        assert ("20" in stage.command) == (stage.name == "step2_reward")
    command = list(stage_named(run, "step2_reward").command)
    own = [place for place, word in enumerate(command) if word == "--max_response_tokens"]
    assert command[own[-1] + 1] == "20"


def test_what_is_done_is_not_run_again() -> None:
    assert wanted(step=1) == NAMES[:4] and wanted(step=3) == NAMES[:8] and wanted() == NAMES
    run = run_of()
    finish(run, *NAMES[:5])
    assert wanted(step=1) == []
    assert wanted(step=2) == ["step2_label", "step2_reward"]
    assert wanted(step=3) == ["step2_label", "step2_reward", "step3_tppo"]
    assert wanted("--resume") == NAMES[5:]
    finish(run, *NAMES)
    assert wanted("--resume") == ["evaluate"]  # whose report may be of older models
    (run.folder / "stages" / "step3_tppo.json").unlink()
    assert wanted("--resume") == ["step3_tppo", "evaluate"]
    finish(run, *NAMES)
    run.tppo.rmdir()  # a record alone is not enough
    assert wanted("--resume") == ["step3_tppo", "evaluate"]


def test_overwrite_makes_the_steps_own_stages_anew() -> None:
    finish(run_of(), *NAMES)
    assert wanted("--overwrite", step=2) == ["step2_sample", "step2_label", "step2_reward"]
    assert wanted("--overwrite", step=3) == ["step3_tppo"]
    assert wanted("--overwrite") == NAMES


def test_an_output_folder_of_the_users_own_is_written_though_the_step_is_done() -> None:
    finish(run_of(), *NAMES)
    for overwrite in ((), ("--overwrite",)):
        assert wanted("--output_dir", "mine", *overwrite, step=3) == ["step3_tppo"]
        assert wanted("--output_dir", "mine", *overwrite, step=2) == ["step2_reward"]
    run = run_of("--output_dir", "mine", step=3)
    stage = stage_named(run, "step3_tppo")
    assert run.writes_elsewhere and not stage.recorded and claimed_folder(run, 3) is None
    assert "--resume" not in stage.command
    assert "--overwrite" in stage_named(run_of("--output_dir", "mine", "--overwrite", step=3), "step3_tppo").command
    # The run's own folder by its name is the run's.
    for name in ("outputs/demo/step3_tppo", str(Path("outputs/demo/step3_tppo").resolve())):
        run = run_of("--output_dir", name, step=3)
        assert not run.writes_elsewhere and stage_named(run, "step3_tppo").recorded
        with pytest.raises(InputError, match="step3_tppo exists"):
            refuse_to_replace(run, 3)


def test_some_inputs_of_the_users_own() -> None:
    Path("mine").mkdir()
    with pytest.raises(InputError, match=r"--actor_path, --reward_path missing: outputs/demo has none"):
        wanted("--data_dir", "mine", step=3)
    # The name of a model is no folder that could be missing.
    assert wanted("--data_dir", "mine", "--model", "smollm2-135m", step=1) == ["step1_sft"]
    with pytest.raises(InputError, match="--model_name_or_path missing"):
        wanted("--data_dir", "mine", step=1)
    run = run_of()
    finish(run, *NAMES)
    assert wanted("--data_dir", "mine", step=3) == ["step3_tppo"]
    for name in ("data_dir", "samples", "labels"):
        with pytest.raises(InputError, match=f"--{name} nowhere: no such file or folder"):
            own_inputs(2 if name != "data_dir" else 3, [f"--{name}", "nowhere"])
    with pytest.raises(InputError, match=r"--actor_path ./nowhere: no such"):
        own_inputs(3, ["--actor_path", "./nowhere"])
    assert own_inputs(3, ["--actor_path=some/name"]) == ["actor_path"]


def test_a_step_alone_has_the_users_flags_and_nothing_of_a_run() -> None:
    argv = ["--actor_path", "a/b", "--reward_path", "r", "--data_dir", "d", "--output_dir", "o", "--seed", "4"]
    run = run_of(*argv, "--miniature", "--resume", step=3)
    stage = run.alone(["c.yaml"])
    command = list(stage.command)
    assert command[:4] == ["bash", command[1], "--config", "c.yaml"] and command[1].endswith("step3_tppo/launch/cpu.sh")
    assert [flag_value(command, name) for name in (*INPUTS[3], "output_dir", "seed")] == ["a/b", "r", "d", "o", "4"]
    assert flag_value(command, "critic_path") == "" and "--resume" in command and not stage.recorded
    assert flag_value(command, "total_steps") in ("2", "3")


def test_what_is_there_is_refused_kept_or_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    finish(run_of(), *NAMES)
    folder = run_of().folder
    for step in (None, 1, 2, 3):
        with pytest.raises(InputError, match=r"add --resume .* --overwrite .* or another --run_name"):
            refuse_to_replace(run_of(step=step), step)
        refuse_to_replace(run_of("--resume", step=step), step)
    with pytest.raises(InputError, match=r"not the folder of a run \(no run\.json\)"):
        refuse_to_replace(run_of("--overwrite"), None)
    make_room(run_of("--resume", step=2), 2)
    assert any((folder / STEP_FOLDERS[2]).iterdir())
    make_room(run_of("--overwrite", step=2), 2)
    assert not any((folder / STEP_FOLDERS[2]).iterdir()) and any((folder / STEP_FOLDERS[3]).iterdir())
    assert "step3_tppo were made from what is replaced now" in capsys.readouterr().out
    assert not list((folder / "stages").glob("step2_*")) and (folder / "stages" / "step1_sft.json").is_file()
    (folder / "run.json").write_text("{}")
    refuse_to_replace(run_of("--overwrite"), None)
    make_room(run_of("--overwrite"), None)
    assert not any(folder.iterdir())


def test_a_step_folder_that_is_a_link_to_another_disk_stays_one() -> None:
    target, folder = Path("disk"), Path("outputs/demo")
    folder.mkdir(parents=True)
    target.mkdir()
    (target / "old").touch()
    (folder / STEP_FOLDERS[3]).symlink_to(target.resolve())
    with pytest.raises(InputError, match="exists"):
        refuse_to_replace(run_of(step=3), 3)
    make_room(run_of("--overwrite", step=3), 3)
    assert (folder / STEP_FOLDERS[3]).is_symlink() and target.is_dir() and not any(target.iterdir())


def test_the_language_models_are_asked_for_an_answer_once_each() -> None:
    assert run_of().endpoint_checks() == []
    (one,) = run_of(*LLM, "--llm_flags=--timeout 3").endpoint_checks()
    assert one[-2:] == ["--timeout", "3"] and flag_value(one, "model") == "m"
    assert len(run_of(*LLM, "--judge_model", "j").endpoint_checks()) == 2
