// Products of rows with packed matrices, one tile of up to 12 rows and 32 outputs at a time.
#pragma once

#include <type_traits>
#include <utility>

#include "panels.h"

#ifdef STEP

namespace loradock {

// Which weights a tile has on their way into the cache while it multiplies: memory is read all the time, and not only while a
// block is new.
enum Fetch {
  OWN,     // its own, where a block has one tile
  NEXT,    // its part of the next block,
  PACKED,  // and of a packed one while it multiplies one that was unpacked
};
// How many bytes before it reads them a tile asks for its own: those that it reads once pass the larger caches by.
constexpr int FAR = 8192, NEAR = 2048;

// A tile's part of the next block.
struct Ahead {
  const uint8_t* at = nullptr;  // null: the reading costs too little of the time to matter
  int step = 0;                 // bytes for 128 that are multiplied; PACKED: bytes in all

  ALWAYS void fetch(int p) const {
    if (at) later(at + size_t(p) * step);
  }
  // The same where `done` bytes of this block are read.
  ALWAYS void follow(ptrdiff_t done) const {
    if (at) later(at + done * step / 128);
  }
  // What of a packed block is fetched beside the n-th of so many groups.
  ALWAYS void beside(int n, int groups) const {
    if (!at) return;
    const int lines = step / 64 + 1;
    for (int i = lines * n / groups, end = lines * (n + 1) / groups; i < end; i++) later(at + 64 * i);
  }
};

// Of the lines from w on, N out of two.
template <int N>
ALWAYS void fetch_own(const uint8_t* w, int lines = N) {
  for (int j = 0; j < lines; j++)
    if constexpr (N == 1)
      soon(w + NEAR + 64 * j);  // the tile comes back for the others
    else
      once(w + FAR + 64 * j);
}

// What a tile fetches beside N vectors of weights at w, the block's number p.
template <Fetch FETCH, int N>
ALWAYS void fetch(const uint8_t* w, const Ahead& ahead, int side, int p) {
  if constexpr (FETCH == OWN) {
    fetch_own<N>(w);
  } else if (FETCH == NEXT && !side) {
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

// What a panel says of a group, and where its inputs begin.
template <int M, bool OFFSETS = false>
struct PanelGroup {
  const float* scale;
  const int32_t* owed;
  const float* offset;
  const int8_t* q;
  ALWAYS explicit PanelGroup(const uint8_t* at)
      : scale(reinterpret_cast<const float*>(at)),
        owed(reinterpret_cast<const int32_t*>(at + 4 * M)),
        offset(reinterpret_cast<const float*>(at + 8 * M)),
        q(reinterpret_cast<const int8_t*>(at + (OFFSETS ? 12 : 8) * M)) {}
};

// What a panel says of a span, and where its groups begin: each with what it owes by itself.
template <int M>
struct PanelSpan {
  const float* scale;
  const int32_t* owed;
  const uint8_t* groups;
  ALWAYS explicit PanelSpan(const uint8_t* at)
      : scale(reinterpret_cast<const float*>(at)), owed(reinterpret_cast<const int32_t*>(at + 4 * M)), groups(at + 8 * M) {}
};

// What products become too large by, since weights have no sign.
template <int M, int N>
ALWAYS void owe(Ints (&s)[M][N], const int32_t* owed) {
#pragma GCC unroll 12
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) s[i][j] = spread(owed[i]);
}

// To the sums those of dot4, which begin at 0 again.
template <int M, int N>
ALWAYS void take(Ints (&s)[M][N], Ints (&part)[M][N]) {
#pragma GCC unroll 12
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) s[i][j] = add(s[i][j], total_of(part[i][j])), part[i][j] = spread(0);
}

// A group's sums, by the scales of its rows and weights, and its weights' offsets where there are any.
template <int M, int N, bool OFFSETS>
ALWAYS void add_group(Floats (&f)[M][N], const Ints (&s)[M][N], const PanelGroup<M, OFFSETS>& of, const Floats (&by)[N],
                      const Floats (&offset)[N]) {
#pragma GCC unroll 12
  for (int i = 0; i < M; i++) {
    const Floats of_row = spread(of.scale[i]);
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) {
      f[i][j] = fma(to_floats(s[i][j]), of_row * by[j], f[i][j]);
      if constexpr (OFFSETS) f[i][j] = fma(spread(of.offset[i]), offset[j], f[i][j]);
    }
  }
}

