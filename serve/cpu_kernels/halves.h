// The words of vectors.h where 16 numbers take several registers: `avx2.h` and `neon.h` say them for one register, and here
// each half does the same, which is a register or in halves itself.
#pragma once

#include <algorithm>

#define APART __attribute__((noinline))

namespace loradock {

constexpr int REGISTERS = 8;

template <class T>
ALWAYS Halves<T> halves(T a, T b) {
  return {a, b};
}

#define OF_ONE(WORD)                     \
  template <class T>                     \
  ALWAYS auto WORD(Halves<T> v) {        \
    return halves(WORD(v.a), WORD(v.b)); \
  }
#define OF_TWO(WORD)                               \
  template <class T>                               \
  ALWAYS auto WORD(Halves<T> v, Halves<T> w) {     \
    return halves(WORD(v.a, w.a), WORD(v.b, w.b)); \
  }
#define OF_THREE(WORD)                                       \
  template <class T, class U, class V>                       \
  ALWAYS auto WORD(Halves<T> v, Halves<U> w, Halves<V> u) {  \
    return halves(WORD(v.a, w.a, u.a), WORD(v.b, w.b, u.b)); \
  }

template <class T>
ALWAYS Halves<T> operator+(Halves<T> v, Halves<T> w) {
  return {v.a + w.a, v.b + w.b};
}
template <class T>
ALWAYS Halves<T> operator-(Halves<T> v, Halves<T> w) {
  return {v.a - w.a, v.b - w.b};
}
template <class T>
ALWAYS Halves<T> operator*(Halves<T> v, Halves<T> w) {
  return {v.a * w.a, v.b * w.b};
}
template <class T>
ALWAYS Halves<T> operator/(Halves<T> v, Halves<T> w) {
  return {v.a / w.a, v.b / w.b};
}

OF_THREE(fma)
OF_THREE(fms)
OF_THREE(fnma)
OF_TWO(min)
OF_TWO(max)
OF_ONE(abs)
OF_ONE(nearest)
OF_TWO(times_power)
OF_TWO(less)
OF_TWO(same)
OF_TWO(differ)
OF_THREE(choose)
OF_TWO(add)
OF_TWO(either)
OF_TWO(larger)
OF_TWO(looked_up)
OF_ONE(to_floats)
OF_ONE(to_ints)
OF_ONE(lower4)
OF_ONE(upper4)
OF_ONE(firsts)
OF_ONE(seconds)
OF_THREE(dot8)
OF_THREE(dot4)
OF_ONE(total_of)
#ifdef WIDE_DOT2
OF_THREE(dot2)
#endif

#undef OF_ONE
#undef OF_TWO
#undef OF_THREE

template <int BITS, class T>
ALWAYS Halves<T> up(Halves<T> v) {
  return {up<BITS>(v.a), up<BITS>(v.b)};
}
template <int BITS, class T>
ALWAYS Halves<T> down(Halves<T> v) {
  return {down<BITS>(v.a), down<BITS>(v.b)};
}
template <int BITS, class T>
ALWAYS Halves<T> masked(Halves<T> v) {
  return {masked<BITS>(v.a), masked<BITS>(v.b)};
}
template <class T>
ALWAYS auto sum_of(Halves<T> v) {
  return sum_of(add(v.a, v.b));
}
template <class T>
ALWAYS float largest_of(Halves<T> v) {
  return largest_of(max(v.a, v.b));
}

// ---- masks: lanes of ones and of zeros

template <class T>
ALWAYS unsigned bits(Halves<T> mask) {
  return bits(mask.a) | bits(mask.b) << sizeof(T) / 4;
}
ALWAYS bool any(Mask mask) { return bits(mask); }
ALWAYS int first_of(Mask mask) { return __builtin_ctz(bits(mask)); }

// ---- memory, bfloat16 and float16

// Of 16 numbers the first `count`, with zeros behind them.
template <class T>
inline Shorts load_some(const T* at, int count) {
  if (count >= 16) return load32(at);
  alignas(32) T some[16] = {};
  std::memcpy(some, at, count * sizeof(T));
  return load32(some);
}
template <class T>
inline void store_some(T* at, Shorts v, int count) {
  alignas(32) T some[16];
  store32(some, v);
  std::memcpy(at, some, std::min(count, 16) * sizeof(T));
}
inline Ints load_pairs(const bf16* at, int count) {  // fewer than 32
  return both(load_some(at, count), count > 16 ? load_some(at + 16, count - 16) : Shorts{});
}
ALWAYS Floats wide(const bf16* at, int count) { return wide(load_some(at, count)); }
ALWAYS void store(bf16* at, Floats v) { store32(at, narrow(v)); }
ALWAYS void store(bf16* at, Floats v, int count) { store_some(at, narrow(v), count); }
ALWAYS Floats wide(const half* at, int count) { return wide_half(load_some(at, count)); }
ALWAYS void store(half* at, Floats v, int count) { store_some(at, narrow_half(v), count); }

// Four vectors' sums, as bfloat16 or float32, and largest numbers.
constexpr int SUMS = 4;
template <class T>
ALWAYS void sums(const Floats* v, T* out) {
  for (int i = 0; i < SUMS; i++) put(out[i], sum_of(v[i]));
}
ALWAYS void largest(const Floats* v, float* out) {
  for (int i = 0; i < SUMS; i++) out[i] = largest_of(v[i]);
}

}  // namespace loradock
