// The words of vectors.h with AVX-512 (F, BW, VL); VNNI and BF16 where the processor has them.
#pragma once

#include <immintrin.h>

#define WIDE 1
#define APART ALWAYS

namespace loradock {

constexpr int REGISTERS = 32;
constexpr const char* INSTRUCTIONS = "AVX-512"
#ifdef __AVX512VNNI__
    " VNNI"
#endif
#ifdef __AVX512BF16__
    " BF16"
#endif
    ;

typedef __m512 Floats;  // with + - * / of their own
typedef __m512i Ints;
typedef __m256i Shorts;
typedef __mmask16 Mask;

ALWAYS void relax() { _mm_pause(); }

// ---- masks: bit i is lane i

ALWAYS Mask chosen(unsigned bits) { return Mask(bits); }
// Those that hold one of the `left` values that remain.
ALWAYS Mask lanes(int left) { return left >= 16 ? 0xffff : Mask((1u << left) - 1); }
ALWAYS bool any(Mask mask) { return mask; }
ALWAYS int first_of(Mask mask) { return __builtin_ctz(mask); }

// ---- numbers

ALWAYS Floats spread(float v) { return _mm512_set1_ps(v); }
ALWAYS Ints spread(int v) { return _mm512_set1_epi32(v); }

ALWAYS Floats load(const float* at) { return _mm512_loadu_ps(at); }
ALWAYS Floats load(const float* at, int count) { return _mm512_maskz_loadu_ps(lanes(count), at); }  // zeros behind them
ALWAYS void store(float* at, Floats v) { _mm512_storeu_ps(at, v); }
ALWAYS void store(float* at, Floats v, int count) { _mm512_mask_storeu_ps(at, lanes(count), v); }
ALWAYS Ints load64(const void* at) { return _mm512_loadu_si512(at); }
ALWAYS void store64(void* at, Ints v) { _mm512_storeu_si512(at, v); }
ALWAYS Shorts load32(const void* at) { return _mm256_loadu_si256((const __m256i*)at); }
ALWAYS Ints load_pairs(const bf16* at, int count) {  // fewer than 32
  return _mm512_maskz_loadu_epi16(__mmask32((1u << count) - 1), at);
}

ALWAYS Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
ALWAYS Floats fms(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }    // a b - c
ALWAYS Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
ALWAYS Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
ALWAYS Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
ALWAYS Floats abs(Floats v) { return _mm512_abs_ps(v); }
ALWAYS Floats nearest(Floats v) { return _mm512_roundscale_ps(v, 0); }
ALWAYS Floats times_power(Floats v, Floats n) { return _mm512_scalef_ps(v, n); }  // v 2^n
ALWAYS float sum_of(Floats v) { return _mm512_reduce_add_ps(v); }
ALWAYS float largest_of(Floats v) { return _mm512_reduce_max_ps(v); }
ALWAYS Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
ALWAYS Mask same(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
ALWAYS Mask differ(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_OQ); }
ALWAYS Floats choose(Mask mask, Floats yes, Floats no) { return _mm512_mask_mov_ps(no, mask, yes); }

ALWAYS Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
ALWAYS Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
template <int BITS>
ALWAYS Ints up(Ints v) { return _mm512_slli_epi32(v, BITS); }
template <int BITS>
ALWAYS Ints down(Ints v) { return _mm512_srli_epi32(v, BITS); }
// Of each byte, these bits.
template <int BITS>
ALWAYS Ints masked(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi8(BITS)); }
// For each byte of 0 to 15 the table's: 16 bytes, four times.
ALWAYS Ints looked_up(Ints table, Ints v) { return _mm512_shuffle_epi8(table, v); }
ALWAYS int sum_of(Ints v) { return _mm512_reduce_add_epi32(v); }
ALWAYS Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
ALWAYS Ints to_ints(Floats v) { return _mm512_cvtps_epi32(v); }  // the nearest
ALWAYS void store8(int8_t* at, Ints v) { _mm_storeu_si128((__m128i*)at, _mm512_cvtsepi32_epi8(v)); }
ALWAYS void store8(int8_t* at, Ints even, Ints odd) {  // by turns, of -128 to 127
  const __m512i two = _mm512_or_si512(_mm512_and_si512(even, _mm512_set1_epi32(255)), _mm512_slli_epi32(odd, 8));
  _mm256_storeu_si256((__m256i*)at, _mm512_cvtepi32_epi16(two));
}
ALWAYS Floats wide(const int8_t* at) { return to_floats(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at))); }
// Of each byte, lower and upper 4 bits.
ALWAYS Ints lower4(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
ALWAYS Ints upper4(Ints v) {
#ifdef __GFNI__
  return _mm512_gf2p8affine_epi64_epi8(v, _mm512_set1_epi64(DOWN4), 0);
#else
  return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15));
