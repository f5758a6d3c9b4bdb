"""Adaptive levels of many sessions at once: what their deltas add, and the steps they take."""
