// y = W x for a few or many rows x, every row by the same instructions in the same order whatever stands beside it.
#pragma once

#include <algorithm>
#include <memory>

#include "amx.h"
#include "vector.h"

constexpr int WIDE = 4;  // vectors of outputs in a panel
constexpr int MOST_ROWS = 6;

enum Form : int32_t { PLAIN, BF16, INT8 };

// W [outputs, inputs] in panels of WIDE vectors of outputs: [panel][input][output]. BF16 holds the inputs 2 i and
// 2 i + 1 of an output in one word, so that either is one shift or mask away from a float; INT8 holds 4 i to 4 i + 3 in
// one, in units of the output's `scales`, with `shifts` = -OFFSET times the sum of an output's weights.
struct Weight {
    const void *data;
    int32_t form;
    int32_t outputs;
    int32_t inputs;
    const float *scales;
    const int32_t *shifts;
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

template <int N>
struct Count {
    constexpr operator int() const { return N; }
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

// tile(row, count) for every tile of at most MOST_ROWS rows, its count known to the compiler.
template <class Tile>
INLINE void in_tiles(int rows, Tile tile) {
    int tiles = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int m = 0; m < rows; tiles--) {
        const int count = (rows - m + tiles - 1) / tiles;  // 16 rows are 6 + 5 + 5
        switch (count) {
            case 1: tile(m, Count<1>{}); break;
            case 2: tile(m, Count<2>{}); break;
            case 3: tile(m, Count<3>{}); break;
            case 4: tile(m, Count<4>{}); break;
            case 5: tile(m, Count<5>{}); break;
            default: tile(m, Count<6>{}); break;
        }
        m += count;
    }
}

template <class T, class Panel, class Write>
INLINE void rows_of_panel(const T *x, int rows, int stride, int inputs, Panel panel, Write write) {
    in_tiles(rows, [&](int m, auto count) INLINED {
        tile<T, count>(x + size_t(m) * stride, stride, inputs, panel,
                       [&](int r, int j, Vec<T> v) INLINED { write(m + r, j, v); });
    });
}

// ---- int8: y = s_row s_output (q + OFFSET) . w + shift, the sums exact, on every machine the same --------------------

constexpr int FEWEST_FOR_TILES = 7;  // rows; of fewer, vectors are faster (8,192 x 256)
constexpr int OFFSET = 128;  // activations are stored without a sign, as the machine's products want one of two

// The products of four bytes of a, without sign, and of w, with sign, added to acc.
INLINE Ints dot4(Ints acc, Ints a, Ints w) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)w);
#else
    for (int byte = 0; byte < 4; byte++) acc += (a >> 8 * byte & 255) * (w << (24 - 8 * byte) >> 24);
    return acc;
#endif
}

// Rows in int8, each in units of its own scale, from the largest element's 127. What is not finite makes the scale NaN.
struct Rows {
    int words;  // of a row, four elements each; what is behind the elements meets weights of zero
    std::unique_ptr<uint8_t[]> data;
    std::unique_ptr<float[]> scales;

    static int words_of(int inputs) { return rounded_up(inputs, TILE_BYTES) / 4; }

    Rows(const float *x, int rows, int stride, int inputs)
        : words(words_of(inputs)), data(new uint8_t[size_t(rounded_up(rows, TILE_ROWS)) * words * 4]), scales(new float[rows]) {
        for (int m = 0; m < rows; m++) narrow(x + size_t(m) * stride, inputs, data.get() + size_t(m) * words * 4, scales[m]);
    }

    INLINE int32_t word(int row, int i) const {
        int32_t word;
        std::memcpy(&word, data.get() + (size_t(row) * words + i) * 4, sizeof word);
        return word;
    }

    static void narrow(const float *x, int inputs, uint8_t *q, float &scale) {
        constexpr int V = LANES<float>;
        typedef uint8_t Bytes __attribute__((vector_size(V)));
        Vec<float> most = {}, nothing = {};
        for (int c = 0; c < inputs; c += V) {
            const Vec<float> v = load_some(x + c, inputs - c), size = v < Vec<float>{} ? -v : v;
            most = size > most ? size : most;
            nothing += v * 0.0f;
        }
        float largest = 0;
        for (int l = 0; l < V; l++) largest = std::max(largest, float(most[l]));
        scale = largest / 127 + sum<float>(nothing);
        if (!(scale < INFINITY)) return void(std::memset(q, OFFSET, 4 * words_of(inputs)));  // a NaN, too
        const float most_units = 127 / largest;
        const Vec<float> units = all(most_units < INFINITY ? most_units : 0.0f);  // zeros, or as good as
        for (int c = 0; c < inputs; c += V) {
            const Vec<float> v = fma<float>(load_some(x + c, inputs - c), units, all(OFFSET + 0.5f));
            const Bytes bytes = __builtin_convertvector(__builtin_convertvector(v, Ints), Bytes);
            std::memcpy(q + c, &bytes, sizeof bytes);
        }
    }
};

