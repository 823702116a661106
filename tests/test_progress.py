"""Progress bars: who shows them, and when."""

from __future__ import annotations

import pytest

from common import progress as bars
from common.progress import phase_progress, progress


def test_only_the_first_rank_shows_a_bar_and_only_one_with_a_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(progress([1, 2], desc="encode")) == [1, 2]
    assert "encode: 100%" in capsys.readouterr().err
    assert list(progress([1, 2], desc="")) == [1, 2]
    monkeypatch.setenv("RANK", "1")
    with progress(total=2, desc="encode") as bar:
        bar.update(2)
    assert list(phase_progress([1], desc="rollout")) == [1]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("delay", "shown"), [(60.0, False), (0.0, True)])
def test_a_phase_shows_its_bar_only_when_it_takes_long(
    delay: float, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bars, "PHASE_DELAY", delay)
    with phase_progress(total=2, desc="rollout", unit="response") as bar:
        bar.update(2)
    text = capsys.readouterr().err
    assert ("rollout:" in text) == shown
    assert text.split("\r")[-1] == "" and (shown or not text)  # it is wiped out, or was never there
