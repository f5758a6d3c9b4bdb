// Training: the rule over whole sequences from a chunk's boundary, forward and backward, head by head.
// Equations and order are those of ../delta_rule/chunk.py; a chunk's backward computes its forward again from X_0.
//
// Rows of every array are padded to whole vectors, with zeros where a sum or a product goes over them. Of rows of C
// values the columns behind the chunk's last whole vector are what an earlier chunk left, perhaps of a sequence that
// diverged: nothing reads them. With C = 32 and K = 64 a head's arrays have 0.9 MB in float32.
#pragma once

#include <algorithm>
#include <thread>
#include <vector>

#include "gemm.h"
#include "rule.h"

// Tensors of a scan; what only the backward needs is null in the forward.
template <class T>
struct Scan {
    const T *xq, *xk, *xv;      // [B, T, H, K]
    const T *eta, *alpha;       // logits [B, T, H]
    const T *base, *rates;      // [H, R, K], [H, R]
    T *state;                   // X [B, H, R, K]; forward: replaced by the last; backward: its gradient, likewise
    T *anchors;                 // X_0 of every chunk [B, H, ceil(T / C), R, K]
    T *out;                     // [B, T, H, K]
    const T *d_out;
    T *d_xq, *d_xk, *d_xv, *d_eta, *d_alpha;
    T *d_base, *d_rates;
    int32_t sequences, tokens, heads;
};

// Operands of products, their rows `row` elements apart: as they lie in memory, and transposed.
template <class T>
struct Straight {
    const T *data;
    size_t row;
    INLINE T at(int i, int k) const { return data[i * row + k]; }
    INLINE Straight from(int i) const { return {data + i * row, row}; }
};
template <class T>
struct Turned {
    const T *data;
    size_t row;
    INLINE T at(int i, int k) const { return data[k * row + i]; }
    INLINE Turned from(int i) const { return {data + i, row}; }
};

enum class To { SET, ADD };

// c [ROWS, VECS V] = or += a [ROWS, depth] b [depth, VECS V]
template <class T, To TO, int ROWS, int VECS, class A>
INLINE void product_tile(A a, const T *b, size_t b_row, int depth, T *c, size_t c_row) {
    constexpr int V = LANES<T>;
    Vec<T> sums[ROWS][VECS];
    for (int i = 0; i < ROWS; i++) {
        for (int j = 0; j < VECS; j++) sums[i][j] = TO == To::ADD ? load(c + i * c_row + j * V) : Vec<T>{};
    }
    for (int k = 0; k < depth; k++) {
        Vec<T> row[VECS];
        for (int j = 0; j < VECS; j++) row[j] = load(b + k * b_row + j * V);
        for (int i = 0; i < ROWS; i++) {
            const Vec<T> x = all(a.at(i, k));
            for (int j = 0; j < VECS; j++) sums[i][j] = fma<T>(x, row[j], sums[i][j]);
        }
    }
#pragma GCC unroll 6  // else the sums live on the stack
    for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < VECS; j++) store(c + i * c_row + j * V, sums[i][j]);
    }
}

template <class T, To TO, int VECS, class A>
void product_panel(A a, int m, const T *b, size_t b_row, int depth, T *c, size_t c_row) {
    in_tiles(m, [&](int i, auto count) INLINED {
        product_tile<T, TO, count, VECS>(a.from(i), b, b_row, depth, c + i * c_row, c_row);
    });
}

// c [m, n] = or += a [m, depth] b [depth, n], n rounded up to whole vectors.
template <class T, To TO, class A>
void product(A a, int m, const T *b, size_t b_row, int depth, int n, T *c, size_t c_row) {
    constexpr int V = LANES<T>;
    int j = 0;
    for (; n - j > 3 * V; j += 4 * V) product_panel<T, TO, 4>(a, m, b + j, b_row, depth, c + j, c_row);
    if (n - j > 2 * V) return product_panel<T, TO, 3>(a, m, b + j, b_row, depth, c + j, c_row);
    if (n - j > V) return product_panel<T, TO, 2>(a, m, b + j, b_row, depth, c + j, c_row);
    if (n - j > 0) product_panel<T, TO, 1>(a, m, b + j, b_row, depth, c + j, c_row);
}

