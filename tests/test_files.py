from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from common.errors import InputError
from common.feedback.llm.answers import AnswerStore
from common.files import (
    RUN_CONFIG_NAME,
    atomic_write,
    claim_output_dir,
    digest,
    mend_last_line,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from common.inputs import _block_starts, content_digest, input_digests, log_files
from common.private import only_mine
from common.tracking import StepFile


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_write(path) as stream:
        stream.write("new")
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_jsonl_round_trip_and_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert write_jsonl(path, [{"a": "é\u2028"}, {"b": 1}]) == 2
    assert list(read_jsonl(path)) == [(1, {"a": "é\u2028"}), (2, {"b": 1})]
    path.write_text('{"a": 1}\n\n[1]\n')
    with pytest.raises(InputError, match=r"rows.jsonl:3: expected a JSON object, found list"):
        list(read_jsonl(path))
    path.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(InputError, match=r"rows.jsonl:1: not UTF-8"):
        list(read_jsonl(path))
    with pytest.raises(InputError, match="no such file"):
        list(read_jsonl(tmp_path / "none.jsonl"))


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_digest_tells_parts_apart() -> None:
    assert digest("ab", "c") != digest("a", "bc")
    assert digest("ab", "c") == digest("ab", "c")
    assert len(digest("x")) == 16


def claim(path: Path, config: dict, resume: bool = False, overwrite: bool = False) -> Path:
    return claim_output_dir(path, config, resume=resume, overwrite=overwrite, may_differ=frozenset({"steps"}))


def test_folder_of_another_run_is_refused_resumed_or_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    claim(folder, {"lr": 1, "steps": 5})
    (folder / "checkpoint").write_text("x")
    with pytest.raises(InputError, match="--resume to go on with it, --overwrite to replace it"):
        claim(folder, {"lr": 1, "steps": 5})
    claim(folder, {"lr": 1, "steps": 9}, resume=True)
    assert (folder / "checkpoint").exists()
    with pytest.raises(InputError, match="lr: was 1, now 2"):
        claim(folder, {"lr": 2, "steps": 5}, resume=True)
    claim(folder, {"lr": 2, "steps": 5}, overwrite=True)
    assert not (folder / "checkpoint").exists()
    assert json.loads((folder / RUN_CONFIG_NAME).read_text()) == {"lr": 2, "steps": 5}
    with pytest.raises(InputError, match="contradict"):
        claim(folder, {}, resume=True, overwrite=True)


def test_inputs_that_changed_under_a_run_are_named(tmp_path: Path) -> None:
    rows, model = tmp_path / "train.jsonl", tmp_path / "model"
    rows.write_text('{"a": 1}\n{"a": 2}\n')
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(100))
    inputs = {"data_dir": [rows], "actor_path": str(model), "critic_path": "", "prompt_template": "plain"}

    def begin(folder: str, **flags: bool) -> None:
        settings = {"resume": False, "overwrite": False} | flags
        claim_output_dir(tmp_path / folder, {"lr": 1}, inputs=inputs, **settings)

    begin("run")
    (model / "README.md").write_text("a note changes nothing")
    begin("run", resume=True)
    rows.write_text('{"a": 2}\n{"a": 1}\n')  # the same rows in another order, the same size
    with pytest.raises(InputError, match=r"these have changed since: --data_dir train.jsonl\. Put them back"):
        begin("run", resume=True)
    (model / "model.safetensors").write_bytes(bytes(99) + b"x")
    (model / "generation_config.json").write_text("{}")
    changed = "--actor_path generation_config.json, --actor_path model.safetensors, --data_dir train.jsonl"
    with pytest.raises(InputError, match=changed):
        begin("run", resume=True)
    begin("run", overwrite=True)
    begin("run", resume=True)
    # A run of an earlier version has noted none.
    settings = read_json(tmp_path / "run" / RUN_CONFIG_NAME)
    assert settings.pop("input_digests").keys() == {
        "--data_dir train.jsonl", "--actor_path config.json", "--actor_path generation_config.json",
        "--actor_path model.safetensors",
    }  # fmt: skip
    write_json(tmp_path / "run" / RUN_CONFIG_NAME, settings)
    rows.write_text("")
    begin("run", resume=True)


def test_every_file_of_a_log_counts_also_in_folders_and_with_equal_names(tmp_path: Path) -> None:
    for folder in ("monday", "tuesday"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "sessions.jsonl.gz").write_text(folder)
    logs = [str(tmp_path / "monday"), str(tmp_path / "tuesday" / "sessions.jsonl.gz"), str(tmp_path / "missing")]
    seen = {input_digests({"log": log_files(logs)})["--log sessions.jsonl.gz"]}
    for folder in ("monday", "tuesday"):
        (tmp_path / folder / "sessions.jsonl.gz").write_text("changed")
        seen.add(input_digests({"log": log_files(logs)})["--log sessions.jsonl.gz"])
    assert len(seen) == 3


def test_a_hub_model_counts_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub client's own cache: `refs/main` names the snapshot that a download of today gives."""
    cache = tmp_path / "models--org--small"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for commit in ("1" * 40, "2" * 40):
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "config.json").write_text("{}")
    (cache / "refs").mkdir()
    found = []
    for commit in ("1" * 40, "2" * 40):
        (cache / "refs" / "main").write_text(commit)
        found.append(input_digests({"actor_path": "org/small", "prompt_template": "plain"}))
    assert found == [{"--actor_path org/small": f"commit {number * 40}"} for number in "12"]
    assert input_digests({"actor_path": "org/other", "reward_path": str(tmp_path / "none"), "critic_path": ""}) == {}


def test_a_large_file_is_known_by_samples_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.inputs.WHOLE_BYTES", 80)
    monkeypatch.setattr("common.inputs.BLOCK_BYTES", 10)
    path = tmp_path / "weights"
    found = set()
    for content in (bytes(80), bytes(81), b"x" + bytes(999), bytes(999) + b"x", bytes(500) + b"x" * 500):
        path.write_bytes(content)
        found.add(content_digest(path))
        assert content_digest(path) in found
    assert len(found) == 5
    assert [start % 10 for start in _block_starts(80)] == [0] * 8
    assert _block_starts(1000) == [0, 141, 282, 424, 565, 707, 848, 990]  # the first and the last among them


def test_a_folder_that_is_no_run_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match="not the output of a run"):
            claim(tmp_path, {}, **flags)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_folder_that_is_a_link_is_emptied_and_stays_one(tmp_path: Path) -> None:
    """An output folder may be a link to a larger disk; links inside it are removed, what they lead to is not."""
    disk, other, link = tmp_path / "disk", tmp_path / "other", tmp_path / "link"
    claim_output_dir(disk, {"a": 1}, resume=False, overwrite=False)
    (disk / "deep" / "folder").mkdir(parents=True)
    other.mkdir()
    (other / "kept").touch()
    (disk / "elsewhere").symlink_to(other)
    link.symlink_to(disk)
    claim_output_dir(link, {"a": 2}, resume=False, overwrite=True)
    assert link.is_symlink() and [path.name for path in disk.iterdir()] == [RUN_CONFIG_NAME]
    assert read_json(disk / RUN_CONFIG_NAME) == {"a": 2} and (other / "kept").is_file()


@pytest.mark.parametrize("umask", [0o022, 0o000, 0o077])
@pytest.mark.parametrize("from_before", [False, True])
def test_what_quotes_users_is_for_its_owner_alone_and_settings_take_the_umask(
    from_before: bool, umask: int, tmp_path: Path
) -> None:
    """Whether a file is new, replaced or appended to, and whatever rights it had."""
    names = ["rows.jsonl", "report.json", "labels.jsonl", "steps_True.jsonl", "answers.jsonl", "opened.jsonl"]
    if from_before:
        for name in names:
            (tmp_path / name).touch(mode=0o644)
    usual = os.umask(umask)
    try:
        write_jsonl(tmp_path / "rows.jsonl", [{}])
        write_json(tmp_path / "report.json", {}, private=True)
        mend_last_line(tmp_path / "labels.jsonl", b'{"id"')
        for private in (True, False):
            StepFile(tmp_path / f"steps_{private}.jsonl", private=private).append(0, {})
            StepFile(tmp_path / f"steps_{private}.jsonl", 1, private).append(1, {})
        AnswerStore(tmp_path / "answers.jsonl").__exit__()
        with open(tmp_path / "opened.jsonl", "a", opener=only_mine) as stream:
            assert mode(tmp_path / "opened.jsonl") == 0o600  # before a word is written
            stream.write("{}")
        write_json(tmp_path / "settings.json", {})
    finally:
        os.umask(usual)
    assert {name: mode(tmp_path / name) for name in names} == dict.fromkeys(names, 0o600)
    shared = {mode(tmp_path / name) for name in ("settings.json", "steps_False.jsonl")}
    assert shared == {0o666 & ~umask}


def test_a_temporary_form_is_private_too(tmp_path: Path) -> None:
    left = tmp_path / f".report.md.{os.getpid()}.tmp"  # by a process of the same number that was killed
    left.touch(mode=0o644)
    with atomic_write(tmp_path / "report.md", private=True) as stream:
        stream.write("shoes")
        assert mode(left) == 0o600
    assert mode(tmp_path / "report.md") == 0o600


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
