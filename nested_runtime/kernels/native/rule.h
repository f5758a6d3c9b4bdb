// The stacked delta rule on the factored state of one head; equations and layout in ../delta_rule/numba.py.
//
// Products with the memories are dots over K. A few tokens take them row by row, many tokens lie in the lanes of
// vectors; both add the same numbers in the same order, so that no bit depends on how a text was cut.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vector.h"

constexpr double ETA_MAX = 0.5, NORM_EPS = 1e-6;  // layout.py
constexpr int FEW = 6;                            // tokens that are read row by row

struct Rule {
    int32_t dim;    // K
    int32_t chunk;  // C
    int32_t token;  // read at the token, else at the anchor
    int32_t whole;  // decay pulls the whole memory to zero, else its deviation alone
    INLINE int rows() const { return 3 * dim + 2; }
    INLINE int mem() const { return 2 * dim + 2; }
};

// Memory that is read a few microseconds later, asked for in even portions while something else is computed.
class Ahead {
    struct Range {
        const char *at, *end;
    } ranges[3] = {};
    int count = 0, portion = 0;

    static constexpr int PORTIONS = 20;  // blocks of rows that one token of a head of 64 takes with 16 lanes: 22

  public:
    template <class T>
    INLINE void add(const T *p, size_t size) {
        ranges[count++] = {reinterpret_cast<const char *>(p), reinterpret_cast<const char *>(p + size)};
        portion += int(size * sizeof(T) / 64 / PORTIONS) + 1;
    }

    INLINE void fetch() {
        for (int i = 0; i < portion && count;) {
            Range &range = ranges[count - 1];
            for (; i < portion && range.at < range.end; range.at += 64, i++) __builtin_prefetch(range.at, 0, 2);
            count -= range.at >= range.end;
        }
    }
};

// S: how the starting values are stored, T or, where it holds them exactly, Half.
template <class T, class S>
struct Head {
    T *anchor, *tail_k, *tail_d, *tail_g;  // X_0 [R, K], [C, K], [C, R], [C]
    const S *start;                        // B [R, K]
    const T *rates;                        // r [R]
    Ahead *ahead;                          // what will be read after this head
};

// Scratch for the tokens of one chunk. Rows are padded, so that whole vectors may be stored.
template <class T>
struct Work {
    int wide, tall;                   // elements of a row of K and of R values
    T *q, *v, *u;                     // unit q and v, v - k
    T *first, *error, *seen, *read, *base;  // M x, M u, X k [C, R]; X q, B q [C, K]
    T *eta, *a, *b, *lanes;           // [C], [C], [C]; operands of many tokens [K, V], a few rows of M
    T *keys;                          // weighted keys of a full chunk [C, K], where `u` was

    static size_t size(const Rule &rule) {
        const int wide = rounded_up(rule.dim, LANES<T>) + LANES<T>, tall = rounded_up(rule.rows(), LANES<T>) + LANES<T>;
        return size_t(rule.chunk) * (5 * wide + 3 * tall) + 3 * (rule.chunk + LANES<T>) + size_t(wide) * 2 * LANES<T>;
    }

    Work(const Rule &rule, T *p) {
        wide = rounded_up(rule.dim, LANES<T>) + LANES<T>;
        tall = rounded_up(rule.rows(), LANES<T>) + LANES<T>;
        auto take = [&](size_t count) {
            T *begin = p;
            p += count;
            return begin;
        };
        const size_t c = rule.chunk;
        q = take(c * wide), v = take(c * wide), u = take(c * wide), read = take(c * wide), base = take(c * wide);
        first = take(c * tall), error = take(c * tall), seen = take(c * tall);
        eta = take(c + LANES<T>), a = take(c + LANES<T>), b = take(c + LANES<T>);
        lanes = take(size_t(wide) * 2 * LANES<T>);
        keys = u;
    }
};

enum class Of { X, B, BOTH };

template <class T, Of OF, class S>
INLINE Vec<T> piece(const T *x, const S *b, int c, int dim) {
    if constexpr (OF == Of::X) return part(x, c, dim);
    if constexpr (OF == Of::B) return part(b, c, dim);
    return part(x, c, dim) + part(b, c, dim);
}

