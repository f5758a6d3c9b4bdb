// A packed step through a stack of HOPE blocks, or through one of its operators, on one thread.
//
// Tokens pass in tiles that stay in cache; a tile holds whole pieces, a piece being the tokens of one sequence that
// fall in one chunk of its own count. Layer by layer: x += rule(norm(x)); x += mlp(norm(x)).
#include <vector>

#include "conv.h"
#include "gemm.h"
#include "rule.h"

constexpr int TILE = 64;            // tokens of a tile, more where a chunk is longer
constexpr double MODEL_EPS = 1e-6;  // NORM_EPS of models/blocks.py, and of the read in memory/self_modifying.py

struct Shape {
    Rule rule;
    int32_t dim;     // D
    int32_t heads;   // H
    int32_t width;   // W of the convolution
    int32_t hidden;  // of the MLP
    INLINE int inner() const { return heads * rule.dim; }
};

// Embeddings E [V, D] in the stream's units: a token enters as scale E_token.
template <class T>
struct Table {
    const T *rows;
    int64_t count;
    double scale;
};

// Sequences of a step, as core.Batch has them.
struct Packed {
    const int32_t *slots;
    const int64_t *positions;
    const int32_t *ends;  // cu_seqlens
    int32_t sequences;
};

// A layer's memory: parameters, and the pool's tensors, slot after slot.
template <class T>
struct Memory {
    const void *base;             // [H, R, K], of Half where `is_half` (K a multiple of PAIR), else of T
    const T *rates, *gate_bias;  // [H, R], [2, H]
    T *anchor, *tail_k, *tail_d, *tail_g, *window;
    int32_t is_half;
};

template <class T>
struct Layer {
    Weight in, out, up, down;
    const T *norm_memory, *norm_cms, *norm_read, *conv;
    Memory<T> memory;
};

struct Piece {
    int slot, done, begin, count;
};

static std::vector<Piece> pieces_of(const Packed &packed, int chunk) {
    std::vector<Piece> pieces;
    for (int b = 0; b < packed.sequences; b++) {
        int done = int(packed.positions[b] % chunk);
        for (int t = packed.ends[b]; t < packed.ends[b + 1];) {
            const int count = std::min(chunk - done, packed.ends[b + 1] - t);
            pieces.push_back({packed.slots[b], done, t, count});
            t += count, done = 0;
        }
    }
    return pieces;
}

template <class T, class S>
static Head<T, S> head_of(const Rule &rule, int heads, const Memory<T> &m, int slot, int h, Ahead *ahead = nullptr) {
    const size_t at = size_t(slot) * heads + h, rows = rule.rows(), dim = rule.dim, chunk = rule.chunk;
    return {m.anchor + at * rows * dim,  m.tail_k + at * chunk * dim, m.tail_d + at * chunk * rows,
            m.tail_g + at * chunk,       static_cast<const S *>(m.base) + h * rows * dim, m.rates + h * rows, ahead};
}

template <class T, class S>
static Ahead ahead_of(const Rule &rule, const Head<T, S> &next, int done) {
    Ahead ahead;
    ahead.add(next.tail_d, size_t(done) * rule.rows());
    ahead.add(next.tail_k, size_t(done) * rule.dim);
    ahead.add(next.anchor, size_t(rule.rows()) * rule.dim);  // the first that is asked for
    return ahead;
}

// streams [.., 3, H, K], gates [.., 2, H] -> reads [.., H, K], all from row `first` of the batch on.
template <class T, class S>
static void read_stored(const Rule &rule, int heads, const Memory<T> &memory, const Piece *piece, int count, int first,
                     const T *streams, size_t stride, const T *gates, size_t gate_stride, T *out, Work<T> &work) {
    const size_t inner = size_t(heads) * rule.dim;
    for (int i = 0; i < count; i++) {
        const Piece &p = piece[i];
        const size_t row = p.begin - first;
        T *to = out + row * inner;
        if (!p.slot) {
            std::memset(to, 0, sizeof(T) * p.count * inner);
            continue;
        }
        for (int h = 0; h < heads; h++) {
            const int k = h * rule.dim;
            const T *x = streams + row * stride + k, *gate = gates + row * gate_stride + h;
            const Inputs<T> in{x, x + inner, x + 2 * inner, stride, gate, gate + heads, gate_stride,
                               memory.gate_bias[h], memory.gate_bias[heads + h]};
            Ahead ahead;
            if (h + 1 < heads) {
                ahead = ahead_of(rule, head_of<T, S>(rule, heads, memory, p.slot, h + 1), p.done);
            } else if (i + 1 < count) {
                ahead = ahead_of(rule, head_of<T, S>(rule, heads, memory, piece[i + 1].slot, 0), piece[i + 1].done);
            }
            read_chunk(rule, in, p.count, p.done, head_of<T, S>(rule, heads, memory, p.slot, h, &ahead), work, to + k, inner);
        }
    }
}

