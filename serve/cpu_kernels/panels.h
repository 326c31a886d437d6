// The rows of a product as its tiles read them.
#pragma once

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

// How rows are cut: into passes of as equal a size as they can be, since each goes over all weights, and these into tiles.
struct Cut {
  int rows, most, passes;  // most: of a tile

  explicit Cut(int rows = 0, int most = 1) : rows(rows), most(most), passes((rows + ROWS - 1) / ROWS) {}
  int pass(int number) const { return int(int64_t(rows) * number / passes); }  // where it begins
  int tiles(int number) const { return (pass(number + 1) - pass(number) + most - 1) / most; }
  // Where a pass's tile begins.
  int tile(int number, int place) const {
    const int begin = pass(number), end = pass(number + 1);
    return begin + (end - begin) * place / tiles(number);
  }

  // The tile of a row.
  struct Range {
    int begin = 0, end = 0;
  };
  Range of(int row) const {
    const int number = int((int64_t(row + 1) * passes - 1) / rows), begin = pass(number);
    const int place = ((row - begin + 1) * tiles(number) - 1) / (pass(number + 1) - begin);
    return {tile(number, place), tile(number, place + 1)};
  }
};

// The rows that are multiplied: bfloat16, or what the processor multiplies instead, in panels. A panel is what a tile reads,
// in the order in which it is read: one pointer goes over it, and not one for each row.
//   float32: two inputs of each row, and the next two
//   int8: for each group of inputs, of each row its scale, what products are too large by (below 0), and where weights have
//   offsets both multiplied; then sixteen inputs of each row, and the next. In spans the scale comes once, with what
//   the products with all of a span's weights are too large by where they are multiplied in 8 bits
struct Input {
  const bf16* x;
  int64_t stride;
  uint8_t* panels;
  int rows;

  static size_t row_bytes(const Matrix& m) {
    if (m.kind == BF16) return size_t(m.k) * sizeof(float);
    if (m.span > 1) return m.k + size_t(m.groups()) * 4 + size_t(m.spans()) * 8;
    return m.k + size_t(m.groups()) * (m.offsets ? 12 : 8);
  }
  uint8_t* panel(const Matrix& m, int first) const { return panels + first * row_bytes(m); }
  // Of a tile of so many rows as dot2 takes it: where it begins, and elements from one row, and one pair, to the next.
  const Element* pairs(const Matrix& m, int first) const {
    if constexpr (PAIRS)
      return reinterpret_cast<const Element*>(x + first * stride);
    else
      return reinterpret_cast<const Element*>(panel(m, first));
  }
  int64_t apart() const { return PAIRS ? stride : 2; }
  static constexpr int next(int rows) { return PAIRS ? 2 : 2 * rows; }
};

inline int most_rows(const Matrix& m) { return m.kind == BF16 ? TILE : m.kind == CHANNEL8 ? TILE8 : GROUP_TILE; }

// The tile of a row. One is asked for after the other: most are in the tile of the one before.
inline Cut::Range tile_of(const Matrix& m, const Input& in, int row) {
  static thread_local Cut cut;
  static thread_local Cut::Range last;
  if (cut.rows != in.rows || cut.most != most_rows(m)) cut = Cut(in.rows, most_rows(m)), last = {};
  if (row < last.begin || row >= last.end) last = cut.of(row);
  return last;
}

// Whether rows must be made into something else before they are multiplied with a matrix.
inline bool converts(const Matrix& m) { return m.kind != BF16 || !PAIRS; }

// A row in 8 bits: as number `place` of `rows`, which have room for it, and in its panel.
inline void convert(const Matrix& m, const Input& in, int row, Rows8& rows, int place) {
  const Bytes bytes = rows.take(place, in.x + row * in.stride, m.k, m.group, m.zero(), m.span);
  const int8_t* from = bytes.q;
  const auto [begin, end] = tile_of(m, in, row);
  const size_t tile = end - begin, place_in = row - begin;
  uint8_t* to = in.panel(m, begin);
  auto put = [&](auto number) { std::memcpy(to + 4 * place_in, &number, 4), to += 4 * tile; };
  const int groups = m.groups();
  for (int g = 0, span = 0, left = m.k; g < groups; g++, left -= m.group) {
    if (m.span == 1) {
      put(bytes.scale[g]);
    } else if (g == span) {
      span = std::min(span + m.span, groups);
      int32_t all = 0;
      for (int i = g; i < span; i++) all += bytes.sum[i];
      put(bytes.scale[g]), put(-all * (ZERO8 / ZERO4));
    }
    put(-bytes.sum[g]);
    if (m.offsets) put(bytes.scale[g] * float(bytes.sum[g]));
    for (int end_of = std::min(m.group, left), i = 0; i < end_of; i += 16, from += 16, to += 16 * tile)
      std::memcpy(to + 16 * place_in, from, 16);
  }
}

// A row as the matrix wants it.
inline void convert(const Matrix& m, const Input& in, int row) {
  if (m.kind != BF16) {
    static thread_local Rows8 one;
    one.room(1, m.k, m.group, m.zero());
    return convert(m, in, row, one, 0);
  }
  const bf16* x = in.x + row * in.stride;
  const auto [begin, end] = tile_of(m, in, row);
  float* to = reinterpret_cast<float*>(in.panel(m, begin)) + (row - begin) * 2;
  alignas(64) float numbers[16];
  for (int i = 0; i < m.k; i += 16) {
    store(numbers, wide(x + i));
    for (int j = 0; j < 16; j += 2, to += (end - begin) * 2) std::memcpy(to, numbers + j, 8);
  }
}

}  // namespace loradock

#endif
