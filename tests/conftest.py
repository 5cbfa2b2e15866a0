"""Settings for every test."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Machines that build are slow and shared: an example may take its time, but not for ever (pytest's own limits hold).
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
