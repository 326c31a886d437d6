// Weights of GGUF files, which stay as they are there: packed block by block, multiplied, and looked up. What lies in a block of
// each type: ggml's `ggml-common.h` and `ggml-quants.c`.
//
// A weight is scale * number + offset, both of its group. Products are added up in integers for each group, and its offset
// times the sum of its inputs is added: so numbers need no sign.

#include "products.h"

#ifdef STEP

using namespace loradock;

namespace {

// ggml's numbers of the types that are packed here.
enum Type { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_NL = 20, IQ4_XS = 23 };

// bits, zero, minima, table, groups, each
constexpr Format PLAIN4{4, 8, false, false, 1, 32}, MINIMA4{4, 0, true, false, 1, 32};
constexpr Format PLAIN5{5, 16, false, false, 1, 32}, MINIMA5{5, 0, true, false, 1, 32};
constexpr Format PLAIN8{8, ZERO8, false, false, 1, 32}, TABLE4{4, ZERO8, false, true, 1, 32}, TABLES4{4, ZERO8, false, true, 8, 32};
constexpr Format K2{4, 0, true, false, 16, 16}, K3{4, 4, false, false, 16, 16}, K4{4, 0, true, false, 8, 32};
constexpr Format K5{5, 0, true, false, 8, 32}, K6{6, 32, false, false, 16, 16};

struct Known {
  int type;
  const Format* format;
  int bytes;  // of a span in the file
};
constexpr Known KNOWN[] = {{Q4_0, &PLAIN4, 18},  {Q4_1, &MINIMA4, 20}, {Q5_0, &PLAIN5, 22}, {Q5_1, &MINIMA5, 24},
                           {Q8_0, &PLAIN8, 34},  {Q2_K, &K2, 84},      {Q3_K, &K3, 110},    {Q4_K, &K4, 144},
                           {Q5_K, &K5, 176},     {Q6_K, &K6, 210},     {IQ4_NL, &TABLE4, 18}, {IQ4_XS, &TABLES4, 136}};

const Known* known(int type) {
  for (const Known& it : KNOWN)
    if (it.type == type) return &it;
  return nullptr;
}

constexpr int8_t VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
// The same with `zero` added, four times, as `looked_up` wants them.
struct alignas(64) TableBytes {
  uint8_t at[64] = {};
  constexpr TableBytes() {
    for (int i = 0; i < 64; i++) at[i] = uint8_t(VALUES[i % 16] + ZERO8);
  }
};
constexpr TableBytes TABLE_BYTES;

// ---- packing ---------------------------------------------------------------------------------------------------------------

// A span of one output.
struct Span {
  uint8_t numbers[256];
  uint16_t scale = 0, minimum = 0;  // float16
  int8_t by[16], less[16];          // of each group: what scale and minimum are multiplied by

  void take(int type, const uint8_t* at);

 private:
  // 32 numbers whose lower bits are in 16 bytes, the lower halves first.
  void halves(const uint8_t* q) {
    for (int i = 0; i < 16; i++) numbers[i] = q[i] & 15, numbers[i + 16] = q[i] >> 4;
  }
  // Their fifth bits.
  void fifth(const uint8_t* at) {
    uint32_t bits;
    std::memcpy(&bits, at, 4);
    for (int i = 0; i < 32; i++) numbers[i] = uint8_t(numbers[i] | (bits >> i & 1) << 4);
  }
  // 64 numbers from 32 bytes each, the lower halves first.
  void k_halves(const uint8_t* q) {
    for (int i = 0; i < 256; i++) numbers[i] = i & 32 ? q[i / 64 * 32 + i % 32] >> 4 : q[i / 64 * 32 + i % 32] & 15;
  }
  // 2 bits each of 128 numbers from 32 bytes.
  static int k_two(const uint8_t* q, int i) { return q[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3; }
  // Eight scales and minima of 6 bits in 12 bytes.
  void k_scales(const uint8_t* s) {
    for (int g = 0; g < 4; g++) {
      by[g] = int8_t(s[g] & 63), less[g] = int8_t(s[g + 4] & 63);
      by[g + 4] = int8_t((s[g + 8] & 15) | s[g] >> 6 << 4), less[g + 4] = int8_t(s[g + 8] >> 4 | s[g + 4] >> 6 << 4);
    }
  }
  void two_bits(const uint8_t* at);
  void three_bits(const uint8_t* at);
  void six_bits(const uint8_t* at);
  void four_bits_of_a_table(const uint8_t* at);
};

inline uint16_t half_at(const uint8_t* at) {
  uint16_t v;
  std::memcpy(&v, at, 2);
  return v;
}

void Span::two_bits(const uint8_t* at) {
  for (int g = 0; g < 16; g++) by[g] = at[g] & 15, less[g] = int8_t(at[g] >> 4);
  for (int i = 0; i < 256; i++) numbers[i] = uint8_t(k_two(at + 16, i));
  scale = half_at(at + 80), minimum = half_at(at + 82);
}

void Span::three_bits(const uint8_t* at) {
  const uint8_t *high = at, *low = at + 32, *s = at + 96;
  for (int i = 0; i < 256; i++) numbers[i] = uint8_t(k_two(low, i) | (high[i % 32] >> (i / 32) & 1) << 2);
  for (int g = 0; g < 16; g++) {
    const int four = g < 8 ? s[g] & 15 : s[g - 8] >> 4;
    by[g] = int8_t((four | (s[8 + g % 4] >> (g / 4 * 2) & 3) << 4) - 32);
  }
  scale = half_at(at + 108);
}

void Span::six_bits(const uint8_t* at) {
  const uint8_t *low = at, *high = at + 128;
  for (int i = 0; i < 256; i++) {
    const uint8_t byte = low[i / 128 * 64 + i % 64];
    numbers[i] = uint8_t((i % 128 < 64 ? byte & 15 : byte >> 4) | k_two(high, i) << 4);
  }
  std::memcpy(by, at + 192, 16);
  scale = half_at(at + 208);
}

void Span::four_bits_of_a_table(const uint8_t* at) {
  scale = half_at(at);
  const uint16_t high = half_at(at + 2);
  for (int g = 0; g < 8; g++) {
    by[g] = int8_t((at[4 + g / 2] >> (g % 2 * 4) & 15 | (high >> (2 * g) & 3) << 4) - 32);
    for (int i = 0; i < 16; i++) {
      const uint8_t byte = at[8 + g * 16 + i];
      numbers[g * 32 + i] = byte & 15, numbers[g * 32 + 16 + i] = byte >> 4;
    }
  }
}

void Span::take(int type, const uint8_t* at) {
  if (type == Q2_K) return two_bits(at);
  if (type == Q3_K) return three_bits(at);
  if (type == Q6_K) return six_bits(at);
  if (type == IQ4_XS) return four_bits_of_a_table(at);
  scale = half_at(at);
  if (type == Q4_K || type == Q5_K) {
    minimum = half_at(at + 2), k_scales(at + 4), k_halves(at + (type == Q5_K ? 48 : 16));
    for (int i = 0; type == Q5_K && i < 256; i++) numbers[i] = uint8_t(numbers[i] | (at[16 + i % 32] >> (i / 32) & 1) << 4);
    return;
  }
  if (type == Q8_0) {
    for (int i = 0; i < 32; i++) numbers[i] = uint8_t(at[2 + i] + ZERO8);
    return;
  }
  at += 2;
  if (type == Q4_1 || type == Q5_1) minimum = half_at(at), at += 2;
  const bool five = type == Q5_0 || type == Q5_1;
  halves(at + (five ? 4 : 0));
  if (five) fifth(at);
}

// Number i of 32 of output j of a block.
inline void put_number(const Format& f, uint8_t* at, int j, int i, int number) {
  const int l = 4 * j + i % 4, four = i / 4;
  if (f.bits == 8) {
    at[four * 128 + l] = uint8_t(number);
    return;
  }
  if (f.bits == 5) at[l] |= uint8_t(number >> 4 << four), at += 128;
  if (f.bits == 6) at += four / 4 * 128, at[four / 4 * 256 + l] |= uint8_t(number >> 4 << four % 4 * 2), at += 128;
  at[four / 2 * 128 + l] |= uint8_t((number & 15) << four % 2 * 4);
}

inline int number_at(const Format& f, const uint8_t* at, int j, int i) {
  const int l = 4 * j + i % 4, four = i / 4;
  if (f.bits == 8) return at[four * 128 + l];
  int high = 0;
  if (f.bits == 5) high = at[l] >> four & 1, at += 128;
  if (f.bits == 6) at += four / 4 * 128, high = at[four / 4 * 256 + l] >> four % 4 * 2 & 3, at += 128;
  return (at[four / 2 * 128 + l] >> four % 2 * 4 & 15) | high << 4;
}

// What a number stands for, where there are no minima.
inline int value_of(const Format& f, int number) {
  if (f.table) return VALUES[number];
  return f.bits == 8 ? int8_t(number - ZERO8) : number - f.zero;
}

void put_span(const Format& f, uint8_t* at, int j, const Span& span) {
  reinterpret_cast<uint16_t*>(at)[j] = span.scale;
  if (f.minima) reinterpret_cast<uint16_t*>(at)[WIDTH + j] = span.minimum;
  for (int g = 0; f.groups > 1 && g < f.groups; g++) {
    at[f.scales() + g * WIDTH + j] = uint8_t(span.by[g]);
    if (f.minima) at[f.scales() + (f.groups + g) * WIDTH + j] = uint8_t(span.less[g]);
  }
  at += f.header();
  for (int i = 0; i < f.inputs(); i++) put_number(f, at + i / 32 * f.numbers(), j, i % 32, span.numbers[i]);
}

// Rows of a tensor in the file.
struct Part {
  const uint8_t* rows;
  const Known* type;
  int first, count;
};

// The part that a row lies in; null for those that only fill the last block.
const Part* part_of(const std::vector<Part>& parts, int row) {
  for (const Part& part : parts)
    if (row < part.first + part.count) return &part;
  return nullptr;
}

// ---- scales ----------------------------------------------------------------------------------------------------------------

// Of each group of a span: its scales, and its offsets where there are minima.
constexpr int scales_of(bool minima) { return minima ? 2 * WIDTH : WIDTH; }
typedef float SpanScales[16 * scales_of(true)];

// Those of 16 N outputs.
template <int N>
inline void read_scales(const Format& f, const uint8_t* at, int side, float* to) {
  for (int j = side; j < side + N; j++) {
    const Floats scale = wide_half(load32(at + 32 * j)), minimum = f.minima ? wide_half(load32(at + 64 + 32 * j)) : spread(0.f);
    float* own = to + 16 * j;
    if (f.groups == 1) {
      store(own, scale);
      if (f.minima) store(own + WIDTH, minimum);
      continue;
    }
    const int8_t *by = reinterpret_cast<const int8_t*>(at + f.scales()) + 16 * j, *less = by + f.groups * WIDTH;
    for (int g = 0; g < f.groups; g++, own += scales_of(f.minima)) {
      store(own, scale * wide(by + g * WIDTH));
      if (f.minima) store(own + WIDTH, spread(0.f) - minimum * wide(less + g * WIDTH));
    }
  }
}

// ---- products --------------------------------------------------------------------------------------------------------------

// What a tile asks for of its own lines, N out of two: into the second cache, 4 KB beforehand. Marked as read once, 8 KB beforehand,
// they took half as long again: the first cache waits for so few lines at a time that unpacking waited for it too.
template <int N>
ALWAYS void fetch_lines(const uint8_t* w, int lines) {
  if constexpr (N == 1) return fetch_own<N>(w, lines);
  for (int j = 0; j < lines; j++) later(w + 2 * NEAR + 64 * j);
}

// What a panel says of 32 inputs.
template <int M>
struct PanelPair {
  const float *scale, *sum;
  const int32_t* sums;  // of the first 16, then of the others, as whole numbers
  const int8_t* q;
  ALWAYS explicit PanelPair(const uint8_t* at)
      : scale(reinterpret_cast<const float*>(at)),
        sum(scale + M),
        sums(reinterpret_cast<const int32_t*>(at + 8 * M)),
        q(reinterpret_cast<const int8_t*>(at + 16 * M)) {}
};

// How often dot4 may add numbers of so many bits to zeros: what it adds up is 2 x the largest x 127.
template <int BITS>
constexpr int rounds() {
  return !ROUNDS4 || BITS == 8 ? 0 : BITS == 4 ? ROUNDS4 : BITS == 5 ? ROUNDS4 / 2 : ROUNDS4 / 4;
}

// Four inputs' numbers with the upper bits of theirs, of which `high` has those of four or eight such fours.
template <int BITS, int FOUR>
ALWAYS Ints with_high(Ints low, Ints high) {
  constexpr int FROM = BITS == 5 ? FOUR : FOUR % 4 * 2, MASK = BITS == 5 ? 0x10 : 0x30;
  if constexpr (FROM > 4)
    high = down<FROM - 4>(high);
  else if constexpr (FROM < 4)
    high = up<4 - FROM>(high);
  return either(low, masked<MASK>(high));
}

// of_sums: of the inputs, where weights have minima.
template <bool MINIMA, int M, int N>
ALWAYS void add_scaled(Floats (&f)[M][N], const Ints (&s)[M][N], const float* of_rows, const float* of_sums, const float* scales) {
  Floats by[N], offset[N];
#pragma GCC unroll 2
  for (int j = 0; j < N; j++) {
    by[j] = load(scales + 16 * j);
    if constexpr (MINIMA) offset[j] = load(scales + WIDTH + 16 * j);
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; i++) {
    const Floats of_row = spread(of_rows[i]);
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) {
      f[i][j] = fma(to_floats(s[i][j]), of_row * by[j], f[i][j]);
      if constexpr (MINIMA) f[i][j] = fma(spread(of_sums[i]), offset[j], f[i][j]);
    }
  }
}

// 32 inputs of M rows, and 16 N outputs. SCALES: how many their weights have. READY: numbers are bytes, in order.
template <int M, int BITS, bool TABLE, int SCALES, bool MINIMA, bool READY>
struct Group {
  static constexpr int N = sides(M, 1), ROUNDS = TABLE ? 0 : rounds<BITS>(), EACH = scales_of(MINIMA);
  static constexpr bool BYTES = BITS == 8 || READY;
  Ints s[M][N], part[M][N], second[1][N], high[N], low[N], upper[N];

