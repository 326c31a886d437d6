// What one token needs of an adapter: the step's plan, the layers' packed weights, and the products that work on them.
//
// A plan holds a step's tokens, grouped by slot. A layer holds pointers to vLLM's stacked A, which is read where it lies,
// and a packed copy of each slot's B, cut to the adapter's true rank. Or copies of both in 8 bits: of sixteen adapters a
// step reads as many bytes as of a small model.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
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
  // In 8 bits A is packed too, [rank, in8(in)], and what either was divided by is multiplied in between: [rank].
  std::vector<char> a8;
  std::vector<float> scale;
  bool eight() const { return !scale.empty(); }
  // Where they begin: at a cache line.
  static const char* aligned(const std::vector<char>& v) {
    return reinterpret_cast<const char*>((reinterpret_cast<uintptr_t>(v.data()) + 63) & ~uintptr_t(63));
  }
  const char* packed() const { return aligned(b); }
  const char* first() const { return eight() ? aligned(a8) : static_cast<const char*>(a); }
};

// Bytes of a row of A in 8 bits.
inline int64_t in8(int in) { return (int64_t(in) + 63) / 64 * 64; }

struct Slice {
  int in, out, offset;
  const char *a, *b;     // stacked: [slots, max_rank, in], [slots, out, max_rank]
  bool a_by_row;         // an embedding's A is [slots, in, max_rank], and looked up by vLLM itself
  std::vector<Weights> slots;
};

struct Layer {
  Plan* plan;
  int dtype;     // 0 float32, 1 bfloat16, 2 float16: of A, B, x and y
  bool eight = false;  // what is loaded is kept in 8 bits
  int max_rank;
  int size;      // bytes of an element
  std::vector<Slice> slices;

  // Bytes of an element of t = x A^T, where a slice's begin in a row, and of a row: what is kept in 8 bits is multiplied
  // in float32.
  int64_t middle() const { return eight ? sizeof(float) : size; }
  int64_t middle_at(size_t slice) const { return int64_t(slice) * ((max_rank + 1) / 2 * 2) * middle(); }
  int64_t middle_row() const { return middle_at(slices.size()); }
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
                     char* t, int64_t t_row) {
    const T* a = static_cast<const T*>(w.a);
    for (int i = 0; i < n; i++)
      for (int r = row; r < row + rows; r++)
        put(reinterpret_cast<T*>(t + i * t_row)[r], dot(x + tokens[i] * stride, a + size_t(r) * in, in));
  }

  static void expand(const Weights& w, int out, const char* t, int64_t t_row, const int32_t* rows_of_t, T* y,
                     int64_t stride, const int32_t* tokens, int n, int first, int count) {
    const T* b = reinterpret_cast<const T*>(w.packed()) + first;
    float sum[OUT_BLOCK];
    for (int i = 0; i < n; i++) {
      const T* ti = reinterpret_cast<const T*>(t + (rows_of_t ? rows_of_t[i] : i) * t_row);
      std::fill(sum, sum + count, 0.f);
      for (int k = 0; k < w.rank; k++) add_scaled(sum, to_float(ti[k]), b + size_t(k) * out, count);
      add_to(y + tokens[i] * stride + first, sum, count);
    }
  }
};

// ---- bfloat16 in vectors ---------------------------------------------------------------------------------------------

#ifdef WIDE
struct Fast {
  // Of what t = x A^T is made, where A and B are kept as E.
  template <class E>
  using Middle = std::conditional_t<std::is_same_v<E, int8_t>, float, bf16>;

