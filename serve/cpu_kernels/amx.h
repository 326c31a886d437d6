// Products of many rows by the processor's tiles (AMX): sums of 32 rows and 32 outputs at a time, in bfloat16, or of 16 rows and 16
// outputs in bytes. With LORADOCK_TILES they are added up one by one, to test what is around them on any AVX-512.
#pragma once

#include "vectors.h"

#ifdef WIDE

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && defined(__linux__) && !defined(LORADOCK_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#define AMX 1
#endif

#if defined(AMX) || (defined(LORADOCK_TILES) && defined(__AVX512BW__))
#define HAS_TILES 1
#endif

namespace loradock {

// Whether there are tiles. The kernel lets a process have them that asks for them.
#ifdef AMX
inline bool asked_for_tiles() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
}
inline const bool TILES = asked_for_tiles();
#elif defined(HAS_TILES)
constexpr bool TILES = true;
#else
constexpr bool TILES = false;
#endif

constexpr int TALL_TILE = 32;  // rows of a tile, at most
constexpr int DEEP = 32;       // inputs that are multiplied at a time

#ifdef AMX
struct alignas(64) TileShape {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a tile's row
  uint8_t rows[16] = {};

  void set(int tile, int its_rows, int row_bytes) { rows[tile] = uint8_t(its_rows), bytes[tile] = uint16_t(row_bytes); }
  void take() const {
    asm volatile("" : : "r"(this) : "memory");  // the intrinsic says that it reads eight bytes
    _tile_loadconfig(this);
  }
};
#endif

// A thread's tiles while it multiplies with 32 outputs: so many rows, up to 32.
class Tiles {
 public:
  explicit Tiles(int rows) : rows_(rows) {
#ifdef AMX
    TileShape shape;
    const int one = rows < 16 ? rows : 16, other = rows - one;
    const int of[8] = {one, one, other, other, one, other, 16, 16};  // four of sums, two of rows, two of weights
    for (int i = 0; i < 8; i++) shape.set(i, of[i], of[i] ? 64 : 0);
    shape.take();
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

// A thread's tiles while it multiplies bytes: those of up to 16 rows, `inputs` at a time (16 or 32), with those of 16 outputs.
class ByteTiles {
 public:
  ByteTiles(int rows, int inputs) : rows_(rows), inputs_(inputs) {
#ifdef AMX
    TileShape shape;
    for (int i = 0; i < 2; i++) {
      shape.set(i, rows, 64);                // sums
      shape.set(4 + i, rows, inputs);        // rows
      shape.set(6 + i, inputs / 4, 64);      // weights
    }
    shape.take();
#endif
  }
  ~ByteTiles() {
#ifdef AMX
    _tile_release();
#endif
  }
  ByteTiles(const ByteTiles&) = delete;

  // to[rows][16]: products of rows of bytes with a sign, 32 from row to row at x, and bytes without one: at w fours of 16 outputs, 128
  // bytes from four to four. ONE: by one half of the tiles, or the other: a product need not wait for the one before.
  template <int ONE>
  ALWAYS void multiply(int32_t* to, const int8_t* x, const uint8_t* w) const {
#ifdef AMX
    if constexpr (ONE) {
      _tile_zero(0);
      _tile_loadd(4, x, 32);
      _tile_loadd(6, w, 128);
      _tile_dpbsud(0, 4, 6);
      _tile_stored(0, to, 64);
    } else {
      _tile_zero(1);
      _tile_loadd(5, x, 32);
      _tile_loadd(7, w, 128);
      _tile_dpbsud(1, 5, 7);
      _tile_stored(1, to, 64);
    }
#else
    for (int i = 0; i < rows_; i++)
      for (int j = 0; j < 16; j++) {
        int32_t sum = 0;
        for (int k = 0; k < inputs_; k++) sum += x[32 * i + k] * w[k / 4 * 128 + 4 * j + k % 4];
        to[16 * i + j] = sum;
      }
#endif
  }

 private:
  int rows_, inputs_;
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
