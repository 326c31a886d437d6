// Products of many rows by the processor's tiles (AMX): sums of 32 rows and 32 outputs at a time, in bfloat16. With LORADOCK_TILES
// they are added up one by one, to test what is around them on any AVX-512.
#pragma once

#include "vectors.h"

#ifdef WIDE

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__) && !defined(LORADOCK_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#define AMX 1
#endif

namespace loradock {

// Whether there are tiles. The kernel lets a process have them that asks for them.
#ifdef AMX
inline bool asked_for_tiles() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
}
inline const bool TILES = asked_for_tiles();
#elif defined(LORADOCK_TILES) && defined(__AVX512BW__)
constexpr bool TILES = true;
#else
constexpr bool TILES = false;
#endif

constexpr int TALL_TILE = 32;  // rows of a tile, at most
constexpr int DEEP = 32;       // inputs that are multiplied at a time

// A thread's tiles while it multiplies with 32 outputs: so many rows, up to 32.
class Tiles {
 public:
  explicit Tiles(int rows) : rows_(rows) {
#ifdef AMX
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};  // of a tile's row
      uint8_t rows[16] = {};
    } shape;
    const int one = rows < 16 ? rows : 16, other = rows - one;
    const int of[8] = {one, one, other, other, one, other, 16, 16};  // four of sums, two of rows, two of weights
    for (int i = 0; i < 8; i++) shape.rows[i] = uint8_t(of[i]), shape.bytes[i] = of[i] ? 64 : 0;
    asm volatile("" : : "r"(&shape) : "memory");  // the intrinsic says that it reads eight bytes
    _tile_loadconfig(&shape);
#endif
  }
  ~Tiles() {
#ifdef AMX
    _tile_release();
#endif
  }
  Tiles(const Tiles&) = delete;

  // sums[rows][32] plus products of `steps` times 32 inputs: rows of 64 bytes at x one behind the other, `apart` bytes from step to
  // step; at w 16 pairs of 32 outputs a step. `begins`: the sums are 0 before.
  template <class Beside>
  ALWAYS void add(float* sums, bool begins, const uint8_t* x, int64_t apart, const uint8_t* w, int steps, Beside&& beside) {
    const Operands of{sums, 128, begins, x, 64, apart, w, 128, steps};
    if (rows_ > 16)
      add<true>(of, beside);
    else
      add<false>(of, beside);
  }

  // sums[rows][32 N] plus products of rows of `steps` times 32 elements with pairs of them: of up to 16 rows. Each has so many bytes
  // from row to row, or pair to pair.
  void multiply(float* sums, int64_t sums_row, bool begins, const void* x, int64_t x_row, const void* pairs, int64_t pairs_row, int steps,
                int columns) {
    for (int at = 0; at < columns; at += 32)
      add<false>({sums + at, sums_row, begins, static_cast<const uint8_t*>(x), x_row, 64, static_cast<const uint8_t*>(pairs) + 4 * at,
                  pairs_row, steps},
                 [](int) {});
  }

 private:
  struct Operands {
    float* sums;
    int64_t sums_row;
    bool begins;
    const uint8_t* x;
    int64_t x_row, x_step;
    const uint8_t* w;
    int64_t pair;
    int steps;
  };

  // BOTH: of more than 16 rows.
  template <bool BOTH, class Beside>
  ALWAYS void add(const Operands& of, Beside&& beside) {
    const uint8_t *x = of.x, *w = of.w;
#ifdef AMX
    float* others = of.sums + 4 * of.sums_row;  // 16 rows further
    if (of.begins) {
      _tile_zero(0);
      _tile_zero(1);
      if (BOTH) _tile_zero(2);
      if (BOTH) _tile_zero(3);
    } else {
      _tile_loadd(0, of.sums, of.sums_row);
      _tile_loadd(1, of.sums + 16, of.sums_row);
      if (BOTH) _tile_loadd(2, others, of.sums_row);
      if (BOTH) _tile_loadd(3, others + 16, of.sums_row);
    }
    for (int s = 0; s < of.steps; s++, x += of.x_step, w += 16 * of.pair) {
      _tile_loadd(4, x, of.x_row);
      _tile_loadd(6, w, of.pair);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, w + 64, of.pair);
      _tile_dpbf16ps(1, 4, 7);
      if (BOTH) {
        _tile_loadd(5, x + 16 * of.x_row, of.x_row);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      beside(s);
    }
    _tile_stored(0, of.sums, of.sums_row);
    _tile_stored(1, of.sums + 16, of.sums_row);
    if (BOTH) _tile_stored(2, others, of.sums_row);
    if (BOTH) _tile_stored(3, others + 16, of.sums_row);
#else
    for (int s = 0; s < of.steps; s++, x += of.x_step, w += 16 * of.pair) {
      for (int i = 0; i < rows_; i++)
        for (int j = 0; j < 32; j++) {
          float& sum = of.sums[i * of.sums_row / 4 + j];
          if (of.begins && !s) sum = 0;
          for (int k = 0; k < DEEP; k++) {
            bf16 of_row, weight;
            std::memcpy(&of_row, x + i * of.x_row + 2 * k, 2), std::memcpy(&weight, w + k / 2 * of.pair + 4 * j + 2 * (k % 2), 2);
            sum += to_float(of_row) * to_float(weight);
          }
        }
      beside(s);
    }
#endif
  }

  int rows_;
};

// Of sixteen outputs the numbers of four inputs, bytes without a sign, as the weights that they stand for: two pairs of bfloat16,
// 128 bytes apart. A byte between an exponent and zeros is a float32: 256 and the number.
ALWAYS void widen4(uint8_t* to, Ints v, Floats scale, Floats offset) {
#ifdef __AVX512BW__
  const __m512i bits = _mm512_set1_epi32(255 << 15), exponent = _mm512_set1_epi32(0x43800000), half = _mm512_set1_epi32(0x8000);
  const Floats from = fma(spread(-256.f), scale, offset);
  auto weight = [&](__m512i shifted) {  // and half of what its lower 16 bits are at most, so that it is rounded without them
    const __m512i number = _mm512_ternarylogic_epi32(shifted, bits, exponent, 0xEA);
    return _mm512_add_epi32((__m512i)fma((__m512)number, scale, from), half);
  };
  auto pair = [](__m512i a, __m512i b) { return _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(a, 16), b); };
  store64(to, pair(weight(_mm512_slli_epi32(v, 15)), weight(_mm512_slli_epi32(v, 7))));
  store64(to + 128, pair(weight(_mm512_srli_epi32(v, 1)), weight(_mm512_srli_epi32(v, 9))));
#endif
}

}  // namespace loradock

#endif
