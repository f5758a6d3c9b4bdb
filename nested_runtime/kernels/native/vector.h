// Vectors of the machine's width, and the sums that do not depend on how a kernel is laid out.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#else
constexpr int BYTES = 32;
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // of a lambda

template <class T>
struct Vector {
    static constexpr int lanes = BYTES / sizeof(T);
    typedef T type __attribute__((vector_size(BYTES)));
};
template <class T>
using Vec = typename Vector<T>::type;
template <class T>
constexpr int LANES = Vector<T>::lanes;

using Ints = Vec<int32_t>;
using Longs = Vec<int64_t>;

INLINE int rounded_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T>
INLINE Vec<T> load(const T *p) {
    Vec<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class T>
INLINE void store(T *p, Vec<T> v) {
    std::memcpy(p, &v, sizeof v);
}

// The first `count` elements (all if it is larger, none below 1), zeros behind them; nothing behind them is touched.
#if defined(__AVX512F__)
INLINE __mmask16 first(int count) { return __mmask16(count > 0 ? 0xffffu >> (count < 16 ? 16 - count : 0) : 0); }
INLINE Vec<float> load_some(const float *p, int count) { return (Vec<float>)_mm512_maskz_loadu_ps(first(count), p); }
INLINE Vec<double> load_some(const double *p, int count) {
    return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8(first(count < 8 ? count : 8)), p);
}
INLINE void store_some(float *p, Vec<float> v, int count) { _mm512_mask_storeu_ps(p, first(count), (__m512)v); }
INLINE void store_some(double *p, Vec<double> v, int count) {
    _mm512_mask_storeu_pd(p, __mmask8(first(count < 8 ? count : 8)), (__m512d)v);
}
#else
template <class T>
INLINE Vec<T> load_some(const T *p, int count) {
    if (count >= LANES<T>) return load(p);
    Vec<T> v = {};
    for (int i = 0; i < count; i++) v[i] = p[i];
    return v;
}

template <class T>
INLINE void store_some(T *p, Vec<T> v, int count) {
    if (count >= LANES<T>) return store(p, v);
    for (int i = 0; i < count; i++) p[i] = v[i];
}
#endif

// bfloat16, the upper half of a float. In rows of a multiple of PAIR elements: those of two vectors share words, the
// first in the lower halves, so that either is one instruction away from floats.
struct Half {
    uint16_t bits;
};

constexpr int PAIR = 2 * LANES<float>;

// Elements c.. of a row of `size`, `c` a multiple of V; zeros behind them.
template <class T>
INLINE Vec<T> part(const T *row, int c, int size) {
    return load_some(row + c, size - c);
}
INLINE Vec<float> part(const Half *row, int c, int) {
    Vec<uint32_t> words;
    std::memcpy(&words, row + c / PAIR * PAIR, sizeof words);
    return (Vec<float>)(c % PAIR ? words & 0xffff0000u : words << 16);
}

template <class T>
INLINE Vec<T> all(T x) {
    return x - Vec<T>{};
}

