// Weights as they come, packed for `products.h`: once, when a layer is loaded. One function for each format.

#include "matrix.h"

#ifdef STEP

using namespace loradock;

namespace loradock {

std::vector<std::unique_ptr<Matrix>> matrices;

}

namespace {

constexpr int SAMPLES = 8;           // blocks of a matrix by which it is decided whether 4 bits get offsets
constexpr float OFFSETS_PAY = 0.5f;  // they do where they leave at most this part of the squared error
constexpr int TRIES = 19;            // scales that are tried for a group of 4 bits

struct Shape {
  int n, k;
  bool paired;
};

std::unique_ptr<Matrix> blank(const Shape& s, int kind, int group, bool offsets, const bf16* bias) {
  std::unique_ptr<Matrix> m(
      new Matrix{s.n, s.k, (s.n + WIDTH - 1) / WIDTH, kind, group, s.paired, offsets, {}, {}, {}});
  m->data.need(m->block_bytes() * m->blocks + 4096);  // what is fetched ahead of the end
  if (kind == CHANNEL8 || kind == GROUP8) m->scale.need(size_t(m->blocks) * m->groups() * WIDTH);
  if (!bias) return m;
  m->bias.need(size_t(m->blocks) * WIDTH);
  for (int b = 0; b < m->blocks; b++)
    for (int j = 0; j < WIDTH; j++)
      m->bias.data[b * WIDTH + j] = m->output(b, j) < s.n ? to_float(bias[m->output(b, j)]) : 0;
  return m;
}

int keep(std::unique_ptr<Matrix> m) {
  matrices.push_back(std::move(m));
  return int(matrices.size()) - 1;
}

// work(block, output of it, row) for every output; the row is -1 for those that only fill the last block.
template <class F>
void outputs(const Matrix& m, F&& work) {
#pragma omp parallel for schedule(static)
  for (int b = 0; b < m.blocks; b++)
    for (int j = 0; j < WIDTH; j++) work(b, j, m.output(b, j) < m.n ? m.output(b, j) : -1);
}

inline uint8_t& place8(Matrix& m, int b, int j, int i) {
  return m.data.data[b * m.block_bytes() + (size_t(i / 4) * WIDTH + j) * 4 + i % 4];
}

// A group of one output in 4 bits: its numbers of 0 to 15 in a buffer, its scale and eighth of an offset in the block.
struct Group4 {
  uint8_t q[128];
  bf16 scale{0}, offset{0};

