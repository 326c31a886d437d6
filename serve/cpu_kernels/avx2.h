// The words of vectors.h with AVX2, FMA and F16C: two registers for 16 numbers. AVX-VNNI where the processor has it.
#pragma once

#include <algorithm>
#include <immintrin.h>

#define WIDE 1
#define APART __attribute__((noinline))

namespace loradock {

constexpr int REGISTERS = 8;
#ifdef __AVXVNNI__
constexpr const char* INSTRUCTIONS = "AVX2 VNNI";
#else
constexpr const char* INSTRUCTIONS = "AVX2";
#endif

struct Floats {
  __m256 a, b;
};
struct Ints {
  __m256i a, b;
};
typedef __m256i Shorts;
struct Mask {
  __m256 a, b;
};

ALWAYS Floats operator+(Floats v, Floats w) { return {_mm256_add_ps(v.a, w.a), _mm256_add_ps(v.b, w.b)}; }
ALWAYS Floats operator-(Floats v, Floats w) { return {_mm256_sub_ps(v.a, w.a), _mm256_sub_ps(v.b, w.b)}; }
ALWAYS Floats operator*(Floats v, Floats w) { return {_mm256_mul_ps(v.a, w.a), _mm256_mul_ps(v.b, w.b)}; }
ALWAYS Floats operator/(Floats v, Floats w) { return {_mm256_div_ps(v.a, w.a), _mm256_div_ps(v.b, w.b)}; }

ALWAYS void soon(const void* at) { _mm_prefetch((const char*)at, _MM_HINT_T0); }
ALWAYS void later(const void* at) { _mm_prefetch((const char*)at, _MM_HINT_T1); }
ALWAYS void relax() { _mm_pause(); }

// ---- masks: lanes of ones and of zeros

ALWAYS Mask chosen(unsigned bits) {
  const __m256i v = _mm256_set1_epi32(int(bits));
  const __m256i a = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), b = _mm256_slli_epi32(a, 8);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(v, a), a)),
          _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(v, b), b))};
}
// Those that hold one of the `left` values that remain.
ALWAYS Mask lanes(int left) { return chosen(left >= 16 ? 0xffff : (1u << left) - 1); }
ALWAYS unsigned bits(Mask mask) { return unsigned(_mm256_movemask_ps(mask.a)) | unsigned(_mm256_movemask_ps(mask.b)) << 8; }
ALWAYS bool any(Mask mask) { return bits(mask); }
ALWAYS int first_of(Mask mask) { return __builtin_ctz(bits(mask)); }

// ---- numbers

ALWAYS Floats spread(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
ALWAYS Ints spread(int v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
ALWAYS Ints spread4(const void* at) {  // four bytes, 16 times
  int four;
  std::memcpy(&four, at, 4);
  return spread(four);
}

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
ALWAYS Ints load64(const void* at) { return {load32(at), load32((const char*)at + 32)}; }
ALWAYS void store64(void* at, Ints v) {
  _mm256_storeu_si256((__m256i*)at, v.a), _mm256_storeu_si256((__m256i*)((char*)at + 32), v.b);
}
template <class T>
inline Shorts load_some(const T* at, int count) {  // of 16
  if (count >= 16) return load32(at);
  alignas(32) T some[16] = {};
  std::memcpy(some, at, count * sizeof(T));
  return load32(some);
}
template <class T>
inline void store_some(T* at, Shorts v, int count) {
  alignas(32) T some[16];
  _mm256_store_si256((__m256i*)some, v);
  std::memcpy(at, some, std::min(count, 16) * sizeof(T));
}
inline Ints load_pairs(const bf16* at, int count) {  // fewer than 32
  return {load_some(at, count), count > 16 ? load_some(at + 16, count - 16) : _mm256_setzero_si256()};
}

ALWAYS Floats fma(Floats v, Floats w, Floats u) { return {_mm256_fmadd_ps(v.a, w.a, u.a), _mm256_fmadd_ps(v.b, w.b, u.b)}; }
ALWAYS Floats fms(Floats v, Floats w, Floats u) { return {_mm256_fmsub_ps(v.a, w.a, u.a), _mm256_fmsub_ps(v.b, w.b, u.b)}; }
ALWAYS Floats fnma(Floats v, Floats w, Floats u) {
  return {_mm256_fnmadd_ps(v.a, w.a, u.a), _mm256_fnmadd_ps(v.b, w.b, u.b)};
}
ALWAYS Floats min(Floats v, Floats w) { return {_mm256_min_ps(v.a, w.a), _mm256_min_ps(v.b, w.b)}; }
ALWAYS Floats max(Floats v, Floats w) { return {_mm256_max_ps(v.a, w.a), _mm256_max_ps(v.b, w.b)}; }
ALWAYS Floats abs(Floats v) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_andnot_ps(sign, v.a), _mm256_andnot_ps(sign, v.b)};
}
ALWAYS Floats nearest(Floats v) {
  constexpr int HOW = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(v.a, HOW), _mm256_round_ps(v.b, HOW)};
}
// v 2^n for n up to 127; 0 where n is below -126.
ALWAYS __m256 times_power(__m256 v, __m256 n) {
  const __m256i power = _mm256_cvtps_epi32(_mm256_max_ps(n, _mm256_set1_ps(-127.f)));
  return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(power, _mm256_set1_epi32(127)), 23)));
}
ALWAYS Floats times_power(Floats v, Floats n) { return {times_power(v.a, n.a), times_power(v.b, n.b)}; }
ALWAYS float sum_of(Floats v) {
  const __m256 s = _mm256_add_ps(v.a, v.b);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
ALWAYS float largest_of(Floats v) {
  const __m256 s = _mm256_max_ps(v.a, v.b);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
ALWAYS Mask less(Floats v, Floats w) { return {_mm256_cmp_ps(v.a, w.a, _CMP_LT_OQ), _mm256_cmp_ps(v.b, w.b, _CMP_LT_OQ)}; }
ALWAYS Mask same(Floats v, Floats w) { return {_mm256_cmp_ps(v.a, w.a, _CMP_EQ_OQ), _mm256_cmp_ps(v.b, w.b, _CMP_EQ_OQ)}; }
ALWAYS Mask differ(Floats v, Floats w) {
  return {_mm256_cmp_ps(v.a, w.a, _CMP_NEQ_OQ), _mm256_cmp_ps(v.b, w.b, _CMP_NEQ_OQ)};
}
ALWAYS Floats choose(Mask mask, Floats yes, Floats no) {
  return {_mm256_blendv_ps(no.a, yes.a, mask.a), _mm256_blendv_ps(no.b, yes.b, mask.b)};
}

ALWAYS Ints add(Ints v, Ints w) { return {_mm256_add_epi32(v.a, w.a), _mm256_add_epi32(v.b, w.b)}; }
ALWAYS Ints either(Ints v, Ints w) { return {_mm256_or_si256(v.a, w.a), _mm256_or_si256(v.b, w.b)}; }
template <int BITS>
ALWAYS Ints up(Ints v) { return {_mm256_slli_epi32(v.a, BITS), _mm256_slli_epi32(v.b, BITS)}; }
ALWAYS int sum_of(Ints v) {
  const __m256i s = _mm256_add_epi32(v.a, v.b);
  __m128i q = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}
ALWAYS Floats to_floats(Ints v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
ALWAYS Ints to_ints(Floats v) { return {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }  // the nearest
ALWAYS void store8(int8_t* at, Ints v) {
  const __m256i two = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.a, v.b), 0xd8);
  _mm_storeu_si128((__m128i*)at, _mm_packs_epi16(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1)));
}
ALWAYS Floats wide(const int8_t* at) {
  return to_floats({_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)at)),
                    _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(at + 8)))});
}
// Of each byte, lower and upper 4 bits.
ALWAYS Ints lower4(Ints v) { return {_mm256_and_si256(v.a, _mm256_set1_epi8(15)), _mm256_and_si256(v.b, _mm256_set1_epi8(15))}; }
ALWAYS Ints upper4(Ints v) { return lower4({_mm256_srli_epi16(v.a, 4), _mm256_srli_epi16(v.b, 4)}); }