template <int M, int N>
ALWAYS void leave(const Floats (&s)[M][N], float* sums) {
#pragma GCC unroll 12
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) store(sums + i * WIDTH + 16 * j, s[i][j]);
}

// sums[i] = the 32 outputs of row i
template <int M, Fetch FETCH>
void tile_bf16(const Matrix& m, int block, const Input& in, int row, const Ahead& ahead, float* sums) {
  constexpr int N = sides(M, 2);
  const int64_t apart = in.apart(m);
  const int pairs = m.k / 2;
  for (int side = 0; side < 2; side += N) {
    const uint8_t* w = m.data.data + block * m.block_bytes + 64 * side;
    const Element* x = in.pairs(m, row);
    Floats s[M][N];
    fill(s, spread(0.f));
    for (int p = 0; p < pairs; p++, w += 128, x += in.next(M)) {
      fetch<FETCH, N>(w, ahead, side, p);
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
  const uint8_t *w = m.data.data + block * m.block_bytes, *next = w + m.block_bytes;
  const Element* x = in.pairs(m, 0);
  Floats s[1][4];
  for (int j = 0; j < 4; j++) s[0][j] = spread(0.f);
  ptrdiff_t far = FAR;
  for (int p = 0; p < m.k / 2; p++, w += 128, next += 128, x += 2) {
    if (p + FAR / 128 == m.k / 2) far += m.block_bytes;  // the next pair's
    for (int j = 0; j < 128; j += 64) once(w + far + j), once(next + far + j);
    const Ints v[4] = {load64(w), load64(w + 64), load64(next), load64(next + 64)};
    dot2(s, v, x, 0);
  }
  for (int j = 0; j < 4; j++) store(sums + 16 * j, s[0][j]);
}

// s[i][j] += four inputs' weights v[j], times the four int8 of row i at q + 16 i.
template <int M, int N>
ALWAYS void add8(Ints (&s)[M][N], const uint8_t* w, const int8_t* q) {
  Ints v[N];
#pragma GCC unroll 2
  for (int j = 0; j < N; j++) v[j] = load64(w + 64 * j);
#pragma GCC unroll 12
  for (int i = 0; i < M; i++) {
    const Ints x = spread4(q + 16 * i);
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) s[i][j] = dot8(s[i][j], v[j], x);
  }
}

// The same of so many inputs, sixteen at a time. `before` is called before each four.
template <int M, int N, class Before>
ALWAYS void add8s(Ints (&s)[M][N], const uint8_t*& w, const int8_t*& q, int inputs, Before&& before) {
  for (; inputs > 0; inputs -= 16, q += 16 * M)
#pragma GCC unroll 4
    for (int h = 0; h < 16; h += 4, w += 128) before(), add8(s, w, q + h);
}

template <int M, Fetch FETCH>
void tile_channel8(const Matrix& m, int block, const Input& in, int row, const Ahead& ahead, float* sums) {
  constexpr int N = sides(M, 1);
  for (int side = 0; side < 2; side += N) {
    const uint8_t* w = m.data.data + block * m.block_bytes + 64 * side;
    Ints s[M][N];
    const PanelGroup<M> of(in.panel(m, row));
    const int8_t* q = of.q;
    owe(s, of.owed);
    if constexpr (M == 1) {
      Ints second[1][N];
      fill(second, spread(0));
      for (int i = 0; i < m.k; i += 8, w += 256, q += 8) {
        fetch<FETCH, 4>(w, ahead, side, i / 4);
        add8(s, w, q);
        add8(second, w + 128, q + 4);
      }
      for (int j = 0; j < N; j++) s[0][j] = add(s[0][j], second[0][j]);
    } else {
      int p = 0;
      add8s(s, w, q, m.k, [&] { fetch<FETCH, N>(w, ahead, side, p++); });
    }
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) {
      const Floats scale = load(m.scale.data + block * WIDTH + 16 * (side + j));
#pragma GCC unroll 12
      for (int i = 0; i < M; i++)
        store(sums + i * WIDTH + 16 * (side + j), to_floats(s[i][j]) * spread(of.scale[i]) * scale);
    }
  }
}

