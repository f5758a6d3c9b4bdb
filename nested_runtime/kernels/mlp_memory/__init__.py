"""The two-layer residual memory M(z) = z + W_1 gelu(W_2 z): gradients of a chunk at its anchor."""
