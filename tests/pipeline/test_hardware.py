"""What a run may use: hostfiles, numbers of ranks, and which launcher follows."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import psutil
import pytest

from common.errors import InputError
from pipeline import hardware
from pipeline.hardware import CPU_RANKS, Hardware, count_gpus, find_hardware, read_hostfile


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A machine with so many GPUs of 24 GiB."""

    def make(gpus: int) -> None:
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        monkeypatch.setattr(hardware.shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        properties = mock.Mock(total_memory=24 << 30)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: properties)

    return make


def hostfile(folder: Path, text: str) -> str:
    (folder / "hosts").write_bytes(text.encode("latin-1"))
    return str(folder / "hosts")


def test_a_hostfile_names_machines_and_their_slots(tmp_path: Path) -> None:
    text = "# a comment\n\nworker-1 slots=8\n  worker-2\tslots=4 # another\n10.0.0.3 slots=1\r\n"
    assert read_hostfile(hostfile(tmp_path, text)) == [8, 4, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no machine"),
        ("# nothing\n\n", "names no machine"),
        ("a slots=1\nb slots=0\n", ":2: expected `NAME slots=N` with N of 1 or more, found 'b slots=0'"),
        ("worker-1\n", ":1: expected"),
        ("worker-1 slots=\n", ":1: expected"),
        ("worker-1 slots=two\n", ":1: expected"),
        ("worker-1 slots=1 slots=2\n", ":1: expected"),
        ("slots=2\n", ":1: expected"),
        ("a slots=1\n\na slots=2\n", ":3: a is there twice"),
        ("\xff\xfe\x00garbage", "utf-8"),
        ("\xef\xbb\xbfa slots=1\n", ":1: begins with a byte order mark"),
    ],
)  # fmt: skip
def test_a_hostfile_that_deepspeed_would_not_read_is_refused_with_its_line(
    tmp_path: Path, text: str, message: str
) -> None:
    path = hostfile(tmp_path, text)
    with pytest.raises(InputError) as refused:
        read_hostfile(path)
    assert path in str(refused.value) and message in str(refused.value)


def test_a_folder_is_no_hostfile(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"hostfile\.example"):
        read_hostfile(str(tmp_path))


def test_without_a_gpu_two_cpu_ranks_or_as_many_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    found = find_hardware("", "")
    assert (found.ranks, found.launcher, found.flags) == (CPU_RANKS, "cpu", ["--num_gpus", "2"])
    assert find_hardware("5", "").flags == ["--num_gpus", "5"]
    assert str(found) == "2 CPU ranks" and found.memory() == psutil.virtual_memory().total // 2


def test_no_gpu_is_asked_for_where_there_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert count_gpus() == 0
    monkeypatch.setattr(hardware.shutil, "which", lambda name: "x" if name == "rocm-smi" else None)
    assert count_gpus() == 3
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert count_gpus() == 0


@pytest.mark.parametrize(
    ("gpus", "num_gpus", "launcher", "ranks"),
    [(1, "", "single_gpu", 1), (8, "", "single_node", 8), (8, "1", "single_gpu", 1), (8, "3", "single_node", 3)],
)
def test_the_launcher_follows_the_gpus(machine, gpus: int, num_gpus: str, launcher: str, ranks: int) -> None:
    machine(gpus)
    found = find_hardware(num_gpus, "")
    assert (found.launcher, found.ranks, found.flags) == (launcher, ranks, ["--num_gpus", str(ranks)])
    assert found.memory() == 24 << 30 and str(found) == f"{ranks} GPU{'s' if ranks > 1 else ''}"


def test_more_gpus_than_there_are_is_refused(machine) -> None:
    machine(2)
    with pytest.raises(InputError, match="--num_gpus 3: this machine has 2"):
        find_hardware("3", "")


def test_many_machines(machine, tmp_path: Path) -> None:
    machine(8)
    path = hostfile(tmp_path, "a slots=8\nb slots=4\n")
    found = find_hardware("", path)
    assert (found.ranks, found.launcher, found.flags) == (12, "multi_node", ["--hostfile", path])
    assert str(found) == f"12 GPUs of the machines in {path}"
    # deepspeed starts --num_gpus ranks on every machine.
    found = find_hardware("2", path)
    assert (found.ranks, found.flags) == (4, ["--hostfile", path, "--num_gpus", "2"])
    with pytest.raises(InputError, match=r"--num_gpus 5: a machine in .* has 4 slots"):
        find_hardware("5", path)


def test_ranks_on_cpus_of_many_machines_share_the_memory_of_one() -> None:
    assert Hardware(0, 8, "hosts").memory() == psutil.virtual_memory().total // CPU_RANKS
