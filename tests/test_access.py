"""Where a command may write: a place without rights or room is refused, and what the system says gets its path."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from common.access import check_writable, naming
from common.data.readers.grouping import group_rows
from common.errors import InputError
from common.feedback.llm.answers import AnswerStore
from common.files import claim_output_dir, write_json
from common.models.loading import save_model_folder
from common.prediction.partial import PartialOutput
from common.tracking import MetricsFile
from tests.tiny_models import ordinary_tokenizer, tiny_llama


@contextmanager
def full_disk(room: int = 1000) -> Iterator[None]:
    """A limit on the size of a file, in bytes, stands for the disk: the write fails alike."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "new" / "one", "outputs/demo", "."):
        check_writable(folder, "choose another")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "where", "reason"),
    [
        ("file/outputs/demo", r"in \S+/file", "Not a directory"),
        ("file", r"in \S+/file", "Not a directory"),
        ("link/outputs", r"in \S+/link", "No such file or directory"),
    ],
)
def test_one_that_cannot_names_the_place_the_reason_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, where: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("link").symlink_to("gone")
    with pytest.raises(InputError, match=rf"^{folder}: no file can be written {where} \({reason}\); choose another$"):
        check_writable(folder, "choose another")


def test_one_on_a_full_disk_is_refused_before_a_run_claims_it(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(InputError, match=r"no file can be written in .* \(File too large\); choose anoth"):
        claim_output_dir(tmp_path / "run", {"a": 1}, resume=False, overwrite=False)
    assert not (tmp_path / "run").exists()
    claim_output_dir(tmp_path / "run", {"a": 1}, resume=False, overwrite=False)
    for repeated in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
        with full_disk(), pytest.raises(InputError, match=r"no file can be written there \(File too large\)"):
            claim_output_dir(tmp_path / "run", {"a": 1}, **repeated)
    assert (tmp_path / "run" / "run_config.json").exists()  # --overwrite has emptied nothing


def test_what_a_full_disk_stops_is_named(tmp_path: Path) -> None:
    long = "a" * 3000

    def atomic() -> None:
        write_json(tmp_path / "whole.json", long)

    def metrics() -> None:
        MetricsFile(tmp_path / "metrics.jsonl").append(0, {"loss": [1.0] * 1000})

    def answers() -> None:
        with AnswerStore(tmp_path / "answers.jsonl") as store:
            store.put("0" * 32, {"answer": long})

    def predictions() -> None:
        with PartialOutput(tmp_path / "p.jsonl", {"flag": long}, 1, 1):
            pass

    names = {atomic: "whole.json", metrics: "metrics.jsonl", answers: "answers.jsonl", predictions: ".p.jsonl.partial"}
    for write, name in names.items():
        with full_disk(), pytest.raises(OSError) as raised:
            write()
        assert str(raised.value.filename).startswith(str(tmp_path / name)), write
        assert raised.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert not (tmp_path / "whole.json").exists()


def test_a_model_folder_that_finds_no_room_is_named_and_the_earlier_one_is_kept(tmp_path: Path) -> None:
    """safetensors and tokenizers raise errors of their own."""
    with full_disk(), pytest.raises(SafetensorError, match=r"\(os error 27\)"):
        save_file({"a": torch.zeros(1000)}, tmp_path / "bare.safetensors")
    path = tmp_path / "model"
    save_model_folder(tiny_llama(), ordinary_tokenizer(), path, {})
    weights = (path / "model.safetensors").stat().st_size
    for room in (1000, weights + 1000):  # the second is enough for the weights, and not for the tokenizer
        tokenizer = ordinary_tokenizer()
        tokenizer.add_tokens([f"token {number}" for number in range(weights // 50)])
        with full_disk(room), pytest.raises(OSError) as raised:
            save_model_folder(tiny_llama(), tokenizer, path, {})
        assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(path)), room
    assert (path / "model.safetensors").stat().st_size == weights


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(OSError) as raised, naming("mine"):
        raise OSError(errno.ENOSPC, "full", "another's")
    assert raised.value.filename == "another's"
    with pytest.raises(OSError) as raised, naming("mine"):
        raise OSError(errno.EIO, "broken")
    assert raised.value.filename is None
    with pytest.raises(ValueError, match=r"os error 2\)"), naming("mine"):
        raise ValueError("No such file (os error 2)")


def test_scratch_files_lie_in_tmpdir_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # unlike Python's tempfile, which looks once a process
    rows = ((str(number % 3), "query", float(number)) for number in range(9))
    groups = group_rows(rows, num_rows=9, rows_in_memory=4)
    first = next(groups)
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == 3 and (folder.stat().st_mode & 0o077) == 0
    assert sorted(key for key, _ in [first, *groups]) == ["0", "1", "2"]
    assert list(tmp_path.iterdir()) == []


def test_a_tmpdir_that_cannot_be_used_is_not_replaced_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    with pytest.raises(InputError, match=rf"^TMPDIR is {tmp_path}/none, and there is no such folder; make it, or set"):
        next(group_rows([], num_rows=9, rows_in_memory=4))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with full_disk(), pytest.raises(InputError, match=r"no file can be written there .*; set TMPDIR to a folder with"):
        next(group_rows([], num_rows=9, rows_in_memory=4))


def test_scratch_files_that_outgrow_the_disk_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    rows = ((str(number), "query" * 100, 1.0) for number in range(9000))
    with full_disk(100_000), pytest.raises(OSError) as raised:
        next(group_rows(rows, num_rows=9, rows_in_memory=4))
    assert Path(raised.value.filename).parent == tmp_path and raised.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == []
