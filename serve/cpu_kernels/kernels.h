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
  // In 8 bits A is packed too, [rank, in8(in)], and what either was divided by is multiplied in between: [rank]. B is
  // [out / 16, rank / 4, 16, 4]. To both ZERO8 is added, but to what only fills a row of A.
  std::vector<char> a8;
  std::vector<float> scale;
  const bf16* gains = nullptr;  // what a step multiplies its outputs with, less 1; null is nothing
  bool eight() const { return !scale.empty(); }
  int fours() const { return (rank + 3) / 4; }
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

// Gains of 32 outputs, less 1: a line of a cache's, which is fetched ahead as a whole. Near 1 that rounds less than bfloat16.
struct alignas(64) Gains {
  bf16 of[32];
};

struct Layer {
  Plan* plan;
  int dtype;     // 0 float32, 1 bfloat16, 2 float16: of A, B, x and y
  bool eight = false;  // what is loaded is kept in 8 bits
  int max_rank;
  int size;      // bytes of an element
  std::vector<Slice> slices;
  std::vector<std::vector<Gains>> gains;  // by slot: of all slices' outputs, or nothing

  // Bytes of t = x A^T: where a slice's begin in a row, and of a row. Of 8 bits it has 8 too, and a `Middle` before.
  int64_t middle_at(size_t slice) const {
    const int64_t ranks = (max_rank + 3) / 4 * 4;
    return int64_t(slice) * (eight ? 2 * ranks + 8 : ranks * size);
  }
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
constexpr int COMING = 1536;  // so many numbers before they are read they are fetched: the next rows

// int8 of x[0..k): each group with a scale of its own, or each span of groups (1, 2, 4 or 8) with one that it repeats, and what
// products with weights to which `zero` was added are too large by. `to` is told of each group with its scale and says who takes
// its numbers, 32 or 16 at a time (the last may be fewer and zeros); it is given its sum once up to 16 groups came.
template <class To>
inline void to_bytes(const bf16* x, int k, int group, int zero, int span, To&& to) {
  const int most = std::max(SUMS, span);
  for (int first = 0; k > 0; k -= most * group, x += most * group, first += most) {
    const int count = std::min(most, (k + group - 1) / group);
    Floats found[16];
    alignas(64) float total[16] = {}, top[16], by[16];
    // For inputs from `at` on: once(at, left) for each 16, but twice(at) for 32 neighbours.
    auto over = [](const bf16* at, int left, auto&& twice, auto&& once) {
      for (; left >= 32; left -= 32, at += 32) twice(at);
      for (; left > 0; left -= 16, at += 16) once(at, left);
    };
    int spans = 0;
    for (int i = 0, inputs = std::min(most * group, k); i < inputs; i += span * group, spans++) {
      Ints of_32 = spread(0);
      Floats of_16 = spread(0.f);
      over(
          x + i, std::min(span * group, inputs - i), [&](const bf16* at) { of_32 = larger(of_32, load64(at)), soon(at + COMING); },
          [&](const bf16* at, int left) { of_16 = max(of_16, abs(left < 16 ? wide(at, left) : wide(at))); });
      found[spans] = max(of_16, max(firsts(of_32), seconds(of_32)));
    }
    // `SUMS` vectors at a time: the largest number of one vector, or its sum, takes longer than all the rest. What is stored
    // number by number is not loaded as a vector again, which would wait for all of it.
    const Floats limit = spread(127.f), none = spread(0.f);
    auto fill = [&](int vectors) {
      for (int i = vectors; i % SUMS; i++) found[i] = none;
    };
    if (spans <= 4) {
      for (int i = 0; i < spans; i++) {
        const float largest = largest_of(found[i]);
        by[i] = largest > 0 ? 127.f / largest : 0.f, top[i] = largest / 127.f;
      }
    } else {
      fill(spans);
      for (int i = 0; i < spans; i += SUMS) largest(found + i, total + i);
      const Floats tops = load(total);
      store(by, choose(less(none, tops), limit / tops, none)), store(top, tops / limit);
    }
    for (int i = 0, g = 0; i < spans; i++) {
      const Floats times = spread(by[i]);
      for (const int end = std::min(g + span, count); g < end; g++) {
        Ints all = spread(0);
        auto place = to.group(first + g, top[i]);
        over(
            x + g * group, std::min(group, k - g * group),
            [&](const bf16* at) {
              const Ints two = load64(at), even = to_ints(firsts(two) * times), odd = to_ints(seconds(two) * times);
              all = add(all, add(even, odd));
              place.take(even, odd);
            },
            [&](const bf16* at, int left) {
              const Ints v = to_ints((left < 16 ? wide(at, left) : wide(at)) * times);
              all = add(all, v);
              place.take(v);
            });
        found[g] = to_floats(all);  // exact
      }
    }
    if (count <= 4) {
      for (int g = 0; g < count; g++) to.sum(first + g, zero * int32_t(sum_of(found[g])));
    } else {
      fill(count);
      for (int g = 0; g < count; g += SUMS) sums(found + g, total + g);
      for (int g = 0; g < count; g++) to.sum(first + g, zero * int32_t(total[g]));
    }
  }
}

// Rows of int8, with a scale for each group of inputs (a multiple of 16), and the sums of `to_bytes`.
struct Bytes {
  const int8_t* q;
  const float* scale;
  const int32_t* sum;
  int64_t stride;
  int group, groups, zero;