  // zero: the number that stands for 0, where there are no minima.
  template <class Fetched>
  ALWAYS const uint8_t* add(Floats (&f)[M][N], const uint8_t* w, int side, const uint8_t* panel, const float* scales, int zero,
                            Fetched&& fetched) {
    const PanelPair<M> of(panel);
    fill(second, spread(0)), fill(part, spread(0));
    w += 64 * side;
    if constexpr (BITS == 5 && !READY) w = take_high(w, fetched);
    begin(zero, [&](int i) { return SCALES == 2 ? of.sums[i] : of.sums[i] + of.sums[M + i]; });
    w = half<0>(w, of.q, fetched);
    if constexpr (SCALES == 2) {
      finish(f, of.scale, of.sums, scales);
      begin(zero, [&](int i) { return of.sums[M + i]; });
    }
    w = half<1>(w, of.q + 16 * M, fetched);
    if constexpr (SCALES == 2)
      finish(f, of.scale, of.sums + M, scales + EACH);
    else
      finish(f, of.scale, of.sum, scales);
    return w - 64 * side;
  }

 private:
  template <class Fetched>
  ALWAYS const uint8_t* take_high(const uint8_t* w, Fetched&& fetched) {
    fetched(N);
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) high[j] = load64(w + 64 * j);
    return w + 128;
  }

