// The words of vectors.h with AVX2, FMA and F16C: two registers for 16 numbers. AVX-VNNI where the processor has it.
#pragma once

#include <immintrin.h>

#define WIDE 1
#pragma GCC diagnostic ignored "-Wignored-attributes"  // of __m256 as an argument of a template: that it may be an alias

namespace loradock {

#ifdef __AVXVNNI__
constexpr const char* INSTRUCTIONS = "AVX2 VNNI";
#else
constexpr const char* INSTRUCTIONS = "AVX2";
#endif

typedef Halves<__m256> Floats, Mask;
typedef Halves<__m256i> Ints;
typedef __m256i Shorts;

ALWAYS void relax() { _mm_pause(); }

// ---- masks

ALWAYS Mask chosen(unsigned bits) {
  const __m256i v = _mm256_set1_epi32(int(bits));
  const __m256i a = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), b = _mm256_slli_epi32(a, 8);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(v, a), a)),
          _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(v, b), b))};
}
// Those that hold one of the `left` values that remain.
ALWAYS Mask lanes(int left) { return chosen(left >= 16 ? 0xffff : (1u << left) - 1); }
ALWAYS unsigned bits(__m256 mask) { return unsigned(_mm256_movemask_ps(mask)); }

// ---- numbers

ALWAYS Floats spread(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
ALWAYS Ints spread(int v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }

ALWAYS Floats load(const float* at) { return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }
ALWAYS void store(float* at, Floats v) { _mm256_storeu_ps(at, v.a), _mm256_storeu_ps(at + 8, v.b); }
ALWAYS Floats load(const float* at, int count) {  // zeros behind them
  const Mask mask = lanes(count);
  return {_mm256_maskload_ps(at, _mm256_castps_si256(mask.a)), _mm256_maskload_ps(at + 8, _mm256_castps_si256(mask.b))};
}
ALWAYS void store(float* at, Floats v, int count) {
  const Mask mask = lanes(count);
  _mm256_maskstore_ps(at, _mm256_castps_si256(mask.a), v.a), _mm256_maskstore_ps(at + 8, _mm256_castps_si256(mask.b), v.b);
}
ALWAYS Shorts load32(const void* at) { return _mm256_loadu_si256((const __m256i*)at); }
ALWAYS void store32(void* at, Shorts v) { _mm256_storeu_si256((__m256i*)at, v); }
ALWAYS Ints load64(const void* at) { return {load32(at), load32((const char*)at + 32)}; }
ALWAYS void store64(void* at, Ints v) { store32(at, v.a), store32((char*)at + 32, v.b); }

ALWAYS __m256 fma(__m256 v, __m256 w, __m256 u) { return _mm256_fmadd_ps(v, w, u); }
ALWAYS __m256 fms(__m256 v, __m256 w, __m256 u) { return _mm256_fmsub_ps(v, w, u); }
ALWAYS __m256 fnma(__m256 v, __m256 w, __m256 u) { return _mm256_fnmadd_ps(v, w, u); }
ALWAYS __m256 min(__m256 v, __m256 w) { return _mm256_min_ps(v, w); }
ALWAYS __m256 max(__m256 v, __m256 w) { return _mm256_max_ps(v, w); }
ALWAYS __m256 abs(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), v); }
ALWAYS __m256 nearest(__m256 v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// v 2^n for n up to 127; 0 where n is below -126.
ALWAYS __m256 times_power(__m256 v, __m256 n) {
  const __m256i power = _mm256_cvtps_epi32(_mm256_max_ps(n, _mm256_set1_ps(-127.f)));
  return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(power, _mm256_set1_epi32(127)), 23)));
}
ALWAYS __m256 add(__m256 v, __m256 w) { return _mm256_add_ps(v, w); }
ALWAYS float sum_of(__m256 v) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
ALWAYS float largest_of(__m256 v) {
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
ALWAYS __m256 less(__m256 v, __m256 w) { return _mm256_cmp_ps(v, w, _CMP_LT_OQ); }
ALWAYS __m256 same(__m256 v, __m256 w) { return _mm256_cmp_ps(v, w, _CMP_EQ_OQ); }
ALWAYS __m256 differ(__m256 v, __m256 w) { return _mm256_cmp_ps(v, w, _CMP_NEQ_OQ); }
ALWAYS __m256 choose(__m256 mask, __m256 yes, __m256 no) { return _mm256_blendv_ps(no, yes, mask); }

ALWAYS __m256i add(__m256i v, __m256i w) { return _mm256_add_epi32(v, w); }
ALWAYS __m256i either(__m256i v, __m256i w) { return _mm256_or_si256(v, w); }
template <int BITS>
ALWAYS __m256i up(__m256i v) {
  return _mm256_slli_epi32(v, BITS);
}
template <int BITS>
ALWAYS __m256i down(__m256i v) {
  return _mm256_srli_epi32(v, BITS);
}
// Of each byte, these bits.
template <int BITS>
ALWAYS __m256i masked(__m256i v) {
  return _mm256_and_si256(v, _mm256_set1_epi8(BITS));
}
// For each byte of 0 to 15 the table's: 16 bytes, again and again.
ALWAYS __m256i looked_up(__m256i table, __m256i v) { return _mm256_shuffle_epi8(table, v); }
ALWAYS int sum_of(__m256i v) {
  __m128i q = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}
ALWAYS __m256 to_floats(__m256i v) { return _mm256_cvtepi32_ps(v); }
ALWAYS __m256i to_ints(__m256 v) { return _mm256_cvtps_epi32(v); }  // the nearest
ALWAYS void store8(int8_t* at, Ints v) {
  const __m256i two = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.a, v.b), 0xd8);
  _mm_storeu_si128((__m128i*)at, _mm_packs_epi16(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1)));
}
ALWAYS __m256i by_turns(__m256i even, __m256i odd) {
  const __m256i low = _mm256_set1_epi32(255);
  return _mm256_or_si256(_mm256_and_si256(even, low), _mm256_slli_epi32(_mm256_and_si256(odd, low), 8));
}
ALWAYS void store8(int8_t* at, Ints even, Ints odd) {  // by turns, of -128 to 127
  store32(at, _mm256_permute4x64_epi64(_mm256_packus_epi32(by_turns(even.a, odd.a), by_turns(even.b, odd.b)), 0xd8));
}
ALWAYS Floats wide(const int8_t* at) {
  return {to_floats(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)at))),
          to_floats(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(at + 8))))};
}
// Of each byte, lower and upper 4 bits.
ALWAYS __m256i lower4(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
ALWAYS __m256i upper4(__m256i v) {
#ifdef __GFNI__
  return _mm256_gf2p8affine_epi64_epi8(v, _mm256_set1_epi64x(DOWN4), 0);
#else
  return lower4(_mm256_srli_epi16(v, 4));
#endif
}

// ---- bfloat16 and float16

ALWAYS __m256 wide(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
ALWAYS Floats wide(Shorts v) { return {wide(_mm256_castsi256_si128(v)), wide(_mm256_extracti128_si256(v, 1))}; }
ALWAYS Floats wide(const bf16* at) {
  return {wide(_mm_loadu_si128((const __m128i*)at)), wide(_mm_loadu_si128((const __m128i*)(at + 8)))};
}
// Of pairs of bfloat16 the first, and the second.
// Of 16 bfloat16 each, v without signs, the larger ones: without signs too.
ALWAYS __m256i larger(__m256i v, __m256i w) { return _mm256_max_epu16(v, _mm256_and_si256(w, _mm256_set1_epi16(0x7fff))); }
ALWAYS __m256 firsts(__m256i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
ALWAYS __m256 seconds(__m256i v) { return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(0xffff0000))); }
ALWAYS Ints zip(Shorts first, Shorts second) {
  const __m256i a = _mm256_unpacklo_epi16(first, second), b = _mm256_unpackhi_epi16(first, second);
  return {_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)};
}
// 32 bfloat16, one 16 behind the other.
ALWAYS Ints both(Shorts v, Shorts w) { return {v, w}; }