// Lane i: row i of `rows` <= V rows of the matrix, times w.
template <class T, Of OF, int DIM, class S>
INLINE Vec<T> products_of(const T *x, const S *b, int rows, int some_dim, const T *w) {
    const int dim = DIM ? DIM : some_dim;
    auto row = [&](int r) INLINED {
        Several<T, 1> s = {};
        for (int c = 0; c < dim; c += LANES<T>) {
            s.v[0] = fma<T>(piece<T, OF>(x + size_t(r) * dim, b + size_t(r) * dim, c, dim), part(w, c, dim), s.v[0]);
        }
        return s;
    };
    return sums_of<T, 1>(rows, row).v[0];
}

template <class T, Of OF, class S>
INLINE Vec<T> products(const T *x, const S *b, int rows, int dim, const T *w) {
    return dim == 64 ? products_of<T, OF, 64>(x, b, rows, 64, w) : products_of<T, OF, 0>(x, b, rows, dim, w);
}

template <class T>
struct Four {
    Vec<T> v[4];
};

// What `sums` gives, of V tokens at a time: the lanes l, l + STEP, ... of four rows m, tokens in lanes [K, V].
template <class T, int STEP>
INLINE Four<T> tree(const T *m, int stride, int dim, const T *lanes, int l) {
    constexpr int V = LANES<T>;
    if constexpr (STEP == V) {
        Four<T> s = {};
        for (int c = l; c < dim; c += V) {
            const Vec<T> w = load(lanes + size_t(c) * V);
            for (int r = 0; r < 4; r++) s.v[r] = fma<T>(all(m[r * stride + c]), w, s.v[r]);
        }
        return s;
    } else {
        Four<T> low = tree<T, 2 * STEP>(m, stride, dim, lanes, l);
        const Four<T> high = tree<T, 2 * STEP>(m, stride, dim, lanes, l + STEP);
        for (int r = 0; r < 4; r++) low.v[r] += high.v[r];
        return low;
    }
}

// w [n <= V, stride] -> lanes [K, V].
template <class T>
INLINE void to_lanes(const T *w, int stride, int n, int dim, T *lanes) {
    constexpr int V = LANES<T>;
    for (int c = 0; c < dim; c += V) {
        Vec<T> v[V];
        for (int i = 0; i < V; i++) v[i] = i < n ? load_some(w + size_t(i) * stride + c, dim - c) : Vec<T>{};
        transpose<T>(v);
        for (int i = 0; i < V && c + i < dim; i++) store(lanes + size_t(c + i) * V, v[i]);
    }
}

// As `multiply_few`, for up to V tokens.
template <class T, Of OF, class S>
void multiply_lanes(const T *x, const S *b, int begin, int end, int dim, int n, T *y, int stride, Work<T> &work) {
    constexpr int V = LANES<T>;
    T *rows = work.lanes + size_t(work.wide) * V;  // four rows of the matrix
    for (int r = begin; r < end; r += V) {
        Vec<T> out[V] = {};
        for (int i = 0; i < V && r + i < end; i += 4) {
            for (int j = 0; j < 4; j++) {
                const size_t at = size_t(r + i + j) * dim;
                for (int c = 0; c < dim; c += V) {
                    const Vec<T> v = r + i + j < end ? piece<T, OF>(x + at, b + at, c, dim) : Vec<T>{};
                    store(rows + j * work.wide + c, v);
                }
            }
            const Four<T> s = dim == 64 ? tree<T, 1>(rows, work.wide, 64, work.lanes, 0)
                                        : tree<T, 1>(rows, work.wide, dim, work.lanes, 0);
            for (int j = 0; j < 4; j++) out[i + j] = s.v[j];
        }
        transpose<T>(out);
        for (int i = 0; i < n; i++) store(y + size_t(i) * stride + r, out[i]);
    }
}