// With offsets: where 4 bits were unpacked (`Unpacked`).
template <int M, bool OFFSETS, Fetch FETCH>
void tile_group8(const Matrix& m, int block, const Input& in, int row, const Ahead& ahead, float* sums) {
  constexpr int N = sides(M, 1);
  const int groups = m.groups();
  for (int side = 0; side < 2; side += N) {
    const uint8_t* w = m.data.data + block * m.block_bytes + 64 * side;
    constexpr int EACH = OFFSETS ? 2 * WIDTH : WIDTH;
    const float* scale = m.scale.data + size_t(block) * groups * EACH + 16 * side;
    Floats f[M][N];
    fill(f, spread(0.f));
    const uint8_t* panel = in.panel(m, row);
    for (int g = 0, at = 0; g < groups; g++, scale += EACH) {
      if (FETCH == PACKED && !side) ahead.beside(g, groups);
      const PanelGroup<M, OFFSETS> of(panel);
      const int8_t* q = of.q;
      Ints s[M][N];
      owe(s, of.owed);
      add8s(s, w, q, std::min(m.group, m.k - g * m.group), [&] { fetch<FETCH, N>(w, ahead, side, at++); });
      panel = reinterpret_cast<const uint8_t*>(q);
      Floats by[N], offset[N];
#pragma GCC unroll 2
      for (int j = 0; j < N; j++) {
        by[j] = load(scale + 16 * j);
        if constexpr (OFFSETS) offset[j] = load(scale + WIDTH + 16 * j);
      }
      add_group(f, s, of, by, offset);
    }
    leave(f, sums + 16 * side);
  }
}

// What is added up over spans, in the registers: in memory where these are needed for other sums.
template <int M, int N>
struct SpanSums {
  static constexpr bool KEPT = M <= 3;
  float* sums;
  Floats kept[KEPT ? M : 1][N];
  bool first = true;

  ALWAYS explicit SpanSums(float* sums) : sums(sums) {
    if constexpr (KEPT) fill(kept, spread(0.f));
  }
  // One span's, in whole numbers of the scales of the rows and of the weights.
  ALWAYS void take(const Floats (&whole)[M][N], const float* of_row, const bf16* by) {
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) {
      const Floats scale = wide(by + 16 * j);
#pragma GCC unroll 12
      for (int i = 0; i < M; i++) {
        const Floats both = spread(of_row[i]) * scale;
        if constexpr (KEPT) {
          kept[i][j] = fma(whole[i][j], both, kept[i][j]);
        } else {
          float* at = sums + i * WIDTH + 16 * j;
          store(at, fma(whole[i][j], both, first ? spread(0.f) : load(at)));
        }
      }
    }
    first = false;
  }
  ALWAYS void leave() const {
    if constexpr (KEPT) loradock::leave(kept, sums);
  }
};

// Where spans of 4 bits were unpacked, and multiplied by what makes one scale each group's.
template <int M>
void tile_span8(const Matrix& m, int block, const Input& in, int row, const Ahead& ahead, float* sums) {
  constexpr int N = sides(M, 1);
  const int groups = m.groups();
  for (int side = 0; side < 2; side += N) {
    const uint8_t* w = m.data.data + block * m.block_bytes + 64 * side;
    const uint8_t* panel = in.panel(m, row);
    Floats f[M][N];
    fill(f, spread(0.f));
    const float* scale = m.scale.data + 16 * side;
    for (int left = m.k, number = 0; left > 0; scale += WIDTH) {
      const PanelSpan<M> of(panel);
      panel = of.groups;
      Ints whole[M][N];
      owe(whole, of.owed);
      for (int g = 0; g < m.span && left > 0; g++, left -= m.group) {
        if (!side) ahead.beside(number++, groups);
        const int8_t* q = reinterpret_cast<const int8_t*>(panel + 4 * M);
        add8s(whole, w, q, std::min(m.group, left), [] {});
        panel = reinterpret_cast<const uint8_t*>(q);
      }
      Floats by[N];
#pragma GCC unroll 2
      for (int j = 0; j < N; j++) by[j] = load(scale + 16 * j);
#pragma GCC unroll 12
      for (int i = 0; i < M; i++)
#pragma GCC unroll 2
        for (int j = 0; j < N; j++) f[i][j] = fma(to_floats(whole[i][j]), spread(of.scale[i]) * by[j], f[i][j]);
    }
    leave(f, sums + 16 * side);
  }
}

