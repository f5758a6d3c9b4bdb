"""Conversion of other checkpoints into ours."""
