// A matrix of weights as the processor's dot products want it: blocks of 32 outputs, packed once (`packing.cpp`) and read by
// every product (`products.h`), with what the dot products want added (`zero`). bfloat16 lies in pairs of inputs; int8 in
// fours; 4 bits in eights: the lower halves of four bytes are the first four inputs. Before each group of them are its
// scales, bfloat16, and eighths of its offsets where there are any; or before each span of groups one scale for each output,
// and int8 by which it becomes each group's. A span's rows have one scale too, so that it is added up in integers.
// What comes from a GGUF file stays as it is there (`Format`), rows of 32 outputs put side by side.
#pragma once

#include "kernels.h"

#ifdef WIDE
#define STEP 1

#include <cmath>
#include <new>

namespace loradock {

constexpr int WIDTH = 32;  // outputs of a block

template <class T>
struct Buffer {  // aligned to a cache line, not initialized
  T* data = nullptr;
  size_t size = 0;
  void need(size_t n) {
    if (n <= size) return;
    if (data) ::operator delete[](data, std::align_val_t(64));
    data = static_cast<T*>(::operator new[](n * sizeof(T), std::align_val_t(64)));
    size = n;
  }
};

enum Kind { BF16 = 0, CHANNEL8 = 1, GROUP8 = 2, GROUP4 = 3, GGML = 4 };

// How one of ggml's types is packed. First the scales of a span of inputs, float16, and minima where there are any; where
// several groups share them, what each multiplies them by. Then, for each 32 inputs, numbers without a sign: their fifth and
// sixth bits, and their lower four as in `GROUP4`; or bytes.
struct Format {
  int bits;
  int zero;       // the number that stands for 0 where there are no minima
  bool minima;
  bool table;     // numbers are places in ggml's table, whose values count from `zero`
  int groups;     // of a span
  int each;       // inputs of a group: 16 or 32

  int inputs() const { return groups * each; }  // of a span
  size_t scales() const { return minima ? 128 : 64; }
  size_t header() const { return scales() + (groups > 1 ? size_t(groups) * (minima ? 64 : 32) : 0); }
  size_t numbers() const { return size_t(bits) * 128; }  // bytes of 32 inputs
  size_t bytes(int k) const { return k / inputs() * header() + k / 32 * numbers(); }
};

struct Matrix {
  int n, k, blocks, kind, group;  // group: inputs that share a scale; the last may be fewer
  int span;      // groups of 4 bits whose scales are whole multiples of one, the last may be fewer; 1: they are not
  bool paired;   // whether the first half of the outputs is the gate of the second: a block has 16 of it, and their 16
  bool offsets;  // whether 4 bits count from an offset of each group, and not from 0
  Buffer<uint8_t> data;
  Buffer<float> scale;  // of 8 bits: [blocks][groups][32]
  Buffer<float> bias;   // [blocks][32], or nothing
  size_t block_bytes = 0;  // as `sized` says
  std::vector<const Format*> formats;  // of each block of GGML,
  std::vector<size_t> places;          // where it begins, and where the last one ends
  bool tiles = false;                  // of GGML: whether the processor's tiles multiply many rows of bytes faster than dot products
  const Format* unpacked = nullptr;    // of the one block of GGML that this is, as bytes

  const uint8_t* block(int b) const { return data.data + (kind == GGML ? places[b] : b * block_bytes); }
  size_t bytes(int b) const { return kind == GGML ? places[b + 1] - places[b] : block_bytes; }

  // The output that is number j of block b; n or more where it only fills the last block.
  int output(int b, int j) const { return paired ? (j < 16 ? 0 : n / 2 - 16) + b * 16 + j : b * WIDTH + j; }
  int groups() const { return (k + group - 1) / group; }
  int spans() const { return (groups() + span - 1) / span; }
  int span_groups(int s) const { return std::min(span, groups() - s * span); }
  // What is before the inputs of a span of so many groups.
  static constexpr size_t header(int groups) { return WIDTH * sizeof(bf16) + (size_t(groups) * WIDTH + 63) / 64 * 64; }
  // What is added to a weight so that it has no sign.
  int zero() const { return kind == GROUP4 ? ZERO4 : kind == GGML ? 1 : ZERO8; }
  size_t sized() const {
    if (kind == BF16) return size_t(k) * WIDTH * 2;
    if (kind != GROUP4) return size_t(k) * WIDTH;
    if (span == 1) return size_t(k) * WIDTH / 2 + size_t(groups()) * (offsets ? 128 : 64);
    return size_t(k) * WIDTH / 2 + (spans() - 1) * header(span) + header(span_groups(spans() - 1));
  }
  // Where a group of 4 bits begins: with its scales.
  uint8_t* group4(int b, int g) const {
    return data.data + b * block_bytes + size_t(g) * ((offsets ? 128 : 64) + group * WIDTH / 2);
  }
  // Where a span begins.
  uint8_t* span4(int b, int s) const {
    return data.data + b * block_bytes + s * (header(span) + size_t(span) * group * WIDTH / 2);
  }
};

extern std::vector<std::unique_ptr<Matrix>> matrices;

// Memory for packed weights, zeros, which stays for good; and the matrix's number.
uint8_t* room(size_t bytes);
int keep(std::unique_ptr<Matrix> m);
template <class T>
void place(Buffer<T>& buffer, size_t n) {
  buffer.data = reinterpret_cast<T*>(room(n * sizeof(T)));
  buffer.size = n;
}

// Row o of a matrix of GGML, as ggml dequantizes it.
void ggml_row(const Matrix& m, int64_t o, float* out);

// Row o of a matrix of bfloat16 or GGML, in bfloat16: put(i, values i and i + 1) for every even i.
template <class Put>
inline void unpack(const Matrix& m, int64_t o, Put&& put) {
  if (m.kind == GGML) {
    static thread_local Buffer<float> row;
    row.need(m.k);
    ggml_row(m, o, row.data);
    for (int i = 0; i < m.k; i += 2) {
      bf16 pair[2];
      loradock::put(pair[0], row.data[i]), loradock::put(pair[1], row.data[i + 1]);
      uint32_t two;
      std::memcpy(&two, pair, 4);
      put(i, two);
    }
    return;
  }
  const uint8_t* w = m.data.data + o / WIDTH * m.block_bytes + o % WIDTH * 4;
  for (int i = 0; i < m.k; i += 2, w += WIDTH * 4) {
    uint32_t two;
    std::memcpy(&two, w, 4);
    put(i, two);
  }
}

}  // namespace loradock

#endif
