// Products of rows with packed matrices, one tile of up to 12 rows and 32 outputs at a time.
#pragma once

#include <type_traits>
#include <utility>

#include "matrix.h"

#ifdef STEP

namespace loradock {

// Sums that a tile holds: of so many rows, and of one or both 16 of a block's outputs, while it goes over the inputs.
constexpr bool MANY = REGISTERS >= 32;
constexpr int TILE = MANY ? 12 : 6;       // tokens that are multiplied with a block together
constexpr int TILE8 = MANY ? 12 : 4;      // the same with int8,
constexpr int GROUP_TILE = MANY ? 6 : 4;  // and where every group of inputs has a scale
constexpr int sides(int rows, int most) { return MANY || rows <= most ? 2 : 1; }
constexpr int ROWS = 192;  // tokens whose inputs stay in the cache while all blocks pass

struct Input {  // the rows that are multiplied: bfloat16, or int8 with a scale for each row (and group)
  const bf16* x;
  int64_t stride;
  float* floats;   // what x is, where the processor does not multiply bfloat16: [rows][inputs]
  int8_t* q;
  float* scale;    // [rows][groups]
  int32_t* sum;    // of the row's (and group's) int8, times what was added to the weights

  // A row as dot2 takes it, and elements from one to the next.
  template <class E = Element>
  const E* row(const Matrix& m, int i) const {
    if constexpr (std::is_same_v<E, bf16>)
      return x + i * stride;
    else
      return floats + int64_t(i) * m.k;
  }
  int64_t apart(const Matrix& m) const { return PAIRS ? stride : m.k; }
};

// The weights of the next block, on their way into the cache while this one is multiplied: memory is read all the time,
// and not only while a block is new. Each of a block's tiles fetches its part of them, `step` bytes of every 128.
struct Ahead {
  const uint8_t* at;  // null: the reading costs too little of the time to matter
  int step;
  ALWAYS void fetch(int p) const {
    if (!at) return;
    later(at + size_t(p) * step);
    if (step > 64) later(at + size_t(p) * step + 64);
  }
  // The same where `done` bytes of this block are read.
  ALWAYS void follow(ptrdiff_t done) const {
    if (at) later(at + done * step / 128);
  }
};

// What a tile of M rows fetches beside N vectors of weights at w, the block's number p.
template <int M, int N>
ALWAYS void fetch(const uint8_t* w, const Ahead& ahead, int side, int p) {
  if constexpr (M <= 4) {
    for (int j = 0; j < N; j++) soon(w + 2048 + 64 * j);
  } else if (!side) {
    ahead.fetch(p);
  }
}

// ---- tiles: M rows, and N of a block's two sixteens of outputs at a time --------------------------------------------------

template <class T, int M, int N>
ALWAYS void fill(T (&s)[M][N], T v) {
#pragma GCC unroll 12
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) s[i][j] = v;
}

// What products become too large by, since weights have no sign: of each row and group, the inputs' sums [rows][groups].
template <int M, int N>
ALWAYS void owe(Ints (&s)[M][N], const int32_t* sum, int row, int groups, int g) {
#pragma GCC unroll 12
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) s[i][j] = spread(-sum[int64_t(row + i) * groups + g]);
}

// To the sums those of dot4, which begin at 0 again.
template <int M, int N>
ALWAYS void take(Ints (&s)[M][N], Ints (&part)[M][N]) {
#pragma GCC unroll 12
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) s[i][j] = add(s[i][j], total_of(part[i][j])), part[i][j] = spread(0);
}

template <int M, int N>
ALWAYS void leave(const Floats (&s)[M][N], float* sums) {
#pragma GCC unroll 12
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) store(sums + i * WIDTH + 16 * j, s[i][j]);
}