// ---- bfloat16 and float16

ALWAYS __m256 wide(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
ALWAYS Floats wide(Shorts v) { return {wide(_mm256_castsi256_si128(v)), wide(_mm256_extracti128_si256(v, 1))}; }
ALWAYS Floats wide(const bf16* at) {
  return {wide(_mm_loadu_si128((const __m128i*)at)), wide(_mm_loadu_si128((const __m128i*)(at + 8)))};
}
ALWAYS Floats wide(const bf16* at, int count) { return wide(load_some(at, count)); }
// Of pairs of bfloat16 the first, and the second.
ALWAYS Floats firsts(Ints v) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(v.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(v.b, 16))};
}
ALWAYS Floats seconds(Ints v) {
  const __m256i high = _mm256_set1_epi32(0xffff0000);
  return {_mm256_castsi256_ps(_mm256_and_si256(v.a, high)), _mm256_castsi256_ps(_mm256_and_si256(v.b, high))};
}
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
ALWAYS void store(bf16* at, Floats v) { _mm256_storeu_si256((__m256i*)at, narrow(v)); }
ALWAYS void store(bf16* at, Floats v, int count) { store_some(at, narrow(v), count); }

ALWAYS Floats wide(const half* at, int count) {
  const __m256i v = load_some(at, count);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))};
}
ALWAYS void store(half* at, Floats v, int count) {
  constexpr int HOW = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  store_some(at, _mm256_set_m128i(_mm256_cvtps_ph(v.b, HOW), _mm256_cvtps_ph(v.a, HOW)), count);
}

// Four vectors' sums, as bfloat16 or float32.
constexpr int SUMS = 4;
template <class T>
ALWAYS void sums(const Floats* v, T* out) {
  for (int i = 0; i < SUMS; i++) put(out[i], sum_of(v[i]));
}

// ---- products of bytes: the sum and those of w x, four neighbours at a time

constexpr int ZERO4 = 8;

#ifdef __AVXVNNI__
constexpr int ZERO8 = 128, ROUNDS4 = 0;
ALWAYS __m256i dot8(__m256i sum, __m256i w, __m256i x) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
  return sum;
}
ALWAYS Ints dot4(Ints sum, Ints w, Ints x) { return {dot8(sum.a, w.a, x.a), dot8(sum.b, w.b, x.b)}; }
ALWAYS Ints total_of(Ints sum) { return sum; }
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
ALWAYS Ints dot4(Ints sum, Ints w, Ints x) { return {dot4(sum.a, w.a, x.a), dot4(sum.b, w.b, x.b)}; }
ALWAYS Ints total_of(Ints sum) {
  return {_mm256_madd_epi16(sum.a, _mm256_set1_epi16(1)), _mm256_madd_epi16(sum.b, _mm256_set1_epi16(1))};
}
#endif
ALWAYS Ints dot8(Ints sum, Ints w, Ints x) { return {dot8(sum.a, w.a, x.a), dot8(sum.b, w.b, x.b)}; }

}  // namespace loradock
