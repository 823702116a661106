"""Run the whole recipe, or one step of it: what the scripts run_all.sh and run_step1.sh to run_step3.sh start.

    python -m pipeline.main all [flags]      every stage, from the log to the report
    python -m pipeline.main 3 [flags]        step 3; what it lacks is made first

A stage that is done leaves its seconds in `stages/NAME.json` in the run's folder, and is not run again.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.access import check_writable
from common.config import parse_config
from common.errors import DEBUG_FLAG, InputError, run_command
from common.files import empty_folder, lock
from pipeline.hardware import find_hardware
from pipeline.options import (
    OF_A_RUN,
    SETTINGS_NAME,
    PipelineOptions,
    keep_settings,
    looks_like_a_path,
    parse_options,
    settle,
)
from pipeline.presets import AUTO, ROOT, SETTINGS, Models, choose_preset, config_files, is_encoder, possible_presets
from pipeline.processes import run_process, run_stage
from pipeline.stages import INPUTS, STEP_FOLDERS, Run, Stage, flag_value


def main() -> None:
    """Check all that can be checked at once, choose the settings, run the stages."""
    which, *argv = sys.argv[1:]
    step = None if which == "all" else int(which)
    if step and {"-h", "--help"} & set(argv):
        show_help(step)
    given, flags = parse_options(argv, step)
    own = own_inputs(step, flags) if step else []
    if step and len(own) == len(INPUTS[step]):
        run_alone(step, given, flags)
        return
    options = settle(given, anew=given.overwrite and step is None)
    hardware = find_hardware(given.num_gpus, given.hostfile)
    if hardware.launcher == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # for the stages' processes: DeepSpeed warns where it has to find out
    models = Models(options.model, options.reward_model)
    candidates = [options.preset] if options.preset != AUTO else possible_presets(models, hardware)
    runs = [Run(options, hardware, models, preset, step, flags) for preset in candidates]
    # Before a model is fetched or measured, which takes long.
    wanted = check_any([lambda run=run: wanted_stages(run, step, own) for run in runs])
    refuse_to_replace(runs[0], step)
    check_folders(runs[0], wanted)

    models = named_models(models)
    preset = candidates[-1]
    # A step whose settings are the user's own needs no preset, and there may be none that fits.
    if options.preset == AUTO and not (options.config and len(wanted) == 1):
        preset, reason = choose_preset(models, hardware)
        print(f"preset: {preset} ({reason})", flush=True)
    run = Run(options, hardware, models, preset, step, flags)
    wanted = check_any([lambda: wanted_stages(run, step, own)])
    announce(run, wanted, step)
    with held(run.folder):
        make_room(run, step)
        keep_settings(options)
        for stage in wanted:
            run_stage(run.folder, stage)
    if step is None and run_process([sys.executable, "-m", "common.pages.report", "--run", str(run.folder)]):
        print(f"warning: {run.folder}/report.html could not be drawn", file=sys.stderr)
    print(closing_words(run, step))


def check_any(ways: Sequence[Callable[[], list[Stage]]]) -> list[Stage]:
    """The stages of the first of these ways whose settings can work. Raises the last one's `InputError` if none can."""
    for place, stages_of in enumerate(ways, start=1):
        try:
            stages = stages_of()
            for stage in stages:
                stage.check()
        except InputError:
            if place == len(ways):
                raise
        else:
            return stages
    raise ValueError("no way is given")


def show_help(step: int) -> None:
    """Print the scripts' own flags, then those of the step's main.py, and end."""
    try:
        parse_options(["--help"], step)
    except SystemExit:
        print(f"\nFlags of {STEP_FOLDERS[step]}/main.py:\n")
    parse_config(SETTINGS[f"step{step}"].config, ["--help"])


def own_inputs(step: int, flags: Sequence[str]) -> list[str]:
    """The inputs of the step that a user names. Raises `InputError` for one that is not there."""
    given = [name for name in INPUTS[step] if flag_value(flags, name)]
    for name in given:
        path = flag_value(flags, name)
        is_file = name in ("data_dir", "samples", "labels")
        if (is_file or looks_like_a_path(path)) and not Path(path).exists():
            raise InputError(f"--{name} {path}: no such file or folder")
    return given


def run_alone(step: int, options: PipelineOptions, flags: Sequence[str]) -> None:
    """Run a step on inputs of the user's own, outside of any run's folder. Raises `InputError`."""
    if unused := [f"--{name}" for name in OF_A_RUN if getattr(options, name)]:
        raise InputError(
            f"{', '.join(unused)}: not for a step whose inputs are all given "
            f"({', '.join(f'--{name}' for name in INPUTS[step])}); leave them out, or some of the inputs"
        )
    hardware = find_hardware(options.num_gpus, options.hostfile)
    program, model = f"step{step}", flag_value(flags, INPUTS[step][0])
    models = Models(model, flag_value(flags, "reward_path") if step == 3 else "")

    def stages_under(preset: str) -> list[Stage]:
        files = options.config or config_files(program, preset, models, hardware)
        return [Run(options, hardware, models, preset, step, flags).alone(files)]

    auto = options.preset in ("", AUTO)
    candidates = possible_presets(models, hardware) if auto else [options.preset]
    (stage,) = check_any([lambda preset=preset: stages_under(preset) for preset in candidates])
    if auto and not options.config:
        models = named_models(models)
        if step == 2 and is_encoder(model):
            models = Models(models.base, models.base)
        preset, reason = choose_preset(models, hardware, [program])
        print(f"preset: {preset} ({reason})", flush=True)
        (stage,) = check_any([lambda: stages_under(preset)])
    if status := run_process(stage.command):
        raise SystemExit(status)