// sums[i] = the 32 outputs of row i
template <int M>
void tile_bf16(const Matrix& m, int block, const Input& in, int row, const Ahead& ahead, float* sums) {
  constexpr int N = sides(M, 2);
  const int64_t apart = in.apart(m);
  const int pairs = m.k / 2;
  for (int side = 0; side < 2; side += N) {
    const uint8_t* w = m.data.data + block * m.block_bytes() + 64 * side;
    const Element* x = in.row(m, row);
    Floats s[M][N];
    fill(s, spread(0.f));
    for (int p = 0; p < pairs; p++, w += 128, x += 2) {
      fetch<M, N>(w, ahead, side, p);
      Ints v[N];
#pragma GCC unroll 2
      for (int j = 0; j < N; j++) v[j] = load64(w + 64 * j);
      dot2(s, v, x, apart);
    }
    leave(s, sums + 16 * side);
  }
}

// The same for two blocks of one row: each sum is a chain of additions, and so few chains leave the processor waiting.
inline void pair_bf16(const Matrix& m, int block, const Input& in, float* sums) {
  const uint8_t *w = m.data.data + block * m.block_bytes(), *next = w + m.block_bytes();
  const Element* x = in.row(m, 0);
  Floats s[1][4];
  for (int j = 0; j < 4; j++) s[0][j] = spread(0.f);
  for (int p = 0; p < m.k / 2; p++, w += 128, next += 128, x += 2) {
    soon(w + 2048), soon(w + 2112), soon(next + 2048), soon(next + 2112);
    const Ints v[4] = {load64(w), load64(w + 64), load64(next), load64(next + 64)};
    dot2(s, v, x, 0);
  }
  for (int j = 0; j < 4; j++) store(sums + 16 * j, s[0][j]);
}

// s[i][j] += four inputs' weights v[j], times the four int8 at q + i * stride.
template <int M, int N>
ALWAYS void add8(Ints (&s)[M][N], const uint8_t* w, const int8_t* q, int64_t stride) {
  Ints v[N];
#pragma GCC unroll 2
  for (int j = 0; j < N; j++) v[j] = load64(w + 64 * j);
#pragma GCC unroll 12
  for (int i = 0; i < M; i++) {
    const Ints x = spread4(q + i * stride);
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) s[i][j] = dot8(s[i][j], v[j], x);
  }
}

template <int M>
void tile_channel8(const Matrix& m, int block, const Input& in, int row, const Ahead& ahead, float* sums) {
  constexpr int N = sides(M, 1);
  for (int side = 0; side < 2; side += N) {
    const uint8_t* w = m.data.data + block * m.block_bytes() + 64 * side;
    Ints s[M][N];
    owe(s, in.sum, row, 1, 0);
    const int8_t* q = in.q + int64_t(row) * m.k;
    const int fours = m.k / 4;
    int p = 0;
    if constexpr (M == 1) {
      Ints second[1][N];
      fill(second, spread(0));
      for (; p + 2 <= fours; p += 2, w += 256) {
        fetch<M, 4>(w, ahead, side, p);
        add8(s, w, q + 4 * p, 0);
        add8(second, w + 128, q + 4 * p + 4, 0);
      }
      for (int j = 0; j < N; j++) s[0][j] = add(s[0][j], second[0][j]);
    }
    for (; p < fours; p++, w += 128) {
      fetch<M, N>(w, ahead, side, p);
      add8(s, w, q + 4 * p, m.k);
    }
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) {
      const Floats scale = load(m.scale.data + block * WIDTH + 16 * (side + j));
#pragma GCC unroll 12
      for (int i = 0; i < M; i++)
        store(sums + i * WIDTH + 16 * (side + j), to_floats(s[i][j]) * spread(in.scale[row + i]) * scale);
    }
  }
}

