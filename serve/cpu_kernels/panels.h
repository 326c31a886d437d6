// The rows of a product as its tiles read them.
#pragma once

#include "amx.h"
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

constexpr int TALL_ROWS = 384;  // the same where the processor's tiles multiply

constexpr int BYTE_TILE = 16;  // rows that they multiply in bytes

// How rows are cut: into passes of about equal size, since each goes over all weights, and these into tiles, all of them full
// but for the last pass's.
struct Cut {
  int rows, most, passes;  // most: of a tile

  explicit Cut(int rows = 0, int most = 1, int of_pass = ROWS) : rows(rows), most(most), passes((rows + of_pass - 1) / of_pass) {}
  // Where it begins.
  int pass(int number) const { return number < passes ? int(int64_t(rows) * number / passes) / most * most : rows; }
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
    int number = int((int64_t(row + 1) * passes - 1) / rows);
    number += row >= pass(number + 1);
    const int begin = pass(number);
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
//   int8 for GGML: for each 32 inputs, of each row their scale, it times their sum, and the sums of the first 16 and of the
//   others; then sixteen inputs of each row, and the others; for the processor's tiles 32 of each row
//   bfloat16 for the processor's tiles: 32 inputs of each row, and the next
struct Input {
  const bf16* x;
  int64_t stride;
  uint8_t* panels;
  int rows;
  const int* which = nullptr;  // rows of x, where they are not the first ones
  bool prompts = false;        // they are of prompts

  int row(int i) const { return which ? which[i] : i; }
  const bf16* at(int i) const { return x + int64_t(row(i)) * stride; }
  // Whether the processor's tiles multiply. They round otherwise: so whatever a step is made of, all tokens of prompts are multiplied
  // by them, and no others.
  bool tall(const Matrix& m) const { return TILES && prompts && m.k % DEEP == 0; }
  // Whether they multiply rows in bytes, where these are as many as that pays for. The sums are those of the dot products, to the last bit.
  bool bytes_by_tiles(const Matrix& m) const { return TILES && m.tiles && rows > GROUP_TILE && !tall(m); }
  // Whether rows must be made into something else before they are multiplied, and whether some rows ever are.
  bool converts(const Matrix& m) const { return m.kind != BF16 || !PAIRS || which || tall(m); }
  static bool may_convert(const Matrix& m) { return m.kind != BF16 || !PAIRS || TILES; }

  // With tiles: of whole lines, and one row more than there is may be read of the last inputs of all.
  static size_t row_bytes(const Matrix& m) {
    return TILES ? (std::max(own_bytes(m), size_t(m.k) * sizeof(bf16) + 64) + 63) / 64 * 64 : own_bytes(m);
  }
  static size_t own_bytes(const Matrix& m) {
    if (m.kind == BF16) return size_t(m.k) * sizeof(float);
    if (m.kind == GGML) return m.k + size_t(m.k / 32) * 16;
    if (m.span > 1) return m.k + size_t(m.groups()) * 4 + size_t(m.spans()) * 8;
    return m.k + size_t(m.groups()) * (m.offsets ? 12 : 8);
  }
  uint8_t* panel(const Matrix& m, int first) const { return panels + first * row_bytes(m); }
  // Of a tile of so many rows as dot2 takes it: where it begins, and elements from one row, and one pair, to the next.
  const Element* pairs(const Matrix& m, int first) const {
    if constexpr (PAIRS)
      return reinterpret_cast<const Element*>(which ? reinterpret_cast<const bf16*>(panel(m, first)) : x + first * stride);
    else
      return reinterpret_cast<const Element*>(panel(m, first));
  }
  int64_t apart(const Matrix& m) const { return !PAIRS ? 2 : which ? int64_t(row_bytes(m) / sizeof(bf16)) : stride; }
  static constexpr int next(int rows) { return PAIRS ? 2 : 2 * rows; }
};

inline Cut cut_of(const Matrix& m, const Input& in) {
  if (in.tall(m)) return Cut(in.rows, TALL_TILE, TALL_ROWS);
  if (in.bytes_by_tiles(m)) return Cut(in.rows, BYTE_TILE);
  return Cut(in.rows, m.kind == BF16 ? TILE : m.kind == CHANNEL8 ? TILE8 : GROUP_TILE);
}

// The tile of a row. One is asked for after the other: most are in the tile of the one before.
inline Cut::Range tile_of(const Matrix& m, const Input& in, int row) {
  static thread_local Cut cut;
  static thread_local Cut::Range last;
  const Cut its = cut_of(m, in);
  if (cut.rows != its.rows || cut.most != its.most) cut = its, last = {};
  if (row < last.begin || row >= last.end) last = cut.of(row);
  return last;
}

// A row's place in its panel, for `to_bytes`.
struct InPanel {
  struct Place {
    uint8_t* to;
    size_t tile;
    ALWAYS void take(Ints even, Ints odd) {
      alignas(32) int8_t both[32];
      store8(both, even, odd);
      std::memcpy(to, both, 16), std::memcpy(to + 16 * tile, both + 16, 16), to += 32 * tile;
    }
    ALWAYS void take(Ints v) { store8(reinterpret_cast<int8_t*>(to), v), to += 16 * tile; }
  };
  uint8_t* begin;       // where the panel's first span or group begins, in the row's place
  size_t tile, inputs;  // inputs: bytes from a group's beginning to its inputs
  int header, group_bytes, shift;  // a span is 2^shift groups; none where it is one
  bool offsets;
  int32_t of_span = 0;
  uint8_t* owed = nullptr;  // of the span