// y [n, tall] = rows begin..end of B + X times w [n, stride].
template <class T, class S>
void multiply(const Head<T, S> &head, int begin, int end, int dim, const T *w, int stride, int n, T *y, Work<T> &work) {
    int i = 0;
    for (; n - i > FEW; i += std::min(n - i, LANES<T>)) {
        const int count = std::min(n - i, LANES<T>);
        to_lanes(w + size_t(i) * stride, stride, count, dim, work.lanes);
        multiply_lanes<T, Of::BOTH>(head.anchor, head.start, begin, end, dim, count, y + size_t(i) * work.tall, work.tall, work);
    }
    for (int r = begin; i < n && r < end; r += LANES<T>) {
        const size_t at = size_t(r) * dim;
        for (int j = i; j < n; j++) {
            const Vec<T> s = products<T, Of::BOTH>(head.anchor + at, head.start + at, end - r, dim, w + size_t(j) * stride);
            store(y + size_t(j) * work.tall + r, s);
        }
        head.ahead->fetch();
    }
}

// out = x / |x|, K values.
template <class T>
INLINE void unit(const T *x, int dim, T *out) {
    const T scale = T(1) / std::sqrt(dot(x, x, dim) + T(NORM_EPS));
    for (int c = 0; c < dim; c += LANES<T>) store_some(out + c, load_some(x + c, dim - c) * all(scale), dim - c);
}

template <class T>
INLINE T log_sigmoid(T x) {
    return std::fmin(x, T(0)) - std::log1p(std::exp(-std::fabs(x)));
}

// Tokens as the rule reads them: streams x^q, x^k, x^v of one head, `stride` apart from token to token; gate logits.
template <class T>
struct Inputs {
    const T *q, *k, *v;
    size_t stride;
    const T *eta, *alpha;
    size_t gate_stride;
    T eta_bias, alpha_bias;
};

// First sweep: k, v, eta, log g of n tokens from the memories at the anchor, unit q, and v - k.
template <class T, class S>
void generate(const Rule &rule, const Inputs<T> &in, int n, int done, Head<T, S> &head, Work<T> &work) {
    const int dim = rule.dim, tall = work.tall;
    multiply(head, 0, dim + 2, dim, in.k, in.stride, n, work.first, work);
    multiply(head, dim + 2, 2 * dim + 2, dim, in.v, in.stride, n, work.first, work);
    for (int i = 0; i < n; i++) {
        const T *y = work.first + size_t(i) * tall;
        T *k = head.tail_k + size_t(done + i) * dim, *v = work.v + size_t(i) * work.wide;
        unit(y, dim, k);
        unit(y + dim + 2, dim, v);
        unit(in.q + i * in.stride, dim, work.q + size_t(i) * work.wide);
        for (int c = 0; c < dim; c += LANES<T>) {
            store(work.u + size_t(i) * work.wide + c, load_some(v + c, dim - c) - load_some(k + c, dim - c));
        }
        const T log_alpha = log_sigmoid(in.alpha[i * in.gate_stride] + in.alpha_bias + y[dim + 1]);
        head.tail_g[done + i] = log_alpha + (done + i ? head.tail_g[done + i - 1] : T(0));
        work.eta[i] = T(ETA_MAX) * std::exp(log_alpha + log_sigmoid(in.eta[i * in.gate_stride] + in.eta_bias + y[dim]));
    }
}

// Second sweep of one token, `rows` <= V rows from r on: each is loaded once for all its products (as in `products`).
template <class T, bool MEM, bool WHOLE, int DIM, class S>
INLINE void look_block(int some_dim, int rows, const T *x, const S *b, const T *u, const T *k, const T *q, T *error,
                       T *seen, T *read, T *base) {
    constexpr int V = LANES<T>, N = MEM ? (WHOLE ? 3 : 4) : 2;
    const int dim = DIM ? DIM : some_dim;
    auto row = [&](int j) INLINED {
        Several<T, N> s = {};
        for (int c = 0; c < dim; c += V) {
            const Vec<T> b_c = part(b + j * dim, c, dim), x_c = part(x + j * dim, c, dim);
            const Vec<T> m = x_c + b_c, acted = WHOLE ? m : x_c;
            s.v[0] = fma<T>(m, load_some(u + c, dim - c), s.v[0]);
            s.v[1] = fma<T>(acted, load_some(k + c, dim - c), s.v[1]);
            if constexpr (MEM) s.v[2] = fma<T>(acted, load_some(q + c, dim - c), s.v[2]);
            if constexpr (MEM && !WHOLE) s.v[3] = fma<T>(b_c, load_some(q + c, dim - c), s.v[3]);
        }
        return s;
    };
    const Several<T, N> s = sums_of<T, N>(rows, row);
    store(error, s.v[0]);
    store(seen, s.v[1]);
    if constexpr (MEM) {
        store(read, s.v[2]);
        store(base, WHOLE ? Vec<T>{} : s.v[N - 1]);
    }
}

