// What one token needs of an adapter: the step's plan, the layers' packed weights, and the products that work on them.
//
// A plan holds a step's tokens, grouped by slot. A layer holds pointers to vLLM's stacked A, which is read where it lies,
// and a packed copy of each slot's B, cut to the adapter's true rank.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <omp.h>

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define WIDE 1
#endif

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

constexpr int CHUNK = 32;         // tokens of one slot that are worked on together
constexpr int FEW_ROWS = 64, FEW_CHUNK = 8;  // fewer in so short a step: there is work for every thread
constexpr int OUT_BLOCK = 768;    // columns of y in one piece of work
constexpr int ROW_BLOCK = 16;     // rows of A in one piece of work
constexpr int64_t SERIAL = 150000;  // multiply-adds that are done sooner than a second thread wakes up

struct Chunk {
  int slot, begin, end;
};

struct Plan {
  int rows = 0;                 // of x and y
  std::vector<int32_t> tokens;  // those of them that have an adapter, grouped by slot
  std::vector<Chunk> chunks;
  std::vector<int32_t> slot, place;  // of every row: its slot, and its place among `tokens`; -1 for none
};

struct Weights {
  int rank = 0;
  const void* a = nullptr;  // [rank, in], in place
  std::vector<char> b;      // packed
  // Where it begins: at a cache line.
  const char* packed() const { return reinterpret_cast<const char*>((reinterpret_cast<uintptr_t>(b.data()) + 63) & ~uintptr_t(63)); }
};

struct Slice {
  int in, out, offset;
  const char *a, *b;     // stacked: [slots, max_rank, in], [slots, out, max_rank]
  bool a_by_row;         // an embedding's A is [slots, in, max_rank], and looked up by vLLM itself
  std::vector<Weights> slots;
};

struct Layer {
  Plan* plan;
  int dtype;     // 0 float32, 1 bfloat16, 2 float16: of A, B, x and y
  int max_rank;
  int size;      // bytes of an element
  std::vector<Slice> slices;
};

extern std::vector<std::unique_ptr<Plan>> plans;
extern std::vector<std::unique_ptr<Layer>> layers;

#ifdef WIDE
inline int depth(int rank) { return (rank + 1) / 2 * 2; }
#endif

// ---- any type, any processor: the compiler vectorizes ----------------------------------------------------------------

template <class T>
inline float dot(const T* x, const T* a, int n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int k = 0; k < n; k++) sum += to_float(x[k]) * to_float(a[k]);
  return sum;
}

template <class T>
inline void add_scaled(float* sum, float v, const T* b, int n) {
#pragma omp simd
  for (int o = 0; o < n; o++) sum[o] += v * to_float(b[o]);
}

template <class T>
inline void add_to(T* y, const float* sum, int n) {
#pragma omp simd
  for (int o = 0; o < n; o++) put(y[o], to_float(y[o]) + sum[o]);
}

#ifdef WIDE
// The lanes of a vector of 16 that hold one of the `left` values that remain.
inline __mmask16 lanes(int left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1); }
#endif

#if defined(WIDE) && defined(__FLT16_MANT_DIG__)
// float16 by hand: compilers of today convert it one by one.
inline __m512 wide(const half* at, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, at)); }

template <>
inline float dot<half>(const half* x, const half* a, int n) {
  __m512 sum = _mm512_setzero_ps();
  for (int k = 0; k < n; k += 16) sum = _mm512_fmadd_ps(wide(x + k, lanes(n - k)), wide(a + k, lanes(n - k)), sum);
  return _mm512_reduce_add_ps(sum);
}

template <>
inline void add_scaled<half>(float* sum, float v, const half* b, int n) {
  const __m512 by = _mm512_set1_ps(v);
  for (int o = 0; o < n; o += 16) {
    const __mmask16 mask = lanes(n - o);
    const __m512 was = _mm512_maskz_loadu_ps(mask, sum + o);
    _mm512_mask_storeu_ps(sum + o, mask, _mm512_fmadd_ps(by, wide(b + o, mask), was));
  }
}

