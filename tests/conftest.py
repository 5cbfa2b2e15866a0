"""Settings for every test."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Machines that build are slow and shared: an example may take its time, but not for ever (pytest's own limits hold).
# In CI the same examples come every time: new ones are for whoever is at hand to look at what they find.
settings.register_profile(
    "patient", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("patient")
