"""A run's folder belongs to one command at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import InputError
from pipeline.main import held


def test_two_commands_do_not_write_into_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "demo"
    with held(folder):
        with held(tmp_path / "outputs" / "other"):
            pass
        refused = r"outputs/demo: another process is writing here.*another --run_name"
        with pytest.raises(InputError, match=refused), held(folder):
            raise AssertionError("the second one began")
    with held(folder):
        pass