  // By what sixteen times four inputs of a row from k on are multiplied.
  ALWAYS Floats by(int row, int k) const {
    const float* of_row = scale + int64_t(row) * groups;
    Floats v = spread(of_row[k / group]);
    if (group % 64 == 0) return v;
    for (int i = 16, left = 4; i < 64; i += 16, left += 4) {
      const float next = of_row[std::min((k + i) / group, groups - 1)];
      v = choose(chosen(range(left, 16)), spread(next), v);
    }
    return v;
  }

  // What a row's products with ZERO8 are.
  float owed(int row) const {
    if (!ZERO8) return 0;
    float all = 0;
    for (int g = 0; g < groups; g++) all += scale[int64_t(row) * groups + g] * float(sum[int64_t(row) * groups + g]);
    return all * float(ZERO8 / zero);
  }
};

// Room for rows in 8 bits, which a thread has for itself.
struct Rows8 {
  std::vector<int8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> sum;

  // So many rows of k inputs, to be filled one by one.
  Bytes room(int rows, int k, int group, int zero) {
    const int64_t stride = in8(k), groups = (k + group - 1) / group;
    if (q.size() < size_t(rows * stride)) q.resize(rows * stride);
    if (scale.size() < size_t(rows * groups)) scale.resize(rows * groups), sum.resize(rows * groups);
    return row(0, k, group, zero);
  }

  // From row `place` on.
  Bytes row(int place, int k, int group, int zero) const {
    const int64_t stride = in8(k), groups = (k + group - 1) / group;
    return {q.data() + place * stride, scale.data() + place * groups, sum.data() + place * groups, stride, group, int(groups),
            std::max(zero, 1)};
  }

  // Row `place`, for `to_bytes`.
  struct Row {
    struct Place {
      int8_t* q;
      ALWAYS void take(Ints even, Ints odd) { store8(q, even, odd), q += 32; }
      ALWAYS void take(Ints v) { store8(q, v), q += 16; }
    };
    int8_t* q;
    float* scale;
    int32_t* sums;
    int inputs;  // of a group
    ALWAYS Place group(int g, float its) const {
      scale[g] = its;
      return {q + g * inputs};
    }
    ALWAYS void sum(int g, int32_t its) const { sums[g] = its; }
  };
  Row to(int place, int k, int group) {
    const int64_t groups = (k + group - 1) / group;
    return {q.data() + place * in8(k), scale.data() + place * groups, sum.data() + place * groups, group};
  }

  // x as row `place`, which comes back.
  Bytes take(int place, const bf16* x, int k, int group, int zero) {
    to_bytes(x, k, group, zero, 1, to(place, k, group));
    return row(place, k, group, zero);
  }
};

// What stands before t in 8 bits: its scale, and what its products with B are too large by.
struct Middle {
  float scale;
  int32_t owed;
  int8_t* q() { return reinterpret_cast<int8_t*>(this + 1); }
  const int8_t* q() const { return reinterpret_cast<const int8_t*>(this + 1); }
};

struct Fast {
  // t = x A^T of one rank after the other, R of them of T tokens.
  template <int T, int R>
  static ALWAYS void shrink8_tile(const char* a, int64_t stride_a, int in, const Bytes& x, int row, float* t,
                                  int64_t t_stride) {
    Floats sum[SUMS];
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) sum[i] = spread(0.f);
    for (int k = 0; k < in; k += 64) {
      Ints xv[T];
      Floats by[T];
#pragma GCC unroll 4
      for (int i = 0; i < T; i++) {
        xv[i] = load64(x.q + (row + i) * x.stride + k);
        by[i] = x.by(row + i, k);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const Ints av = load64(a + r * stride_a + k);
#pragma GCC unroll 4
        for (int i = 0; i < T; i++) sum[i * R + r] = fma(to_floats(dot8(spread(0), av, xv[i])), by[i], sum[i * R + r]);
      }
    }
    alignas(64) float done[SUMS];
    sums(sum, done);
    for (int i = 0; i < T; i++)
      for (int r = 0; r < R; r++) t[i * t_stride + r] = done[i * R + r];
  }