// s[i][j] += eight inputs' 4 bits, times the eight int8 of row i at q + 16 i; the upper ones' to `second` where M is 1.
template <int M, int N>
ALWAYS void add4(Ints (&s)[M][N], Ints (&second)[1][N], const uint8_t* w, const int8_t* q) {
  Ints low[N], high[N];
#pragma GCC unroll 2
  for (int j = 0; j < N; j++) {
    const Ints v = load64(w + 64 * j);
    low[j] = lower4(v), high[j] = upper4(v);
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; i++) {
    const Ints x = spread4(q + 16 * i), y = spread4(q + 16 * i + 4);
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) {
      s[i][j] = dot4(s[i][j], low[j], x);
      Ints& to = M == 1 ? second[0][j] : s[i][j];
      to = dot4(to, high[j], y);
    }
  }
}

// A group's 4 bits times int8, in integers; then its scale, and its offset times the sum of the inputs. In spans the scales of
// groups are small whole numbers: what is added up is exact, and the same to the last bit in `tile_span8`.
template <int M, bool OFFSETS, bool SPANS, Fetch FETCH>
void tile_group4(const Matrix& m, int block, const Input& in, int row, const Ahead& ahead, float* sums) {
  constexpr int N = sides(M, 1);
  const int groups = m.groups();
  const uint8_t* const begin = m.data.data + block * m.block_bytes;
  for (int side = 0; side < 2; side += N) {
    const uint8_t* w = begin;
    auto fetched = [&](int lines) {
      if constexpr (FETCH == OWN) return fetch_own<N>(w + 64 * side, lines);
      for (int i = 0; i < lines && !side; i++) ahead.follow(w - begin + 64 * i);
    };
    Floats f[M][N];
    fill(f, spread(0.f));
    const uint8_t* panel = in.panel(m, row);
    const uint8_t *span = nullptr, *of_span = nullptr;
    SpanSums<SPANS ? M : 4, N> spans(sums + 16 * side);
    for (int g = 0, place = 0; g < groups; g++) {
      if (SPANS && !place) of_span = panel, panel = PanelSpan<M>(panel).groups;
      const PanelGroup<M, OFFSETS> of(panel - (SPANS ? 4 * M : 0));
      const int8_t* q = of.q;
      const bf16* scale = reinterpret_cast<const bf16*>(w);
      if (!place) {
        const size_t header = SPANS ? Matrix::header(std::min(m.span, groups - g)) : OFFSETS ? 128 : 64;
        span = w;
        fetched(int(header / 64));
        w += header;
      }
      Ints s[M][N], second[1][N];
      owe(s, of.owed);
      fill(second, spread(0));
      int sixteens = std::min(m.group, m.k - g * m.group) / 16;
      auto sixteen = [&](Ints (&to)[M][N]) {
#pragma GCC unroll 2
        for (int h = 0; h < 16; h += 8, w += 128) {
          fetched(N);
          add4(to, second, w + 64 * side, q + h);
        }
        q += 16 * M;
      };
      if constexpr (ROUNDS4) {
        while (sixteens) {
          Ints part[M][N];
          fill(part, spread(0));
          for (int e = std::min(sixteens, ROUNDS4 / 4); e; e--, sixteens--) sixteen(part);
          take(s, part);
          if constexpr (M == 1) take(s, second);
        }
      } else {
        for (; sixteens; sixteens--) sixteen(s);
        if constexpr (M == 1) take(s, second);
      }
      panel = reinterpret_cast<const uint8_t*>(q);
      if constexpr (SPANS) {
        const int8_t* by = reinterpret_cast<const int8_t*>(span + WIDTH * sizeof(bf16)) + place * WIDTH + 16 * side;
#pragma GCC unroll 2
        for (int j = 0; j < N; j++) {
          const Floats times = wide(by + 16 * j);
#pragma GCC unroll 12
          for (int i = 0; i < M; i++) f[i][j] = fma(to_floats(s[i][j]), times, f[i][j]);
        }
        if (++place == m.span || g + 1 == groups) {
          spans.take(f, PanelSpan<M>(of_span).scale, reinterpret_cast<const bf16*>(span) + 16 * side);
          fill(f, spread(0.f));
          place = 0;
        }
        continue;
      }
      Floats by[N], offset[N];
#pragma GCC unroll 2
      for (int j = 0; j < N; j++) {
        by[j] = wide(scale + 16 * (side + j));
        if constexpr (OFFSETS) offset[j] = wide(scale + 32 + 16 * (side + j));
      }
      add_group(f, s, of, by, offset);
    }
    if constexpr (SPANS)
      spans.leave();
    else
      leave(f, sums + 16 * side);
  }
}

