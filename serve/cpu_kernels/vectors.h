// The words that the kernels are written in: 16 numbers at a time, as the processor at hand takes them. `avx512.h`,
// `avx2.h` and `neon.h` say the same words, the latter two with `halves.h`; a further processor needs one more such file.
// Where there is none, WIDE is not defined: the step is not there, and adapters are added by plain loops.
//
//   Floats, Ints     16 numbers of 32 bits; Ints are also 64 bytes, or 32 bfloat16 in 16 pairs
//   Shorts, Mask     16 numbers of 16 bits; which of 16 are meant
//   REGISTERS        how many Floats there is room for; less what one round of a loop needs, so many sums are held
//   APART            of a loop that wants all registers: what is around it keeps them where there are few
//   PAIRS            whether pairs of bfloat16 are multiplied as they are, or each half of them as float32
//   ZERO8, ZERO4     what `dot8` and `dot4` want added to weights of 8 and 4 bits
//   ROUNDS4          how often dot4 may add to zeros before `total_of` has to be taken; 0: always
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#define ALWAYS inline __attribute__((always_inline))

namespace loradock {

struct bf16 {
  uint16_t bits;
};
#if defined(__FLT16_MANT_DIG__)
typedef _Float16 half;
#else
struct half {
  uint16_t bits;
};
#endif

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) {
  uint32_t u = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline void put(float& out, float v) { out = v; }
inline void put(bf16& out, float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  // To the nearest, ties to even; a NaN stays one.
  if ((u & 0x7fffffff) > 0x7f800000)
    out.bits = uint16_t((u >> 16) | 0x40);
  else
    out.bits = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
#if defined(__FLT16_MANT_DIG__)
inline float to_float(half v) { return float(v); }
inline void put(half& out, float v) { out = half(v); }
#endif

// Of 16 numbers, where they take several registers.
template <class T>
struct Halves {
  T a, b;
};

// The matrix by which GFNI moves the upper 4 bits of bytes down.
constexpr long long DOWN4 = 0x1020408000000000;

}  // namespace loradock

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include "avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "avx2.h"
#include "halves.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "neon.h"
#include "halves.h"
#endif

#ifdef WIDE
namespace loradock {

#if defined(__znver1__) || defined(__znver2__) || defined(__znver3__) || defined(__znver4__) || defined(__znver5__) || !defined(__x86_64__)
constexpr bool INTEL = false;
#else
constexpr bool INTEL = true;
#endif

// What will be read, on its way into the nearest cache, or the next one; `once`: into the nearest, and from there to none. A
// model's weights would leave nothing of anything else in the caches, and what is between two steps would begin with cold ones.
// On Intel's processors that takes two to three times as long (Emerald Rapids, one core): there they pass the second cache.
ALWAYS void soon(const void* at) { __builtin_prefetch(at, 0, 3); }
ALWAYS void later(const void* at) { __builtin_prefetch(at, 0, 2); }
ALWAYS void once(const void* at) { INTEL ? __builtin_prefetch(at, 0, 2) : __builtin_prefetch(at, 0, 0); }

ALWAYS Ints spread4(const void* at) {  // four bytes, 16 times
  int four;
  std::memcpy(&four, at, 4);
  return spread(four);
}
ALWAYS Floats rounded(Floats v) { return wide(narrow(v)); }
ALWAYS Floats only(Mask mask, Floats v) { return choose(mask, v, spread(0.f)); }
// Bits [from, to) of 16, for `chosen`.
inline unsigned range(int from, int to) { return (~0u << from) & ((1u << to) - 1); }

// A pair of bfloat16 at an address, 16 times.
ALWAYS Ints pair_at(const bf16* at) { return spread4(at); }

// The sum and those of products of pairs, the two of each pair added up. Of many rows Intel's processors multiply the halves of pairs
// 1.6 times as fast.
#ifdef WIDE_DOT2
constexpr bool PAIRS = !INTEL;
#else
constexpr bool PAIRS = false;
ALWAYS Floats dot2(Floats sum, Ints a, Ints b) { return fma(seconds(a), seconds(b), fma(firsts(a), firsts(b), sum)); }
#endif

typedef std::conditional_t<PAIRS, bf16, float> Element;  // of what is multiplied with pairs of weights

// sums[i][j] += pairs of weights w[j], times the pair at x + i * stride.
template <int M, int N>
ALWAYS void dot2(Floats (&sums)[M][N], const Ints (&w)[N], const Element* x, int64_t stride) {
  if constexpr (PAIRS) {
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) {
      const Ints pair = spread4(x + i * stride);
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) sums[i][j] = dot2(sums[i][j], w[j], pair);
    }
  } else if constexpr (M == 1) {
    const Floats first = spread(to_float(x[0])), second = spread(to_float(x[1]));
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) sums[0][j] = fma(seconds(w[j]), second, fma(firsts(w[j]), first, sums[0][j]));
  } else {
    // One half of the weights after the other: both do not fit into the registers beside the sums.
#pragma GCC unroll 2
    for (int part = 0; part < 2; part++) {
      Floats one[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) one[j] = part ? seconds(w[j]) : firsts(w[j]);
#pragma GCC unroll 12
      for (int i = 0; i < M; i++) {
        const Floats by = spread(to_float(x[i * stride + part]));
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) sums[i][j] = fma(one[j], by, sums[i][j]);
      }
    }
  }
}

}  // namespace loradock
#endif