template <class T, bool WHOLE, int DIM, class S>
void look_few(const Rule &rule, int begin, int end, int done, const Head<T, S> &head, Work<T> &work) {
    const int dim = rule.dim, wide = work.wide, mem = rule.mem(), rows = rule.rows();
    for (int i = begin; i < end; i++) {
        const T *k = head.tail_k + size_t(done + i) * dim, *u = work.u + size_t(i) * wide, *q = work.q + size_t(i) * wide;
        T *error = work.error + size_t(i) * work.tall, *seen = work.seen + size_t(i) * work.tall;
        T *read = work.read + size_t(i) * wide, *base = work.base + size_t(i) * wide;
        auto block = [&](int r, auto of_mem) INLINED {
            constexpr bool MEM = of_mem;
            const size_t at = size_t(r) * dim;
            const int to = MEM ? r - mem : 0;
            head.ahead->fetch();
            look_block<T, MEM, WHOLE, DIM>(dim, (MEM ? rows : mem) - r, head.anchor + at, head.start + at, u, k, q, error + r, seen + r, read + to, base + to);
        };
        // Backwards: what the first sweep read last is still in the first cache.
        for (int r = rounded_up(mem, LANES<T>) - LANES<T>; r >= 0; r -= LANES<T>) block(r, std::false_type());
        for (int r = mem; r < rows; r += LANES<T>) block(r, std::true_type());
    }
}

// The same of many tokens, matrix by matrix.
template <class T, class S>
void look_many(const Rule &rule, int begin, int count, int done, const Head<T, S> &head, Work<T> &work) {
    const int dim = rule.dim, wide = work.wide, tall = work.tall, rows = rule.rows(), mem = rule.mem();
    const size_t at = size_t(begin) * wide, over = size_t(begin) * tall;
    T *read = work.read + at - mem, *base = work.base + at - mem;  // their rows are the main memory's
    const T *x = head.anchor;
    const S *b = head.start;
    to_lanes(work.u + at, wide, count, dim, work.lanes);
    multiply_lanes<T, Of::BOTH>(x, b, 0, rows, dim, count, work.error + over, tall, work);
    to_lanes(head.tail_k + size_t(done + begin) * dim, dim, count, dim, work.lanes);
    if (rule.whole) {
        multiply_lanes<T, Of::BOTH>(x, b, 0, rows, dim, count, work.seen + over, tall, work);
    } else {
        multiply_lanes<T, Of::X>(x, b, 0, rows, dim, count, work.seen + over, tall, work);
    }
    to_lanes(work.q + at, wide, count, dim, work.lanes);
    if (rule.whole) {
        multiply_lanes<T, Of::BOTH>(x, b, mem, rows, dim, count, read, wide, work);
        std::memset(work.base + at, 0, sizeof(T) * count * wide);
    } else {
        multiply_lanes<T, Of::X>(x, b, mem, rows, dim, count, read, wide, work);
        multiply_lanes<T, Of::B>(x, b, mem, rows, dim, count, base, wide, work);
    }
}

// Second sweep: M u, X k (M k where decay acts on M), and the main memory's X q (or M q) and B q.
template <class T, class S>
void look(const Rule &rule, int n, int done, const Head<T, S> &head, Work<T> &work) {
    int i = 0;
    for (; n - i > FEW; i += std::min(n - i, LANES<T>)) {
        look_many(rule, i, std::min(n - i, LANES<T>), done, head, work);
    }
    if (rule.dim == 64) {
        rule.whole ? look_few<T, true, 64>(rule, i, n, done, head, work) : look_few<T, false, 64>(rule, i, n, done, head, work);
    } else {
        rule.whole ? look_few<T, true, 0>(rule, i, n, done, head, work) : look_few<T, false, 0>(rule, i, n, done, head, work);
    }
}

