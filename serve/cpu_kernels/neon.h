// The words of vectors.h for arm64 with dot products of bytes: four registers for 16 numbers. Products of pairs of bfloat16
// where the processor has them.
#pragma once

#include <arm_neon.h>

#define WIDE 1

namespace loradock {

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
constexpr const char* INSTRUCTIONS = "NEON dotprod BF16";
#else
constexpr const char* INSTRUCTIONS = "NEON dotprod";
#endif

typedef Halves<Halves<float32x4_t>> Floats;
typedef Halves<Halves<int32x4_t>> Ints;
typedef Halves<Halves<uint32x4_t>> Mask;
typedef Halves<uint16x8_t> Shorts;

ALWAYS void relax() { asm volatile("isb" ::: "memory"); }  // `yield` takes no time on most

// ---- masks

ALWAYS uint32x4_t chosen4(unsigned bits) { return vtstq_u32(vdupq_n_u32(bits), uint32x4_t{1, 2, 4, 8}); }
ALWAYS Mask chosen(unsigned bits) {
  return {{chosen4(bits), chosen4(bits >> 4)}, {chosen4(bits >> 8), chosen4(bits >> 12)}};
}
ALWAYS unsigned bits(uint32x4_t mask) { return vaddvq_u32(vandq_u32(mask, uint32x4_t{1, 2, 4, 8})); }

// ---- numbers

template <class T>
ALWAYS Halves<Halves<T>> four(T v) {
  return {{v, v}, {v, v}};
}
ALWAYS Floats spread(float v) { return four(vdupq_n_f32(v)); }
ALWAYS Ints spread(int v) { return four(vdupq_n_s32(v)); }

ALWAYS Floats load(const float* at) { return {{vld1q_f32(at), vld1q_f32(at + 4)}, {vld1q_f32(at + 8), vld1q_f32(at + 12)}}; }
ALWAYS void store(float* at, Floats v) {
  vst1q_f32(at, v.a.a), vst1q_f32(at + 4, v.a.b), vst1q_f32(at + 8, v.b.a), vst1q_f32(at + 12, v.b.b);
}
inline Floats load(const float* at, int count) {  // zeros behind them
  if (count >= 16) return load(at);
  float some[16] = {};
  std::memcpy(some, at, count * sizeof(float));
  return load(some);
}
inline void store(float* at, Floats v, int count) {
  if (count >= 16) return store(at, v);
  float some[16];
  store(some, v);
  std::memcpy(at, some, count * sizeof(float));
}
ALWAYS uint8x16_t load16(const void* at, int place) { return vld1q_u8((const uint8_t*)at + 16 * place); }
ALWAYS void store16(void* at, int place, uint8x16_t v) { vst1q_u8((uint8_t*)at + 16 * place, v); }
ALWAYS Shorts load32(const void* at) { return {vreinterpretq_u16_u8(load16(at, 0)), vreinterpretq_u16_u8(load16(at, 1))}; }
ALWAYS void store32(void* at, Shorts v) {
  store16(at, 0, vreinterpretq_u8_u16(v.a)), store16(at, 1, vreinterpretq_u8_u16(v.b));
}
// 32 bfloat16, one 16 behind the other.
ALWAYS Ints both(Shorts v, Shorts w) {
  return {{vreinterpretq_s32_u16(v.a), vreinterpretq_s32_u16(v.b)}, {vreinterpretq_s32_u16(w.a), vreinterpretq_s32_u16(w.b)}};
}
ALWAYS Ints load64(const void* at) { return both(load32(at), load32((const char*)at + 32)); }
ALWAYS void store64(void* at, Ints v) {
  store16(at, 0, vreinterpretq_u8_s32(v.a.a)), store16(at, 1, vreinterpretq_u8_s32(v.a.b));
  store16(at, 2, vreinterpretq_u8_s32(v.b.a)), store16(at, 3, vreinterpretq_u8_s32(v.b.b));
}

ALWAYS float32x4_t fma(float32x4_t v, float32x4_t w, float32x4_t u) { return vfmaq_f32(u, v, w); }
ALWAYS float32x4_t fms(float32x4_t v, float32x4_t w, float32x4_t u) { return vfmaq_f32(vnegq_f32(u), v, w); }
ALWAYS float32x4_t fnma(float32x4_t v, float32x4_t w, float32x4_t u) { return vfmsq_f32(u, v, w); }
ALWAYS float32x4_t min(float32x4_t v, float32x4_t w) { return vminq_f32(v, w); }
ALWAYS float32x4_t max(float32x4_t v, float32x4_t w) { return vmaxq_f32(v, w); }
ALWAYS float32x4_t abs(float32x4_t v) { return vabsq_f32(v); }
ALWAYS float32x4_t nearest(float32x4_t v) { return vrndnq_f32(v); }
// v 2^n for n up to 127; 0 where n is below -126.
ALWAYS float32x4_t times_power(float32x4_t v, float32x4_t n) {
  const int32x4_t power = vcvtnq_s32_f32(vmaxq_f32(n, vdupq_n_f32(-127.f)));
  return vmulq_f32(v, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(power, vdupq_n_s32(127)), 23)));
}
ALWAYS float32x4_t add(float32x4_t v, float32x4_t w) { return vaddq_f32(v, w); }
ALWAYS float sum_of(float32x4_t v) { return vaddvq_f32(v); }
ALWAYS float largest_of(float32x4_t v) { return vmaxvq_f32(v); }
ALWAYS uint32x4_t less(float32x4_t v, float32x4_t w) { return vcltq_f32(v, w); }
ALWAYS uint32x4_t same(float32x4_t v, float32x4_t w) { return vceqq_f32(v, w); }
ALWAYS uint32x4_t differ(float32x4_t v, float32x4_t w) { return vorrq_u32(vcltq_f32(v, w), vcgtq_f32(v, w)); }
ALWAYS float32x4_t choose(uint32x4_t mask, float32x4_t yes, float32x4_t no) { return vbslq_f32(mask, yes, no); }