  InPanel(const Matrix& m, const Input& in, int row)
      : header(m.span > 1 ? 4 : m.offsets ? 12 : 8),
        group_bytes(header + m.group),
        shift(__builtin_ctz(m.span)),
        offsets(m.offsets) {
    const auto [from, to] = tile_of(m, in, row);
    tile = to - from, begin = in.panel(m, from) + 4 * (row - from), inputs = header * tile + 12 * (row - from);
  }
  // What a panel says of a group, or of its row in it.
  ALWAYS uint8_t* of_group(int g) const {
    const size_t spans = shift ? 8 * ((g >> shift) + 1) : 0;
    return begin + tile * (size_t(g) * group_bytes + spans);
  }
  // Whether a span begins with a group.
  ALWAYS bool begins(int g) const { return g >> shift << shift == g; }
  template <class T>
  static ALWAYS void put(uint8_t* at, T number) {
    std::memcpy(at, &number, 4);
  }
  ALWAYS Place group(int g, float scale) const {
    uint8_t* at = of_group(g);
    if (!shift)
      put(at, scale);
    else if (begins(g))
      put(at - 8 * tile, scale);
    return {at + inputs, tile};
  }
  ALWAYS void sum(int g, int32_t its) {
    uint8_t* at = of_group(g);
    if (shift) {
      if (begins(g)) of_span = 0, owed = at - 4 * tile;
      of_span += its;
      put(at, -its), put(owed, -of_span * (ZERO8 / ZERO4));
      return;
    }
    float scale;
    std::memcpy(&scale, at, 4);
    put(at + 4 * tile, -its);
    if (offsets) put(at + 8 * tile, scale * float(its));
  }
};

// The same for GGML, in groups of 16 inputs of which two share a scale.
struct InPairs {
  uint8_t* begin;
  size_t tile, inputs, others;  // from a pair's beginning to the row's first 16 inputs, and from these to the others
  int row;
  int32_t of_first = 0;

  InPairs(const Matrix& m, const Input& in, int row) {
    const auto [from, to] = tile_of(m, in, row);
    tile = to - from, begin = in.panel(m, from), this->row = row - from;
    const bool by_row = in.bytes_by_tiles(m);
    inputs = tile * 16 + (by_row ? 32 : 16) * this->row, others = by_row ? 16 : 16 * tile;
  }
  ALWAYS uint8_t* pair(int g) const { return begin + tile * 48 * size_t(g >> 1); }
  ALWAYS InPanel::Place group(int g, float scale) const {
    uint8_t* at = pair(g);
    if (!(g & 1)) InPanel::put(at + 4 * row, scale);
    return {at + inputs + others * (g & 1), tile};
  }
  ALWAYS void sum(int g, int32_t its) {
    uint8_t* at = pair(g) + 4 * row;
    InPanel::put(at + 4 * tile * (2 + (g & 1)), its);
    if (!(g & 1)) {
      of_first = its;
      return;
    }
    float scale;
    std::memcpy(&scale, at, 4);
    InPanel::put(at + 4 * tile, scale * float(of_first + its));
  }
};

// What takes a row in 8 bits, in its panel or as one of `Rows8`, twice.
template <class Panel>
struct Both {
  struct Place {
    InPanel::Place panel;
    Rows8::Row::Place row;
    ALWAYS void take(Ints even, Ints odd) { panel.take(even, odd), row.take(even, odd); }
    ALWAYS void take(Ints v) { panel.take(v), row.take(v); }
  };
  Panel panel;
  Rows8::Row row;
  ALWAYS Place group(int g, float scale) { return {panel.group(g, scale), row.group(g, scale)}; }
  ALWAYS void sum(int g, int32_t its) { panel.sum(g, its), row.sum(g, its); }
};

// A row for the processor's tiles.
inline void put_tall(const Matrix& m, const Input& in, int row) {
  const auto [begin, end] = tile_of(m, in, row);
  uint8_t* to = in.panel(m, begin) + 64 * (row - begin);
  const bf16* x = in.at(row);
  for (int i = 0; i < m.k; i += DEEP, to += 64 * (end - begin)) store64(to, load64(x + i));
}

// A row in its panel, and in 8 bits as number `place` of `rows`, which have room for it.
inline void convert(const Matrix& m, const Input& in, int row, Rows8& rows, int place) {
  auto put = [&](auto&& to) { to_bytes(in.at(row), m.k, m.group, m.zero(), m.span, to); };
  if (in.tall(m)) return put_tall(m, in, row), put(rows.to(place, m.k, m.group));
  if (m.kind == GGML) return put(Both<InPairs>{{m, in, row}, rows.to(place, m.k, m.group)});
  put(Both<InPanel>{{m, in, row}, rows.to(place, m.k, m.group)});
}

// A row as the matrix wants it.
inline void convert(const Matrix& m, const Input& in, int row) {
  if (in.tall(m)) return put_tall(m, in, row);
  const bf16* x = in.at(row);
  if (m.kind == GGML) return to_bytes(x, m.k, m.group, m.zero(), m.span, InPairs(m, in, row));
  if (m.kind != BF16) return to_bytes(x, m.k, m.group, m.zero(), m.span, InPanel(m, in, row));
  if (PAIRS) return (void)std::memcpy(in.panel(m, row), x, m.k * sizeof(bf16));
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
