"""What makes the generated parts of the documentation, and scripts that `make` runs."""