  // What products become too large by, since numbers have no sign: exact in integers.
  template <class Sum>
  ALWAYS void begin(int zero, Sum&& sum) {
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) {
      const Ints owed = MINIMA ? spread(0) : spread(-zero * sum(i));
#pragma GCC unroll 2
      for (int j = 0; j < N; j++) s[i][j] = owed;
    }
  }

  ALWAYS void finish(Floats (&f)[M][N], const float* of_rows, const float* of_sums, const float* scales) {
    flush();
    add_scaled<MINIMA>(f, s, of_rows, of_sums, scales);
  }
  ALWAYS void finish(Floats (&f)[M][N], const float* of_rows, const int32_t* sums, const float* scales) {
    float of_sums[M];
#pragma GCC unroll 12
    for (int i = 0; MINIMA && i < M; i++) of_sums[i] = of_rows[i] * float(sums[i]);
    finish(f, of_rows, of_sums, scales);
  }

  template <int HALF, class Fetched>
  ALWAYS const uint8_t* half(const uint8_t* w, const int8_t* q, Fetched&& fetched) {
    if constexpr (BITS == 6 && !READY) w = take_high(w, fetched);
    w = eight<4 * HALF>(w, q, fetched);
    if constexpr (ROUNDS == 2) flush();
    w = eight<4 * HALF + 2>(w, q + 8, fetched);
    if constexpr (ROUNDS == 2 || ROUNDS == 4) flush();
    return w;
  }

  // What was added up in 16 bits comes to the sums; what has 32 of its own, too.
  ALWAYS void flush() {
    if constexpr (ROUNDS) take(s, part);
    if constexpr (M == 1 && ROUNDS) take(s, second);
    if constexpr (M == 1 && !ROUNDS)
#pragma GCC unroll 2
      for (int j = 0; j < N; j++) s[0][j] = loradock::add(s[0][j], second[0][j]), second[0][j] = spread(0);
  }

  template <int FOUR, class Fetched>
  ALWAYS const uint8_t* eight(const uint8_t* w, const int8_t* q, Fetched&& fetched) {
    fetched(BYTES ? 2 * N : N);
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) numbers<FOUR>(w + 64 * j, j);
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) {
      const Ints x = spread4(q + 16 * i), y = spread4(q + 16 * i + 4);
#pragma GCC unroll 2
      for (int j = 0; j < N; j++) {
        Ints& to = ROUNDS ? part[i][j] : s[i][j];
        to = dot(to, low[j], x);
        Ints& other = M == 1 ? second[0][j] : to;
        other = dot(other, upper[j], y);
      }
    }
    return w + (BYTES ? 256 : 128);
  }

  template <int FOUR>
  ALWAYS void numbers(const uint8_t* w, int j) {
    if constexpr (BYTES) {
      low[j] = load64(w), upper[j] = load64(w + 128);
      return;
    }
    const Ints v = load64(w);
    low[j] = lower4(v), upper[j] = upper4(v);
    if constexpr (BITS == 5 || BITS == 6)
      low[j] = with_high<BITS, FOUR>(low[j], high[j]), upper[j] = with_high<BITS, FOUR + 1>(upper[j], high[j]);
    if constexpr (TABLE) low[j] = looked_up(table(), low[j]), upper[j] = looked_up(table(), upper[j]);
  }

  static ALWAYS Ints dot(Ints sum, Ints w, Ints x) { return BITS == 8 || TABLE ? dot8(sum, w, x) : dot4(sum, w, x); }

 public:
  static ALWAYS Ints table() { return load64(TABLE_BYTES.at); }
};

