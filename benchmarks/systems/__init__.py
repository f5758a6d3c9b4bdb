"""The systems that benchmarks/peers.py compares, one a file."""