// x [rows, row] -> y [columns, y_row], zeros behind `rows` up to whole vectors.
template <class T>
void transposed(const T *x, size_t row, int rows, int columns, T *y, size_t y_row) {
    constexpr int V = LANES<T>;
    for (int r = 0; r < rows; r += V) {
        for (int c = 0; c < columns; c += V) {
            Vec<T> v[V];
            for (int i = 0; i < V; i++) v[i] = r + i < rows ? load(x + (r + i) * row + c) : Vec<T>{};
            transpose<T>(v);
            for (int i = 0; i < V && c + i < columns; i++) store(y + (c + i) * y_row + r, v[i]);
        }
    }
}

template <class T>
struct HeadScan {
    int dim, rows, mem, wide, tall, side;  // K, R, first row of the main memory; elements of a row of K, R and C values
    size_t chunk;
    bool is_token, from_start;

    // one head: starting values and rates; gradients
    T *start, *start_t, *rates, *d_start, *d_rates;
    // one chunk
    T *x, *m, *x_t, *m_t;                                  // [R, wide], [K, tall]
    T *xq, *xk, *xv, *q, *k, *v, *u, *k_t;                 // [C, wide]; [K, side]
    T *y, *target, *seen, *d, *d_t;                        // [C, tall]: M x^k, M u, X k, D; [R, side]
    T *kk, *qk, *decay, *weight;                           // [C, side]: k.k, q.k, g_t / g_j, the last two's product
    T *read, *out;                                         // [C, wide]: X q
    T *q_norm, *k_norm, *v_norm, *alpha, *gate, *eta, *g;  // [C]; g: its logarithm
    // its backward
    T *dx, *dm, *dx_t;                                     // [R, wide], [K, tall]
    T *d_out, *dq, *dk, *du;                               // [C, wide]
    T *dd, *dp, *weighted;                                 // [C, tall]
    T *dw;                                                 // [C, side]
    T *dg, *dg_before, *d_eta, *column;                    // [C]

    explicit HeadScan(const Rule &r)
        : dim(r.dim), rows(r.rows()), mem(r.mem()), wide(rounded_up(r.dim, LANES<T>)),
          tall(rounded_up(r.rows(), LANES<T>) + LANES<T>), side(rounded_up(r.chunk, LANES<T>)), chunk(r.chunk),
          is_token(r.token), from_start(!r.whole) {}

    // Places the arrays from `p` on, or only counts them.
    size_t place(T *p) {
        size_t used = 0;
        auto take = [&](size_t count) {
            T *begin = p ? p + used : nullptr;
            used += count;
            return begin;
        };
        const size_t c = chunk, by_k = c * wide, by_r = c * tall, by_c = c * side;
        for (T **a : {&start, &d_start, &x, &m, &dx, &dm}) *a = take(size_t(rows) * wide);
        for (T **a : {&start_t, &x_t, &m_t, &dx_t}) *a = take(size_t(dim) * tall);
        for (T **a : {&xq, &xk, &xv, &q, &k, &v, &u, &read, &out, &d_out, &dq, &dk, &du}) *a = take(by_k);
        for (T **a : {&y, &target, &seen, &d, &dd, &dp, &weighted}) *a = take(by_r);
        for (T **a : {&kk, &qk, &decay, &weight, &dw}) *a = take(by_c);
        for (T **a : {&q_norm, &k_norm, &v_norm, &alpha, &gate, &eta, &g}) *a = take(side);
        for (T **a : {&dg, &dg_before, &d_eta, &column}) *a = take(side);
        k_t = take(size_t(dim) * side), d_t = take(size_t(tall) * side);
        rates = take(tall), d_rates = take(tall);
        return used;
    }

    // ---- rows -------------------------------------------------------------------------------------------------------

    // f(column) for the whole vectors of `size` elements
    template <class F>
    static INLINE void sweep(int size, F f) {
        for (int c = 0; c < size; c += LANES<T>) f(c);
    }

