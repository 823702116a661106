"""What a person sees of the rollouts: some responses with each token's reward, in a file, on a page and as an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from common.engine.distributed import rank
from common.evaluation.summary import Row
from common.files import atomic_write
from common.pages.drawing import draw_or_tell
from common.pages.heat_map import heat_map
from common.pages.samples import SAMPLES_NAME, Sample, Token, Verdict, samples_page
from common.tracking import StepFile, Tracker
from step3_tppo.rollout import Rollout

SHOWN = 8  # responses a step
IN_IMAGE = 4  # of those; an image is for a glance and each holds some 20 kB
SHOWN_EVENTS = 8  # of a history, the newest


def chosen_samples(step: int, rollout: Rollout, judged: Sequence[Row] | None = None) -> list[Sample]:
    """At most `SHOWN` responses of this rank, spread over the rollout; `judged` are a monitor's rows of all of them."""
    count = len(rollout.generated)
    places = range(0, count, max(1, math.ceil(count / SHOWN)))
    return [_sample(step, rollout, row, judged[row] if judged is not None else None) for row in places]


class SampleLog:
    """Keeps `samples.jsonl` and the pages `samples/step_NNNNN.html` of a run; a resumed run first takes away what lies
    past its checkpoint. Made on every rank, it writes on the first alone."""

    def __init__(self, output_dir: str | Path, first_step: int = 0) -> None:
        self._run = Path(output_dir)
        if rank() == 0:
            self._file = StepFile(self._run / SAMPLES_NAME, first_step)
            for page in (self._run / "samples").glob("step_*.html"):
                if page >= self._page(first_step):
                    page.unlink()

    def show(self, step: int, samples: Sequence[Sample], tracker: Tracker) -> None:
        """Write `samples` of `step`. A page or an image that cannot be drawn is told, and ends no run."""
        for sample in samples:
            self._file.append(step, sample.to_dict())
        draw_or_tell(f"the page of step {step}", lambda: self._write_page(step, samples))
        draw_or_tell(
            f"the image of step {step}", lambda: tracker.image(step, "samples", lambda: heat_map(samples[:IN_IMAGE]))
        )

    def _write_page(self, step: int, samples: Sequence[Sample]) -> None:
        with atomic_write(self._page(step)) as stream:
            stream.write(samples_page(samples, step, str(self._run)))

    def _page(self, step: int) -> Path:
        return self._run / "samples" / f"step_{step:05d}.html"


def _sample(step: int, rollout: Rollout, row: int, judged: Row | None) -> Sample:
    decoded, parts, example = rollout.decoded[row], rollout.parts[row], rollout.examples[row]
    tokens = [
        Token(decoded.text[int(start) : math.ceil(end)], *values, kl if math.isfinite(kl) else None)
        for (start, end), *values, kl in zip(
            decoded.spans, parts.model, parts.sentence, parts.length_penalty, parts.guard,
            rollout.kl[row, : len(decoded.spans)].tolist(), strict=True,
        )
    ]  # fmt: skip
    has_verdict = judged is not None and judged["queries"] is not None
    return Sample(
        step=step,
        id=example.id,
        history=[[event.type, event.text] for event in example.history[-SHOWN_EVENTS:]],
        targets=list(example.targets),
        finished=rollout.generated[row].finished,
        tokens=tokens,
        verdict=Verdict(judged["words"], judged["queries"]) if has_verdict else None,
    )
