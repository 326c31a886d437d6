// Products of rows with packed matrices, one tile of up to 12 rows and 32 outputs at a time.
#pragma once

#include "matrix.h"

#ifdef STEP

namespace loradock {

constexpr int TILE = 12;       // tokens that are multiplied with a block together
constexpr int GROUP_TILE = 6;  // the same, where every group of inputs has a scale
constexpr int ROWS = 192;      // tokens whose inputs stay in the cache while all blocks pass

#ifdef __AVX512VNNI__
// sum + w x of four int8 each, w without a sign. Around the compiler's own function GCC copies every sum to another register
// and runs out of them: it took more time than bfloat16.
inline __m512i dot8(__m512i sum, __m512i w, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
}
#else
inline __m512i dot8(__m512i sum, __m512i w, __m512i x) {
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(w, _mm512_set1_epi16(255)), _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(x, 8));
  return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
}
#endif

struct Input {  // the rows that are multiplied: bfloat16, or int8 with a scale for each row (and group)
  const bf16* x;
  int64_t stride;
  float* floats;   // what x is, where the processor does not multiply bfloat16: [rows][inputs]
  int8_t* q;
  float* scale;    // [rows][groups]
  int32_t* sum;    // of the row's (and group's) int8, times what was added to the weights
};

// The weights of the next block, on their way into the cache while this one is multiplied: memory is read all the time,
// and not only while a block is new. Each of a block's tiles fetches its part of them, `step` bytes of every 128.
struct Ahead {
  const uint8_t* at;  // null: the reading costs too little of the time to matter
  int step;
  inline void fetch(int p) const {
    if (!at) return;
    _mm_prefetch((const char*)at + size_t(p) * step, _MM_HINT_T1);
    if (step > 64) _mm_prefetch((const char*)at + size_t(p) * step + 64, _MM_HINT_T1);
  }
  // The same where `done` bytes of this block are read.
  inline void follow(ptrdiff_t done) const {
    if (at) _mm_prefetch((const char*)at + done * step / 128, _MM_HINT_T1);
  }
};

inline __m512i pair_at(const bf16* at) {
  int pair;
  std::memcpy(&pair, at, 4);
  return _mm512_set1_epi32(pair);
}

// Pairs of two times 16 outputs' weights, times a pair of inputs in float32.
inline void dot2(__m512& a, __m512& b, __m512i wa, __m512i wb, const float* x) {
  const __m512 first = _mm512_set1_ps(x[0]), second = _mm512_set1_ps(x[1]);
  a = _mm512_fmadd_ps(firsts(wa), first, a);
  b = _mm512_fmadd_ps(firsts(wb), first, b);
  a = _mm512_fmadd_ps(seconds(wa), second, a);
  b = _mm512_fmadd_ps(seconds(wb), second, b);
}

