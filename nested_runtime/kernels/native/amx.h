// Products of bytes by the processor's tile unit (AMX), where there is one: the sums of `dot4`, sixteen rows at a time.
#pragma once

constexpr int TILE_ROWS = 16, TILE_BYTES = 64;  // of a row

#if defined(__AMX_INT8__) && defined(__AVX512F__)
#include <sys/syscall.h>
#include <unistd.h>

#include "vector.h"

#define HAS_AMX 1

// Whether the system lets this process use tiles: it has to be asked, once.
inline bool may_use_tiles() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool may = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return may;
}

// Tiles 0 to 3: sums of sixteen rows and four vectors of outputs; 4: rows of x; 5: weights. All of 16 x 64 bytes.
class Tiles {
    struct alignas(64) Config {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
    };

  public:
    Tiles() {
        const Config config;
        settle(&config);
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }  // else every switch of threads saves 8 KB
    Tiles(const Tiles &) = delete;

    // sums[j][row] = x [16, 4 words] times vector j of a panel [words, 4 vectors]; `words` is a multiple of 16.
    static INLINE void multiply(const uint8_t *x, const int32_t *panel, int words, Ints (*sums)[TILE_ROWS]) {
        constexpr int WIDTH = 4 * LANES<float>;
        settle(x);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int i = 0; i < words; i += 16) {
            const int32_t *w = panel + size_t(i) * WIDTH;
            _tile_loadd(4, x + 4 * i, 4 * words);
            _tile_loadd(5, w, 4 * WIDTH);
            _tile_dpbusd(0, 4, 5);
            _tile_loadd(5, w + LANES<float>, 4 * WIDTH);
            _tile_dpbusd(1, 4, 5);
            _tile_loadd(5, w + 2 * LANES<float>, 4 * WIDTH);
            _tile_dpbusd(2, 4, 5);
            _tile_loadd(5, w + 3 * LANES<float>, 4 * WIDTH);
            _tile_dpbusd(3, 4, 5);
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
    }

  private:
    // What was written is in memory: gcc 12's intrinsics do not say that they read it.
    static INLINE void settle(const void *p) { asm volatile("" : : "r"(p) : "memory"); }
};
#endif