typedef void (*Tile)(const Matrix&, int, const Input&, int, const Ahead&, float*);

// Of a block of GGML, also once it is unpacked, which `unpack_ggml` does: into `bytes` if they are none.
const Tile* ggml_tiles(const Format& format, bool unpacked);
void unpack_ggml(const Matrix& m, int block, Matrix& to, uint8_t* bytes);
// A block times the tiles [0, parts) of a pass, in bytes by the processor's tiles: sums[part][BYTE_TILE][32].
void ggml_by_tiles(const Matrix& m, int block, const Input& in, const Cut& cut, int pass, float* sums);

// How the scales of groups are given.
enum Scales { PLAIN, OFFSETS, SPANS };

template <int KIND, Scales SCALES, Fetch FETCH, int M>
constexpr Tile tile() {
  if constexpr (KIND == BF16) return tile_bf16<M, FETCH>;
  if constexpr (KIND == CHANNEL8) return tile_channel8<M, FETCH>;
  if constexpr (KIND == GROUP8 && SCALES == SPANS) return tile_span8<M>;
  if constexpr (KIND == GROUP8 && SCALES != SPANS) return tile_group8<M, SCALES == OFFSETS, FETCH>;
  if constexpr (KIND == GROUP4) return tile_group4<M, SCALES == OFFSETS, SCALES == SPANS, FETCH>;
}

// The tiles of 1, 2, ... rows.
template <int KIND, Scales SCALES, Fetch FETCH, int... I>
const Tile* tiles(std::integer_sequence<int, I...>) {
  static const Tile all[] = {tile<KIND, SCALES, FETCH, I + 1>()...};
  return all;
}

template <int KIND, Fetch FETCH>
const Tile* grouped_tiles(const Matrix& m) {
  constexpr std::make_integer_sequence<int, GROUP_TILE> rows;
  if (m.span > 1) return tiles<KIND, SPANS, FETCH>(rows);
  return m.offsets ? tiles<KIND, OFFSETS, FETCH>(rows) : tiles<KIND, PLAIN, FETCH>(rows);
}

template <Fetch FETCH>
const Tile* tiles_of(const Matrix& m) {
  if (m.kind == BF16) return tiles<BF16, PLAIN, FETCH>(std::make_integer_sequence<int, TILE>());
  if (m.kind == CHANNEL8) return tiles<CHANNEL8, PLAIN, FETCH>(std::make_integer_sequence<int, TILE8>());
  if (m.kind == GROUP8) return tiles<GROUP8, PLAIN, FETCH>(std::make_integer_sequence<int, GROUP_TILE>());
  if (m.kind == GGML) return nullptr;  // they differ from block to block
  return grouped_tiles<GROUP4, FETCH>(m);
}

// A block of fewer than 8 bits as bytes, where as many tiles need it that unpacking it once pays: the same numbers, so the same sums.
class Unpacked {
 public:
  Matrix block{};

  // For so many tiles.
  Unpacked(const Matrix& m, int tiles) {
    if (m.kind == GGML ? tiles == 1 : m.kind != GROUP4 || ROUNDS4 || tiles < TILES) return;
    static thread_local Buffer<uint8_t> bytes;
    static thread_local Buffer<float> scales;
    bytes.need(size_t(m.k) * WIDTH), scales.need(size_t(m.groups()) * (m.offsets || m.kind == GGML ? 2 : 1) * WIDTH);
    block.n = m.n, block.k = m.k, block.blocks = 1, block.kind = m.kind == GGML ? GGML : GROUP8, block.group = m.group;
    block.span = m.span, block.offsets = m.offsets, block.data = bytes, block.scale = scales, room_ = bytes.data;
  }