template <class T, class... Rest>
static void read_all(const Rule &rule, int heads, const Memory<T> &memory, Rest &&...rest) {
    if constexpr (sizeof(T) == sizeof(float)) {
        if (memory.is_half) return read_stored<T, Half>(rule, heads, memory, rest...);
    }
    read_stored<T, T>(rule, heads, memory, rest...);
}

template <class T>
static void convolve_all(const Piece *piece, int count, int first, const T *x, size_t stride, T *windows,
                         const T *weight, int width, int channels, T *y) {
    for (int i = 0; i < count; i++) {
        const Piece &p = piece[i];
        T *to = y + size_t(p.begin - first) * channels;
        if (p.slot) {
            convolve(x + (p.begin - first) * stride, stride, p.count, windows + size_t(p.slot) * (width - 1) * channels,
                     weight, width, channels, to, channels);
        } else {
            std::memset(to, 0, sizeof(T) * p.count * channels);
        }
    }
}

// y = x / rms(x) * weight
template <class T>
static void normalise(const T *x, const T *weight, int size, T *y) {
    const T scale = T(1) / std::sqrt(dot(x, x, size) / T(size) + T(MODEL_EPS));
    for (int c = 0; c < size; c += LANES<T>) {
        store_some(y + c, load_some(x + c, size - c) * all(scale) * load_some(weight + c, size - c), size - c);
    }
}

template <class T>
struct Scratch {
    size_t wide_in, wide_up;  // strides of projected and hidden
    T *normed, *projected, *streams, *read, *hidden, *work;

    static int most_rows(const Shape &s) { return std::max(TILE, int(s.rule.chunk)); }

    static size_t size(const Shape &s) {
        const size_t rows = most_rows(s), in = padded<T>(4 * s.inner() + 2 * s.heads), up = padded<T>(s.hidden);
        return rows * (s.dim + in + 4 * s.inner() + up) + Work<T>::size(s.rule) + 8 * LANES<T>;
    }

    Scratch(const Shape &s, T *p) {
        const size_t rows = most_rows(s);
        wide_in = padded<T>(4 * s.inner() + 2 * s.heads), wide_up = padded<T>(s.hidden);
        normed = p, projected = normed + rows * s.dim, streams = projected + rows * wide_in;
        read = streams + rows * 3 * s.inner(), hidden = read + rows * s.inner(), work = hidden + rows * wide_up;
    }
};

// The tile's rows x [rows, D] through one layer.
template <class T>
static void pass(const Shape &s, const Layer<T> &layer, const Piece *piece, int count, T *x, const Scratch<T> &to) {
    constexpr int V = LANES<T>;
    const int first = piece[0].begin, rows = piece[count - 1].begin + piece[count - 1].count - first;
    const int dim = s.dim, inner = s.inner();
    Work<T> work(s.rule, to.work);
    auto add = [&](int row, int column, Vec<T> v) {
        T *p = x + size_t(row) * dim + column;
        store_some(p, load_some(p, dim - column) + v, dim - column);
    };
    for (int t = 0; t < rows; t++) normalise(x + size_t(t) * dim, layer.norm_memory, dim, to.normed + size_t(t) * dim);
    gemm(to.normed, rows, dim, layer.in,
         [&](int row, int column, Vec<T> v) { store(to.projected + row * to.wide_in + column, v); });
    convolve_all(piece, count, first, to.projected, to.wide_in, layer.memory.window, layer.conv, s.width, 3 * inner, to.streams);
    read_all(s.rule, s.heads, layer.memory, piece, count, first, to.streams, 3 * inner, to.projected + 4 * inner,
             to.wide_in, to.read, work);
    for (int t = 0; t < rows; t++) {
        T *read = to.read + size_t(t) * inner;
        const T *gate = to.projected + t * to.wide_in + 3 * inner;
        for (int h = 0; h < s.heads; h++) normalise(read + h * s.rule.dim, layer.norm_read, s.rule.dim, read + h * s.rule.dim);
        for (int c = 0; c < inner; c += V) {
            store_some(read + c, load_some(read + c, inner - c) * silu<T>(load_some(gate + c, inner - c)), inner - c);
        }
    }
    gemm(to.read, rows, inner, layer.out, add);
    for (int t = 0; t < rows; t++) normalise(x + size_t(t) * dim, layer.norm_cms, dim, to.normed + size_t(t) * dim);
    gemm(to.normed, rows, dim, layer.up, [&](int row, int column, Vec<T> v) {
        v = v < Vec<T>{} ? Vec<T>{} : v;  // a NaN stays one
        store(to.hidden + row * to.wide_up + column, v * v);
    });
    gemm(to.hidden, rows, int(to.wide_up), layer.down, add);
}