// a_j = -eta (g_{t-1} / g_j) k_j.k_t for j < at, b_j = (g_t / g_j) k_j.q_t for j <= at; zeros up to a whole vector.
template <class T, class S>
INLINE void weigh(const Rule &rule, const T *q, int at, T eta, const Head<T, S> &head, Work<T> &work) {
    constexpr int V = LANES<T>;
    const T *k = head.tail_k + size_t(at) * rule.dim;
    const T before = at ? head.tail_g[at - 1] : T(0), now = head.tail_g[at];
    for (int j = 0; j <= at; j += V) {
        const T *rows = head.tail_k + size_t(j) * rule.dim;
        const Vec<T> g = load_some(head.tail_g + j, at + 1 - j);
        const Vec<T> kk = products<T, Of::X>(rows, rows, at - j, rule.dim, k);
        store(work.a + j, kk * exp<T>(all(before) - g) * all(-eta));
        const Vec<T> kq = products<T, Of::X>(rows, rows, at + 1 - j, rule.dim, q);
        store(work.b + j, kq * exp<T>(all(now) - g));
    }
}

// out [size] += sum_{j < count} weight_j rows_j, rows `stride` apart.
template <class T, int BLOCK>
INLINE void add_block(const T *weight, const T *rows, int stride, int count, int left, T *out) {
    constexpr int V = LANES<T>;
    Vec<T> s[BLOCK];
    for (int i = 0; i < BLOCK; i++) s[i] = load_some(out + i * V, left - i * V);
    for (int j = 0; j < count; j++) {
        const Vec<T> w = all(weight[j]);
        const T *row = rows + size_t(j) * stride;
        for (int i = 0; i < BLOCK - 1; i++) s[i] = fma<T>(w, load(row + i * V), s[i]);
        s[BLOCK - 1] = fma<T>(w, load_some(row + (BLOCK - 1) * V, left - (BLOCK - 1) * V), s[BLOCK - 1]);
    }
    for (int i = 0; i < BLOCK; i++) store_some(out + i * V, s[i], left - i * V);
}

template <class T>
INLINE void add_rows(const T *weight, const T *rows, int stride, int count, int size, T *out) {
    constexpr int V = LANES<T>;
    int c = 0;
    for (; size - c > 6 * V; c += 7 * V) add_block<T, 7>(weight, rows + c, stride, count, size - c, out + c);
    for (; size - c > 3 * V; c += 4 * V) add_block<T, 4>(weight, rows + c, stride, count, size - c, out + c);
    for (; c < size; c += V) add_block<T, 1>(weight, rows + c, stride, count, size - c, out + c);
}

// Token i of the step, row `at` of the tail: d by substitution, then the read, which sees d itself.
template <class T, class S>
void substitute(const Rule &rule, int i, int at, Head<T, S> &head, Work<T> &work, T *out) {
    constexpr int V = LANES<T>;
    const int rows = rule.rows(), mem = rule.mem(), dim = rule.dim;
    const T *error = work.error + size_t(i) * work.tall, *seen = work.seen + size_t(i) * work.tall;
    const T *v = work.v + size_t(i) * work.wide, *q = work.q + size_t(i) * work.wide;
    T *d = head.tail_d + size_t(at) * rows;
    const T eta = work.eta[i], g = at ? std::exp(head.tail_g[at - 1]) : T(1);
    weigh(rule, q, at, eta, head, work);
    auto begin = [&](int r, int count, Vec<T> wrong) {
        const Vec<T> target = load_some(head.rates + r, count) * wrong;
        store_some(d + r, all(eta) * fma<T>(all(-g), load(seen + r), target), count);
    };
    for (int r = 0; r < mem; r += V) begin(r, mem - r, load(error + r));
    for (int c = 0; c < dim; c += V) begin(mem + c, dim - c, load(error + mem + c) + load_some(v + c, dim - c));
    add_rows(work.a, head.tail_d, rows, at, rows, d);
    const T g_now = rule.token ? std::exp(head.tail_g[at]) : T(1);
    for (int c = 0; c < dim; c += V) {
        const Vec<T> base = load(work.base + size_t(i) * work.wide + c);
        store_some(out + c, fma<T>(all(g_now), load(work.read + size_t(i) * work.wide + c), base), dim - c);
    }
    if (rule.token) add_rows(work.b, head.tail_d + mem, rows, at + 1, dim, out);
}

