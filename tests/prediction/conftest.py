"""What the tests of prediction share; no test changes the folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.prediction.models import export_learnt_model, export_reward_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model that knows `LEARNT` by heart."""
    return export_learnt_model(tmp_path_factory.mktemp("learnt") / "model")


@pytest.fixture(scope="session")
def reward_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported token reward model."""
    return export_reward_model(tmp_path_factory.mktemp("judge") / "model", model_folder)
