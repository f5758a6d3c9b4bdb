"""Softmax attention of packed tokens over keys and values in blocks."""
