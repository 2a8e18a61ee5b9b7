"""Measurements of a run, the sinks that store them, and the report page.

`measures` (which needs torch) and `report` (which needs matplotlib) are imported by those who
use them; this package by itself imports neither.
"""

from spectral_scale.metrics.history import MetricsHistory, load_history, read_metrics
from spectral_scale.metrics.sinks import MetricsLog, NullLog

__all__ = ["MetricsHistory", "MetricsLog", "NullLog", "load_history", "read_metrics"]
