// The causal depthwise convolution with its carried window, then SiLU; see ../short_conv/reference.py.
#pragma once

#include <algorithm>

#include "vector.h"

// y_t = silu(sum_i w_i x_{t - W + 1 + i}) for n rows x [n, stride] behind the window [W - 1, F], which moves on.
template <class T>
void convolve(const T *x, size_t stride, int n, T *window, const T *weight, int width, int channels, T *y,
              size_t y_stride) {
    constexpr int V = LANES<T>;
    for (int t = 0; t < n; t++) {
        for (int c = 0; c < channels; c += V) {
            Vec<T> s = {};
            for (int i = 0; i < width; i++) {
                const int row = t - width + 1 + i;
                const T *from = row < 0 ? window + size_t(row + width - 1) * channels : x + row * stride;
                s = fma<T>(load_some(from + c, channels - c), load_some(weight + size_t(i) * channels + c, channels - c), s);
            }
            store_some(y + t * y_stride + c, silu<T>(s), channels - c);
        }
    }
    const int kept = std::max(0, width - 1 - n);  // rows of the window that are still within reach
    std::memmove(window, window + size_t(width - 1 - kept) * channels, sizeof(T) * kept * channels);
    for (int i = kept; i < width - 1; i++) {
        std::memcpy(window + size_t(i) * channels, x + size_t(n - (width - 1) + i) * stride, sizeof(T) * channels);
    }
}