// PACKED: the block was unpacked (`unpack_ggml`).
template <int M, int BITS, bool TABLE, int SCALES, bool MINIMA, Fetch FETCH>
void tile_ggml(const Matrix& m, int block, const Input& in, int row, const Ahead& ahead, float* sums) {
  constexpr bool READY = FETCH == PACKED;
  constexpr int N = sides(M, 1), EACH = scales_of(MINIMA);
  const Format& format = READY ? *m.unpacked : *m.formats[block];
  const int pairs = m.k / 32;
  for (int side = 0; side < 2; side += N) {
    const uint8_t* w = READY ? m.data.data : m.block(block);
    auto fetched = [&](int lines) {
      if constexpr (FETCH == OWN) fetch_lines<N>(w + 64 * side, lines);
    };
    Floats f[M][N];
    fill(f, spread(0.f));
    const uint8_t* panel = in.panel(m, row);
    alignas(64) SpanScales own;
    const float* scales = READY ? m.scale.data + 16 * side : own + 16 * side;
    Group<M, BITS, TABLE, SCALES, MINIMA, READY> group;
    auto take = [&] {
      w = group.add(f, w, side, panel, scales, format.zero, fetched);
      panel += size_t(M) * 48, scales += SCALES * EACH;
    };
    if constexpr (READY) {
      for (int pair = 0; pair < pairs; pair++, w += m.block_bytes) {
        if (!side) ahead.beside(pair, pairs);
        take();
      }
    } else {
      const size_t header = format.header();
      const int span = format.inputs() / 32;
      for (int left = pairs; left > 0; left -= span) {
        fetched(int(header / 64));
        read_scales<N>(format, w, side, own);
        w += header, scales = own + 16 * side;
        for (int pair = 0; pair < span; pair++) take();
      }
    }
    leave(f, sums + 16 * side);
  }
}

template <int BITS, bool TABLE, int SCALES, bool MINIMA, Fetch FETCH, int... I>
const Tile* tiles_of_rows(std::integer_sequence<int, I...>) {
  static const Tile all[] = {tile_ggml<I + 1, BITS, TABLE, SCALES, MINIMA, FETCH>...};
  return all;
}

// Where sums are of 32 bits, all numbers are multiplied alike once they are bytes.
template <int BITS, bool TABLE, int SCALES, bool MINIMA>
const Tile* tiles_of_format(bool unpacked) {
  constexpr std::make_integer_sequence<int, GROUP_TILE> rows;
  constexpr int OF_BYTES = ROUNDS4 && !TABLE ? BITS : 8;
  return unpacked ? tiles_of_rows<OF_BYTES, false, SCALES, MINIMA, PACKED>(rows)
                  : tiles_of_rows<BITS, TABLE, SCALES, MINIMA, OWN>(rows);
}

float to_float_of_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float v = exponent == 31 ? (fraction ? NAN : INFINITY)
                  : exponent     ? std::ldexp(float(1024 + fraction), exponent - 25)
                                 : std::ldexp(float(fraction), -24);
  return bits & 0x8000 ? -v : v;
}

}  // namespace

