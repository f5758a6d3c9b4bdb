"""Backends: what runs the model for the sessions layer."""