template <class T>
static void run_stack(const Shape &s, const Layer<T> *layers, int count, const Packed &packed, T *x, T *scratch) {
    const std::vector<Piece> pieces = pieces_of(packed, s.rule.chunk);
    const Scratch<T> to(s, scratch);
    for (int l = 0; l < count; l++) {
        for (size_t i = 0; i < pieces.size();) {
            size_t j = i;
            const int begin = pieces[i].begin;
            while (j < pieces.size() && pieces[j].begin + pieces[j].count - begin <= Scratch<T>::most_rows(s)) j++;
            pass(s, layers[l], &pieces[i], int(j - i), x + size_t(begin) * s.dim, to);
            i = j;
        }
    }
}

// ---- what Python calls; SCALAR is the type of memories and activations ----------------------------------------------

extern "C" {

// Tokens [T] through the layers and the last norm -> x [T, D]. Returns -1, or, before anything is changed, the place of
// a token that is not in the table, T where the sequences do not end there.
int64_t stack(const Shape *shape, const Layer<SCALAR> *layers, int count, const Packed *packed,
              const Table<SCALAR> *table, const int64_t *tokens, int total, const SCALAR *last_norm, SCALAR *x, SCALAR *scratch) {
    const int dim = shape->dim;
    if (packed->ends[packed->sequences] != total) return total;
    const auto scale = SCALAR(table->scale);
    for (int t = 0; t < total; t++) {
        if (tokens[t] < 0 || tokens[t] >= table->count) return t;
    }
    for (int t = 0; t < total; t++) {
        const SCALAR *row = table->rows + tokens[t] * dim;
        for (int c = 0; c < dim; c++) x[size_t(t) * dim + c] = row[c] * scale;
    }
    run_stack(*shape, layers, count, *packed, x, scratch);
    for (int t = 0; t < total; t++) normalise(x + size_t(t) * dim, last_norm, dim, x + size_t(t) * dim);
    return -1;
}

size_t stack_scratch(const Shape *shape) { return Scratch<SCALAR>::size(*shape); }

// x [rows, inputs] -> y [rows, outputs]
void linear(const Weight *weight, const SCALAR *x, int rows, SCALAR *y) {
    gemm(x, rows, weight->inputs, *weight, [&](int row, int column, Vec<SCALAR> v) {
        store_some(y + size_t(row) * weight->outputs + column, v, weight->outputs - column);
    });
}

size_t packed_size(int outputs, int inputs) { return size_t(padded<SCALAR>(outputs)) * inputs; }
int pair() { return PAIR; }
int padded_outputs(int outputs) { return padded<float>(outputs); }
int padded_inputs(int inputs) { return 4 * Rows::words_of(inputs); }

void pack_weight(const SCALAR *w, int outputs, int inputs, int is_bf16, void *data) {
    pack(w, outputs, inputs, is_bf16 != 0, data);
}

void pack_weight_int8(const int8_t *q, int outputs, int inputs, int8_t *data, int32_t *shifts) {
    pack_int8(q, outputs, inputs, data, shifts);
}

// streams [T, 3, H, K], gates [T, 2, H] -> reads [T, H, K]
void rule(const Rule *rule, int heads, const Memory<SCALAR> *memory, const Packed *packed, const SCALAR *streams,
          const SCALAR *gates, SCALAR *out, SCALAR *scratch) {
    const auto pieces = pieces_of(*packed, rule->chunk);
    Work<SCALAR> work(*rule, scratch);
    read_all(*rule, heads, *memory, pieces.data(), int(pieces.size()), 0, streams, size_t(3) * heads * rule->dim, gates,
             size_t(2) * heads, out, work);
}

size_t rule_scratch(const Rule *rule) { return Work<SCALAR>::size(*rule); }

// x [T, F], windows [S + 1, W - 1, F] -> y [T, F]
void conv(const Packed *packed, const SCALAR *x, SCALAR *windows, const SCALAR *weight, int width, int channels,
          SCALAR *y) {
    const auto pieces = pieces_of(*packed, 1 << 30);
    convolve_all(pieces.data(), int(pieces.size()), 0, x, channels, windows, weight, width, channels, y);
}
}