  void store(Matrix& m, int b, int j, int g) const {
    const int size = std::min(m.group, m.k - g * m.group);
    uint8_t* at = m.data.data + b * m.block_bytes() + size_t(g) * ((m.offsets ? 128 : 64) + m.group * WIDTH / 2);
    reinterpret_cast<bf16*>(at)[j] = scale;
    if (m.offsets) reinterpret_cast<bf16*>(at)[WIDTH + j] = offset;
    at += m.offsets ? 128 : 64;
    for (int i = 0; i < size; i += 8)
      for (int l = 0; l < 4; l++) at[(size_t(i / 8) * WIDTH + j) * 4 + l] = uint8_t(q[i + l] | q[i + 4 + l] << 4);
  }
};


// The numbers for w[0..n) that a scale and an offset leave, and their squared error.
float numbers(const float* w, int n, float scale, float offset, uint8_t* q) {
  const float by = scale != 0 ? 1 / scale : 0;
  float error = 0;
#pragma omp simd reduction(+ : error)
  for (int i = 0; i < n; i++) {
    const float v = std::min(15.f, std::max(0.f, std::nearbyint((w[i] - offset) * by) + 8));
    const float off = w[i] - (v - 8) * scale - offset;
    error += off * off;
    q[i] = uint8_t(v);
  }
  return error;
}

// The best of several scales: numbers by each, then the least squares' scale (and offset) for these numbers.
float fit(const float* w, int n, bool offsets, Group4& out) {
  float low = w[0], high = w[0];
  for (int i = 1; i < n; i++) low = std::min(low, w[i]), high = std::max(high, w[i]);
  const float most = -low > high ? low : high;  // with its sign: 4 bits reach from -8 to 7
  float best = INFINITY;
  for (int t = 0; t < TRIES; t++) {
    const float steps = offsets ? 15 + 0.1f * (t - TRIES / 2) : -8 - 0.1f * (t - TRIES / 2);
    const float by = offsets ? (high > low ? steps / (high - low) : 0) : most != 0 ? steps / most : 0;
    float sq = 0, qq = 0, wq = 0, sw = 0;
#pragma omp simd reduction(+ : sq, qq, wq, sw)
    for (int i = 0; i < n; i++) {
      const float v = offsets ? std::min(15.f, std::max(0.f, std::nearbyint((w[i] - low) * by))) - 8
                              : std::min(7.f, std::max(-8.f, std::nearbyint(w[i] * by)));
      sq += v, qq += v * v, wq += w[i] * v, sw += w[i];
    }
    float scale = qq > 0 ? wq / qq : 0, offset = 0;
    if (offsets) {
      const float spread = n * qq - sq * sq;
      scale = spread > 0 ? (n * wq - sq * sw) / spread : 0;
      offset = (sw - scale * sq) / n;
    }
    Group4 tried;
    put(tried.scale, scale);
    put(tried.offset, offset / 8);
    const float error = numbers(w, n, to_float(tried.scale), 8 * to_float(tried.offset), tried.q);
    if (error < best) best = error, out = tried;
  }
  return best;
}

// The squared error of some of the blocks.
float sampled(const bf16* from, const Shape& s, int group, bool offsets) {
  const int blocks = (s.n + WIDTH - 1) / WIDTH, step = std::max(1, blocks / SAMPLES);
  float error = 0;
#pragma omp parallel for reduction(+ : error)
  for (int o = 0; o < s.n; o++) {
    if (o / WIDTH % step) continue;
    float w[128];
    Group4 made;
    for (int i = 0; i < s.k; i += group) {
      const int size = std::min(group, s.k - i);
      for (int l = 0; l < size; l++) w[l] = to_float(from[size_t(o) * s.k + i + l]);
      error += fit(w, size, offsets, made);
    }
  }
  return error;
}

int plain(const bf16* from, const Shape& s, const bf16* bias) {
  auto m = blank(s, BF16, s.k, false, bias);
  outputs(*m, [&](int b, int j, int o) {
    bf16* at = reinterpret_cast<bf16*>(m->data.data + b * m->block_bytes());
    for (int i = 0; i < s.k; i++)
      at[(size_t(i / 2) * WIDTH + j) * 2 + i % 2] = o < 0 ? bf16{0} : from[size_t(o) * s.k + i];
  });
  return keep(std::move(m));
}

int channel8(const int8_t* from, const Shape& s, const float* scale, const bf16* bias) {
  auto m = blank(s, CHANNEL8, s.k, false, bias);
  outputs(*m, [&](int b, int j, int o) {
    for (int i = 0; i < s.k; i++) place8(*m, b, j, i) = uint8_t((o < 0 ? 0 : from[size_t(o) * s.k + i]) + 128);
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
        place8(*m, b, j, i) = uint8_t((o < 0 ? 0 : int(std::nearbyint(to_float(from[size_t(o) * s.k + i]) * by))) + 128);
      m->scale.data[(size_t(b) * m->groups() + g) * WIDTH + j] = top / 127.f;
    }
  });
  return keep(std::move(m));
}

int rounded4(const bf16* from, const Shape& s, int group, const bf16* bias) {
  const bool offsets = sampled(from, s, group, true) <= OFFSETS_PAY * sampled(from, s, group, false);
  auto m = blank(s, GROUP4, group, offsets, bias);
  outputs(*m, [&](int b, int j, int o) {
    float w[128] = {};
    for (int g = 0; g < m->groups(); g++) {
      const int size = std::min(group, s.k - g * group);
      for (int i = 0; o >= 0 && i < size; i++) w[i] = to_float(from[size_t(o) * s.k + g * group + i]);
      Group4 made;
      fit(w, size, offsets, made);
      made.store(*m, b, j, g);
    }
  });
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
        for (int i = first; i < first + size; i++) place8(*m, b, j, i) = uint8_t(o < 0 ? 128 : number(o, i));
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

// Whether its 4 bits count from offsets.
int loradock_matrix_offsets(int number) { return matrices[number]->offsets; }

// What it takes in memory.
int64_t loradock_matrix_bytes(int number) {
  const Matrix& m = *matrices[number];
  return m.data.size + (m.scale.size + m.bias.size) * sizeof(float);
}
}

#endif