  explicit operator bool() const { return block.data.data; }
  const Tile* tiles() const { return block.kind == GGML ? nullptr : grouped_tiles<GROUP8, PACKED>(block); }

  void take(const Matrix& m, int b) {
    if (m.kind == GGML) return unpack_ggml(m, b, block, room_);
    if (m.span > 1) return take_spans(m, b);
    uint8_t* to = block.data.data;
    float* scale = block.scale.data;
    const int halves = m.offsets ? 4 : 2;
    for (int g = 0; g < m.groups(); g++) {
      const uint8_t* from = m.group4(b, g);
      for (int i = 0; i < halves; i++, scale += 16, from += 32) store(scale, wide(reinterpret_cast<const bf16*>(from)));
      for (int eights = std::min(m.group, m.k - g * m.group) / 8; eights; eights--, from += 128, to += 256)
        for (int j = 0; j < 128; j += 64) {
          const Ints v = load64(from + j);
          store64(to + j, lower4(v)), store64(to + 128 + j, upper4(v));
        }
    }
  }

 private:
  // Each number times its group's: from -120 to 120.
  void take_spans(const Matrix& m, int b) {
    // Two numbers at a time, neither of which becomes negative or more than 255.
    constexpr int TWOS = 2 * WIDTH;
    uint16_t* to = reinterpret_cast<uint16_t*>(block.data.data);
    alignas(64) uint16_t times[TWOS], zero[TWOS];
    for (int s = 0; s < m.spans(); s++) {
      const uint8_t* from = m.span4(b, s);
      for (int i = 0; i < WIDTH; i += 16)
        store(block.scale.data + s * WIDTH + i, wide(reinterpret_cast<const bf16*>(from) + i));
      const int8_t* by = reinterpret_cast<const int8_t*>(from + WIDTH * sizeof(bf16));
      from += Matrix::header(m.span_groups(s));
      for (int g = s * m.span; g < s * m.span + m.span_groups(s); g++, by += WIDTH) {
        for (int i = 0; i < WIDTH; i += 16) {
          const Floats v = wide(by + i);
          put_twice(times + 2 * i, choose(less(v, spread(0.f)), v + spread(65536.f), v));
          put_twice(zero + 2 * i, fnma(v, spread(257 * 8.f), spread(257 * 128.f)));
        }
        for (int eights = std::min(m.group, m.k - g * m.group) / 8; eights; eights--, from += 128, to += 2 * TWOS) {
          const uint16_t* two = reinterpret_cast<const uint16_t*>(from);
          for (int i = 0; i < TWOS; i++) {
            constexpr uint16_t SIGN = ZERO8 ? 0 : 0x8080;
            to[i] = uint16_t((two[i] & 0x0f0f) * times[i] + zero[i]) ^ SIGN;
            to[TWOS + i] = uint16_t((two[i] >> 4 & 0x0f0f) * times[i] + zero[i]) ^ SIGN;
          }
        }
      }
    }
  }

  // Sixteen whole numbers from 0 to 65535, each twice in 16 bits.
  static void put_twice(uint16_t* to, Floats v) {
    const Ints one = to_ints(v);
    store64(to, either(one, up<16>(one)));
  }

  uint8_t* room_ = nullptr;
  static constexpr int TILES = 5;  // as was measured on Zen 5
};

// ---- many rows by the processor's tiles ---------------------------------------------------------------------------------------

constexpr int CHUNK_INPUTS = 512;  // so many inputs of a block stay in the first cache while all rows pass,
constexpr int TALL_BLOCKS = 8;     // and of the rows in the second one while so many blocks pass