ALWAYS int32x4_t add(int32x4_t v, int32x4_t w) { return vaddq_s32(v, w); }
ALWAYS int32x4_t either(int32x4_t v, int32x4_t w) { return vorrq_s32(v, w); }
template <int BITS>
ALWAYS int32x4_t up(int32x4_t v) {
  return vshlq_n_s32(v, BITS);
}
template <int BITS>
ALWAYS int32x4_t down(int32x4_t v) {
  return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(v), BITS));
}
// Of each byte, these bits.
template <int BITS>
ALWAYS int32x4_t masked(int32x4_t v) {
  return vandq_s32(v, vdupq_n_s32(0x01010101 * BITS));
}
// For each byte of 0 to 15 the table's: 16 bytes, again and again.
ALWAYS int32x4_t looked_up(int32x4_t table, int32x4_t v) {
  return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(table), vreinterpretq_u8_s32(v)));
}
ALWAYS int sum_of(int32x4_t v) { return vaddvq_s32(v); }
ALWAYS float32x4_t to_floats(int32x4_t v) { return vcvtq_f32_s32(v); }
ALWAYS int32x4_t to_ints(float32x4_t v) { return vcvtnq_s32_f32(v); }  // the nearest
ALWAYS int16x8_t to_shorts(Halves<int32x4_t> v) { return vcombine_s16(vqmovn_s32(v.a), vqmovn_s32(v.b)); }
ALWAYS void store8(int8_t* at, Ints v) {
  vst1q_s8(at, vcombine_s8(vqmovn_s16(to_shorts(v.a)), vqmovn_s16(to_shorts(v.b))));
}
ALWAYS void store8(int8_t* at, Ints even, Ints odd) {  // by turns, of -128 to 127
  const int8x8_t e[2] = {vqmovn_s16(to_shorts(even.a)), vqmovn_s16(to_shorts(even.b))};
  const int8x8_t o[2] = {vqmovn_s16(to_shorts(odd.a)), vqmovn_s16(to_shorts(odd.b))};
  vst2_s8(at, int8x8x2_t{e[0], o[0]}), vst2_s8(at + 16, int8x8x2_t{e[1], o[1]});
}
ALWAYS Halves<float32x4_t> to_floats(int16x8_t v) {
  return {to_floats(vmovl_s16(vget_low_s16(v))), to_floats(vmovl_high_s16(v))};
}
ALWAYS Floats wide(const int8_t* at) {
  const int8x16_t v = vld1q_s8(at);
  return {to_floats(vmovl_s8(vget_low_s8(v))), to_floats(vmovl_high_s8(v))};
}
// Of each byte, lower and upper 4 bits.
ALWAYS int32x4_t lower4(int32x4_t v) { return vandq_s32(v, vdupq_n_s32(0x0f0f0f0f)); }
ALWAYS int32x4_t upper4(int32x4_t v) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(v), 4)); }