    // out = x / |x|, zeros behind K; returns |x|
    T normalise_row(const T *from, T *to) const {
        const T norm = std::sqrt(dot(from, from, dim) + T(NORM_EPS));
        sweep(wide, [&](int c) { store(to + c, load_some(from + c, dim - c) / all(norm)); });
        return norm;
    }

    // gradient of x / |x|
    void normalise_back(T *grad, const T *unit, T norm) const {
        const T along = dot(grad, unit, dim);
        sweep(wide, [&](int c) {
            store(grad + c, (load_some(grad + c, dim - c) - load(unit + c) * all(along)) / all(norm));
        });
    }

    T first_decay(int t) const { return t ? std::exp(g[t - 1]) : T(1); }

    // row t of F = g_{t-1} / g_j, strictly below the diagonal; there is none of t = 0
    const T *decay_before(int t) const { return decay + size_t(t - 1) * side; }

    // ---- loading ----------------------------------------------------------------------------------------------------

    void widen(const T *from, int count, T *to) const {
        for (int r = 0; r < count; r++) {
            const T *row = from + size_t(r) * dim;
            sweep(wide, [&](int c) { store(to + size_t(r) * wide + c, load_some(row + c, dim - c)); });
        }
    }

    void narrow(const T *from, int count, T *to) const {
        for (int r = 0; r < count; r++) {
            T *row = to + size_t(r) * dim;
            sweep(dim, [&](int c) { store_some(row + c, load(from + size_t(r) * wide + c), dim - c); });
        }
    }

    void enter_head(const Scan<T> &s, int h) {
        if (from_start) {
            widen(s.base + size_t(h) * rows * dim, rows, start);
        } else {
            std::fill_n(start, size_t(rows) * wide, T(0));
        }
        transposed(start, wide, rows, dim, start_t, tall);
        std::fill_n(d_start, size_t(rows) * wide, T(0));
        std::fill_n(d_rates, tall, T(0));
        sweep(rows, [&](int c) { store(rates + c, load_some(s.rates + size_t(h) * rows + c, rows - c)); });
    }

    void leave_head(const Scan<T> &s, int h) const {
        narrow(d_start, rows, s.d_base + size_t(h) * rows * dim);
        std::copy_n(d_rates, rows, s.d_rates + size_t(h) * rows);
    }

    struct Place {
        size_t first, stride, gates, gate_stride;  // of the chunk's first token in [B, T, H, K] and [B, T, H]
    };

    size_t chunks_of(const Scan<T> &s) const { return (s.tokens + chunk - 1) / chunk; }

    Place place_of(const Scan<T> &s, int b, int h, int t) const {
        const size_t token = (size_t(b) * s.tokens + t) * s.heads + h;
        return {token * dim, size_t(s.heads) * dim, token, size_t(s.heads)};
    }

    void gather(const T *from, const Place &at, int n, T *to) const {
        for (int i = 0; i < n; i++) {
            const T *row = from + at.first + i * at.stride;
            sweep(wide, [&](int c) { store(to + size_t(i) * wide + c, load_some(row + c, dim - c)); });
        }
    }

    void scatter(const T *from, const Place &at, int n, T *to) const {
        for (int i = 0; i < n; i++) {
            T *row = to + at.first + i * at.stride;
            sweep(dim, [&](int c) { store_some(row + c, load(from + size_t(i) * wide + c), dim - c); });
        }
    }

    // ---- forward ----------------------------------------------------------------------------------------------------

    static Straight<T> of(const T *a, int row) { return {a, size_t(row)}; }
    static Turned<T> turned(const T *a, int row) { return {a, size_t(row)}; }

    // All of a chunk of n tokens from X_0 in `x` but the next X.
    void forward(const Scan<T> &s, const Place &at, int n) {
        gather(s.xq, at, n, xq), gather(s.xk, at, n, xk), gather(s.xv, at, n, xv);
        transposed(x, wide, rows, dim, x_t, tall);
        sums_of(x_t, start_t, dim * tall, m_t);
        generate(s, at, n);
        product<T, To::SET>(of(u, wide), n, m_t, tall, dim, rows, target, tall);
        for (int i = 0; i < n; i++) {
            T *main = target + size_t(i) * tall + mem;
            sweep(dim, [&](int c) { store(main + c, load(main + c) + load(v + size_t(i) * wide + c)); });
        }
        product<T, To::SET>(of(k, wide), n, x_t, tall, dim, rows, seen, tall);
        transposed(k, wide, n, dim, k_t, side);
        product<T, To::SET>(of(k, wide), n, k_t, side, dim, n, kk, side);
        product<T, To::SET>(of(q, wide), n, k_t, side, dim, n, qk, side);
        decays(n);
        for (int i = 0; i < n; i++) solve_row(i);
        look(n);
    }

    static INLINE void sums_of(const T *a, const T *b, int size, T *to) {
        sweep(size, [&](int c) { store(to + c, load(a + c) + load(b + c)); });
    }

    void generate(const Scan<T> &s, const Place &at, int n) {
        product<T, To::SET>(of(xk, wide), n, m_t, tall, dim, dim + 2, y, tall);
        product<T, To::SET>(of(xv, wide), n, m_t + dim + 2, tall, dim, dim, v, wide);
        T sum = 0;
        for (int i = 0; i < n; i++) {
            const size_t row = size_t(i) * wide;
            const T *self = y + size_t(i) * tall;
            q_norm[i] = normalise_row(xq + row, q + row);
            k_norm[i] = normalise_row(self, k + row);
            v_norm[i] = normalise_row(v + row, v + row);
            sweep(wide, [&](int c) { store(u + row + c, load(v + row + c) - load(k + row + c)); });
            const T log_alpha = log_sigmoid(s.alpha[at.gates + i * at.gate_stride] + self[dim + 1]);
            alpha[i] = std::exp(log_alpha);
            gate[i] = std::exp(log_sigmoid(s.eta[at.gates + i * at.gate_stride] + self[dim]));
            eta[i] = T(ETA_MAX) * alpha[i] * gate[i];
            g[i] = sum += log_alpha;
        }
        for (int i = n; i < side; i++) g[i] = sum;
    }

    // g_t / g_j for j <= t, zero elsewhere; and times q.k
    void decays(int n) {
        for (int t = 0; t < n; t++) {
            const size_t row = size_t(t) * side;
            sweep(t + 1, [&](int c) { store(decay + row + c, exp<T>(all(g[t]) - load(g + c))); });
            std::fill_n(decay + row + t + 1, side - t - 1, T(0));
            sweep(n, [&](int c) { store(weight + row + c, load(decay + row + c) * load(qk + row + c)); });
        }
    }

    // -eta_t F_tj k_t.k_j for j < t
    void system_row(int t, T *to) const {
        if (!t) return;
        const T *before = decay_before(t), *same = kk + size_t(t) * side;
        sweep(t, [&](int c) { store(to + c, load(before + c) * load(same + c) * all(-eta[t])); });
    }

    void solve_row(int t) {
        T *to = d + size_t(t) * tall;
        const T before = first_decay(t);
        const T *hit = target + size_t(t) * tall, *old = seen + size_t(t) * tall;
        sweep(rows, [&](int c) {
            store(to + c, all(eta[t]) * fma<T>(all(-before), load(old + c), load(hit + c) * load(rates + c)));
        });
        system_row(t, column);
        add_rows(column, d, tall, t, rows, to);
    }

    void look(int n) {
        if (!is_token) return product<T, To::SET>(of(q, wide), n, m_t + mem, tall, dim, dim, out, wide);
        product<T, To::SET>(of(q, wide), n, x_t + mem, tall, dim, dim, read, wide);
        product<T, To::SET>(of(q, wide), n, start_t + mem, tall, dim, dim, out, wide);
        for (int i = 0; i < n; i++) {
            T *to = out + size_t(i) * wide;
            const Vec<T> now = all(std::exp(g[i]));
            sweep(wide, [&](int c) { store(to + c, fma<T>(now, load(read + size_t(i) * wide + c), load(to + c))); });
        }
        product<T, To::ADD>(of(weight, side), n, d + mem, tall, n, dim, out, wide);
    }

    // (g_n / g_t) D_t, and g_n
    T weigh(int n) {
        const T last = g[n - 1];
        for (int t = 0; t < n; t++) {
            const Vec<T> a = all(std::exp(last - g[t]));
            sweep(rows, [&](int c) { store(weighted + size_t(t) * tall + c, a * load(d + size_t(t) * tall + c)); });
        }
        return std::exp(last);
    }

    void carry(int n) {
        const Vec<T> last = all(weigh(n));
        sweep(rows * wide, [&](int c) { store(x + c, load(x + c) * last); });
        product<T, To::ADD>(turned(weighted, tall), rows, k, wide, n, dim, x, wide);
    }

    // ---- backward, from the last line to the first ------------------------------------------------------------------

    // `dx`: gradient of the next X, then that of X_0
    void backward(const Scan<T> &s, const Place &at, int n) {
        forward(s, at, n);
        sums_of(x, start, rows * wide, m);
        gather(s.d_out, at, n, d_out);
        transposed(d, tall, n, rows, d_t, side);
        std::fill_n(dm, size_t(rows) * wide, T(0));
        carry_back(n);
        is_token ? look_back(n) : look_back_at_anchor(n);
        solve_back(n);
        targets_back(n);
        inputs_back(s, at, n);
        sums_of(dx, dm, rows * wide, dx);
        if (from_start) sums_of(d_start, dm, rows * wide, d_start);
    }

    void carry_back(int n) {
        const T last = weigh(n);
        transposed(dx, wide, rows, dim, dx_t, tall);
        product<T, To::SET>(of(k, wide), n, dx_t, tall, dim, rows, dd, tall);
        product<T, To::SET>(of(weighted, tall), n, dx, wide, rows, dim, dk, wide);
        T sum = 0;
        for (int t = 0; t < n; t++) {
            T *row = dd + size_t(t) * tall;
            const Vec<T> a = all(std::exp(g[n - 1] - g[t]));
            sweep(rows, [&](int c) { store(row + c, load(row + c) * a); });
            const T part = dot(row, d + size_t(t) * tall, rows);
            dg[t] = -part, dg_before[t] = 0;
            sum += part;
        }
        Vec<T> kept = {};
        sweep(rows * wide, [&](int c) {
            const Vec<T> v = load(dx + c) * all(last);
            store(dx + c, v);
            kept = fma<T>(v, load(x + c), kept);
        });
        dg[n - 1] += sum + ::sum<T>(kept);
    }

    void look_back(int n) {
        T *scaled = du;
        for (int t = 0; t < n; t++) {
            const size_t row = size_t(t) * wide;
            const Vec<T> now = all(std::exp(g[t]));
            sweep(wide, [&](int c) { store(scaled + row + c, load(d_out + row + c) * now); });
            dg[t] += dot(scaled + row, read + row, dim);
        }
        product<T, To::SET>(of(scaled, wide), n, x + size_t(mem) * wide, wide, dim, dim, dq, wide);
        product<T, To::ADD>(of(d_out, wide), n, start + size_t(mem) * wide, wide, dim, dim, dq, wide);
        product<T, To::ADD>(turned(scaled, wide), dim, q, wide, n, dim, dx + size_t(mem) * wide, wide);
        if (from_start) {
            product<T, To::ADD>(turned(d_out, wide), dim, q, wide, n, dim, d_start + size_t(mem) * wide, wide);
        }
        product<T, To::SET>(of(d_out, wide), n, d_t + size_t(mem) * side, side, dim, n, dw, side);
        product<T, To::ADD>(turned(weight, side), n, d_out, wide, n, dim, dd + mem, tall);
        for (int t = 0; t < n; t++) {
            const size_t row = size_t(t) * side;
            const T own = log_gradients(n, row, weight);
            dg[t] += own;
            sweep(n, [&](int c) { store(dw + row + c, load(dw + row + c) * load(decay + row + c)); });
        }
        product<T, To::ADD>(of(dw, side), n, k, wide, n, dim, dq, wide);
        product<T, To::ADD>(turned(dw, side), n, q, wide, n, dim, dk, wide);
    }

