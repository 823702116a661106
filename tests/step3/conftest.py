"""What the tests of whole runs share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.step3.runs import write_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An actor, a reward model and training examples; no test changes them."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))
