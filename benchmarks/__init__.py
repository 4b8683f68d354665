"""Measurements: every case checks its result before it times it, and reports ratios taken in one process."""
