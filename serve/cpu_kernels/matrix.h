// A matrix of weights as the processor's dot products want it: blocks of 32 outputs, packed once (`packing.cpp`) and read by
// every product (`products.h`). bfloat16 lies in pairs of inputs; int8 in fours, with 128 added.
#pragma once

#include "kernels.h"

#if defined(FAST_BF16) && defined(__AVX512VNNI__)
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

enum Kind { BF16 = 0, CHANNEL8 = 1, GROUP8 = 2 };

struct Matrix {
  int n, k, blocks, kind, group;  // group: inputs that share a scale
  Buffer<uint8_t> data;
  Buffer<float> scale;  // [blocks][k / group][32]
  Buffer<float> bias;   // [blocks][32], or nothing
  size_t block_bytes() const { return kind == BF16 ? size_t(k) * WIDTH * 2 : size_t(k) * WIDTH; }
};

inline __m512 wide(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
inline __m512 wide(const bf16* at) { return wide(_mm256_loadu_si256((const __m256i*)at)); }
inline __m256i narrow(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
inline __m512 rounded(__m512 v) { return wide(narrow(v)); }
inline void store(bf16* at, __m512 v) { _mm256_storeu_si256((__m256i*)at, narrow(v)); }

extern std::vector<std::unique_ptr<Matrix>> matrices;

}  // namespace loradock

#endif
