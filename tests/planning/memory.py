"""Memory as torch's allocator hands it out."""

from __future__ import annotations

from collections.abc import Callable

import torch


def allocated_peak(action: Callable[[], None]) -> int:
    """The highest sum of bytes that the allocator gave and took while `action` ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        action()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
