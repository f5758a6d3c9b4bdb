"""Evaluations against a checkpoint or a running server."""