template <int M>
void tile_group8(const Matrix& m, int block, const Input& in, int row, const Ahead& ahead, float* sums) {
  constexpr int N = sides(M, 1);
  const int groups = m.groups();
  for (int side = 0; side < 2; side += N) {
    const uint8_t* w = m.data.data + block * m.block_bytes() + 64 * side;
    const float* scale = m.scale.data + size_t(block) * groups * WIDTH + 16 * side;
    Floats f[M][N];
    fill(f, spread(0.f));
    const int8_t* q = in.q + int64_t(row) * m.k;
    for (int g = 0, at = 0; g < groups; g++, q += m.group, scale += WIDTH) {
      const int fours = std::min(m.group, m.k - g * m.group) / 4;
      Ints s[M][N];
      owe(s, in.sum, row, groups, g);
      for (int p = 0; p < fours; p++, w += 128) {
        fetch<M, N>(w, ahead, side, at++);
        add8(s, w, q + 4 * p, m.k);
      }
      Floats by[N];
#pragma GCC unroll 2
      for (int j = 0; j < N; j++) by[j] = load(scale + 16 * j);
#pragma GCC unroll 12
      for (int i = 0; i < M; i++) {
        const Floats of_row = spread(in.scale[int64_t(row + i) * groups + g]);
#pragma GCC unroll 2
        for (int j = 0; j < N; j++) f[i][j] = fma(to_floats(s[i][j]), of_row * by[j], f[i][j]);
      }
    }
    leave(f, sums + 16 * side);
  }
}

// s[i][j] += eight inputs' 4 bits, times the eight int8 at q + i * stride; the upper ones' to `second` where M is 1.
template <int M, int N>
ALWAYS void add4(Ints (&s)[M][N], Ints (&second)[1][N], const uint8_t* w, const int8_t* q, int64_t stride) {
  Ints low[N], high[N];
#pragma GCC unroll 2
  for (int j = 0; j < N; j++) {
    const Ints v = load64(w + 64 * j);
    low[j] = lower4(v), high[j] = upper4(v);
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; i++) {
    const Ints x = spread4(q + i * stride), y = spread4(q + i * stride + 4);
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) {
      s[i][j] = dot4(s[i][j], low[j], x);
      Ints& to = M == 1 ? second[0][j] : s[i][j];
      to = dot4(to, high[j], y);
    }
  }
}

// A group's 4 bits times int8, in integers; then its scale, and its offset times the sum of the inputs.
template <int M, bool OFFSETS>
void tile_group4(const Matrix& m, int block, const Input& in, int row, const Ahead& ahead, float* sums) {
  constexpr int N = sides(M, 1);
  const int groups = m.groups();
  const uint8_t* const begin = m.data.data + block * m.block_bytes();
  for (int side = 0; side < 2; side += N) {
    const uint8_t* w = begin;
    auto fetched = [&](int lines) {
      for (int i = 0; i < lines; i++)
        if constexpr (M <= 4)
          soon(w + 2048 + 64 * (side + i));
        else
          ahead.follow(w - begin + 64 * i);
    };
    Floats f[M][N];
    fill(f, spread(0.f));
    const int8_t* q = in.q + int64_t(row) * m.k;
    for (int g = 0; g < groups; g++) {
      const bf16* scale = reinterpret_cast<const bf16*>(w);
      fetched(OFFSETS ? 2 : 1);
      w += OFFSETS ? 128 : 64;
      Ints s[M][N], second[1][N];
      owe(s, in.sum, row, groups, g);
      fill(second, spread(0));
      int eights = std::min(m.group, m.k - g * m.group) / 8;
      if constexpr (ROUNDS4) {
        while (eights) {
          Ints part[M][N];
          fill(part, spread(0));
          for (int e = std::min(eights, ROUNDS4 / 2); e; e--, eights--, w += 128, q += 8) {
            fetched(N);
            add4(part, second, w + 64 * side, q, m.k);
          }
          take(s, part);
          if constexpr (M == 1) take(s, second);
        }
      } else {
        for (; eights; eights--, w += 128, q += 8) {
          fetched(N);
          add4(s, second, w + 64 * side, q, m.k);
        }
        if constexpr (M == 1) take(s, second);
      }
      Floats by[N];
#pragma GCC unroll 2
      for (int j = 0; j < N; j++) by[j] = wide(scale + 16 * (side + j));
#pragma GCC unroll 12
      for (int i = 0; i < M; i++) {
        const int64_t at = int64_t(row + i) * groups + g;
        const Floats of_row = spread(in.scale[at]);
#pragma GCC unroll 2
        for (int j = 0; j < N; j++) {
          f[i][j] = fma(to_floats(s[i][j]), of_row * by[j], f[i][j]);
          if constexpr (OFFSETS) f[i][j] = fma(spread(in.scale[at] * in.sum[at]), wide(scale + 32 + 16 * (side + j)), f[i][j]);
        }
      }
    }
    leave(f, sums + 16 * side);
  }
}