namespace loradock {

const Tile* ggml_tiles(const Format& format, bool unpacked) {
  if (format.table) return tiles_of_format<4, true, 1, false>(unpacked);
  if (format.bits == 8) return tiles_of_format<8, false, 1, false>(unpacked);
  if (format.bits == 6) return tiles_of_format<6, false, 2, false>(unpacked);
  if (format.bits == 5) return format.minima ? tiles_of_format<5, false, 1, true>(unpacked) : tiles_of_format<5, false, 1, false>(unpacked);
  if (format.each == 16) return format.minima ? tiles_of_format<4, false, 2, true>(unpacked) : tiles_of_format<4, false, 2, false>(unpacked);
  return format.minima ? tiles_of_format<4, false, 1, true>(unpacked) : tiles_of_format<4, false, 1, false>(unpacked);
}

namespace {

// put(fours before them, numbers of four inputs as bytes) for one side of a block's 32 inputs, which is at w.
template <int BITS, bool TABLE, class Put>
ALWAYS void each_four(const uint8_t* w, Ints table, Put&& put) {
  if constexpr (BITS == 8) {
#pragma GCC unroll 8
    for (int four = 0; four < 8; four++) put(four, load64(w + four * 128));
    return;
  }
  Ints high = BITS == 5 ? load64(w) : spread(0);
  if (BITS == 5) w += 128;
  auto eight = [&](auto four) {
    constexpr int FOUR = decltype(four)::value;
    if (BITS == 6 && FOUR % 4 == 0) high = load64(w), w += 128;
    const Ints v = load64(w);
    Ints low = lower4(v), upper = upper4(v);
    w += 128;
    if constexpr (BITS == 5 || BITS == 6) low = with_high<BITS, FOUR>(low, high), upper = with_high<BITS, FOUR + 1>(upper, high);
    if (TABLE) low = looked_up(table, low), upper = looked_up(table, upper);
    put(FOUR, low), put(FOUR + 1, upper);
  };
  eight(std::integral_constant<int, 0>()), eight(std::integral_constant<int, 2>());
  eight(std::integral_constant<int, 4>()), eight(std::integral_constant<int, 6>());
}

// use(its bits, whether they are looked up), as constants.
template <class Use>
ALWAYS void of_format(const Format& f, Use&& use) {
  const auto bits = [&](auto four) { use(four, std::false_type()); };
  if (f.table) return use(std::integral_constant<int, 4>(), std::true_type());
  if (f.bits == 4) return bits(std::integral_constant<int, 4>());
  if (f.bits == 5) return bits(std::integral_constant<int, 5>());
  if (f.bits == 6) return bits(std::integral_constant<int, 6>());
  bits(std::integral_constant<int, 8>());
}

}  // namespace

// Its numbers as bytes, its scales as float32. Numbers that are bytes stay where they are, each 32 behind their scales.
void unpack_ggml(const Matrix& m, int block, Matrix& to, uint8_t* bytes) {
  const Format& f = *m.formats[block];
  const uint8_t* w = m.block(block);
  float* scales = to.scale.data;
  to.unpacked = &f;
  to.block_bytes = f.bits == 8 ? f.header() : 0;
  to.data.data = f.bits == 8 ? const_cast<uint8_t*>(w) + f.header() : bytes;
  const Ints table = Group<1, 4, true, 1, false, false>::table();
  of_format(f, [&](auto bits, auto looked_up) {
    for (int done = 0; done < m.k; done += f.inputs()) {
      read_scales<2>(f, w, 0, scales);
      w += f.header(), scales += size_t(f.groups) * scales_of(f.minima);
      if (bits == 8) w += f.inputs() / 32 * f.numbers();
      for (int i = 0; i < f.inputs() && bits < 8; i += 32, w += f.numbers(), bytes += 1024)
        for (int side = 0; side < 128; side += 64)
          each_four<bits, looked_up>(w + side, table, [&](int four, Ints v) { store64(bytes + four * 128 + side, v); });
    }
  });
}

void widen_ggml(const Matrix& m, int block, int from, int to, uint8_t* pairs) {
  const Format& f = *m.formats[block];
  const uint8_t* w = m.block(block) + from / f.inputs() * (f.header() + f.inputs() / 32 * f.numbers());
  const Ints table = Group<1, 4, true, 1, false, false>::table();
  alignas(64) SpanScales own;
  of_format(f, [&](auto bits, auto looked_up) {
    for (int done = from; done < to; done += f.inputs()) {
      read_scales<2>(f, w, 0, own);
      w += f.header();
      for (int i = 0; i < f.inputs(); i += 32, w += f.numbers(), pairs += 2048)
        for (int side = 0; side < 128; side += 64) {
          Floats scale[2], offset[2];  // of each 16 inputs
          for (int half = 0; half < 2; half++) {
            const float* scales = own + (i + 16 * half) / f.each * scales_of(f.minima) + side / 4;
            scale[half] = load(scales), offset[half] = f.minima ? load(scales + WIDTH) : spread(-float(f.zero)) * scale[half];
          }
          each_four<bits, looked_up>(w + side, table, [&](int four, Ints v) {
            widen4(pairs + four * 256 + side, v, scale[four / 4], offset[four / 4]);
          });
        }
    }
  });
}

// ---- rows in bytes, by the processor's tiles -----------------------------------------------------------------------------------

#ifdef HAS_TILES
namespace {

constexpr int CHUNK = 256;  // inputs whose weights are unpacked and multiplied with all rows

// The products of M rows, one side of a block and `pairs` times 32 inputs, which are so many bytes `apart`, added to sums as
// `add_scaled` does. Beside each group so many lines are asked for, from `next` on.
template <int SCALES, bool MINIMA, int M>
void add_chunk(const ByteTiles& tiles, const uint8_t* w, size_t apart, const uint8_t* panel, const float* scales, int zero, int pairs,
               bool begins, float* sums, const uint8_t*& next, int lines) {
  alignas(64) int32_t products[4][BYTE_TILE][16];
  alignas(64) float of_sums[BYTE_TILE];
  alignas(64) int32_t owed[BYTE_TILE];
  Floats f[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) f[i] = begins ? spread(0.f) : load(sums + i * WIDTH);
  const int count = pairs * SCALES;
  const size_t pair_bytes = size_t(M) * 48;
  auto multiply = [&](auto one, int g) __attribute__((always_inline)) {
    const int pair = g / SCALES, half = g % SCALES;
    const auto* x = reinterpret_cast<const int8_t*>(panel + pair * pair_bytes + 16 * M + 16 * half);
    tiles.multiply<decltype(one)::value>(products[g % 4][0], x, w + pair * apart + half * 512);
  };
  auto finish = [&](int g) __attribute__((always_inline)) {
    for (int i = 0; i < lines; i++, next += 64) later(next);
    const int pair = g / SCALES, half = g % SCALES;
    const float* of_rows = reinterpret_cast<const float*>(panel + pair * pair_bytes);
    const int32_t* its = reinterpret_cast<const int32_t*>(of_rows + (2 + half) * M);
    const float* offsets = of_rows + M;
    if constexpr (MINIMA && SCALES == 2) {
      store(of_sums, load(of_rows) * to_floats(load64(its)));
      offsets = of_sums;
    } else if constexpr (!MINIMA) {
      const Ints all = SCALES == 2 ? load64(its) : add(load64(its), load64(its + M));
      store64(owed, to_ints(to_floats(all) * spread(float(-zero))));
    }
    const float* its_scales = scales + g * scales_of(MINIMA);
    const Floats by = load(its_scales);
    Floats offset;
    if constexpr (MINIMA) offset = load(its_scales + WIDTH);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      Ints s = load64(products[g % 4][i]);
      if constexpr (!MINIMA) s = add(s, spread(owed[i]));
      f[i] = fma(to_floats(s), spread(of_rows[i]) * by, f[i]);
      if constexpr (MINIMA) f[i] = fma(spread(offsets[i]), offset, f[i]);
    }
  };
  multiply(std::true_type(), 0);
  for (int g = 0; g < count; g += 2) {
    if (g + 1 < count) multiply(std::false_type(), g + 1);
    finish(g);
    if (g + 2 < count) multiply(std::true_type(), g + 2);
    if (g + 1 < count) finish(g + 1);
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) store(sums + i * WIDTH, f[i]);
}

typedef void (*AddChunk)(const ByteTiles&, const uint8_t*, size_t, const uint8_t*, const float*, int, int, bool, float*,
                         const uint8_t*&, int);
template <int SCALES, bool MINIMA, int... I>
const AddChunk* add_chunks(std::integer_sequence<int, I...>) {
  static const AddChunk all[] = {(I < GROUP_TILE ? nullptr : add_chunk<SCALES, MINIMA, I < GROUP_TILE ? BYTE_TILE : I + 1>)...};
  return all;
}

template <int BITS, bool TABLE, int SCALES, bool MINIMA>
void by_tiles(const Format& format, const uint8_t* w, int k, const Input& in, const Matrix& m, const Cut& cut, int pass, float* sums) {
  static thread_local Buffer<uint8_t> room;
  room.need(CHUNK * WIDTH);
  alignas(64) float scales[CHUNK / 32 * SCALES * scales_of(MINIMA)];
  const int parts = cut.tiles(pass), span = format.inputs();
  const size_t own = format.header() + span / 32 * format.numbers();
  const Ints table = Group<1, 4, true, 1, false, false>::table();
  int most = 0;  // where a tile has fewer, what is behind its rows is multiplied in vain
  for (int part = 0; part < parts; part++) most = std::max(most, cut.tile(pass, part + 1) - cut.tile(pass, part));
  const ByteTiles tiles(most, 32 / SCALES);
  for (int from = 0; from < k; from += CHUNK) {
    const int inputs = std::min(CHUNK, k - from);
    const uint8_t* bytes = BITS == 8 ? w + format.header() : room.data;  // which stay where they are
    uint8_t* to = room.data;
    float* its = scales;
    for (int i = 0; i < inputs; i += span, w += own, its += size_t(format.groups) * scales_of(MINIMA)) {
      read_scales<2>(format, w, 0, its);
      const uint8_t* numbers = w + format.header();
      for (int j = 0; j < span && BITS < 8; j += 32, numbers += format.numbers(), to += 1024)
        for (int side = 0; side < 128; side += 64)
          each_four<BITS, TABLE>(numbers + side, table, [&](int four, Ints v) { store64(to + four * 128 + side, v); });
    }
    // What is unpacked next is on its way meanwhile: not all of it at once, which the first cache would wait for.
    const uint8_t* next = w;
    const int groups = 2 * parts * (inputs / 32 * SCALES), lines = int((own * inputs / span / 64 + groups - 1) / groups);
    for (int part = 0; part < parts; part++) {
      const int begin = cut.tile(pass, part), rows = cut.tile(pass, part + 1) - begin;
      const uint8_t* panel = in.panel(m, begin) + size_t(from) / 32 * 48 * rows;
      static const AddChunk* const of_rows = add_chunks<SCALES, MINIMA>(std::make_integer_sequence<int, BYTE_TILE>());
      for (int side = 0; side < 2; side++)
        of_rows[rows - 1](tiles, bytes + 64 * side, BITS == 8 ? own : 1024, panel, scales + 16 * side, format.zero, inputs / 32, !from,
                          sums + size_t(part) * BYTE_TILE * WIDTH + 16 * side, next, lines);
    }
  }
}

}  // namespace
#endif

