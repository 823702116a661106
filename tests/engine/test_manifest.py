"""Damaged checkpoints: whatever happens to a file is seen, and the checkpoint before is taken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.engine.manifest import MANIFEST, damage, is_complete, newest_sound, write_manifest
from tests.distributed.ranks import run_on_ranks

CONTENT = {"weights.bin": b"\x00" * 100, "deep/state.json": b'{"step": 1}', "empty": b""}


def checkpoint(path: Path) -> Path:
    for name, content in CONTENT.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    write_manifest(path)
    return path


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "has other content": lambda folder: flip_a_bit(folder / "weights.bin"),
    "has 99 bytes, not 100": lambda folder: os.truncate(folder / "weights.bin", 99),
    "state.json is missing": lambda folder: (folder / "deep" / "state.json").unlink(),
    "not readable": lambda folder: os.truncate(folder / MANIFEST, 50),
    "is_not_there": lambda folder: (folder / MANIFEST).write_text("[]"),
}


def test_a_sound_folder_has_no_damage(tmp_path: Path) -> None:
    assert not is_complete(tmp_path)
    assert damage(checkpoint(tmp_path / "sound")) == []
    (tmp_path / "sound" / "zero_to_fp32.py").write_text("a file that came later is no damage")
    assert damage(tmp_path / "sound") == []


@pytest.mark.parametrize("message", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_taken_aloud(
    message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [checkpoint(tmp_path / f"step_{number}") for number in (1, 2, 3)]
    DAMAGES[message](folders[2])
    assert newest_sound(folders) == folders[1]
    printed = capsys.readouterr().out
    assert f"warning: checkpoint {folders[2]} is damaged" in printed
    assert message == "is_not_there" or message in printed
    assert not folders[2].exists() and (tmp_path / ".damaged_step_3" / "empty").is_file()
    DAMAGES[message](folders[1])
    DAMAGES[message](folders[0])
    assert newest_sound(folders[:2]) is None


def _damage_on_ranks(rank: int, world_size: int, folder: str) -> list[str]:
    path = Path(folder)
    for number in range(5):
        (path / f"rank{rank}_{number}").write_bytes(bytes([rank, number]) * 10)
    write_manifest(path)
    return damage(path)


def test_every_rank_hashes_a_share_and_all_see_all_damage(tmp_path: Path) -> None:
    assert run_on_ranks(_damage_on_ranks, 2, str(tmp_path)) == [[], []]
    flip_a_bit(tmp_path / "rank0_3")
    (tmp_path / "rank1_4").unlink()
    found = run_on_ranks(_see, 2, str(tmp_path))
    assert found == [["rank0_3 has other content", "rank1_4 is missing"]] * 2


def _see(rank: int, world_size: int, folder: str) -> list[str]:
    return damage(Path(folder))
