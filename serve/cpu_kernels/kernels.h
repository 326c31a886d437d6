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

#include "vectors.h"

namespace loradock {

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

#if defined(WIDE) && defined(__FLT16_MANT_DIG__)
// float16 by hand: compilers of today convert it one by one.
template <>
inline float dot<half>(const half* x, const half* a, int n) {
  Floats sum = spread(0.f);
  for (int k = 0; k < n; k += 16) sum = fma(wide(x + k, n - k), wide(a + k, n - k), sum);
  return sum_of(sum);
}

template <>
inline void add_scaled<half>(float* sum, float v, const half* b, int n) {
  const Floats by = spread(v);
  for (int o = 0; o < n; o += 16) store(sum + o, fma(by, wide(b + o, n - o), load(sum + o, n - o)), n - o);
}

template <>
inline void add_to<half>(half* y, const float* sum, int n) {
  for (int o = 0; o < n; o += 16) store(y + o, wide(y + o, n - o) + load(sum + o, n - o), n - o);
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

// ---- bfloat16 in vectors ---------------------------------------------------------------------------------------------

#ifdef WIDE
struct Fast {
  template <int T, int R>
  static ALWAYS void shrink_tile(const bf16* a, int in, const bf16* x, int64_t stride, const int32_t* tokens, bf16* t,
                                 int64_t t_stride) {
    Floats sum[SUMS];
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) sum[i] = spread(0.f);
    const bf16* xs[T];
    for (int i = 0; i < T; i++) xs[i] = x + tokens[i] * stride;
    int k = 0;
    for (; k + 32 <= in; k += 32) {
      Ints xv[T];
#pragma GCC unroll 4
      for (int i = 0; i < T; i++) xv[i] = load64(xs[i] + k);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const Ints av = load64(a + size_t(r) * in + k);
#pragma GCC unroll 4
        for (int i = 0; i < T; i++) sum[i * R + r] = dot2(sum[i * R + r], av, xv[i]);
      }
    }
    if (k < in) {
      for (int r = 0; r < R; r++) {
        const Ints av = load_pairs(a + size_t(r) * in + k, in - k);
        for (int i = 0; i < T; i++) sum[i * R + r] = dot2(sum[i * R + r], av, load_pairs(xs[i] + k, in - k));
      }
    }
    alignas(64) bf16 done[SUMS];
    sums(sum, done);
    for (int i = 0; i < T; i++) std::memcpy(t + i * t_stride, done + i * R, R * sizeof(bf16));
  }

  template <int T>
  static void shrink_rows(const bf16* a, int in, const bf16* x, int64_t stride, const int32_t* tokens, int rows, bf16* t,
                          int64_t t_stride) {
    constexpr int R = SUMS / T;  // as many rows of A as there is room for sums
    int r = 0;
    if constexpr (R > 8)
      for (; r + R <= rows; r += R) shrink_tile<T, R>(a + size_t(r) * in, in, x, stride, tokens, t + r, t_stride);
    if constexpr (R >= 8)
      for (; r + 8 <= rows; r += 8) shrink_tile<T, 8>(a + size_t(r) * in, in, x, stride, tokens, t + r, t_stride);
    constexpr int FEW = std::min(R, 4);
    for (; r + FEW <= rows; r += FEW) shrink_tile<T, FEW>(a + size_t(r) * in, in, x, stride, tokens, t + r, t_stride);
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

  // 16 U outputs of T tokens; `count` of them, where U is 1.
  template <int T, int U>
  static ALWAYS void expand_tile(const bf16* const* ts, int pairs, const char* b, bf16* const* ys, int count) {
    Floats sum[T * U];
#pragma GCC unroll 16
    for (int i = 0; i < T * U; i++) sum[i] = spread(0.f);
    for (int k = 0; k < pairs; k++) {
      Ints bv[U];
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) bv[u] = load64(b + (size_t(u) * pairs + k) * 64);
#pragma GCC unroll 4
      for (int i = 0; i < T; i++) {
        const Ints tv = pair_at(ts[i] + 2 * k);
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) sum[i * U + u] = dot2(sum[i * U + u], bv[u], tv);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < T; i++)
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) {
        bf16* y = ys[i] + 16 * u;
        if (U == 1)
          store(y, wide(y, count) + sum[i * U + u], count);
        else
          store(y, wide(y) + sum[i * U + u]);
      }
  }

  template <int T>
  static void expand_some(const char* b, int pairs, const bf16* const* ts, bf16* const* ys, int count) {
    constexpr int U = std::min(4, SUMS / T);
    bf16* at[T];
    for (int i = 0; i < T; i++) at[i] = ys[i];
    int o = 0;
    if constexpr (U > 1)
      for (; o + 16 * U <= count; o += 16 * U) {
        expand_tile<T, U>(ts, pairs, b + size_t(o) * pairs * 4, at, 0);
        for (int i = 0; i < T; i++) at[i] += 16 * U;
      }
    for (; o < count; o += 16) {
      expand_tile<T, 1>(ts, pairs, b + size_t(o) * pairs * 4, at, count - o);
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
