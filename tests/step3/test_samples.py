"""The samples of a rollout: which, what is written of them, what a resumed run keeps, and that no picture ends it."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import metadata
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from common.pages.samples import read_samples
from common.pages.sections import QUESTIONS, tensorboard_layout
from common.tracking import Tracker
from step3_tppo import samples
from step3_tppo.samples import SampleLog, chosen_samples
from tests.step3.rollouts import made_rollout

ROLLOUT = made_rollout(["ab", "c"], [["red hat"], []], [[0.5, -0.5, 0.25], [1.0, 0.0]])
ROWS = [{"words": [[2]], "queries": [1]}, {"words": None, "queries": None}]


def test_each_token_carries_its_reward_and_each_response_its_verdict() -> None:
    first, second = chosen_samples(3, ROLLOUT, ROWS)
    assert [(token.text, token.reward) for token in first.tokens] == [("a", 0.5), ("b", -0.5), ("", 0.25)]
    assert (first.step, first.id, first.history, first.targets) == (3, "e0", [["search", "red hat"]], ["red hat"])
    assert first.relevant == 1 and first.verdict.words == [[2]]
    assert [token.reward for token in second.tokens] == [1.0, 0.0]
    assert second.verdict is None  # the judge had no valid answer
    assert all(sample.verdict is None for sample in chosen_samples(3, ROLLOUT))


@pytest.mark.parametrize(
    ("responses", "chosen"),
    [(1, [0]), (8, list(range(8))), (9, [0, 2, 4, 6, 8]), (64, list(range(0, 64, 8))), (30, list(range(0, 30, 4)))],
)
def test_samples_are_spread_over_the_rollout(responses: int, chosen: list[int]) -> None:
    rollout = made_rollout(["a"] * responses, [[]] * responses)
    assert [sample.id for sample in chosen_samples(0, rollout)] == [f"e{number}" for number in chosen]


def show(folder: Path, steps: list[int], first_step: int = 0) -> None:
    log, tracker = SampleLog(folder, first_step), Tracker(folder, tensorboard=False)
    for step in steps:
        log.show(step, chosen_samples(step, ROLLOUT), tracker)


def test_a_resumed_run_has_each_sample_once(tmp_path: Path) -> None:
    show(tmp_path / "straight", [0, 4, 8])
    show(tmp_path / "killed", [0, 4, 8])
    SampleLog(tmp_path / "killed", first_step=8)
    assert sorted(page.name for page in (tmp_path / "killed" / "samples").iterdir()) == [
        "step_00000.html", "step_00004.html"
    ]
    show(tmp_path / "killed", [4, 8], first_step=4)
    names = ["samples.jsonl", *(f"samples/step_{step:05d}.html" for step in (0, 4, 8))]
    for name in names:
        ours, theirs = ((tmp_path / run / name).read_text() for run in ("killed", "straight"))
        assert ours.replace("killed", "straight") == theirs
    assert [sample.step for sample in read_samples(tmp_path / "killed" / "samples.jsonl")] == [0, 0, 4, 4, 8, 8]


def test_what_cannot_be_drawn_is_told_and_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(samples, "samples_page", side_effect=ValueError("no\nink")):
        show(tmp_path, [4])
    assert "warning: the page of step 4 could not be drawn: ValueError: no ink" in capsys.readouterr().out
    assert len(read_samples(tmp_path / "samples.jsonl")) == 2
    assert not (tmp_path / "samples").exists() or not list((tmp_path / "samples").iterdir())


def test_tensorboard_has_the_images_and_the_questions_in_their_order(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, tensorboard=True, layout=tensorboard_layout())
    SampleLog(tmp_path).show(20, chosen_samples(20, ROLLOUT), tracker)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (image,) = events.Images("samples")
    assert image.step == 20 and image.width > 800
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "tensorboard").iterdir()} == {0o600}
    layout = Layout.FromString(events.Tensors(metadata.CONFIG_SUMMARY_TAG)[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(QUESTIONS)
    tags = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    assert "^response/copy_rate$" in tags and len(tags) == len(set(tags))