template <>
inline void add_to<half>(half* y, const float* sum, int n) {
  for (int o = 0; o < n; o += 16) {
    const __mmask16 mask = lanes(n - o);
    const __m512 now = _mm512_add_ps(wide(y + o, mask), _mm512_maskz_loadu_ps(mask, sum + o));
    _mm256_mask_storeu_epi16(y + o, mask, _mm512_cvtps_ph(now, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}
#endif

template <class T>
struct Plain {
  static void shrink(const Weights& w, int in, const T* x, int64_t stride, const int32_t* tokens, int n, int row, int rows,
                     T* t, int64_t t_stride) {
    const T* a = static_cast<const T*>(w.a);
    for (int i = 0; i < n; i++)
      for (int r = row; r < row + rows; r++)
        put(t[i * t_stride + r], dot(x + tokens[i] * stride, a + size_t(r) * in, in));
  }

  static void expand(const Weights& w, int out, const T* t, int64_t t_stride, const int32_t* rows_of_t, T* y,
                     int64_t stride, const int32_t* tokens, int n, int first, int count) {
    const T* b = reinterpret_cast<const T*>(w.packed()) + first;
    float sum[OUT_BLOCK];
    for (int i = 0; i < n; i++) {
      const T* ti = t + (rows_of_t ? rows_of_t[i] : i) * t_stride;
      std::fill(sum, sum + count, 0.f);
      for (int k = 0; k < w.rank; k++) add_scaled(sum, to_float(ti[k]), b + size_t(k) * out, count);
      add_to(y + tokens[i] * stride + first, sum, count);
    }
  }
};

// ---- bfloat16 with AVX-512 ---------------------------------------------------------------------------------------------

#ifdef WIDE
// Of 32 bfloat16 in pairs: the first of each, and the second.
inline __m512 firsts(__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
inline __m512 seconds(__m512i v) { return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xffff0000))); }

#ifdef __AVX512BF16__
constexpr bool PAIRS = true;
// sum + a b, summed over the two of each pair.
inline __m512 dot2(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
inline __m256i narrow(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
#else
constexpr bool PAIRS = false;
inline __m512 dot2(__m512 sum, __m512i a, __m512i b) {
  return _mm512_fmadd_ps(seconds(a), seconds(b), _mm512_fmadd_ps(firsts(a), firsts(b), sum));
}
inline __m256i narrow(__m512 v) {  // to the nearest, ties to even; a NaN stays one
  const __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 none = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(up, none, _mm512_set1_epi32(0x7fc00000)), 16));
}
#endif

// Sixteen vectors become the sixteen sums of their lanes.
inline __m512 sums(const __m512* v) {
  __m512 s[8], q[4];
  for (int i = 0; i < 8; i++)
    s[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(s[2 * i]), b = _mm512_castps_pd(s[2 * i + 1]);
    q[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const __m512 lo = _mm512_add_ps(_mm512_shuffle_f32x4(q[0], q[1], 0x88), _mm512_shuffle_f32x4(q[0], q[1], 0xdd));
  const __m512 hi = _mm512_add_ps(_mm512_shuffle_f32x4(q[2], q[3], 0x88), _mm512_shuffle_f32x4(q[2], q[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(lo, hi, 0x88), _mm512_shuffle_f32x4(lo, hi, 0xdd));
}

struct Fast {
  template <int T, int R>
  static inline __attribute__((always_inline)) void shrink_tile(const bf16* a, int in, const bf16* x, int64_t stride,
                                                                const int32_t* tokens, bf16* t, int64_t t_stride) {
    __m512 sum[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_ps();
    const bf16* xs[T];
    for (int i = 0; i < T; i++) xs[i] = x + tokens[i] * stride;
    int k = 0;
    for (; k + 32 <= in; k += 32) {
      __m512i xv[T];
#pragma GCC unroll 4
      for (int i = 0; i < T; i++) xv[i] = _mm512_loadu_si512(xs[i] + k);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const __m512i av = _mm512_loadu_si512(a + size_t(r) * in + k);
#pragma GCC unroll 4
        for (int i = 0; i < T; i++) sum[i * R + r] = dot2(sum[i * R + r], av, xv[i]);
      }
    }
    if (k < in) {
      const __mmask32 mask = (__mmask32)((1u << (in - k)) - 1);
      for (int r = 0; r < R; r++) {
        const __m512i av = _mm512_maskz_loadu_epi16(mask, a + size_t(r) * in + k);
        for (int i = 0; i < T; i++)
          sum[i * R + r] = dot2(sum[i * R + r], av, _mm512_maskz_loadu_epi16(mask, xs[i] + k));
      }
    }
    alignas(64) bf16 done[32];
    _mm256_store_si256((__m256i*)done, narrow(sums(sum)));
    for (int i = 0; i < T; i++) std::memcpy(t + i * t_stride, done + i * R, R * sizeof(bf16));
  }

  template <int T>
  static void shrink_rows(const bf16* a, int in, const bf16* x, int64_t stride, const int32_t* tokens, int rows, bf16* t,
                          int64_t t_stride) {
    int r = 0;
    if constexpr (T == 1)
      for (; r + 16 <= rows; r += 16) shrink_tile<1, 16>(a + size_t(r) * in, in, x, stride, tokens, t + r, t_stride);
    if constexpr (T <= 2)
      for (; r + 8 <= rows; r += 8) shrink_tile<T, 8>(a + size_t(r) * in, in, x, stride, tokens, t + r, t_stride);
    for (; r + 4 <= rows; r += 4) shrink_tile<T, 4>(a + size_t(r) * in, in, x, stride, tokens, t + r, t_stride);
    for (; r < rows; r++) shrink_tile<T, 1>(a + size_t(r) * in, in, x, stride, tokens, t + r, t_stride);
  }

  static void shrink(const Weights& w, int in, const bf16* x, int64_t stride, const int32_t* tokens, int n, int row,
                     int rows, bf16* t, int64_t t_stride) {
    const bf16* a = static_cast<const bf16*>(w.a) + size_t(row) * in;
    int i = 0;
    for (; i + 4 <= n; i += 4) shrink_rows<4>(a, in, x, stride, tokens + i, rows, t + i * t_stride + row, t_stride);
    for (; i + 2 <= n; i += 2) shrink_rows<2>(a, in, x, stride, tokens + i, rows, t + i * t_stride + row, t_stride);
    for (; i < n; i++) shrink_rows<1>(a, in, x, stride, tokens + i, rows, t + i * t_stride + row, t_stride);
    if (row + rows == w.rank && w.rank % 2)  // B's last pair ends in a zero, and 0 * NaN is NaN
      for (i = 0; i < n; i++) t[i * t_stride + w.rank].bits = 0;
  }

  template <int T, int U>
  static inline __attribute__((always_inline)) void expand_tile(const bf16* const* ts, int pairs, const char* b,
                                                                bf16* const* ys, __mmask16 mask) {
    __m512 sum[T * U];
#pragma GCC unroll 16
    for (int i = 0; i < T * U; i++) sum[i] = _mm512_setzero_ps();
    for (int k = 0; k < pairs; k++) {
      __m512i bv[U];
#pragma GCC unroll 4
      for (int u = 0; u < U; u++)
        bv[u] = _mm512_load_si512(b + (size_t(u) * pairs + k) * 64);
#pragma GCC unroll 4
      for (int i = 0; i < T; i++) {
        int pair;
        std::memcpy(&pair, ts[i] + 2 * k, 4);
        const __m512i tv = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) sum[i * U + u] = dot2(sum[i * U + u], bv[u], tv);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < T; i++)
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) {
        bf16* y = ys[i] + 16 * u;
        const __m256i old = U == 1 ? _mm256_maskz_loadu_epi16(mask, y) : _mm256_loadu_si256((const __m256i*)y);
        const __m512 was = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(old), 16));
        const __m256i now = narrow(_mm512_add_ps(was, sum[i * U + u]));
        if (U == 1)
          _mm256_mask_storeu_epi16(y, mask, now);
        else
          _mm256_storeu_si256((__m256i*)y, now);
      }
  }

  template <int T>
  static void expand_some(const char* b, int pairs, const bf16* const* ts, bf16* const* ys, int count) {
    bf16* at[T];
    for (int i = 0; i < T; i++) at[i] = ys[i];
    int o = 0;
    for (; o + 64 <= count; o += 64) {
      expand_tile<T, 4>(ts, pairs, b + size_t(o) * pairs * 4, at, 0xffff);
      for (int i = 0; i < T; i++) at[i] += 64;
    }
    for (; o < count; o += 16) {
      expand_tile<T, 1>(ts, pairs, b + size_t(o) * pairs * 4, at, lanes(count - o));
      for (int i = 0; i < T; i++) at[i] += 16;
    }
  }

  // `first` is a multiple of 16.
  static void expand(const Weights& w, int, const bf16* t, int64_t t_stride, const int32_t* rows_of_t, bf16* y,
                     int64_t stride, const int32_t* tokens, int n, int first, int count) {
    const int pairs = depth(w.rank) / 2;
    const char* b = w.packed() + size_t(first) * pairs * 4;
    const bf16* ts[CHUNK];
    bf16* ys[CHUNK];
    for (int i = 0; i < n; i++) {
      ts[i] = t + (rows_of_t ? rows_of_t[i] : i) * t_stride;
      ys[i] = y + tokens[i] * stride + first;
    }
    int i = 0;
    for (; i + 4 <= n; i += 4) expand_some<4>(b, pairs, ts + i, ys + i, count);
    for (; i + 2 <= n; i += 2) expand_some<2>(b, pairs, ts + i, ys + i, count);
    for (; i < n; i++) expand_some<1>(b, pairs, ts + i, ys + i, count);
  }
};
#endif

}  // namespace loradock
