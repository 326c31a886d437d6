// Weights as they come, packed for `products.h`: once, when a layer is loaded. One function for each format.

#include "matrix.h"

#ifdef STEP

#include <sys/mman.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

using namespace loradock;

namespace loradock {

std::vector<std::unique_ptr<Matrix>> matrices;

}  // namespace loradock

namespace {

constexpr int SAMPLES = 8;           // sixteens of outputs by which it is decided how 4 bits get their scales
constexpr float OFFSETS_PAY = 0.5f;  // they do where they leave at most this part of the squared error
constexpr float SPANS_COST = 1.1f;   // and common scales where they leave at most so much of it: prompts are faster
constexpr int TRIES = 9;             // scales that are tried for a group of 4 bits,
constexpr int SPAN_TRIES = 17;       // and for a span of groups
constexpr int SPAN = 128;            // inputs of a span,
constexpr int SPAN_GROUPS = 8;       // and how many groups it has at most

constexpr size_t HUGE_PAGE = size_t(2) << 20, CHUNK_BYTES = size_t(64) << 20;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t BETWEEN = 64;  // bytes between two of them, which nobody may touch
#else
constexpr size_t BETWEEN = 0;
#endif
bool huge_pages = true;

}  // namespace

namespace loradock {

// One after the other, in huge pages where the kernel gives them: every
// step reads all of it, and the processor knows the addresses of a few megabytes of small pages at a time.
uint8_t* room(size_t bytes) {
  static uint8_t *next = nullptr, *end = nullptr;
  const size_t taken = (bytes + 63) / 64 * 64 + BETWEEN;
  if (size_t(end - next) < taken) {
    const size_t size = (std::max(taken, CHUNK_BYTES) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    void* got = mmap(nullptr, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) throw std::bad_alloc();
    next = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(got) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    end = next + size;
    madvise(next, size, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(next, size);
#endif
  }
  uint8_t* here = next;
  next += taken;
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(here, bytes);
#endif
  return here;
}

int keep(std::unique_ptr<Matrix> m) {
  matrices.push_back(std::move(m));
  return int(matrices.size()) - 1;
}

}  // namespace loradock

namespace {

struct Shape {
  int n, k;
  bool paired;
};

std::unique_ptr<Matrix> blank(const Shape& s, int kind, int group, bool offsets, const bf16* bias, int span = 1) {
  std::unique_ptr<Matrix> m(
      new Matrix{s.n, s.k, (s.n + WIDTH - 1) / WIDTH, kind, group, span, s.paired, offsets, {}, {}, {}, 0});
  m->block_bytes = m->sized();
  place(m->data, m->block_bytes * m->blocks);
  if (kind == CHANNEL8 || kind == GROUP8) place(m->scale, size_t(m->blocks) * m->groups() * WIDTH);
  if (!bias) return m;
  place(m->bias, size_t(m->blocks) * WIDTH);
  for (int b = 0; b < m->blocks; b++)
    for (int j = 0; j < WIDTH; j++)
      m->bias.data[b * WIDTH + j] = m->output(b, j) < s.n ? to_float(bias[m->output(b, j)]) : 0;
  return m;
}

// work(block, output of it, row) for every output; the row is -1 for those that only fill the last block.
template <class F>
void outputs(const Matrix& m, F&& work) {
#pragma omp parallel for schedule(static)
  for (int b = 0; b < m.blocks; b++)
    for (int j = 0; j < WIDTH; j++) work(b, j, m.output(b, j) < m.n ? m.output(b, j) : -1);
}

inline uint8_t& place8(Matrix& m, int b, int j, int i) {
  return m.data.data[b * m.block_bytes + (size_t(i / 4) * WIDTH + j) * 4 + i % 4];
}

// A group of one output in 4 bits: its numbers of 0 to 15 in a buffer, its scale and eighth of an offset in the block.
struct Group4 {
  uint8_t q[128];
  bf16 scale{0}, offset{0};

  void store(Matrix& m, int b, int j, int g) const {
    const int size = std::min(m.group, m.k - g * m.group);
    uint8_t* at = m.group4(b, g);
    reinterpret_cast<bf16*>(at)[j] = scale;
    if (m.offsets) reinterpret_cast<bf16*>(at)[WIDTH + j] = offset;
    at += m.offsets ? 128 : 64;
    for (int i = 0; i < size; i += 8)
      for (int l = 0; l < 4; l++) at[(size_t(i / 8) * WIDTH + j) * 4 + l] = uint8_t(q[i + l] | q[i + 4 + l] << 4);
  }
};


// Input i of output j of block b, as the products take it; not of GGML.
inline float weight(const Matrix& m, int b, int j, int i) {
  const uint8_t* block = m.data.data + b * m.block_bytes;
  if (m.kind == BF16) return to_float(reinterpret_cast<const bf16*>(block)[(size_t(i / 2) * WIDTH + j) * 2 + i % 2]);
  const int g = i / m.group, first = i % m.group;
  if (m.kind != GROUP4) {
    const auto number = int8_t(block[(size_t(i / 4) * WIDTH + j) * 4 + i % 4] - ZERO8);
    return float(number) * m.scale.data[(size_t(b) * m.groups() + g) * WIDTH + j];
  }
  float scale, offset = 0;
  const uint8_t* at;
  if (m.span == 1) {
    at = m.group4(b, g);
    scale = to_float(reinterpret_cast<const bf16*>(at)[j]);
    if (m.offsets) offset = 8 * to_float(reinterpret_cast<const bf16*>(at)[WIDTH + j]);
    at += m.offsets ? 128 : 64;
  } else {
    const int span = g / m.span, place = g % m.span;
    at = m.span4(b, span);
    scale = to_float(reinterpret_cast<const bf16*>(at)[j]) *
            float(reinterpret_cast<const int8_t*>(at + WIDTH * sizeof(bf16))[place * WIDTH + j]);
    at += Matrix::header(m.span_groups(span)) + size_t(place) * m.group * WIDTH / 2;
  }
  const uint8_t two = at[(size_t(first / 8) * WIDTH + j) * 4 + first % 4];
  return float(int(first % 8 < 4 ? two & 15 : two >> 4) - 8) * scale + offset;
}

// One group of 16 outputs, a lane for each of them, and the best 4 bits for it.
struct Fit {
  int n;
  bool offsets;
  Floats w[128], scale, offset, error;

  // Numbers of 0 to 15, less 8, that are nearest.
  inline Floats numbers(int i, Floats from, Floats by) const {
    return min(max(nearest((w[i] - from) * by), spread(-8.f)), spread(7.f));
  }

  // a / b, and 0 where b is 0.
  static inline Floats ratio(Floats a, Floats b) { return only(differ(b, spread(0.f)), a / b); }

  // Inputs [first, first + n) of rows [row, row + 16) of W [., k].
  void take(const bf16* from, int row, int k, int first) {
    alignas(64) float rows[16][128], lanes[16];
    for (int j = 0; j < 16; j++)
      for (int i = 0; i < n; i += 16) loradock::store(rows[j] + i, wide(from + size_t(row + j) * k + first + i));
    for (int i = 0; i < n; i++) {
      for (int j = 0; j < 16; j++) lanes[j] = rows[j][i];
      w[i] = load(lanes);
    }
    search();
  }

  // Numbers by each of several scales, then the least squares' scale (and offset) for these numbers.
  void search() {
    const Floats zero = spread(0.f), one = spread(1.f), count = spread(float(n));
    Floats low = w[0], high = w[0], sum = zero;
    for (int i = 0; i < n; i++) low = min(low, w[i]), high = max(high, w[i]), sum = sum + w[i];
    // The widest with its sign: 4 bits reach from -8 to 7.
    const Floats widest = choose(less(high, zero - low), low, high);
    scale = offset = zero, error = spread(INFINITY);
    for (int t = -TRIES / 2; t <= TRIES / 2; t++) {
      const Floats first = offsets ? (high - low) / spread(15 + 0.2f * t) : widest / spread(-8 - 0.2f * t);
      const Floats from = offsets ? fma(spread(8.f), first, low) : zero;
      const Floats by = ratio(one, first);
      Floats q = zero, qq = zero, wq = zero;
      for (int i = 0; i < n; i++) {
        const Floats r = numbers(i, from, by);
        q = q + r, qq = fma(r, r, qq), wq = fma(r, w[i], wq);
      }
      Floats is = ratio(wq, qq), at = zero;
      if (offsets) {
        is = ratio(fms(count, wq, q * sum), fms(count, qq, q * q));
        at = fnma(is, q, sum) / count * spread(0.125f);
      }
      is = rounded(is), at = rounded(at) * spread(8.f);
      const Floats back = ratio(one, is);
      Floats left = zero;
      for (int i = 0; i < n; i++) {
        const Floats off = fnma(numbers(i, at, back), is, w[i] - at);
        left = fma(off, off, left);
      }
      const Mask better = less(left, error);
      error = choose(better, left, error);
      scale = choose(better, is, scale), offset = choose(better, at, offset);
    }
  }

  // At group g of half a block.
  void store(Matrix& m, int b, int half, int g) const {
    uint8_t* at = m.group4(b, g);
    loradock::store(reinterpret_cast<bf16*>(at) + half, scale);
    if (offsets) loradock::store(reinterpret_cast<bf16*>(at) + WIDTH + half, offset * spread(0.125f));
    numbers_at(at + (offsets ? 128 : 64) + half * 4);
  }

  // The numbers where half a block has them.
  void numbers_at(uint8_t* at) const {
    const Floats back = ratio(spread(1.f), scale);
    auto number = [&](int i) { return to_ints(numbers(i, offset, back) + spread(8.f)); };
    for (int i = 0; i < n; i += 8, at += WIDTH * 4) {
      Ints bytes = spread(0);
      for (int l = 3; l >= 0; l--) bytes = either(up<8>(bytes), either(number(i + l), up<4>(number(i + 4 + l))));
      store64(at, bytes);
    }
  }
};

// Groups of 16 outputs whose scales are whole multiples, from -15 to 15, of one scale for each output.
struct FitSpan {
  Fit fits[SPAN_GROUPS];
  int groups;
  Floats scale, first;  // `first` says which multiple is nearest, `scale` is the least squares' for these multiples
  Floats error;

  // The multiple that is nearest to what a group would have, and has its sign.
  inline Floats times(const Fit& fit, Floats back) const {
    const Floats most = min(max(nearest(abs(fit.scale) * back), spread(1.f)), spread(15.f));
    return choose(less(fit.scale, spread(0.f)), spread(0.f) - most, most);
  }

  // One scale after the other, down from where the largest group gets the largest multiple: which one explains most.
  void search() {
    const Floats zero = spread(0.f), one = spread(1.f);
    Floats top = zero, most = spread(-1.f), all = zero;
    for (int g = 0; g < groups; g++) {
      top = max(top, abs(fits[g].scale));
      for (int i = 0; i < fits[g].n; i++) all = fma(fits[g].w[i], fits[g].w[i], all);
    }
    scale = first = zero;
    for (int t = 0; t < SPAN_TRIES; t++) {
      const Floats common = top / spread(15.5f - 0.25f * t), back = Fit::ratio(one, common);
      Floats qq = zero, wq = zero;
      for (int g = 0; g < groups; g++) {
        const Floats by = times(fits[g], back), nearest_by = Fit::ratio(one, by * common);
        Floats squares = zero, products = zero;
        for (int i = 0; i < fits[g].n; i++) {
          const Floats r = fits[g].numbers(i, zero, nearest_by);
          squares = fma(r, r, squares), products = fma(r, fits[g].w[i], products);
        }
        qq = fma(by * by, squares, qq), wq = fma(by, products, wq);
      }
      const Floats explained = Fit::ratio(wq * wq, qq);
      const Mask better = less(most, explained);
      most = choose(better, explained, most);
      scale = choose(better, Fit::ratio(wq, qq), scale), first = choose(better, common, first);
    }
    error = all - most;
    scale = rounded(scale);
  }

  // As span s of half a block.
  void store(Matrix& m, int b, int half, int s) {
    uint8_t* at = m.span4(b, s);
    loradock::store(reinterpret_cast<bf16*>(at) + half, scale);
    int8_t* by = reinterpret_cast<int8_t*>(at + WIDTH * sizeof(bf16)) + half;
    at += Matrix::header(groups) + half * 4;
    const Floats back = Fit::ratio(spread(1.f), first);
    for (int g = 0; g < groups; at += size_t(fits[g].n) * WIDTH / 2, g++) {
      alignas(16) int8_t multiples[16];
      const Floats multiple = times(fits[g], back);
      store8(multiples, to_ints(multiple));
      std::memcpy(by + g * WIDTH, multiples, 16);
      fits[g].scale = multiple * scale;
      fits[g].numbers_at(at);
    }
  }
};

// The squared error of some of the outputs, rounded to 4 bits in each of three ways.
struct Errors {
  float plain = 0, offsets = 0, spans = 0;

  Errors(const bf16* from, const Shape& s, int group, int span) {
    const int halves = s.n / 16, step = std::max(1, halves / SAMPLES), inputs = span * group;
    float p = 0, o = 0, c = 0;
#pragma omp parallel for reduction(+ : p, o, c)
    for (int h = 0; h < halves; h += step) {
      FitSpan fit;
      Fit with;
      for (int begin = 0; begin < s.k; begin += inputs) {
        const int end = std::min(begin + inputs, s.k);
        fit.groups = (end - begin + group - 1) / group;
        for (int g = 0, i = begin; i < end; g++, i += group) {
          fit.fits[g].n = with.n = std::min(group, end - i), fit.fits[g].offsets = false, with.offsets = true;
          fit.fits[g].take(from, h * 16, s.k, i), with.take(from, h * 16, s.k, i);
          p += sum_of(fit.fits[g].error), o += sum_of(with.error);
        }
        fit.search();
        c += sum_of(fit.error);
      }
    }
    plain = p, offsets = o, spans = c;
  }
};

int plain(const bf16* from, const Shape& s, const bf16* bias) {
  auto m = blank(s, BF16, s.k, false, bias);
  outputs(*m, [&](int b, int j, int o) {
    bf16* at = reinterpret_cast<bf16*>(m->data.data + b * m->block_bytes);
    for (int i = 0; i < s.k; i++)
      at[(size_t(i / 2) * WIDTH + j) * 2 + i % 2] = o < 0 ? bf16{0} : from[size_t(o) * s.k + i];
  });
  return keep(std::move(m));
}

int channel8(const int8_t* from, const Shape& s, const float* scale, const bf16* bias) {
  auto m = blank(s, CHANNEL8, s.k, false, bias);
  outputs(*m, [&](int b, int j, int o) {
    for (int i = 0; i < s.k; i++) place8(*m, b, j, i) = uint8_t((o < 0 ? 0 : from[size_t(o) * s.k + i]) + ZERO8);
    m->scale.data[b * WIDTH + j] = o < 0 ? 0 : scale[o];
  });
  return keep(std::move(m));
}

int rounded8(const bf16* from, const Shape& s, int group, const bf16* bias) {
  auto m = blank(s, GROUP8, group, false, bias);
  outputs(*m, [&](int b, int j, int o) {
    for (int g = 0; g < m->groups(); g++) {
      const int first = g * group, end = std::min(first + group, s.k);
      float top = 0;
      for (int i = first; o >= 0 && i < end; i++) top = std::max(top, std::fabs(to_float(from[size_t(o) * s.k + i])));
      const float by = top > 0 ? 127.f / top : 0.f;
      for (int i = first; i < end; i++)
        place8(*m, b, j, i) = uint8_t((o < 0 ? 0 : int(std::nearbyint(to_float(from[size_t(o) * s.k + i]) * by))) + ZERO8);
      m->scale.data[(size_t(b) * m->groups() + g) * WIDTH + j] = top / 127.f;
    }
  });
  return keep(std::move(m));
}

int rounded4(const bf16* from, const Shape& s, int group, const bf16* bias) {
  const int most = std::min(SPAN / group, SPAN_GROUPS);
  const Errors errors(from, s, group, most);
  const bool offsets = errors.offsets <= OFFSETS_PAY * errors.plain, spans = errors.spans <= SPANS_COST * errors.plain;
  auto m = blank(s, GROUP4, group, offsets, bias, spans && !offsets ? most : 1);
#pragma omp parallel for schedule(static)
  for (int b = 0; b < m->blocks; b++)
    for (int half = 0; half < WIDTH; half += 16) {
      auto taken = [&](Fit& fit, int g) {
        fit.n = std::min(group, s.k - g * group), fit.offsets = offsets;
        if (m->output(b, half) < s.n) return fit.take(from, m->output(b, half), s.k, g * group);
        std::fill(fit.w, fit.w + fit.n, spread(0.f));  // which only fill the last block
        fit.search();
      };
      FitSpan span;
      for (int part = 0; part < m->spans(); part++) {
        span.groups = m->span_groups(part);
        for (int g = 0; g < span.groups; g++) taken(span.fits[g], part * m->span + g);
        if (m->span == 1) {
          span.fits[0].store(*m, b, half, part);
        } else {
          span.search();
          span.store(*m, b, half, part);
        }
      }
    }
  return keep(std::move(m));
}

}  // namespace

extern "C" {

// Rows of W [n, k], as bfloat16 (kind 0), as int8 with a scale for each row (1), or bfloat16 to be made int8 (2) or 4 bits
// (3) with a scale for each group of inputs. `paired`: the first half of the rows is the gate of the second half. -1: it
// can't be.
int loradock_matrix(const void* from, int n, int k, int kind, int group, const float* scale, const bf16* bias, int paired) {
  if (k % 16 || n % 16 || group % 16 || (kind == GROUP4 && group > 128) || (paired && n % 32)) return -1;
  const Shape s{n, k, bool(paired)};
  const bf16* floats = static_cast<const bf16*>(from);
  if (kind == CHANNEL8) return channel8(static_cast<const int8_t*>(from), s, scale, bias);
  if (kind == GROUP8) return rounded8(floats, s, group, bias);
  return kind == GROUP4 ? rounded4(floats, s, group, bias) : plain(floats, s, bias);
}

// W [n, k] as checkpoints pack it: 8 or 4 bits in int32, the lowest first, along the inputs; scales [n, k / group], and the
// numbers that stand for 0 there, or null for the middle. Strides are elements from one output, and one input (int32, or
// group), to the next. Groups are cut to 128 inputs at most: the inputs of each get a scale of their own.
int loradock_matrix_integers(const uint32_t* from, const int64_t* strides, int bits, const bf16* scale, const uint8_t* zero,
                             const int64_t* scale_strides, int n, int k, int group, const bf16* bias, int paired) {
  int most = std::min(group, 128);
  if (group < k)
    while (most > 16 && (group % most || most % 16)) most--;
  if (k % 16 || n % 16 || most % 16 || (group < k && group % most) || (paired && n % 32)) return -1;
  if (bits != 4 && (bits != 8 || zero)) return -1;
  const Shape s{n, k, bool(paired)};
  auto m = blank(s, bits == 4 ? GROUP4 : GROUP8, most, zero, bias);
  const int each = 32 / bits;
  auto number = [&](int o, int i) {
    return from[o * strides[0] + i / each * strides[1]] >> (i % each * bits) & ((1u << bits) - 1);
  };
  outputs(*m, [&](int b, int j, int o) {
    for (int g = 0; g < m->groups(); g++) {
      const int first = g * most, size = std::min(most, k - first);
      const int64_t at = o * scale_strides[0] + first / group * scale_strides[1];
      if (bits == 8) {
        for (int i = first; i < first + size; i++) place8(*m, b, j, i) = uint8_t((o < 0 ? 0 : int(number(o, i)) - 128) + ZERO8);
        m->scale.data[(size_t(b) * m->groups() + g) * WIDTH + j] = o < 0 ? 0 : to_float(scale[at]);
        continue;
      }
      Group4 made{};
      for (int i = 0; o >= 0 && i < size; i++) made.q[i] = uint8_t(number(o, first + i));
      if (o >= 0) made.scale = scale[at];
      if (o >= 0 && zero) put(made.offset, (8 - zero[at]) * to_float(scale[at]) / 8);
      made.store(*m, b, j, g);
    }
  });
  return keep(std::move(m));
}

// Whether further matrices lie in huge pages; for measuring.
void loradock_huge_pages(int on) { huge_pages = on != 0; }

int loradock_matrix_outputs(int number) { return matrices[number]->n; }
int loradock_matrix_inputs(int number) { return matrices[number]->k; }

// Whether W can be had back from a matrix.
int loradock_unpacks(int number) { return matrices[number]->kind == BF16 || matrices[number]->kind == GGML; }

// out[rows, k] = W's rows of these numbers; W is bfloat16 or GGML, and not paired.
void loradock_rows(int number, const int64_t* which, int rows, bf16* out) {
  const Matrix& m = *matrices[number];
#pragma omp parallel for schedule(static) if (rows > 16)
  for (int r = 0; r < rows; r++)
    unpack(m, which[r], [&](int i, uint32_t two) { std::memcpy(out + int64_t(r) * m.k + i, &two, 4); });
}

// out[n] = of each of W's rows the sum of its squares. Not 0: they cannot be had of this matrix.
int loradock_row_squares(int number, float* out) {
  const Matrix& m = *matrices[number];
  if (m.kind == GGML && m.paired) return 1;
  outputs(m, [&](int b, int j, int o) {
    if (o < 0) return;
    double sum = 0;
    if (m.kind == GGML) {
      static thread_local Buffer<float> row;
      row.need(m.k);
      ggml_row(m, o, row.data);
      for (int i = 0; i < m.k; i++) sum += double(row.data[i]) * row.data[i];
    } else {
      for (int i = 0; i < m.k; i++) {
        const double w = weight(m, b, j, i);
        sum += w * w;
      }
    }
    out[o] = float(sum);
  });
  return 0;
}

// Whether its 4 bits count from offsets, and how many of its groups have scales that are multiples of one.
int loradock_matrix_offsets(int number) { return matrices[number]->offsets; }
int loradock_matrix_span(int number) { return matrices[number]->span; }

// What it takes in memory.
int64_t loradock_matrix_bytes(int number) {
  const Matrix& m = *matrices[number];
  return m.data.size + (m.scale.size + m.bias.size) * sizeof(float);
}
}

#endif