void ggml_by_tiles(const Matrix& m, int block, const Input& in, const Cut& cut, int pass, float* sums) {
#ifdef HAS_TILES
  const Format& f = *m.formats[block];
  of_format(f, [&](auto bits, auto table) {
    constexpr int BITS = decltype(bits)::value;
    constexpr bool TABLE = decltype(table)::value;
    auto call = [&](auto scales, auto minima) {
      by_tiles<BITS, TABLE, decltype(scales)::value, decltype(minima)::value>(f, m.block(block), m.k, in, m, cut, pass, sums);
    };
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, 2> two;
    if constexpr (TABLE || BITS == 8) return call(one, std::false_type());
    if constexpr (BITS == 6) return call(two, std::false_type());
    if constexpr (BITS == 5) return f.minima ? call(one, std::true_type()) : call(one, std::false_type());
    if constexpr (BITS == 4 && !TABLE) {
      if (f.each == 16) return f.minima ? call(two, std::true_type()) : call(two, std::false_type());
      return f.minima ? call(one, std::true_type()) : call(one, std::false_type());
    }
  });
#endif
}

void ggml_row(const Matrix& m, int64_t o, float* out) {
  const bool second = m.paired && o >= m.n / 2;
  const int64_t place = second ? o - m.n / 2 : o;
  const int b = int(place / (m.paired ? 16 : WIDTH)), j = int(place % (m.paired ? 16 : WIDTH)) + (second ? 16 : 0);
  const Format& f = *m.formats[b];
  const uint8_t* at = m.block(b);
  for (int done = 0; done < m.k; done += f.inputs()) {
    const float scale = to_float_of_half(half_at(at + 2 * j)), minimum = f.minima ? to_float_of_half(half_at(at + 64 + 2 * j)) : 0;
    const int8_t *by = reinterpret_cast<const int8_t*>(at + f.scales()) + j, *less = by + f.groups * WIDTH;
    at += f.header();
    for (int i = 0; i < f.inputs(); i++) {
      const int g = i / f.each, number = number_at(f, at + i / 32 * f.numbers(), j, i % 32);
      const float own = f.groups == 1 ? scale : scale * float(by[g * WIDTH]);
      const float offset = f.groups == 1 ? minimum : f.minima ? -minimum * float(less[g * WIDTH]) : 0;
      out[done + i] = f.minima ? own * float(number) + offset : own * float(value_of(f, number));
    }
    at += f.inputs() / 32 * f.numbers();
  }
}

}  // namespace loradock

