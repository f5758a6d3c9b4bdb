"""What happens to whole slots of a pool tensor: copy, zero, and int8 with a scale per row."""