// ---- bfloat16 and float16

ALWAYS Halves<int32x4_t> zip(uint16x8_t first, uint16x8_t second) {
  return {vreinterpretq_s32_u16(vzip1q_u16(first, second)), vreinterpretq_s32_u16(vzip2q_u16(first, second))};
}
ALWAYS Ints zip(Shorts first, Shorts second) { return {zip(first.a, second.a), zip(first.b, second.b)}; }
ALWAYS Halves<float32x4_t> wide(uint16x8_t v) {
  const Halves<int32x4_t> u = zip(vdupq_n_u16(0), v);
  return {vreinterpretq_f32_s32(u.a), vreinterpretq_f32_s32(u.b)};
}
ALWAYS Floats wide(Shorts v) { return {wide(v.a), wide(v.b)}; }
ALWAYS Floats wide(const bf16* at) { return wide(load32(at)); }
// Of pairs of bfloat16 the first, and the second.
// Of 8 bfloat16 each, v without signs, the larger ones: without signs too.
ALWAYS int32x4_t larger(int32x4_t v, int32x4_t w) {
  return vreinterpretq_s32_u16(vmaxq_u16(vreinterpretq_u16_s32(v), vandq_u16(vreinterpretq_u16_s32(w), vdupq_n_u16(0x7fff))));
}
ALWAYS float32x4_t firsts(int32x4_t v) { return vreinterpretq_f32_s32(vshlq_n_s32(v, 16)); }
ALWAYS float32x4_t seconds(int32x4_t v) { return vreinterpretq_f32_s32(vandq_s32(v, vdupq_n_s32(int(0xffff0000)))); }

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#define WIDE_DOT2 1
ALWAYS float32x4_t dot2(float32x4_t sum, int32x4_t a, int32x4_t b) {
  return vbfdotq_f32(sum, vreinterpretq_bf16_s32(a), vreinterpretq_bf16_s32(b));
}
ALWAYS uint16x8_t narrow(Halves<float32x4_t> v) {
  return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(v.a), v.b));
}
#else
ALWAYS uint32x4_t narrow(float32x4_t v) {  // to the nearest, ties to even; a NaN stays one
  const uint32x4_t u = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t up = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vbslq_u32(vceqq_f32(v, v), up, vdupq_n_u32(0x7fc00000));
}
ALWAYS uint16x8_t narrow(Halves<float32x4_t> v) {
  return vuzp2q_u16(vreinterpretq_u16_u32(narrow(v.a)), vreinterpretq_u16_u32(narrow(v.b)));
}
#endif
ALWAYS Shorts narrow(Floats v) { return {narrow(v.a), narrow(v.b)}; }

ALWAYS Halves<float32x4_t> wide_half(uint16x8_t v) {
  const float16x8_t f = vreinterpretq_f16_u16(v);
  return {vcvt_f32_f16(vget_low_f16(f)), vcvt_high_f32_f16(f)};
}
ALWAYS Floats wide_half(Shorts v) { return {wide_half(v.a), wide_half(v.b)}; }
ALWAYS uint16x8_t narrow_half(Halves<float32x4_t> v) {
  return vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(v.a), v.b));
}
ALWAYS Shorts narrow_half(Floats v) { return {narrow_half(v.a), narrow_half(v.b)}; }

// ---- products of bytes: the sum and those of w x, four neighbours at a time. Weights of 8 bits are signed; those of 4 bits
// are 0 to 15, which a signed byte holds too. So products of unsigned with signed bytes (I8MM) bring nothing.

constexpr int ZERO8 = 0, ZERO4 = 8, ROUNDS4 = 0;
ALWAYS int32x4_t dot8(int32x4_t sum, int32x4_t w, int32x4_t x) {
  return vdotq_s32(sum, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
}
ALWAYS int32x4_t dot4(int32x4_t sum, int32x4_t w, int32x4_t x) { return dot8(sum, w, x); }
ALWAYS int32x4_t total_of(int32x4_t sum) { return sum; }

}  // namespace loradock