// Rows r.. of X_0 <- g_C X_0 + sum_j a_j d_j k_j^T.
template <class T, int ROWS, int BLOCK, class S>
INLINE void fold_rows(const Rule &rule, int r, int c, T g, Head<T, S> &head, const Work<T> &work) {
    constexpr int V = LANES<T>;
    const int dim = rule.dim, rows = rule.rows(), left = dim - c;
    Vec<T> s[ROWS][BLOCK];
    for (int i = 0; i < ROWS; i++) {
        for (int j = 0; j < BLOCK; j++) {
            const size_t at = size_t(r + i) * dim;
            const Vec<T> b = rule.whole ? part(head.start + at, c + j * V, dim) * all(g - 1) : Vec<T>{};
            s[i][j] = fma<T>(all(g), part(head.anchor + at, c + j * V, dim), b);
        }
    }
    for (int t = 0; t < rule.chunk; t++) {
        Vec<T> k[BLOCK];
        for (int j = 0; j < BLOCK; j++) k[j] = load(work.keys + size_t(t) * work.wide + c + j * V);
        const T *d = head.tail_d + size_t(t) * rows + r;
        for (int i = 0; i < ROWS; i++) {
            for (int j = 0; j < BLOCK; j++) s[i][j] = fma<T>(all(d[i]), k[j], s[i][j]);
        }
    }
    for (int i = 0; i < ROWS; i++) {
        for (int j = 0; j < BLOCK; j++) store_some(head.anchor + size_t(r + i) * dim + c + j * V, s[i][j], left - j * V);
    }
}

template <class T, int BLOCK, class S>
INLINE void fold_columns(const Rule &rule, int c, T g, Head<T, S> &head, const Work<T> &work) {
    int r = 0;
    for (; rule.rows() - r >= 4; r += 4) fold_rows<T, 4, BLOCK>(rule, r, c, g, head, work);
    for (; r < rule.rows(); r++) fold_rows<T, 1, BLOCK>(rule, r, c, g, head, work);
}

// Close a full chunk: X_0 <- g_C X_0 + sum_j (g_C / g_j) d_j k_j^T (M instead of X where decay acts on M), tail <- 0.
template <class T, class S>
void fold(const Rule &rule, Head<T, S> &head, Work<T> &work) {
    constexpr int V = LANES<T>;
    const int dim = rule.dim, count = rule.chunk;
    const T last = head.tail_g[count - 1], g = std::exp(last);
    for (int t = 0; t < count; t++) {
        const T a = std::exp(last - head.tail_g[t]);
        for (int c = 0; c < dim; c += V) {
            store(work.keys + size_t(t) * work.wide + c, load_some(head.tail_k + size_t(t) * dim + c, dim - c) * all(a));
        }
    }
    int c = 0;
    for (; dim - c > 3 * V; c += 4 * V) fold_columns<T, 4>(rule, c, g, head, work);
    for (; c < dim; c += V) fold_columns<T, 1>(rule, c, g, head, work);
    std::memset(head.tail_k, 0, sizeof(T) * count * dim);
    std::memset(head.tail_d, 0, sizeof(T) * count * rule.rows());
    std::memset(head.tail_g, 0, sizeof(T) * count);
}

// n tokens within one chunk of which `done` have been read -> out [n, out_stride].
template <class T, class S>
void read_chunk(const Rule &rule, const Inputs<T> &in, int n, int done, Head<T, S> head, Work<T> &work, T *out,
                size_t out_stride) {
    generate(rule, in, n, done, head, work);
    look(rule, n, done, head, work);
    for (int i = 0; i < n; i++) substitute(rule, i, done + i, head, work, out + i * out_stride);
    if (done + n == rule.chunk) fold(rule, head, work);
}