// A block's weights from input `from` on, as pairs of bfloat16. GGML: of whole spans.
void widen_ggml(const Matrix& m, int block, int from, int to, uint8_t* pairs);
inline void widen(const Matrix& m, int block, int from, int to, uint8_t* pairs) {
  if (m.kind == GGML) return widen_ggml(m, block, from, to, pairs);
  const bool four = m.kind == GROUP4;
  for (int i = from; i < to;) {
    const int g = i / m.group, end = std::min(to, (g + 1) * m.group), into = i - g * m.group;
    const uint8_t* w;
    Floats scale[2], offset[2];
    if (four) {
      const int s = g / m.span;
      const uint8_t* header = m.span > 1 ? m.span4(block, s) : m.group4(block, g);
      const int8_t* by = reinterpret_cast<const int8_t*>(header + WIDTH * sizeof(bf16)) + (g - s * m.span) * WIDTH;
      for (int j = 0; j < 2; j++) {
        scale[j] = wide(reinterpret_cast<const bf16*>(header) + 16 * j);
        if (m.span > 1) scale[j] = scale[j] * wide(by + 16 * j);
        offset[j] = spread(-float(ZERO4)) * scale[j];
        if (m.offsets) offset[j] = fma(spread(8.f), wide(reinterpret_cast<const bf16*>(header) + 32 + 16 * j), offset[j]);
      }
      w = m.span > 1 ? header + Matrix::header(m.span_groups(s)) + size_t(g - s * m.span) * m.group * WIDTH / 2
                     : header + (m.offsets ? 128 : 64);
      w += size_t(into) * WIDTH / 2;
    } else {
      w = m.data.data + block * m.block_bytes + size_t(i) * WIDTH;
      for (int j = 0; j < 2; j++) {
        scale[j] = load(m.scale.data + (size_t(block) * m.groups() + g) * WIDTH + 16 * j);
        offset[j] = spread(-float(ZERO8)) * scale[j];
      }
    }
    for (; i < end; i += four ? 8 : 4, w += 128, pairs += four ? 512 : 256)
      for (int j = 0; j < 2; j++) {
        const Ints v = load64(w + 64 * j);
        if (four) widen4(pairs + 64 * j + 256, upper4(v), scale[j], offset[j]);
        widen4(pairs + 64 * j, four ? lower4(v) : v, scale[j], offset[j]);
      }
  }
}

// given(block, from, to, sums) for every tile of rows and for the blocks of [first, last).
template <class Given>
void multiply_tall(const Matrix& m, const Input& in, int first, int last, Given&& given) {
  static thread_local Buffer<uint8_t> room;
  static thread_local Buffer<float> all_sums;
  room.need(size_t(CHUNK_INPUTS) * WIDTH * sizeof(bf16));
  const Cut cut = cut_of(m, in);
  for (int pass = 0; pass < cut.passes; pass++) {
    const int parts = cut.tiles(pass);  // the last pass may have one more than others
    all_sums.need(size_t(TALL_BLOCKS) * parts * TALL_TILE * WIDTH);
    int most = 0;
    for (int part = 0; part < parts; part++) most = std::max(most, cut.tile(pass, part + 1) - cut.tile(pass, part));
    auto sums = [&](int block, int part) { return all_sums.data + size_t(block * parts + part) * TALL_TILE * WIDTH; };
    for (int b = first; b < last; b += TALL_BLOCKS) {
      const int blocks = std::min(TALL_BLOCKS, last - b);
      {
        Tiles tiles(most);
        for (int k = 0; k < m.k; k += CHUNK_INPUTS)
          for (int block = 0; block < blocks; block++) {
            const int inputs = std::min(CHUNK_INPUTS, m.k - k);
            const uint8_t* w = m.kind == BF16 ? m.block(b + block) + size_t(k) * WIDTH * sizeof(bf16) : room.data;
            if (m.kind != BF16) widen(m, b + block, k, k + inputs, room.data);
            // What comes next is on its way meanwhile: about, where blocks begin with what is of all of them.
            const bool other = block + 1 < blocks;
            const uint8_t* begin = m.block(b + (other ? block + 1 : 0));
            const size_t bytes = m.bytes(b + (other ? block + 1 : 0));
            const int after = other ? k : k + CHUNK_INPUTS, until = std::min(after + CHUNK_INPUTS, m.k);
            for (int part = 0; part < parts; part++) {
              const int from = cut.tile(pass, part), rows = cut.tile(pass, part + 1) - from;
              const size_t all = after < m.k ? bytes * (until - after) / m.k : 0;
              const Ahead ahead{all ? begin + bytes * after / m.k + all * part / parts : nullptr, int(all / parts)};
              // Where a tile has fewer rows than most, what is behind them is multiplied in vain.
              tiles.add(sums(block, part), !k, in.panel(m, from) + size_t(k) * sizeof(bf16) * rows, 64 * rows, w, inputs / DEEP,
                        [&](int step) { ahead.beside(step, CHUNK_INPUTS / DEEP); });
            }
          }
      }
      for (int block = 0; block < blocks; block++)
        for (int part = 0; part < parts; part++)
          given(b + block, cut.tile(pass, part), cut.tile(pass, part + 1), sums(block, part));
    }
  }
}

