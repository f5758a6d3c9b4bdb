"""Products with int8 weights and float activations."""