extern "C" {

// Bytes of a row of k inputs in a file; 0 for a type, or a number of inputs, that is not packed.
int64_t loradock_ggml_row_bytes(int type, int k) {
  const Known* it = known(type);
  return it && k % it->format->inputs() == 0 ? int64_t(k / it->format->inputs()) * it->bytes : 0;
}

// W [n, k] of one or more tensors as a GGUF file has them, one below the other: their rows, types and how many rows. Rows up to n
// that no tensor has are zeros. `paired`: as in loradock_matrix. -1: it can't be, since 32 outputs would be of two types.
int loradock_matrix_ggml(const uint8_t* const* from, const int* types, const int* rows, int count, int n, int k, const bf16* bias,
                         int paired) {
  std::vector<Part> parts;
  int first = 0;
  for (int i = 0; i < count; first += rows[i++]) {
    if (!loradock_ggml_row_bytes(types[i], k)) return -1;
    parts.push_back({from[i], known(types[i]), first, rows[i]});
  }
  if (n % 16 || first > n || !count || (paired && (n % 32 || first != n))) return -1;
  std::unique_ptr<Matrix> m(
      new Matrix{n, k, (n + WIDTH - 1) / WIDTH, GGML, 16, 2, bool(paired), false, {}, {}, {}, 0, {}, {}});
  m->places.push_back(0);
  for (int b = 0; b < m->blocks; b++) {
    const Known* type = nullptr;
    for (int j = 0; j < WIDTH; j++) {
      const Part* part = part_of(parts, m->output(b, j));
      if (part && type && part->type != type) return -1;
      if (part) type = part->type;
    }
    m->formats.push_back((type ? type : parts.back().type)->format);
    m->places.push_back(m->places.back() + m->formats.back()->bytes(k));
  }
  // Of 16 inputs with a scale of their own tiles multiply half as many at a time, and are slower.
  const auto of_32 = [](const Format* f) { return f->each == 32; };
  m->tiles = 2 * std::count_if(m->formats.begin(), m->formats.end(), of_32) > m->blocks;
  place(m->data, m->places.back());
  if (bias) place(m->bias, size_t(m->blocks) * WIDTH);
#pragma omp parallel for schedule(static)
  for (int b = 0; b < m->blocks; b++)
    for (int j = 0; j < WIDTH; j++) {
      const int o = m->output(b, j);
      if (bias) m->bias.data[b * WIDTH + j] = o < n ? to_float(bias[o]) : 0;
      const Part* part = part_of(parts, o);
      if (!part) continue;
      const Format& f = *part->type->format;
      const uint8_t* row = part->rows + (o - part->first) * loradock_ggml_row_bytes(part->type->type, k);
      uint8_t* at = m->data.data + m->places[b];
      Span span;
      for (int i = 0; i < k; i += f.inputs(), row += part->type->bytes) {
        span.take(part->type->type, row);
        put_span(f, at, j, span);
        at += f.header() + f.inputs() / 32 * f.numbers();
      }
    }
  return keep(std::move(m));
}

// out[rows, k] = W's rows of these numbers, in float32, as ggml dequantizes them.
void loradock_ggml_rows(int number, const int64_t* which, int rows, float* out) {
  const Matrix& m = *matrices[number];
#pragma omp parallel for schedule(static) if (rows > 16)
  for (int r = 0; r < rows; r++) ggml_row(m, which[r], out + int64_t(r) * m.k);
}
}

#endif