#endif
}

// ---- bfloat16 and float16

ALWAYS Floats wide(Shorts v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
ALWAYS Floats wide(const bf16* at) { return wide(load32(at)); }
ALWAYS Floats wide(const bf16* at, int count) { return wide(_mm256_maskz_loadu_epi16(lanes(count), at)); }
// Of pairs of bfloat16 the first, and the second.
ALWAYS Floats firsts(Ints v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
ALWAYS Floats seconds(Ints v) { return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xffff0000))); }
ALWAYS Ints zip(Shorts first, Shorts second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}
// Of 32 bfloat16 each, a without signs, the larger ones: without signs too.
ALWAYS Ints larger(Ints a, Ints b) { return _mm512_max_epu16(a, _mm512_and_si512(b, _mm512_set1_epi32(0x7fff7fff))); }
// 32 bfloat16, one 16 behind the other.
ALWAYS Ints both(Shorts a, Shorts b) { return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1); }

#ifdef __AVX512BF16__
#define WIDE_DOT2 1
ALWAYS Floats dot2(Floats sum, Ints a, Ints b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
ALWAYS Shorts narrow(Floats v) { return (__m256i)_mm512_cvtneps_pbh(v); }
#else
ALWAYS Shorts narrow(Floats v) {  // to the nearest, ties to even; a NaN stays one
  const __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 none = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(up, none, _mm512_set1_epi32(0x7fc00000)), 16));
}
#endif
ALWAYS void store(bf16* at, Floats v) { _mm256_storeu_si256((__m256i*)at, narrow(v)); }
ALWAYS void store(bf16* at, Floats v, int count) { _mm256_mask_storeu_epi16(at, lanes(count), narrow(v)); }

ALWAYS Floats wide_half(Shorts v) { return _mm512_cvtph_ps(v); }
ALWAYS Floats wide(const half* at, int count) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(count), at)); }
ALWAYS void store(half* at, Floats v, int count) {
  _mm256_mask_storeu_epi16(at, lanes(count), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Of sixteen vectors, what an operation makes of each one's numbers.
template <class Op>
ALWAYS Floats across(const Floats* v, Op&& op) {
  __m512 s[8], q[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) s[i] = op(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(s[2 * i]), b = _mm512_castps_pd(s[2 * i + 1]);
    q[i] = op(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const __m512 lo = op(_mm512_shuffle_f32x4(q[0], q[1], 0x88), _mm512_shuffle_f32x4(q[0], q[1], 0xdd));
  const __m512 hi = op(_mm512_shuffle_f32x4(q[2], q[3], 0x88), _mm512_shuffle_f32x4(q[2], q[3], 0xdd));
  return op(_mm512_shuffle_f32x4(lo, hi, 0x88), _mm512_shuffle_f32x4(lo, hi, 0xdd));
}

// Sixteen vectors' sums, as bfloat16 or float32, and largest numbers.
constexpr int SUMS = 16;
template <class T>
inline void sums(const Floats* v, T* out) {
  store(out, across(v, [](Floats a, Floats b) { return a + b; }));
}
ALWAYS void largest(const Floats* v, float* out) {
  store(out, across(v, [](Floats a, Floats b) { return max(a, b); }));
}

// ---- products of bytes: the sum and those of w x, four neighbours at a time

constexpr int ZERO8 = 128, ZERO4 = 8, ROUNDS4 = 0;

#ifdef __AVX512VNNI__
// Around the compiler's own function GCC copies every sum to another register and runs out of them: it took more time than
// bfloat16.
ALWAYS Ints dot8(Ints sum, Ints w, Ints x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
}
#else
ALWAYS Ints dot8(Ints sum, Ints w, Ints x) {
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(w, _mm512_set1_epi16(255)), _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(x, 8));
  return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
}
#endif
ALWAYS Ints dot4(Ints sum, Ints w, Ints x) { return dot8(sum, w, x); }
ALWAYS Ints total_of(Ints sum) { return sum; }

}  // namespace loradock