// sums[i] = the 32 outputs of row i
template <int M>
void tile_bf16(const Matrix& m, int block, const Input& in, int row, const Ahead& ahead, float* sums) {
  const uint8_t* w = m.data.data + block * m.block_bytes();
  __m512 a[M], b[M];
#pragma GCC unroll 12
  for (int i = 0; i < M; i++) a[i] = b[i] = _mm512_setzero_ps();
  const bf16* x = in.x + int64_t(row) * in.stride;
  const int pairs = m.k / 2;
  for (int p = 0; p < pairs; p++, w += 128) {
    if constexpr (M <= 4) {
      _mm_prefetch((const char*)w + 2048, _MM_HINT_T0);
      _mm_prefetch((const char*)w + 2112, _MM_HINT_T0);
    } else {
      ahead.fetch(p);
    }
    const __m512i wa = _mm512_load_si512(w), wb = _mm512_load_si512(w + 64);
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) {
      if constexpr (PAIRS) {
        const __m512i xu = pair_at(x + i * in.stride + 2 * p);
        a[i] = dot2(a[i], wa, xu);
        b[i] = dot2(b[i], wb, xu);
      } else {
        dot2(a[i], b[i], wa, wb, in.floats + int64_t(row + i) * m.k + 2 * p);
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; i++) {
    _mm512_store_ps(sums + i * WIDTH, a[i]);
    _mm512_store_ps(sums + i * WIDTH + 16, b[i]);
  }
}

// The same for two blocks of one row: each sum is a chain of additions, and so few chains leave the processor waiting.
inline void pair_bf16(const Matrix& m, int block, const Input& in, int row, float* sums) {
  const uint8_t* w[2] = {m.data.data + block * m.block_bytes(), m.data.data + (block + 1) * m.block_bytes()};
  __m512 a[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, b[2] = {a[0], a[0]};
  const bf16* x = in.x + int64_t(row) * in.stride;
  for (int p = 0; p < m.k / 2; p++) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      _mm_prefetch((const char*)w[i] + 2048, _MM_HINT_T0);
      _mm_prefetch((const char*)w[i] + 2112, _MM_HINT_T0);
      const __m512i wa = _mm512_load_si512(w[i]), wb = _mm512_load_si512(w[i] + 64);
      if constexpr (PAIRS) {
        const __m512i xu = pair_at(x + 2 * p);
        a[i] = dot2(a[i], wa, xu);
        b[i] = dot2(b[i], wb, xu);
      } else {
        dot2(a[i], b[i], wa, wb, in.floats + int64_t(row) * m.k + 2 * p);
      }
      w[i] += 128;
    }
  }
  for (int i = 0; i < 2; i++) {
    _mm512_store_ps(sums + i * WIDTH, a[i]);
    _mm512_store_ps(sums + i * WIDTH + 16, b[i]);
  }
}

template <int M>
void tile_channel8(const Matrix& m, int block, const Input& in, int row, const Ahead& ahead, float* sums) {
  const uint8_t* w = m.data.data + block * m.block_bytes();
  __m512i a[M], b[M];
#pragma GCC unroll 12
  for (int i = 0; i < M; i++) a[i] = b[i] = _mm512_set1_epi32(-in.sum[row + i]);
  const int8_t* q = in.q + int64_t(row) * m.k;
  const int fours = m.k / 4;
  int p = 0;
  if constexpr (M == 1) {
    __m512i a2 = _mm512_setzero_si512(), b2 = a2;
    for (; p + 2 <= fours; p += 2, w += 256) {
      _mm_prefetch((const char*)w + 2048, _MM_HINT_T0);
      _mm_prefetch((const char*)w + 2112, _MM_HINT_T0);
      _mm_prefetch((const char*)w + 2176, _MM_HINT_T0);
      _mm_prefetch((const char*)w + 2240, _MM_HINT_T0);
      int u, v;
      std::memcpy(&u, q + 4 * p, 4);
      std::memcpy(&v, q + 4 * p + 4, 4);
      const __m512i xu = _mm512_set1_epi32(u), xv = _mm512_set1_epi32(v);
      a[0] = dot8(a[0], _mm512_load_si512(w), xu);
      b[0] = dot8(b[0], _mm512_load_si512(w + 64), xu);
      a2 = dot8(a2, _mm512_load_si512(w + 128), xv);
      b2 = dot8(b2, _mm512_load_si512(w + 192), xv);
    }
    a[0] = _mm512_add_epi32(a[0], a2);
    b[0] = _mm512_add_epi32(b[0], b2);
  }
  for (; p < fours; p++, w += 128) {
    if constexpr (M <= 4) {
      _mm_prefetch((const char*)w + 2048, _MM_HINT_T0);
      _mm_prefetch((const char*)w + 2112, _MM_HINT_T0);
    } else {
      ahead.fetch(p);
    }
    const __m512i wa = _mm512_load_si512(w), wb = _mm512_load_si512(w + 64);
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) {
      int u;
      std::memcpy(&u, q + int64_t(i) * m.k + 4 * p, 4);
      const __m512i xu = _mm512_set1_epi32(u);
      a[i] = dot8(a[i], wa, xu);
      b[i] = dot8(b[i], wb, xu);
    }
  }
  const __m512 sa = _mm512_load_ps(m.scale.data + block * WIDTH), sb = _mm512_load_ps(m.scale.data + block * WIDTH + 16);
