"""Hypothesis profiles: `--hypothesis-profile=campaign` tries twenty times as many malformed inputs."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("default", deadline=None, suppress_health_check=SLOW)
settings.register_profile("campaign", max_examples=2000, deadline=None, suppress_health_check=SLOW)
settings.load_profile("default")
