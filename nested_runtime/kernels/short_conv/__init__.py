"""Causal depthwise convolution with a carried window, followed by SiLU."""