#pragma GCC unroll 12
  for (int i = 0; i < M; i++) {
    const __m512 s = _mm512_set1_ps(in.scale[row + i]);
    _mm512_store_ps(sums + i * WIDTH, _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(a[i]), s), sa));
    _mm512_store_ps(sums + i * WIDTH + 16, _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(b[i]), s), sb));
  }
}

template <int M>
void tile_group8(const Matrix& m, int block, const Input& in, int row, const Ahead& ahead, float* sums) {
  const uint8_t* w = m.data.data + block * m.block_bytes();
  const int groups = m.groups();
  const float* scale = m.scale.data + size_t(block) * groups * WIDTH;
  __m512 fa[M], fb[M];
#pragma GCC unroll 12
  for (int i = 0; i < M; i++) fa[i] = fb[i] = _mm512_setzero_ps();
  const int8_t* q = in.q + int64_t(row) * m.k;
  for (int g = 0, at = 0; g < groups; g++, q += m.group, scale += WIDTH) {
    const int fours = std::min(m.group, m.k - g * m.group) / 4;
    __m512i a[M], b[M];
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) a[i] = b[i] = _mm512_set1_epi32(-in.sum[int64_t(row + i) * groups + g]);
    for (int p = 0; p < fours; p++, w += 128) {
      if constexpr (M <= 4) {
        _mm_prefetch((const char*)w + 2048, _MM_HINT_T0);
        _mm_prefetch((const char*)w + 2112, _MM_HINT_T0);
      } else {
        ahead.fetch(at++);
      }
      const __m512i wa = _mm512_load_si512(w), wb = _mm512_load_si512(w + 64);
#pragma GCC unroll 12
      for (int i = 0; i < M; i++) {
        int u;
        std::memcpy(&u, q + int64_t(i) * m.k + 4 * p, 4);
        const __m512i xu = _mm512_set1_epi32(u);
        a[i] = dot8(a[i], wa, xu);
        b[i] = dot8(b[i], wb, xu);
      }
    }
    const __m512 sa = _mm512_load_ps(scale), sb = _mm512_load_ps(scale + 16);
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) {
      const __m512 s = _mm512_set1_ps(in.scale[int64_t(row + i) * groups + g]);
      fa[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[i]), _mm512_mul_ps(s, sa), fa[i]);
      fb[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(b[i]), _mm512_mul_ps(s, sb), fb[i]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; i++) {
    _mm512_store_ps(sums + i * WIDTH, fa[i]);
    _mm512_store_ps(sums + i * WIDTH + 16, fb[i]);
  }
}

