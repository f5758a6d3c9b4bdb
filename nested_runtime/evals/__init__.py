"""Evaluations: what a model remembers, measured in process or through a server, and how fluent it is."""
