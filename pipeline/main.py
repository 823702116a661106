"""Run the whole recipe, or one step of it: what the scripts run_all.sh and run_step1.sh to run_step3.sh start.

    python -m pipeline.main all [flags]      every stage, from the log to the report
    python -m pipeline.main 3 [flags]        step 3; what it lacks is made first

A stage that is done leaves its seconds in `stages/NAME.json` in the run's folder, and is not run again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from common.config import parse_config
from common.errors import DEBUG_FLAG, InputError, run_command
from common.files import empty_folder
from pipeline.hardware import Hardware, find_hardware
from pipeline.options import PipelineOptions, keep_settings, parse_options, settle
from pipeline.presets import AUTO, ROOT, SETTINGS, Models, choose_preset, config_files
from pipeline.processes import run_process, run_stage
from pipeline.stages import INPUTS, STEP_FOLDERS, Run, Stage, flag_value


def main() -> None:
    """Check all that can be checked at once, choose the settings, run the stages."""
    which, *argv = sys.argv[1:]
    step = None if which == "all" else int(which)
    if step and {"-h", "--help"} & set(argv):
        show_help(step)
    given, flags = parse_options(argv, step)
    hardware = find_hardware(given.num_gpus, given.hostfile)
    if step and len(own_inputs(step, flags)) == len(INPUTS[step]):
        run_alone(step, given, flags, hardware)
        return
    options = settle(given, anew=given.overwrite and step is None)
    models = Models(options.model, options.reward_model)
    # Under any preset of its kind: the user's flags are checked before a model is asked for its size.
    first = options.preset if options.preset != AUTO else "cpu_lora" if models.base else "tiny"
    for stage in wanted_stages(Run(options, hardware, models, first, step, flags), step, flags):
        stage.check()
    claim(options, step, flags)

    models = named_models(models)
    preset, reason = (options.preset, "") if options.preset != AUTO else choose_preset(models, hardware)
    print(f"preset: {preset}" + (f" ({reason})" if reason else ""), flush=True)
    run = Run(options, hardware, models, preset, step, flags)
    wanted = wanted_stages(run, step, flags)
    keep_settings(options)
    announce(run, wanted, step)
    for stage in wanted:
        run_stage(run.folder, stage)
    if step is None and run_process([sys.executable, "-m", "common.pages.report", "--run", str(run.folder)]):
        print(f"warning: {run.folder}/report.html could not be drawn", file=sys.stderr)
    print(closing_words(run, step))


def show_help(step: int) -> None:
    """Print the scripts' own flags, then those of the step's main.py, and end."""
    try:
        parse_options(["--help"], step)
    except SystemExit:
        print(f"\nFlags of {STEP_FOLDERS[step]}/main.py:\n")
    parse_config(SETTINGS[f"step{step}"].config, ["--help"])


def own_inputs(step: int, flags: Sequence[str]) -> list[str]:
    """The inputs of the step that a user names."""
    return [name for name in INPUTS[step] if flag_value(flags, name)]


def run_alone(step: int, options: PipelineOptions, flags: Sequence[str], hardware: Hardware) -> None:
    """Run a step on inputs of the user's own, outside of any run's folder."""
    for name in INPUTS[step]:
        path = flag_value(flags, name)
        if name in ("data_dir", "samples", "labels") and not Path(path).exists():
            raise InputError(f"--{name} {path}: no such file or folder")
    program, model = f"step{step}", flag_value(flags, INPUTS[step][0])
    models = Models(model, model if step == 2 and options.reward_model else "")
    preset = options.preset or AUTO
    stage = Run(options, hardware, models, "tiny", step, flags).alone(options.config)
    stage.check()
    if not options.config:
        if preset == AUTO:
            preset, reason = choose_preset(models, hardware)
            print(f"preset: {preset} ({reason})", flush=True)
        stage = Run(options, hardware, models, preset, step, flags).alone(
            config_files(program, preset, models, hardware)
        )
        stage.check()
    if status := run_process(stage.command):
        raise SystemExit(status)


def wanted_stages(run: Run, step: int | None, flags: Sequence[str]) -> list[Stage]:
    """What is to be run: everything that is not done; up to a step, if one is asked for.

    Raises `InputError` where a user names some of a step's inputs and the run lacks the others.
    """
    stages = run.stages()
    if step is None:
        return [stage for stage in stages if stage.name == "evaluate" or not run.is_done(stage)]
    own = [stage for stage in stages if stage.step == step]
    if given := own_inputs(step, flags):
        lacking = [f"--{name}" for name, path in run.inputs(step).items() if name not in given and not path.exists()]
        if lacking:
            raise InputError(
                f"{', '.join(lacking)} missing: {run.folder} has none. Give it too, or leave "
                f"{', '.join(f'--{name}' for name in given)} out, and the run's own is made"
            )
        return own[-1:]
    return [stage for stage in stages if stage.step < step and not run.is_done(stage)] + [
        stage for stage in own if run.options.overwrite or not run.is_done(stage)
    ]


def claim(options: PipelineOptions, step: int | None, flags: Sequence[str]) -> None:
    """Refuse to write over what is there, unless asked to. Raises `InputError`."""
    if step and flag_value(flags, "output_dir"):
        return  # that folder is main.py's to claim
    folder = options.folder / STEP_FOLDERS[step] if step else options.folder
    if folder.is_dir() and any(folder.iterdir()) and not options.resume:
        if not options.overwrite:
            raise InputError(
                f"{folder} exists; add --resume to go on with it, --overwrite to replace it, or another --run_name"
            )
        empty_folder(folder)
        for record in (options.folder / "stages").glob(f"step{step}_*.json") if step else ():
            record.unlink()
    later = [options.folder / name for number, name in STEP_FOLDERS.items() if step and number > step]
    if options.overwrite and (stale := [str(path) for path in later if path.exists()]):
        print(f"note: {' and '.join(stale)} were made from what is replaced now", flush=True)
    options.folder.mkdir(parents=True, exist_ok=True)


def named_models(models: Models) -> Models:
    """The folders of models that are given by a short name; others as they are."""
    from common.models.packaged import model_folder

    return Models(*(name and model_folder(name) for name in models))


def announce(run: Run, wanted: Sequence[Stage], step: int | None) -> None:
    """Say what a step lacks, and ask the language models that will be needed for an answer."""
    for earlier in sorted({stage.step for stage in wanted if step and stage.step < step}):
        what = f"step {earlier} has no output" if earlier else "there are no examples"
        print(f"{what} in {run.folder} yet: made first", flush=True)
    for command in run.endpoint_checks() if {"step2_label", "evaluate"} & {stage.name for stage in wanted} else ():
        if status := run_process(command):
            raise SystemExit(status)


def closing_words(run: Run, step: int | None) -> str:
    """Where the results lie, and what comes next."""
    folder = run.folder
    if step:
        following = f"run_step{step + 1}.sh" if step < 3 else "run_all.sh --resume"
        named = "" if run.options.run_name == "demo" else f" --run_name {run.options.run_name}"
        return f"\nnext         bash {os.path.relpath(ROOT)}/scripts/{following}{named}"
    return f"""
models       SFT {run.sft}, reward {run.reward}, TPPO {run.tppo}
report       {folder}/report.html (curves, warnings, examples), {folder}/report.md, {folder}/report.json
TensorBoard  tensorboard --logdir {folder}
next         read the report and its warnings; docs/tuning.md shows what healthy curves look like"""


if __name__ == "__main__":
    if DEBUG_FLAG in sys.argv:
        os.environ["TPPO_DEBUG"] = "1"  # for the processes of the stages
    run_command(main)