// write(row, column, y): vector j of the panel from output n on, of its sums without the shift.
template <class Write>
INLINE void scaled(const Rows &x, const Weight &weight, int row, int n, int j, Ints sums, Write write) {
    const int column = n + j * LANES<float>;
    const Vec<float> v = __builtin_convertvector(sums + load(weight.shifts + column), Vec<float>);
    write(row, column, v * all(x.scales[row]) * load(weight.scales + column));
}

template <class Write>
INLINE void panel_int8(const Rows &x, int rows, const Weight &weight, int n, const int32_t *panel, Write write) {
    const int width = panel_width<float>();
    in_tiles(rows, [&](int m, auto count) INLINED {
        constexpr int ROWS = count;
        Ints acc[ROWS][WIDE] = {};
        for (int i = 0; i < x.words; i++) {
            Ints w[WIDE];
            for (int j = 0; j < WIDE; j++) w[j] = load(panel + i * width + j * LANES<float>);
            for (int r = 0; r < ROWS; r++) {
                const Ints a = all(x.word(m + r, i));
                for (int j = 0; j < WIDE; j++) acc[r][j] = dot4(acc[r][j], a, w[j]);
            }
        }
#pragma GCC unroll 6  // else the sums live on the stack
        for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
            for (int j = 0; j < WIDE; j++) scaled(x, weight, m + r, n, j, acc[r][j], write);
        }
    });
}

template <class Write>
INLINE void gemm_int8(const Rows &x, int rows, const Weight &weight, Write write) {
    const auto *panels = static_cast<const int32_t *>(weight.data);
#if defined(HAS_AMX)
    if (rows >= FEWEST_FOR_TILES && may_use_tiles()) {
        const Tiles tiles;
        Ints sums[WIDE][TILE_ROWS];
        for (int n = 0; n < weight.outputs; n += panel_width<float>()) {
            for (int m = 0; m < rows; m += TILE_ROWS) {
                tiles.multiply(x.data.get() + size_t(m) * x.words * 4, panels + size_t(n) * x.words, x.words, sums);
                for (int r = 0; r < std::min(TILE_ROWS, rows - m); r++) {
                    for (int j = 0; j < WIDE; j++) scaled(x, weight, m + r, n, j, sums[j][r], write);
                }
            }
        }
        return;
    }
#endif
    for (int n = 0; n < weight.outputs; n += panel_width<float>()) {
        panel_int8(x, rows, weight, n, panels + size_t(n) * x.words, write);
    }
}

// write(row, column, sums): V outputs of a row from `column` on, for x [rows, stride]; weight.inputs is even.
template <class T, class Write>
INLINE void gemm(const T *x, int rows, int stride, const Weight &weight, Write write) {
    const int inputs = weight.inputs, width = panel_width<T>();
    if constexpr (sizeof(T) == sizeof(float)) {
        if (weight.form == INT8) return gemm_int8(Rows(x, rows, stride, inputs), rows, weight, write);
    }
    for (int n = 0; n < weight.outputs; n += width) {
        auto at = [&](int row, int j, Vec<T> v) { write(row, n + j * LANES<T>, v); };
        if constexpr (sizeof(T) == sizeof(float)) {
            if (weight.form == BF16) {
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

// q [outputs, inputs] -> panels and shifts, both zero where they pad.
inline void pack_int8(const int8_t *q, int outputs, int inputs, int8_t *data, int32_t *shifts) {
    const int width = panel_width<float>(), padded_inputs = 4 * Rows::words_of(inputs);
    std::memset(data, 0, size_t(padded<float>(outputs)) * padded_inputs);
    std::memset(shifts, 0, sizeof(int32_t) * padded<float>(outputs));
    for (int n = 0; n < outputs; n++) {
        int8_t *panel = data + size_t(n / width) * width * padded_inputs;
        for (int k = 0; k < inputs; k++) {
            const int8_t value = q[size_t(n) * inputs + k];
            panel[size_t(k / 4) * 4 * width + 4 * (n % width) + k % 4] = value;
            shifts[n] -= OFFSET * value;
        }
    }
}