ALWAYS __m256i narrow(__m256 v) {  // to the nearest, ties to even; a NaN stays one
  const __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i none = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), none), 16);
}
ALWAYS Shorts narrow(Floats v) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(narrow(v.a), narrow(v.b)), 0xd8); }

ALWAYS Floats wide_half(Shorts v) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))};
}
ALWAYS Shorts narrow_half(Floats v) {
  constexpr int HOW = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm256_set_m128i(_mm256_cvtps_ph(v.b, HOW), _mm256_cvtps_ph(v.a, HOW));
}

// ---- products of bytes: the sum and those of w x, four neighbours at a time

constexpr int ZERO4 = 8;

#ifdef __AVXVNNI__
constexpr int ZERO8 = 128, ROUNDS4 = 0;
ALWAYS __m256i dot8(__m256i sum, __m256i w, __m256i x) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
  return sum;
}
ALWAYS __m256i dot4(__m256i sum, __m256i w, __m256i x) { return dot8(sum, w, x); }
ALWAYS __m256i total_of(__m256i sum) { return sum; }
#else
// Two products of 8 bits are added up in 16: that fits for weights of -128 to 127, and inputs of -127 to 127, where the
// weight is taken without its sign; not for weights of up to 255.
constexpr int ZERO8 = 0;
ALWAYS __m256i dot8(__m256i sum, __m256i w, __m256i x) {
  const __m256i two = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(two, _mm256_set1_epi16(1)));
}
// Sums in 16 bits, of weights of 0 to 15: eight times they hold 2 x 15 x 127.
constexpr int ROUNDS4 = 8;
ALWAYS __m256i dot4(__m256i sum, __m256i w, __m256i x) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)); }
ALWAYS __m256i total_of(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
#endif

}  // namespace loradock
