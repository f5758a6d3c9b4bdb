"""The CPU path in C++: whole stacks of blocks and their operators, on vectors, the same to the bit in any schedule."""
