"""Measurements: correctness, time, memory, bandwidth and the computed lower bound."""