// The same for rows in bytes.
template <class Top, class Given>
void multiply_bytes(const Matrix& m, const Input& in, int first, int last, const Top& top, Given&& given) {
  const Cut cut = cut_of(m, in);
  static thread_local Buffer<float> sums;
  for (int pass = 0; pass < cut.passes; pass++) {
    const int parts = cut.tiles(pass);
    sums.need(size_t(parts) * BYTE_TILE * WIDTH);
    for (int b = first; b < last; b++) {
      for (int part = 0; in.rows <= 48 && part < parts; part++)
        top.fetch(m, in, b, cut.tile(pass, part), cut.tile(pass, part + 1));
      ggml_by_tiles(m, b, in, cut, pass, sums.data);
      for (int part = 0; part < parts; part++)
        given(b, cut.tile(pass, part), cut.tile(pass, part + 1), sums.data + size_t(part) * BYTE_TILE * WIDTH);
    }
  }
}

// What comes on top of a product: nothing.
struct Nothing {
  void fetch(const Matrix&, const Input&, int, int, int) const {}
  void add(const Matrix&, const Input&, int, int, int, float*) const {}
};

// out(row, block, sums) for every row and for the blocks of [first, last), once `top` has added what it has; its fetch is
// called beforehand, where rows are few.
// A row's sums are added up in the same order whatever rows are beside it: no answer depends on what it is computed with.
template <class Out, class Top = Nothing>
void multiply(const Matrix& m, const Input& in, int first, int last, Out&& out, const Top& top = {}) {
  const int rows = in.rows;
  const Cut cut = cut_of(m, in);
  alignas(64) float sums[TILE * WIDTH];
  auto given = [&](int block, int from, int to, float* s) {
    const float* bias = m.bias.data ? m.bias.data + block * WIDTH : nullptr;
    for (int i = 0; bias && i < to - from; i++)
      for (int j = 0; j < WIDTH; j++) s[i * WIDTH + j] += bias[j];
    top.add(m, in, block, from, to, s);
    for (int i = from; i < to; i++) out(in.row(i), block, s + (i - from) * WIDTH);
  };
  if (in.tall(m)) return multiply_tall(m, in, first, last, given);
  if (in.bytes_by_tiles(m)) return multiply_bytes(m, in, first, last, top, given);
  for (int pass = 0; pass < cut.passes; pass++) {
    const int parts = cut.tiles(pass);
    Unpacked unpacked(m, parts);
    const Tile* tiles = unpacked ? unpacked.tiles() : parts == 1 ? tiles_of<OWN>(m) : tiles_of<NEXT>(m);
    for (int b = first; b < last; b++) {
      if (rows == 1 && m.kind == BF16 && b + 1 < last) {
        for (int i = 0; i < 2; i++) top.fetch(m, in, b + i, 0, 1);
        pair_bf16(m, b, in, sums);
        for (int i = 0; i < 2; i++) given(b + i, 0, 1, sums + i * WIDTH);
        b++;
        continue;
      }
      if (unpacked) unpacked.take(m, b);
      if (m.kind == GGML) tiles = ggml_tiles(*m.formats[b], bool(unpacked));
      const size_t bytes = m.bytes(b);
      for (int part = 0; part < parts; part++) {
        const int from = cut.tile(pass, part), to = cut.tile(pass, part + 1);
        if (rows <= 48) top.fetch(m, in, b, from, to);
        // This tile's part of the next block: where it begins, and how much of it for 128 bytes of this block.
        const int fetching = unpacked ? parts : std::min(parts, 8);
        const uint8_t* next = part < fetching ? m.block(b) + bytes + bytes * part / fetching : nullptr;
        if (unpacked)
          tiles[to - from - 1](unpacked.block, 0, in, from, Ahead{next, int(bytes / fetching)}, sums);
        else
          tiles[to - from - 1](m, b, in, from, Ahead{next, 128 / fetching}, sums);
        given(b, from, to, sums);
      }
    }
  }
}

}  // namespace loradock

#endif