  // E: what A and B are kept in, bf16 or int8_t. stride_a: from row to row of A. scale: of rows in 8 bits.
  template <class E, int T, int R>
  static ALWAYS void shrink_tile(const E* a, int64_t stride_a, const float* scale, int in, const bf16* x, int64_t stride,
                                 const int32_t* tokens, Middle<E>* t, int64_t t_stride) {
    Floats sum[SUMS];
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) sum[i] = spread(0.f);
    const bf16* xs[T];
    for (int i = 0; i < T; i++) xs[i] = x + tokens[i] * stride;
    int k = 0;
    if constexpr (std::is_same_v<E, int8_t>) {
      for (; k + 16 <= in; k += 16) {
        Floats xv[T];
#pragma GCC unroll 4
        for (int i = 0; i < T; i++) xv[i] = wide(xs[i] + k);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
          const Floats av = wide(a + r * stride_a + k);
#pragma GCC unroll 4
          for (int i = 0; i < T; i++) sum[i * R + r] = fma(av, xv[i], sum[i * R + r]);
        }
      }
      if (k < in)
        for (int r = 0; r < R; r++)
          for (int i = 0; i < T; i++) sum[i * R + r] = fma(wide(a + r * stride_a + k), wide(xs[i] + k, in - k), sum[i * R + r]);
    } else {
      for (; k + 32 <= in; k += 32) {
        Ints xv[T];
#pragma GCC unroll 4
        for (int i = 0; i < T; i++) xv[i] = load64(xs[i] + k);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
          const Ints av = load64(a + r * stride_a + k);
#pragma GCC unroll 4
          for (int i = 0; i < T; i++) sum[i * R + r] = dot2(sum[i * R + r], av, xv[i]);
        }
      }
      if (k < in) {
        for (int r = 0; r < R; r++) {
          const Ints av = load_pairs(a + r * stride_a + k, in - k);
          for (int i = 0; i < T; i++) sum[i * R + r] = dot2(sum[i * R + r], av, load_pairs(xs[i] + k, in - k));
        }
      }
    }
    alignas(64) Middle<E> done[SUMS];
    sums(sum, done);
    for (int i = 0; i < T; i++)
      if constexpr (std::is_same_v<E, int8_t>)
        for (int r = 0; r < R; r++) t[i * t_stride + r] = done[i * R + r] * scale[r];
      else
        std::memcpy(t + i * t_stride, done + i * R, R * sizeof(bf16));
  }

  template <int T, class E>
  static void shrink_rows(const E* a, int64_t stride_a, const float* scale, int in, const bf16* x, int64_t stride,
                          const int32_t* tokens, int rows, Middle<E>* t, int64_t t_stride) {
    constexpr int R = SUMS / T;  // as many rows of A as there is room for sums
    constexpr int FEW = std::min(R, 4);
    int r = 0;
    auto tile = [&](auto count) {
      constexpr int N = decltype(count)::value;
      for (; r + N <= rows; r += N)
        shrink_tile<E, T, N>(a + r * stride_a, stride_a, scale + r, in, x, stride, tokens, t + r, t_stride);
    };
    if constexpr (R > 8) tile(std::integral_constant<int, R>());
    if constexpr (R >= 8) tile(std::integral_constant<int, 8>());
    tile(std::integral_constant<int, FEW>());
    tile(std::integral_constant<int, 1>());
  }

  // `row` and `rows`: of A. t: where the first token's begins, t_row bytes before the next one's.
  template <class E>
  static void shrink_as(const Weights& w, int64_t stride_a, int in, const bf16* x, int64_t stride, const int32_t* tokens,
                        int n, int row, int rows, char* t_at, int64_t t_row) {
    const E* a = reinterpret_cast<const E*>(w.first()) + row * stride_a;
    const float* scale = w.scale.data() + row;
    auto* t = reinterpret_cast<Middle<E>*>(t_at) + row;
    const int64_t t_stride = t_row / int64_t(sizeof(*t));
    int i = 0;
    for (; i + 4 <= n; i += 4) shrink_rows<4>(a, stride_a, scale, in, x, stride, tokens + i, rows, t + i * t_stride, t_stride);
    for (; i + 2 <= n; i += 2) shrink_rows<2>(a, stride_a, scale, in, x, stride, tokens + i, rows, t + i * t_stride, t_stride);
    for (; i < n; i++) shrink_rows<1>(a, stride_a, scale, in, x, stride, tokens + i, rows, t + i * t_stride, t_stride);
    if (row + rows == w.rank && w.rank % 2)  // B's last pair ends in a zero, and 0 * NaN is NaN
      for (i = 0; i < n; i++) t[i * t_stride + rows] = {};
  }

  static void shrink(const Weights& w, int in, const bf16* x, int64_t stride, const int32_t* tokens, int n, int row,
                     int rows, char* t, int64_t t_row) {
    if (w.eight())
      shrink_as<int8_t>(w, in8(in), in, x, stride, tokens, n, row, rows, t, t_row);
    else
      shrink_as<bf16>(w, in, in, x, stride, tokens, n, row, rows, t, t_row);
  }

  // B's pair of ranks for 16 outputs, and what it adds to a sum with a pair of t.
  struct Two {
    Floats first, second;
  };
  static ALWAYS Ints ranks_at(const bf16* b) { return load64(b); }
  static ALWAYS Two ranks_at(const int8_t* b) { return {wide(b), wide(b + 16)}; }
  static ALWAYS Floats add(Floats sum, Ints b, const bf16* t) { return dot2(sum, b, pair_at(t)); }
  static ALWAYS Floats add(Floats sum, const Two& b, const float* t) {
    return fma(b.second, spread(t[1]), fma(b.first, spread(t[0]), sum));
  }

  // 16 U outputs of T tokens; `count` of them, where U is 1.
  template <int T, int U, class E>
  static ALWAYS void expand_tile(const Middle<E>* const* ts, int pairs, const E* b, bf16* const* ys, int count) {
    Floats sum[T * U];
#pragma GCC unroll 16
    for (int i = 0; i < T * U; i++) sum[i] = spread(0.f);
    for (int k = 0; k < pairs; k++) {
      decltype(ranks_at(b)) bv[U];
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) bv[u] = ranks_at(b + (size_t(u) * pairs + k) * 32);
#pragma GCC unroll 4
      for (int i = 0; i < T; i++)
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) sum[i * U + u] = add(sum[i * U + u], bv[u], ts[i] + 2 * k);
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

  template <int T, class E>
  static void expand_some(const E* b, int pairs, const Middle<E>* const* ts, bf16* const* ys, int count) {
    constexpr int U = std::min(4, SUMS / T);
    bf16* at[T];
    for (int i = 0; i < T; i++) at[i] = ys[i];
    int o = 0;
    if constexpr (U > 1)
      for (; o + 16 * U <= count; o += 16 * U) {
        expand_tile<T, U>(ts, pairs, b + size_t(o) * pairs * 2, at, 0);
        for (int i = 0; i < T; i++) at[i] += 16 * U;
      }
    for (; o < count; o += 16) {
      expand_tile<T, 1>(ts, pairs, b + size_t(o) * pairs * 2, at, count - o);
      for (int i = 0; i < T; i++) at[i] += 16;
    }
  }

  template <class E>
  static void expand_as(const Weights& w, const char* t, int64_t t_row, const int32_t* rows_of_t, bf16* y, int64_t stride,
                        const int32_t* tokens, int n, int first, int count) {
    const int pairs = depth(w.rank) / 2;
    const E* b = reinterpret_cast<const E*>(w.packed()) + size_t(first) * pairs * 2;
    const Middle<E>* ts[CHUNK];
    bf16* ys[CHUNK];
    for (int i = 0; i < n; i++) {
      ts[i] = reinterpret_cast<const Middle<E>*>(t + (rows_of_t ? rows_of_t[i] : i) * t_row);
      ys[i] = y + tokens[i] * stride + first;
    }
    int i = 0;
    for (; i + 4 <= n; i += 4) expand_some<4>(b, pairs, ts + i, ys + i, count);
    for (; i + 2 <= n; i += 2) expand_some<2>(b, pairs, ts + i, ys + i, count);
    for (; i < n; i++) expand_some<1>(b, pairs, ts + i, ys + i, count);
  }

  // `first` is a multiple of 16.
  static void expand(const Weights& w, int, const char* t, int64_t t_row, const int32_t* rows_of_t, bf16* y,
                     int64_t stride, const int32_t* tokens, int n, int first, int count) {
    if (w.eight())
      expand_as<int8_t>(w, t, t_row, rows_of_t, y, stride, tokens, n, first, count);
    else
      expand_as<bf16>(w, t, t_row, rows_of_t, y, stride, tokens, n, first, count);
  }
};
#endif

}  // namespace loradock