typedef void (*Tile)(const Matrix&, int, const Input&, int, const Ahead&, float*);

template <int KIND, bool OFFSETS, int M>
constexpr Tile tile() {
  if constexpr (KIND == BF16) return tile_bf16<M>;
  if constexpr (KIND == CHANNEL8) return tile_channel8<M>;
  if constexpr (KIND == GROUP8) return tile_group8<M>;
  if constexpr (KIND == GROUP4) return tile_group4<M, OFFSETS>;
}

// The tiles of 1, 2, ... rows.
template <int KIND, bool OFFSETS = false, int... I>
const Tile* tiles(std::integer_sequence<int, I...>) {
  static const Tile all[] = {tile<KIND, OFFSETS, I + 1>()...};
  return all;
}

inline const Tile* tiles_of(const Matrix& m) {
  constexpr std::make_integer_sequence<int, GROUP_TILE> grouped;
  if (m.kind == BF16) return tiles<BF16>(std::make_integer_sequence<int, TILE>());
  if (m.kind == CHANNEL8) return tiles<CHANNEL8>(std::make_integer_sequence<int, TILE8>());
  return m.kind == GROUP8 ? tiles<GROUP8>(grouped) : m.offsets ? tiles<GROUP4, true>(grouped) : tiles<GROUP4>(grouped);
}

inline int most_rows(const Matrix& m) { return m.kind == BF16 ? TILE : m.kind == CHANNEL8 ? TILE8 : GROUP_TILE; }

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
  const int most = most_rows(m);
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
        pair_bf16(m, b, in, sums);
        for (int i = 0; i < 2; i++) given(b + i, 0, 1, sums + i * WIDTH);
        b++;
        continue;
      }
      for (int part = 0; part < parts; part++) {  // of as equal a size as they can be
        const int from = begin + (end - begin) * part / parts, to = begin + (end - begin) * (part + 1) / parts;
        if (rows <= 48) top.fetch(m, b, from, to);
        // Of this tile's part: where it begins, and how much of it for 128 bytes of this block.
        const int fetching = std::min(parts, 8);
        const uint8_t* next = part < fetching ? m.data.data + (b + 1) * bytes + bytes * part / fetching : nullptr;
        tiles[to - from - 1](m, b, in, from, Ahead{next, 128 / fetching}, sums);
        given(b, from, to, sums);
      }
    }
  }
}

// Whether rows must be made into something else before they are multiplied with a matrix.
inline bool converts(const Matrix& m) { return m.kind != BF16 || !PAIRS; }

// A row as the matrix wants it.
inline void convert(const Matrix& m, const Input& in, int row) {
  const bf16* x = in.x + row * in.stride;
  if (m.kind != BF16) {
    const int64_t groups = m.groups();
    return to_bytes(x, m.k, m.group, m.zero(), in.q + int64_t(row) * m.k, in.scale + row * groups, in.sum + row * groups);
  }
  for (int i = 0; i < m.k; i += 16) store(in.floats + int64_t(row) * m.k + i, wide(x + i));
}

}  // namespace loradock

#endif