  template <int T>
  static void shrink8_rows(const Weights& w, int in, const Bytes& x, int row, float* t, int64_t t_stride) {
    const int64_t stride_a = in8(in);
    constexpr int R = SUMS / T;
    int r = 0;
    auto tile = [&](auto count) {
      constexpr int N = decltype(count)::value;
      for (; r + N <= w.rank; r += N) shrink8_tile<T, N>(w.first() + r * stride_a, stride_a, in, x, row, t + r, t_stride);
    };
    tile(std::integral_constant<int, R>());
    if constexpr (R > 8) tile(std::integral_constant<int, 8>());
    if constexpr (R > 4) tile(std::integral_constant<int, 4>());
    tile(std::integral_constant<int, 1>());
  }

  // The way in, in 8 bits, for n tokens of one slot, x's rows: t_row bytes from one's to the next one's. owed: `Bytes::owed`
  // of each.
  static void shrink8(const Weights& w, int in, const Bytes& x, int n, const float* owed, char* t_at, int64_t t_row) {
    const int64_t ranks = (w.rank + 15) / 16 * 16;
    static thread_local std::vector<float> room;
    if (room.size() < size_t(CHUNK * ranks)) room.resize(CHUNK * ranks);
    float* t = room.data();
    int i = 0;
    for (; i + 4 <= n; i += 4) shrink8_rows<4>(w, in, x, i, t + i * ranks, ranks);
    for (; i + 2 <= n; i += 2) shrink8_rows<2>(w, in, x, i, t + i * ranks, ranks);
    for (; i < n; i++) shrink8_rows<1>(w, in, x, i, t + i * ranks, ranks);
    for (i = 0; i < n; i++) {
      auto& to = *reinterpret_cast<Middle*>(t_at + i * t_row);
      const Floats too_much = spread(owed[i]);
      float* of = t + i * ranks;
      std::fill(of + w.rank, of + ranks, 0.f);
      Floats most = spread(0.f);
      for (int r = 0; r < w.rank; r += 16) {
        const Floats v = (load(of + r) - too_much) * load(w.scale.data() + r, w.rank - r);
        store(of + r, v);
        most = max(most, abs(v));
      }
      const float top = largest_of(most);
      const Floats by = spread(top > 0 ? 127.f / top : 0.f);
      Ints total = spread(0);
      alignas(16) int8_t q[16];
      for (int r = 0; r < w.rank; r += 16) {
        const Ints v = to_ints(load(of + r) * by);
        total = add(total, v);
        store8(q, v);
        std::memcpy(to.q() + r, q, std::min(16, (w.rank - r + 3) / 4 * 4));
      }
      to.scale = top / 127.f, to.owed = ZERO8 * sum_of(total);
    }
  }