// a b + c, rounded once where the machine can: the same everywhere, as the compiler may not contract by itself.
template <class T>
INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
    return a * b + c;
}
#if defined(__AVX512F__)
template <>
INLINE Vec<float> fma<float>(Vec<float> a, Vec<float> b, Vec<float> c) {
    return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
template <>
INLINE Vec<double> fma<double>(Vec<double> a, Vec<double> b, Vec<double> c) {
    return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__FMA__)
template <>
INLINE Vec<float> fma<float>(Vec<float> a, Vec<float> b, Vec<float> c) {
    return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
template <>
INLINE Vec<double> fma<double>(Vec<double> a, Vec<double> b, Vec<double> c) {
    return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#endif

// e^x; a NaN stays one. float: Cephes' polynomial, 2 ulp; double: the library's, lane by lane.
template <class T>
INLINE Vec<T> exp(Vec<T> x);

template <>
INLINE Vec<double> exp<double>(Vec<double> x) {
    for (int i = 0; i < LANES<double>; i++) x[i] = std::exp(x[i]);
    return x;
}

template <>
INLINE Vec<float> exp<float>(Vec<float> x) {
    const Vec<float> low = all(-87.3f), high = all(88.3f), magic = all(12582912.0f);  // 1.5 * 2^23 rounds to integers
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Vec<float> shifted = fma<float>(x, all(1.44269504088896341f), magic);
    const Vec<float> n = shifted - magic;
    Vec<float> r = fma<float>(n, all(-0.693359375f), x);
    r = fma<float>(n, all(2.12194440e-4f), r);
    Vec<float> p = all(1.9875691500e-4f);
    p = fma<float>(p, r, all(1.3981999507e-3f));
    p = fma<float>(p, r, all(8.3334519073e-3f));
    p = fma<float>(p, r, all(4.1665795894e-2f));
    p = fma<float>(p, r, all(1.6666665459e-1f));
    p = fma<float>(p, r, all(5.0000001201e-1f));
    p = fma<float>(p, r * r, r) + all(1.0f);
    const Ints power = ((Ints)shifted - (Ints)magic + 127) << 23;
    return p * (Vec<float>)power;
}

template <class T>
INLINE Vec<T> silu(Vec<T> x) {
    return x / (all(T(1)) + exp<T>(-x));
}

// ---- sums over lanes: always (l, l + V/2), then (l, l + V/4), ... ---------------------------------------------------

template <class T>
struct Index {
    using type = Ints;
};
template <>
struct Index<double> {
    using type = Longs;
};

// Lanes of the groups of `width` of a and b, interleaved: their lower halves, or their upper halves.
template <class T, int WIDTH>
INLINE Vec<T> halves(Vec<T> a, Vec<T> b, bool upper) {
    constexpr int V = LANES<T>, HALF = WIDTH / 2;
    typename Index<T>::type mask = {};
    for (int p = 0; p < V; p++) {
        const int group = p / HALF;
        mask[p] = group / 2 * WIDTH + p % HALF + (upper ? HALF : 0) + (group % 2 ? V : 0);
    }
    return __builtin_shuffle(a, b, mask);
}

// halves(a, b, false) + halves(a, b, true), to the bit: half of the lanes are where they belong already.
template <class T, int WIDTH>
INLINE Vec<T> added_halves(Vec<T> a, Vec<T> b) {
    constexpr int V = LANES<T>, HALF = WIDTH / 2;
    typename Index<T>::type is_upper = {}, other = {};
    for (int p = 0; p < V; p++) {
        is_upper[p] = p & HALF ? -1 : 0;
        other[p] = p & HALF ? V + p - HALF : p + HALF;
    }
    return (is_upper ? b : a) + __builtin_shuffle(a, b, other);
}

// N vectors of one row, or of V rows folded into one.
template <class T, int N>
struct Several {
    Vec<T> v[N];
};

// Rows r to r + 2 V / WIDTH - 1, folded. Rows are asked for when they can be folded, so that few are held at a time.
template <class T, int N, int WIDTH, class Row>
INLINE Several<T, N> folded(const Row &row, int r) {
    if constexpr (WIDTH > LANES<T>) {
        return row(r);
    } else {
        Several<T, N> a = folded<T, N, 2 * WIDTH>(row, r);
        const Several<T, N> b = folded<T, N, 2 * WIDTH>(row, r + LANES<T> / WIDTH);
        for (int n = 0; n < N; n++) a.v[n] = added_halves<T, WIDTH>(a.v[n], b.v[n]);
        return a;
    }
}

// Lane r of vector n of the result is the sum of the lanes of vector n of row(r), for rows 0 to V - 1.
template <class T, int N, class Row>
INLINE Several<T, N> sums(const Row &row) {
    constexpr int V = LANES<T>;
    typename Index<T>::type order = {};  // folding leaves row r where its bits stand in reverse
    for (int r = 0; r < V; r++) {
        for (int bit = 1; bit < V; bit *= 2) order[r] |= r & bit ? V / 2 / bit : 0;
    }
    Several<T, N> s = folded<T, N, 2>(row, 0);
    for (int n = 0; n < N; n++) s.v[n] = __builtin_shuffle(s.v[n], order);
    return s;
}

// The same of `count` rows; the sums of those that are missing are zero.
template <class T, int N, class Row>
INLINE Several<T, N> sums_of(int count, const Row &row) {
    if (count >= LANES<T>) return sums<T, N>(row);
    return sums<T, N>([&](int r) INLINED { return r < count ? row(r) : Several<T, N>{}; });
}

template <class T, int HALF = LANES<T> / 2>
INLINE T sum(Vec<T> v) {
    if constexpr (HALF == 0) {
        return v[0];
    } else {
        typename Index<T>::type other = {};
        for (int p = 0; p < LANES<T>; p++) other[p] = p ^ HALF;
        return sum<T, HALF / 2>(v + __builtin_shuffle(v, other));
    }
}

// The sum over lanes of sum_i a_i b_i for n elements, zeros behind them.
template <class T>
INLINE T dot(const T *a, const T *b, int n) {
    Vec<T> s = {};
    for (int c = 0; c < n; c += LANES<T>) s = fma<T>(load_some(a + c, n - c), load_some(b + c, n - c), s);
    return sum<T>(s);
}

// v [V][V] transposed in place: the same interleaving, without sums.
template <class T, int WIDTH = LANES<T>>
INLINE void transpose(Vec<T> *v) {
    constexpr int V = LANES<T>;
    if constexpr (WIDTH > 1) {
        Vec<T> next[V];
        for (int block = 0; block < V; block += WIDTH) {  // rows block.. hold the lanes with the same leading bits
            for (int i = 0; i < WIDTH / 2; i++) {
                const Vec<T> a = v[block + i], b = v[block + i + WIDTH / 2];
                next[block + i] = halves<T, WIDTH>(a, b, false);
                next[block + WIDTH / 2 + i] = halves<T, WIDTH>(a, b, true);
            }
        }
        for (int i = 0; i < V; i++) v[i] = next[i];
        transpose<T, WIDTH / 2>(v);
    }
}