    // What a factor g_t / g_j of w gives log g: the sum over j for t, minus each for j.
    T log_gradients(int n, size_t row, const T *w) {
        Vec<T> sums = {};
        sweep(n, [&](int c) {
            const Vec<T> v = load(dw + row + c) * load(w + row + c);
            store(dg + c, load(dg + c) - v);
            sums += v;
        });
        return ::sum<T>(sums);
    }

    void look_back_at_anchor(int n) {
        product<T, To::SET>(of(d_out, wide), n, m + size_t(mem) * wide, wide, dim, dim, dq, wide);
        product<T, To::ADD>(turned(d_out, wide), dim, q, wide, n, dim, dm + size_t(mem) * wide, wide);
    }

    // dd: of D, then of the right-hand side eta (r U - g_{t-1} P)
    void solve_back(int n) {
        for (int t = 0; t < n; t++) system_row(t, dw + size_t(t) * side);
        for (int j = n - 2; j >= 0; j--) {
            for (int t = j + 1; t < n; t++) column[t - j - 1] = dw[size_t(t) * side + j];
            add_rows(column, dd + size_t(j + 1) * tall, tall, n - 1 - j, rows, dd + size_t(j) * tall);
        }
        product<T, To::SET>(of(dd, tall), n, d_t, side, rows, n, dw, side);
        for (int t = 0; t < n; t++) {
            T *row = dw + size_t(t) * side;
            Vec<T> sums = {};
            sweep(n, [&](int c) {
                const Vec<T> v = t ? -load(row + c) * load(decay_before(t) + c) : Vec<T>{};
                sums = fma<T>(v, load(kk + size_t(t) * side + c), sums);
                store(row + c, v * all(eta[t]));
            });
            d_eta[t] = ::sum<T>(sums);
            dg_before[t] += log_gradients(n, size_t(t) * side, kk);
        }
        product<T, To::ADD>(of(dw, side), n, k, wide, n, dim, dk, wide);
        product<T, To::ADD>(turned(dw, side), n, k, wide, n, dim, dk, wide);
    }

    // dd: of U in the end, with the rates
    void targets_back(int n) {
        for (int t = 0; t < n; t++) {
            T *grad = dd + size_t(t) * tall, *old_grad = dp + size_t(t) * tall;
            const T *hit = target + size_t(t) * tall, *old = seen + size_t(t) * tall;
            const T before = first_decay(t);
            Vec<T> of_eta = {}, of_decay = {};
            sweep(rows, [&](int c) {
                const Vec<T> r = load(rates + c), old_c = load(old + c), hit_c = load(hit + c), v = load(grad + c);
                of_eta = fma<T>(v, fma<T>(all(-before), old_c, hit_c * r), of_eta);
                const Vec<T> step = v * all(eta[t]), p = step * all(-before);
                of_decay = fma<T>(p, old_c, of_decay);
                store(d_rates + c, fma<T>(step, hit_c, load(d_rates + c)));
                store(old_grad + c, p);
                store(grad + c, step * r);
            });
            d_eta[t] += ::sum<T>(of_eta);
            dg_before[t] += ::sum<T>(of_decay);
        }
        product<T, To::ADD>(of(dp, tall), n, x, wide, rows, dim, dk, wide);
        product<T, To::ADD>(turned(dp, tall), rows, k, wide, n, dim, dx, wide);
        product<T, To::SET>(of(dd, tall), n, m, wide, rows, dim, du, wide);
        product<T, To::ADD>(turned(dd, tall), rows, u, wide, n, dim, dm, wide);
    }

