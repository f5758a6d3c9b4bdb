// y = W x for a few or many rows x, every row by the same instructions in the same order whatever stands beside it.
#pragma once

#include "vector.h"

constexpr int WIDE = 4;  // vectors of outputs in a panel
constexpr int MOST_ROWS = 6;

// W [outputs, inputs] in panels of WIDE vectors of outputs: [panel][input][output]; bf16 holds the inputs 2 i and
// 2 i + 1 of an output in one word, so that either is one shift or mask away from a float.
struct Weight {
    const void *data;
    int32_t is_bf16;
    int32_t outputs;
    int32_t inputs;
};

template <class T>
INLINE int panel_width() {
    return WIDE * LANES<T>;
}

// Columns of y that are written, a multiple of the panel's.
template <class T>
INLINE int padded(int outputs) {
    return rounded_up(outputs, panel_width<T>());
}

template <class T>
struct Plain {
    const T *data;
    INLINE void pair(int i, Vec<T> *even, Vec<T> *odd) const {
        const T *p = data + size_t(2 * i) * panel_width<T>();
        for (int j = 0; j < WIDE; j++) {
            even[j] = load(p + j * LANES<T>);
            odd[j] = load(p + panel_width<T>() + j * LANES<T>);
        }
    }
};

struct Halves {
    const uint32_t *data;
    INLINE void pair(int i, Vec<float> *even, Vec<float> *odd) const {
        const uint32_t *p = data + size_t(i) * panel_width<float>();
        for (int j = 0; j < WIDE; j++) {
            const Vec<uint32_t> word = load(p + j * LANES<float>);
            even[j] = (Vec<float>)(word << 16);
            odd[j] = (Vec<float>)(word & 0xffff0000u);
        }
    }
};

// One panel times ROWS rows: write(row, j, sums) gets vector j of the panel's outputs.
template <class T, int ROWS, class Panel, class Write>
INLINE void tile(const T *x, int stride, int inputs, Panel panel, Write write) {
    Vec<T> acc[ROWS][WIDE] = {};
    for (int i = 0; i < inputs / 2; i++) {
        Vec<T> even[WIDE], odd[WIDE];
        panel.pair(i, even, odd);
        for (int m = 0; m < ROWS; m++) {
            const Vec<T> a = all(x[m * stride + 2 * i]);
            for (int j = 0; j < WIDE; j++) acc[m][j] = fma<T>(a, even[j], acc[m][j]);
        }
        for (int m = 0; m < ROWS; m++) {
            const Vec<T> a = all(x[m * stride + 2 * i + 1]);
            for (int j = 0; j < WIDE; j++) acc[m][j] = fma<T>(a, odd[j], acc[m][j]);
        }
    }
    for (int m = 0; m < ROWS; m++) {
        for (int j = 0; j < WIDE; j++) write(m, j, acc[m][j]);
    }
}

template <class T, class Panel, class Write>
INLINE void rows_of_panel(const T *x, int rows, int stride, int inputs, Panel panel, Write write) {
    int tiles = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int m = 0; m < rows; tiles--) {
        const int count = (rows - m + tiles - 1) / tiles;  // 16 rows are 6 + 5 + 5
        const T *from = x + size_t(m) * stride;
        auto shifted = [&](int r, int j, Vec<T> v) { write(m + r, j, v); };
        switch (count) {
            case 1: tile<T, 1>(from, stride, inputs, panel, shifted); break;
            case 2: tile<T, 2>(from, stride, inputs, panel, shifted); break;
            case 3: tile<T, 3>(from, stride, inputs, panel, shifted); break;
            case 4: tile<T, 4>(from, stride, inputs, panel, shifted); break;
            case 5: tile<T, 5>(from, stride, inputs, panel, shifted); break;
            default: tile<T, 6>(from, stride, inputs, panel, shifted); break;
        }
        m += count;
    }
}

// write(row, column, sums): V outputs of a row from `column` on, for x [rows, stride]; weight.inputs is even.
template <class T, class Write>
INLINE void gemm(const T *x, int rows, int stride, const Weight &weight, Write write) {
    const int inputs = weight.inputs, width = panel_width<T>();
    for (int n = 0; n < weight.outputs; n += width) {
        auto at = [&](int row, int j, Vec<T> v) { write(row, n + j * LANES<T>, v); };
        if constexpr (sizeof(T) == sizeof(float)) {
            if (weight.is_bf16) {
                const auto *words = static_cast<const uint32_t *>(weight.data);
                rows_of_panel<T>(x, rows, stride, inputs, Halves{words + size_t(n) * (inputs / 2)}, at);
                continue;
            }
        }
        rows_of_panel<T>(x, rows, stride, inputs, Plain<T>{static_cast<const T *>(weight.data) + size_t(n) * inputs}, at);
    }
}

// w [outputs, inputs] -> panels; outputs that pad the last panel are zero.
template <class T>
void pack(const T *w, int outputs, int inputs, bool is_bf16, void *data) {
    const int width = panel_width<T>();
    for (int n = 0; n < padded<T>(outputs); n++) {
        for (int k = 0; k < inputs; k++) {
            const T value = n < outputs ? w[size_t(n) * inputs + k] : T(0);
            const size_t panel = size_t(n / width) * inputs * width;
            if (is_bf16) {
                uint32_t bits;
                const float narrow = float(value);
                std::memcpy(&bits, &narrow, sizeof bits);
                auto *half = static_cast<uint16_t *>(data);
                half[panel + size_t(k / 2) * 2 * width + 2 * (n % width) + k % 2] = uint16_t(bits >> 16);
            } else {
                static_cast<T *>(data)[panel + size_t(k) * width + n % width] = value;
            }
        }
    }
}