// A group's 4 bits times int8, in integers; then its scale, and its offset times the sum of the inputs.
template <int M, bool OFFSETS>
void tile_group4(const Matrix& m, int block, const Input& in, int row, const Ahead& ahead, float* sums) {
  const uint8_t *const begin = m.data.data + block * m.block_bytes(), *w = begin;
  const int groups = m.groups();
  const __m512i low = _mm512_set1_epi8(15);
  auto soon = [&](int lines) {
    for (int i = 0; i < lines; i++)
      if constexpr (M <= 4)
        _mm_prefetch((const char*)w + 2048 + 64 * i, _MM_HINT_T0);
      else
        ahead.follow(w - begin + 64 * i);
  };
  __m512 fa[M], fb[M];
#pragma GCC unroll 12
  for (int i = 0; i < M; i++) fa[i] = fb[i] = _mm512_setzero_ps();
  const int8_t* q = in.q + int64_t(row) * m.k;
  for (int g = 0; g < groups; g++) {
    const uint8_t* scale = w;
    soon(OFFSETS ? 2 : 1);
    w += OFFSETS ? 128 : 64;
    __m512i a[M], b[M], a2, b2;
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) a[i] = b[i] = _mm512_set1_epi32(-in.sum[int64_t(row + i) * groups + g]);
    a2 = b2 = _mm512_setzero_si512();
    for (int eights = std::min(m.group, m.k - g * m.group) / 8; eights; eights--, w += 128, q += 8) {
      soon(2);
      const __m512i wa = _mm512_load_si512(w), wb = _mm512_load_si512(w + 64);
      const __m512i la = _mm512_and_si512(wa, low), ha = _mm512_and_si512(_mm512_srli_epi16(wa, 4), low);
      const __m512i lb = _mm512_and_si512(wb, low), hb = _mm512_and_si512(_mm512_srli_epi16(wb, 4), low);
#pragma GCC unroll 12
      for (int i = 0; i < M; i++) {
        int u, v;
        std::memcpy(&u, q + int64_t(i) * m.k, 4);
        std::memcpy(&v, q + int64_t(i) * m.k + 4, 4);
        const __m512i xu = _mm512_set1_epi32(u), xv = _mm512_set1_epi32(v);
        a[i] = dot8(a[i], la, xu);
        b[i] = dot8(b[i], lb, xu);
        if constexpr (M == 1) {
          a2 = dot8(a2, ha, xv);
          b2 = dot8(b2, hb, xv);
        } else {
          a[i] = dot8(a[i], ha, xv);
          b[i] = dot8(b[i], hb, xv);
        }
      }
    }
    if constexpr (M == 1) a[0] = _mm512_add_epi32(a[0], a2), b[0] = _mm512_add_epi32(b[0], b2);
    const bf16* of = reinterpret_cast<const bf16*>(scale);
    const __m512 sa = wide(of), sb = wide(of + 16);
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) {
      const int64_t at = int64_t(row + i) * groups + g;
      const __m512 s = _mm512_set1_ps(in.scale[at]);
      fa[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[i]), _mm512_mul_ps(s, sa), fa[i]);
      fb[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(b[i]), _mm512_mul_ps(s, sb), fb[i]);
      if constexpr (OFFSETS) {
        const __m512 sum = _mm512_set1_ps(in.scale[at] * in.sum[at]);
        fa[i] = _mm512_fmadd_ps(sum, wide(of + 32), fa[i]);
        fb[i] = _mm512_fmadd_ps(sum, wide(of + 48), fb[i]);
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; i++) {
    _mm512_store_ps(sums + i * WIDTH, fa[i]);
    _mm512_store_ps(sums + i * WIDTH + 16, fb[i]);
  }
}

typedef void (*Tile)(const Matrix&, int, const Input&, int, const Ahead&, float*);
const Tile BF16_TILES[] = {nullptr,       tile_bf16<1>, tile_bf16<2>, tile_bf16<3>, tile_bf16<4>,  tile_bf16<5>, tile_bf16<6>,
                           tile_bf16<7>, tile_bf16<8>, tile_bf16<9>, tile_bf16<10>, tile_bf16<11>, tile_bf16<12>};
const Tile CHANNEL_TILES[] = {nullptr,           tile_channel8<1>, tile_channel8<2>,  tile_channel8<3>,  tile_channel8<4>,
                              tile_channel8<5>, tile_channel8<6>, tile_channel8<7>,  tile_channel8<8>,  tile_channel8<9>,
                              tile_channel8<10>, tile_channel8<11>, tile_channel8<12>};
const Tile GROUP_TILES[] = {nullptr,         tile_group8<1>, tile_group8<2>, tile_group8<3>,
                            tile_group8<4>, tile_group8<5>, tile_group8<6>};
const Tile HALF_TILES[] = {nullptr,                tile_group4<1, false>, tile_group4<2, false>, tile_group4<3, false>,
                           tile_group4<4, false>, tile_group4<5, false>, tile_group4<6, false>};
const Tile OFFSET_TILES[] = {nullptr,               tile_group4<1, true>, tile_group4<2, true>, tile_group4<3, true>,
                             tile_group4<4, true>, tile_group4<5, true>, tile_group4<6, true>};

inline const Tile* tiles_of(const Matrix& m) {
  if (m.kind == BF16) return BF16_TILES;
  if (m.kind == CHANNEL8) return CHANNEL_TILES;
  return m.kind == GROUP8 ? GROUP_TILES : m.offsets ? OFFSET_TILES : HALF_TILES;
}

// What comes on top of a product: nothing.
struct Nothing {
  void fetch(const Matrix&, int, int, int) const {}
  void add(const Matrix&, int, int, int, float*) const {}
};