def wanted_stages(run: Run, step: int | None, own_inputs: Sequence[str]) -> list[Stage]:
    """What is to be run: everything that is not done; up to a step, if one is asked for.

    Raises `InputError` where a user names some of a step's inputs and the run lacks the others.
    """
    stages, overwrite = run.stages(), run.options.overwrite
    if step is None:
        return [stage for stage in stages if stage.name == "evaluate" or overwrite or not run.is_done(stage)]
    own = [stage for stage in stages if stage.step == step]
    if own_inputs:
        others = {name: path for name, path in run.inputs(step).items() if name not in own_inputs}
        lacking = [f"--{name}" for name, path in others.items() if run.holds(path) and not path.exists()]
        if lacking:
            raise InputError(
                f"{', '.join(lacking)} missing: {run.folder} has none. Give it too, or leave "
                f"{', '.join(f'--{name}' for name in own_inputs)} out, and the run's own is made"
            )
        return own[-1:]
    anew = overwrite and not run.writes_elsewhere
    return [stage for stage in stages if stage.step < step and not run.is_done(stage)] + [
        stage for stage in own if anew or not run.is_done(stage)
    ]


def refuse_to_replace(run: Run, step: int | None) -> None:
    """Raise `InputError` where the run's folder, or the step's, holds something that the user has not given up."""
    folder, options = claimed_folder(run, step), run.options
    if folder is None or not folder.is_dir() or not any(folder.iterdir()) or options.resume:
        return
    if not options.overwrite:
        raise InputError(
            f"{folder} exists; add --resume to go on with it, --overwrite to replace it, or another --run_name"
        )
    if step is None and not (folder / SETTINGS_NAME).is_file():
        raise InputError(f"{folder}: not the folder of a run (no {SETTINGS_NAME}); choose another --run_name")


def check_folders(run: Run, wanted: Sequence[Stage]) -> None:
    """Raise `InputError` where the run's folder, or one in it that a stage writes to, takes no file."""
    folders = [run.folder, *(stage.makes.parent for stage in wanted if stage.recorded)]
    for folder in dict.fromkeys(folders):
        check_writable(
            folder, "type the command in a folder of your own, where outputs/ is made, or choose another --run_name"
        )


def make_room(run: Run, step: int | None) -> None:
    """With --overwrite, empty the folder of the run, or of the step."""
    folder = claimed_folder(run, step)
    if not run.options.overwrite or folder is None or not folder.is_dir():
        return
    empty_folder(folder)
    for record in (run.folder / "stages").glob(f"step{step}_*.json") if step else ():
        record.unlink()
    later = [run.folder / name for number, name in STEP_FOLDERS.items() if step and number > step]
    if stale := [str(path) for path in later if path.exists()]:
        print(f"note: {' and '.join(stale)} were made from what is replaced now", flush=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The run's folder for this command alone: two would write the same files. Raises `InputError` as `files.lock`."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, folder, "choose another --run_name")
        yield
    finally:
        os.close(descriptor)


def claimed_folder(run: Run, step: int | None) -> Path | None:
    """The folder that the command writes; None for one of the user's own, which is main.py's to claim."""
    if step is None:
        return run.folder
    return None if run.writes_elsewhere else run.folder / STEP_FOLDERS[step]


def named_models(models: Models) -> Models:
    """The folders of models that are given by a short name, others as they are; and what the reward model can read."""
    from common.models.loading import load_model_config
    from common.models.packaged import model_folder

    base, reward = (name and model_folder(name) for name in (models.base, models.reward))
    config = load_model_config(reward) if reward else None
    return Models(base, reward, getattr(config, "max_position_embeddings", 0) or 0)


def announce(run: Run, wanted: Sequence[Stage], step: int | None) -> None:
    """Say what a step lacks, and ask the language models that will be needed for an answer."""
    for earlier in sorted({stage.step for stage in wanted if step and stage.step < step}):
        what = f"step {earlier} has no output" if earlier else "there are no examples"
        print(f"{what} in {run.folder} yet: made first", flush=True)
    if not wanted:
        print(f"step {step} is done in {run.folder}; --overwrite makes it anew", flush=True)
    for command in run.endpoint_checks() if {"step2_label", "evaluate"} & {stage.name for stage in wanted} else ():
        if status := run_process(command):
            raise SystemExit(status)


def closing_words(run: Run, step: int | None) -> str:
    """Where the results lie, and what comes next."""
    folder = run.folder
    if step:
        following = f"run_step{step + 1}.sh" if step < 3 else "run_all.sh --resume"
        named = "" if run.options.run_name == "demo" else f" --run_name {run.options.run_name}"
        return f"\nnext         bash {shlex.quote(os.path.relpath(ROOT / 'scripts'))}/{following}{named}"
    return f"""
models       SFT {run.sft}, reward {run.reward}, TPPO {run.tppo}
report       {folder}/report.html (curves, warnings, examples), {folder}/report.md, {folder}/report.json
TensorBoard  tensorboard --logdir {folder}
next         read the report and its warnings; docs/tuning.md shows what healthy curves look like"""


if __name__ == "__main__":
    if DEBUG_FLAG in sys.argv:
        os.environ["TPPO_DEBUG"] = "1"  # for the processes of the stages
    run_command(main)
