"""Slots of a pool tensor as int8 with a scale per row, and back."""