// out(row, block, sums) for every row and for the blocks of [first, last), once `top` has added what it has; its fetch is
// called beforehand, where rows are few.
// A row's sums are added up in the same order whatever rows are beside it: no answer depends on what it is computed with.
template <class Out, class Top = Nothing>
void multiply(const Matrix& m, const Input& in, int rows, int first, int last, Out&& out, const Top& top = {}) {
  const Tile* tiles = tiles_of(m);
  const int most = m.kind == GROUP8 || m.kind == GROUP4 ? GROUP_TILE : TILE;
  alignas(64) float sums[TILE * WIDTH];
  auto given = [&](int block, int from, int to, float* s) {
    const float* bias = m.bias.data ? m.bias.data + block * WIDTH : nullptr;
    for (int i = 0; bias && i < to - from; i++)
      for (int j = 0; j < WIDTH; j++) s[i * WIDTH + j] += bias[j];
    top.add(m, block, from, to, s);
    for (int i = from; i < to; i++) out(i, block, s + (i - from) * WIDTH);
  };
  const size_t bytes = m.block_bytes();
  const int passes = (rows + ROWS - 1) / ROWS;
  for (int pass = 0; pass < passes; pass++) {  // of as equal a size as they can be: each goes over all weights
    const int begin = int(int64_t(rows) * pass / passes), end = int(int64_t(rows) * (pass + 1) / passes);
    const int parts = (end - begin + most - 1) / most;
    for (int b = first; b < last; b++) {
      if (rows == 1 && m.kind == BF16 && b + 1 < last) {
        for (int i = 0; i < 2; i++) top.fetch(m, b + i, 0, 1);
        pair_bf16(m, b, in, 0, sums);
        for (int i = 0; i < 2; i++) given(b + i, 0, 1, sums + i * WIDTH);
        b++;
        continue;
      }
      for (int part = 0; part < parts; part++) {  // of as equal a size as they can be
        const int from = begin + (end - begin) * part / parts, to = begin + (end - begin) * (part + 1) / parts;
        if (rows <= TILE * 4) top.fetch(m, b, from, to);
        // Of this tile's part: where it begins, and how much of it for 128 bytes of this block.
        const int fetching = std::min(parts, 8);
        const uint8_t* next = part < fetching ? m.data.data + (b + 1) * bytes + bytes * part / fetching : nullptr;
        tiles[to - from](m, b, in, from, Ahead{next, 128 / fetching}, sums);
        given(b, from, to, sums);
      }
    }
  }
}

// Whether rows must be made into something else before they are multiplied with a matrix.
inline bool converts(const Matrix& m) { return m.kind != BF16 || !PAIRS; }

// int8 of x[0..k) as the matrix wants them: each group with a scale of its own.
inline void quantize(const Matrix& m, const bf16* x, int8_t* q, float* scale, int32_t* sum) {
  for (int g = 0, left = m.k; left > 0; g++, left -= m.group, x += m.group, q += m.group) {
    const int size = std::min(m.group, left);
    __m512 most = _mm512_setzero_ps();
    for (int i = 0; i < size; i += 16) most = _mm512_max_ps(most, _mm512_abs_ps(wide(x + i)));
    const float top = _mm512_reduce_max_ps(most);
    const __m512 by = _mm512_set1_ps(top > 0 ? 127.f / top : 0.f);
    __m512i total = _mm512_setzero_si512();
    for (int i = 0; i < size; i += 16) {
      const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(wide(x + i), by));
      total = _mm512_add_epi32(total, v);
      _mm_storeu_si128((__m128i*)(q + i), _mm512_cvtsepi32_epi8(v));
    }
    scale[g] = top / 127.f;
    sum[g] = m.zero() * _mm512_reduce_add_epi32(total);
  }
}

// A row as the matrix wants it.
inline void convert(const Matrix& m, const Input& in, int row) {
  const bf16* x = in.x + row * in.stride;
  if (m.kind != BF16) {
    const int64_t groups = m.groups();
    return quantize(m, x, in.q + int64_t(row) * m.k, in.scale + row * groups, in.sum + row * groups);
  }
  for (int i = 0; i < m.k; i += 16) _mm512_storeu_ps(in.floats + int64_t(row) * m.k + i, wide(x + i));
}

}  // namespace loradock

#endif