    void inputs_back(const Scan<T> &s, const Place &at, int n) {
        T *dv = du, *dy = y;
        for (int t = 0; t < n; t++) {
            const size_t row = size_t(t) * wide;
            const T *main = dd + size_t(t) * tall + mem;
            T *dy_t = dy + size_t(t) * tall;
            sweep(wide, [&](int c) { store(dy_t + c, load(dk + row + c) - load(du + row + c)); });
            sweep(dim, [&](int c) { store(dv + row + c, load(du + row + c) + load_some(main + c, dim - c)); });
            normalise_back(dy_t, k + row, k_norm[t]);
            normalise_back(dv + row, v + row, v_norm[t]);
            normalise_back(dq + row, q + row, q_norm[t]);
        }
        gates_back(s, at, n, dy);
        T *dxv = u, *dxk = read;
        product<T, To::SET>(of(dv, wide), n, m + size_t(dim + 2) * wide, wide, dim, dim, dxv, wide);
        product<T, To::ADD>(turned(dv, wide), dim, xv, wide, n, dim, dm + size_t(dim + 2) * wide, wide);
        product<T, To::SET>(of(dy, tall), n, m, wide, dim + 2, dim, dxk, wide);
        product<T, To::ADD>(turned(dy, tall), dim + 2, xk, wide, n, dim, dm, wide);
        scatter(dq, at, n, s.d_xq), scatter(dxk, at, n, s.d_xk), scatter(dxv, at, n, s.d_xv);
    }

    // log g = cumsum(log alpha), g_{t-1} = g_t / alpha_t, eta = alpha / 2 times its gate; logits' go behind dy's keys
    void gates_back(const Scan<T> &s, const Place &at, int n, T *dy) {
        T later = 0;
        for (int t = n - 1; t >= 0; t--) {
            later += dg[t] + dg_before[t];
            const T scaled = d_eta[t] * eta[t];
            const T d_gate = scaled * (1 - gate[t]), d_alpha = (later - dg_before[t] + scaled) * (1 - alpha[t]);
            dy[size_t(t) * tall + dim] = s.d_eta[at.gates + t * at.gate_stride] = d_gate;
            dy[size_t(t) * tall + dim + 1] = s.d_alpha[at.gates + t * at.gate_stride] = d_alpha;
        }
    }
};

template <class T>
size_t train_scratch(const Rule &rule) {
    HeadScan<T> work(rule);
    return work.place(nullptr);
}

// One head of one sequence, through all chunks.
template <class T>
void forward_sequence(HeadScan<T> &work, const Scan<T> &s, int b, int h) {
    const size_t size = size_t(work.rows) * work.dim, chunks = work.chunks_of(s), head = size_t(b) * s.heads + h;
    work.widen(s.state + head * size, work.rows, work.x);
    for (size_t c = 0; c < chunks; c++) {
        const int begin = int(c * work.chunk), n = std::min(int(work.chunk), s.tokens - begin);
        const auto at = work.place_of(s, b, h, begin);
        if (s.anchors) work.narrow(work.x, work.rows, s.anchors + (head * chunks + c) * size);
        work.forward(s, at, n);
        work.scatter(work.out, at, n, s.out);
        work.carry(n);
    }
    work.narrow(work.x, work.rows, s.state + head * size);
}

template <class T>
void backward_sequence(HeadScan<T> &work, const Scan<T> &s, int b, int h) {
    const size_t size = size_t(work.rows) * work.dim, chunks = work.chunks_of(s), head = size_t(b) * s.heads + h;
    work.widen(s.state + head * size, work.rows, work.dx);
    for (size_t c = chunks; c-- > 0;) {
        const int begin = int(c * work.chunk), n = std::min(int(work.chunk), s.tokens - begin);
        work.widen(s.anchors + (head * chunks + c) * size, work.rows, work.x);
        work.backward(s, work.place_of(s, b, h, begin), n);
    }
    work.narrow(work.dx, work.rows, s.state + head * size);
}

// Heads in turn to each thread: their gradients do not meet, so results do not depend on the number of threads.
template <class T, void SEQUENCE(HeadScan<T> &, const Scan<T> &, int, int)>
void train(const Rule &rule, const Scan<T> &s, T *scratch, int threads) {
    auto share = [&](int first) {
        HeadScan<T> work(rule);
        const size_t size = work.place(nullptr);
        T *own = scratch + first * size;
        std::fill_n(own, size, T(0));
        work.place(own);
        for (int h = first; h < s.heads; h += threads) {
            work.enter_head(s, h);
            for (int b = 0; b < s.sequences; b++) SEQUENCE(work, s, b, h);
            if (s.d_base) work.leave_head(s, h);
        }
    };
    std::vector<std::thread> others;
    for (int t = 1; t < threads; t++) others.emplace_back(share, t);
    share(0);
    for (std::thread &other : others) other.join();
}