  // To the sums of sixteen outputs of M tokens, SUM from one's to the next one's, what their adapter adds: `fours` of its
  // ranks. `finish` has the last word on each.
  template <int M, int SUM, class F>
  static ALWAYS void expand8(const char* b, int fours, const char* t, int64_t t_row, float* sums, F finish) {
    auto of = [&](int i) { return reinterpret_cast<const Middle*>(t + i * t_row); };
    Ints v[M];
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) v[i] = spread(-of(i)->owed);
    for (int k = 0; k < fours; k++) {
      const Ints bv = load64(b + 64 * k);
#pragma GCC unroll 12
      for (int i = 0; i < M; i++) v[i] = dot8(v[i], bv, spread4(of(i)->q() + 4 * k));
    }
#pragma GCC unroll 12
    for (int i = 0; i < M; i++)
      store(sums + i * SUM, finish(fma(to_floats(v[i]), spread(of(i)->scale), load(sums + i * SUM))));
  }

  // stride_a: from row to row of A.
  template <int T, int R>
  static ALWAYS void shrink_tile(const bf16* a, int64_t stride_a, int in, const bf16* x, int64_t stride,
                                 const int32_t* tokens, bf16* t, int64_t t_stride) {
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
    alignas(64) bf16 done[SUMS];
    sums(sum, done);
    for (int i = 0; i < T; i++) std::memcpy(t + i * t_stride, done + i * R, R * sizeof(bf16));
  }

  template <int T>
  static void shrink_rows(const bf16* a, int64_t stride_a, int in, const bf16* x, int64_t stride, const int32_t* tokens,
                          int rows, bf16* t, int64_t t_stride) {
    constexpr int R = SUMS / T;  // as many rows of A as there is room for sums
    constexpr int FEW = std::min(R, 4);
    int r = 0;
    auto tile = [&](auto count) {
      constexpr int N = decltype(count)::value;
      for (; r + N <= rows; r += N)
        shrink_tile<T, N>(a + r * stride_a, stride_a, in, x, stride, tokens, t + r, t_stride);
    };
    if constexpr (R > 8) tile(std::integral_constant<int, R>());
    if constexpr (R >= 8) tile(std::integral_constant<int, 8>());
    tile(std::integral_constant<int, FEW>());
    tile(std::integral_constant<int, 1>());
  }

  // `row` and `rows`: of A. t_at: where the first token's t begins, t_row bytes before the next one's. Of 8 bits all rows
  // are multiplied at once.
  static void shrink(const Weights& w, int in, const bf16* x, int64_t stride, const int32_t* tokens, int n, int row,
                     int rows, char* t_at, int64_t t_row) {
    if (w.eight()) return shrink8_of(w, in, x, stride, tokens, n, t_at, t_row);
    const bf16* a = static_cast<const bf16*>(w.a) + int64_t(row) * in;
    bf16* t = reinterpret_cast<bf16*>(t_at) + row;
    const int64_t t_stride = t_row / int64_t(sizeof(*t));
    int i = 0;
    for (; i + 4 <= n; i += 4) shrink_rows<4>(a, in, in, x, stride, tokens + i, rows, t + i * t_stride, t_stride);
    for (; i + 2 <= n; i += 2) shrink_rows<2>(a, in, in, x, stride, tokens + i, rows, t + i * t_stride, t_stride);
    for (; i < n; i++) shrink_rows<1>(a, in, in, x, stride, tokens + i, rows, t + i * t_stride, t_stride);
    if (row + rows == w.rank && w.rank % 2)  // B's last pair ends in a zero, and 0 * NaN is NaN
      for (i = 0; i < n; i++) t[i * t_stride + rows] = {};
  }

  // The same of x as it is.
  static void shrink8_of(const Weights& w, int in, const bf16* x, int64_t stride, const int32_t* tokens, int n, char* t,
                         int64_t t_row) {
    constexpr int GROUP = 64;
    static thread_local Rows8 rows;
    const Bytes bytes = rows.room(n, in, GROUP, ZERO8);
    float owed[CHUNK];
    for (int i = 0; i < n; i++) owed[i] = rows.take(i, x + tokens[i] * stride, in, GROUP, ZERO8).owed(0);
    shrink8(w, in, bytes, n, owed, t, t_row);
  }

  // 16 U outputs of T tokens; `count` of them, where U is 1.
  template <int T, int U>
  static ALWAYS void expand_tile(const bf16* const* ts, int pairs, const bf16* b, bf16* const* ys, int count) {
    Floats sum[T * U];
#pragma GCC unroll 16
    for (int i = 0; i < T * U; i++) sum[i] = spread(0.f);
    for (int k = 0; k < pairs; k++) {
      Ints bv[U];
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) bv[u] = load64(b + (size_t(u) * pairs + k) * 32);
#pragma GCC unroll 4
      for (int i = 0; i < T; i++)
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) sum[i * U + u] = dot2(sum[i * U + u], bv[u], pair_at(ts[i] + 2 * k));
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
  static void expand_some(const bf16* b, int pairs, const bf16* const* ts, bf16* const* ys, int count) {
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

  // `first` is a multiple of 16.
  static void expand(const Weights& w, int, const char* t, int64_t t_row, const int32_t* rows_of_t, bf16* y,
                     int64_t stride, const int32_t* tokens, int n, int first, int count) {
    auto row = [&](int i) { return t + (rows_of_t ? rows_of_t[i] : i) * t_row; };
    if (w.eight()) {
      for (int o = first; o < first + count; o += 16)
        for (int i = 0; i < n; i++) {
          bf16* to = y + tokens[i] * stride + o;
          const int left = first + count - o;
          alignas(64) float sums[16];
          store(sums, wide(to, left));
          const char* b = w.packed() + size_t(o / 16) * w.fours() * 64;
          expand8<1, 16>(b, w.fours(), row(i), t_row, sums, [](Floats v) { return v; });
          store(to, load(sums), left);
        }
      return;
    }
    const int pairs = depth(w.rank) / 2;
    const bf16* b = reinterpret_cast<const bf16*>(w.packed()) + size_t(first) * pairs * 2;
    const bf16* ts[CHUNK];
    bf16* ys[CHUNK];
    for (int i = 0; i < n; i++) ts[i] = reinterpret_cast<const bf16*>(row(i)), ys[i] = y + tokens[i] * stride + first;
    int i = 0;
    for (; i + 4 <= n; i += 4) expand_some<4>(b, pairs, ts + i, ys + i, count);
    for (; i + 2 <= n; i += 2) expand_some<2>(b, pairs, ts + i, ys + i, count);
    for (; i < n; i++) expand_some<1>(b, pairs, ts + i, ys + i, count);
  }
};
#endif

}  // namespace loradock
