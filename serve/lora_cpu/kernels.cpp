// The CPU multi-LoRA kernels: y[token] += (x[token] A^T) B^T with the A and B of each token's adapter slot.
//
// A plan holds a step's tokens, grouped by slot. A layer holds pointers to vLLM's stacked A, which is read where it lies,
// and a packed copy of each slot's B, cut to the adapter's true rank. The op takes a layer's number and does nothing in a
// step, or for a slot, without an adapter. No torch headers: the few functions of its stable C ABI stand below.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <omp.h>

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define WIDE 1
#if defined(__AVX512BF16__)
#define FAST_BF16 1
#endif
#endif

extern "C" {
typedef struct AtenTensorOpaque* Handle;
typedef struct TorchLibraryOpaque* Library;
int32_t aoti_torch_get_data_ptr(Handle, void**);
int32_t aoti_torch_get_sizes(Handle, int64_t**);
int32_t aoti_torch_get_strides(Handle, int64_t**);
int32_t aoti_torch_delete_tensor_object(Handle);
int32_t aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, Library*);
int32_t aoti_torch_library_impl(Library, const char*, void (*)(uint64_t*, uint64_t, uint64_t), uint64_t);
}

namespace {

struct bf16 {
  uint16_t bits;
};
#if defined(__FLT16_MANT_DIG__)
typedef _Float16 half;
#else
struct half {
  uint16_t bits;
};
#endif

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) {
  uint32_t u = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline void put(float& out, float v) { out = v; }
inline void put(bf16& out, float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  // To the nearest, ties to even; a NaN stays one.
  if ((u & 0x7fffffff) > 0x7f800000)
    out.bits = uint16_t((u >> 16) | 0x40);
  else
    out.bits = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
#if defined(__FLT16_MANT_DIG__)
inline float to_float(half v) { return float(v); }
inline void put(half& out, float v) { out = half(v); }
#endif

constexpr int CHUNK = 32;         // tokens of one slot that are worked on together
constexpr int OUT_BLOCK = 768;    // columns of y in one piece of work
constexpr int ROW_BLOCK = 16;     // rows of A in one piece of work
constexpr int64_t SERIAL = 150000;  // multiply-adds that are done sooner than a second thread wakes up

struct Chunk {
  int slot, begin, end;
};

struct Plan {
  int rows = 0;                 // of x and y
  std::vector<int32_t> tokens;  // those of them that have an adapter, grouped by slot
  std::vector<Chunk> chunks;
};

struct Weights {
  int rank = 0;
  const void* a = nullptr;  // [rank, in], in place
  std::vector<char> b;      // packed
};

struct Slice {
  int in, out, offset;
  const char *a, *b;     // stacked: [slots, max_rank, in], [slots, out, max_rank]
  bool a_by_row;         // an embedding's A is [slots, in, max_rank], and looked up by vLLM itself
  std::vector<Weights> slots;
};

struct Layer {
  Plan* plan;
  int dtype;     // 0 float32, 1 bfloat16, 2 float16: of A, B, x and y
  int max_rank;
  int size;      // bytes of an element
  std::vector<Slice> slices;
};

std::vector<std::unique_ptr<Plan>> plans;
std::vector<std::unique_ptr<Layer>> layers;
std::vector<char> scratch;

// ---- packing -------------------------------------------------------------------------------------------------------

bool zero(const char* at, size_t bytes) {
  for (size_t i = 0; i < bytes; i++)
    if (at[i]) return false;
  return true;
}

// The rank that the slot really has: vLLM fills up to max_rank with zeros.
int true_rank(const Layer& layer, const Slice& slice, int slot) {
  const int size = layer.size;
  int rank = layer.max_rank;
  if (slice.a_by_row) {
    // Looked up by token: B says more cheaply which columns are used.
    const char* b = slice.b + size_t(slot) * slice.out * layer.max_rank * size;
    for (; rank > 0; rank--) {
      bool used = false;
      for (int o = 0; o < slice.out && !used; o++) used = !zero(b + (size_t(o) * layer.max_rank + rank - 1) * size, size);
      if (used) break;
    }
    return rank;
  }
  const char* a = slice.a + size_t(slot) * layer.max_rank * slice.in * size;
  while (rank > 0 && zero(a + size_t(rank - 1) * slice.in * size, size_t(slice.in) * size)) rank--;
  return rank;
}

#ifdef FAST_BF16
inline int depth(int rank) { return (rank + 1) / 2 * 2; }
#endif

// B as [rank, out]; for the bfloat16 dot products as [rank / 2, out, 2].
template <class T>
void pack(const Layer& layer, Slice& slice, int slot) {
  Weights& w = slice.slots[slot];
  w.rank = true_rank(layer, slice, slot);
  w.a = slice.a + size_t(slot) * layer.max_rank * slice.in * sizeof(T);
  if (w.rank == 0) {
    w.b = {};
    return;
  }
  const T* b = reinterpret_cast<const T*>(slice.b) + size_t(slot) * slice.out * layer.max_rank;
#ifdef FAST_BF16
  if (layer.dtype == 1) {
    const int pairs = depth(w.rank) / 2;
    w.b.assign(size_t(pairs) * slice.out * 4, 0);
    T* to = reinterpret_cast<T*>(w.b.data());
    for (int o = 0; o < slice.out; o++)
      for (int k = 0; k < w.rank; k++)
        to[(size_t(k / 2) * slice.out + o) * 2 + k % 2] = b[size_t(o) * layer.max_rank + k];
    return;
  }
#endif
  w.b.resize(size_t(w.rank) * slice.out * sizeof(T));
  T* to = reinterpret_cast<T*>(w.b.data());
  for (int o = 0; o < slice.out; o++)
    for (int k = 0; k < w.rank; k++) to[size_t(k) * slice.out + o] = b[size_t(o) * layer.max_rank + k];
}

// ---- any type, any processor: the compiler vectorizes ----------------------------------------------------------------

template <class T>
inline float dot(const T* x, const T* a, int n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int k = 0; k < n; k++) sum += to_float(x[k]) * to_float(a[k]);
  return sum;
}

template <class T>
inline void add_scaled(float* sum, float v, const T* b, int n) {
#pragma omp simd
  for (int o = 0; o < n; o++) sum[o] += v * to_float(b[o]);
}

template <class T>
inline void add_to(T* y, const float* sum, int n) {
#pragma omp simd
  for (int o = 0; o < n; o++) put(y[o], to_float(y[o]) + sum[o]);
}

#if defined(WIDE) && defined(__FLT16_MANT_DIG__)
// float16 by hand: compilers of today convert it one by one.
inline __mmask16 lanes(int left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1); }
inline __m512 wide(const half* at, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, at)); }

template <>
inline float dot<half>(const half* x, const half* a, int n) {
  __m512 sum = _mm512_setzero_ps();
  for (int k = 0; k < n; k += 16) sum = _mm512_fmadd_ps(wide(x + k, lanes(n - k)), wide(a + k, lanes(n - k)), sum);
  return _mm512_reduce_add_ps(sum);
}

template <>
inline void add_scaled<half>(float* sum, float v, const half* b, int n) {
  const __m512 by = _mm512_set1_ps(v);
  for (int o = 0; o < n; o += 16) {
    const __mmask16 mask = lanes(n - o);
    const __m512 was = _mm512_maskz_loadu_ps(mask, sum + o);
    _mm512_mask_storeu_ps(sum + o, mask, _mm512_fmadd_ps(by, wide(b + o, mask), was));
  }
}

template <>
inline void add_to<half>(half* y, const float* sum, int n) {
  for (int o = 0; o < n; o += 16) {
    const __mmask16 mask = lanes(n - o);
    const __m512 now = _mm512_add_ps(wide(y + o, mask), _mm512_maskz_loadu_ps(mask, sum + o));
    _mm256_mask_storeu_epi16(y + o, mask, _mm512_cvtps_ph(now, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}
#endif

template <class T>
struct Plain {
  static void shrink(const Weights& w, int in, const T* x, int64_t stride, const int32_t* tokens, int n, int row, int rows,
                     T* t, int64_t t_stride) {
    const T* a = static_cast<const T*>(w.a);
    for (int i = 0; i < n; i++)
      for (int r = row; r < row + rows; r++)
        put(t[i * t_stride + r], dot(x + tokens[i] * stride, a + size_t(r) * in, in));
  }

  static void expand(const Weights& w, int out, const T* t, int64_t t_stride, const int32_t* rows_of_t, T* y,
                     int64_t stride, const int32_t* tokens, int n, int first, int count) {
    const T* b = reinterpret_cast<const T*>(w.b.data()) + first;
    float sum[OUT_BLOCK];
    for (int i = 0; i < n; i++) {
      const T* ti = t + (rows_of_t ? rows_of_t[i] : i) * t_stride;
      std::fill(sum, sum + count, 0.f);
      for (int k = 0; k < w.rank; k++) add_scaled(sum, to_float(ti[k]), b + size_t(k) * out, count);
      add_to(y + tokens[i] * stride + first, sum, count);
    }
  }
};

// ---- bfloat16 with AVX-512 BF16 ---------------------------------------------------------------------------------------

#ifdef FAST_BF16
inline __m512bh bits(__m512i v) { return (__m512bh)v; }

// Sixteen vectors become the sixteen sums of their lanes.
inline __m512 sums(const __m512* v) {
  __m512 s[8], q[4];
  for (int i = 0; i < 8; i++)
    s[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(s[2 * i]), b = _mm512_castps_pd(s[2 * i + 1]);
    q[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const __m512 lo = _mm512_add_ps(_mm512_shuffle_f32x4(q[0], q[1], 0x88), _mm512_shuffle_f32x4(q[0], q[1], 0xdd));
  const __m512 hi = _mm512_add_ps(_mm512_shuffle_f32x4(q[2], q[3], 0x88), _mm512_shuffle_f32x4(q[2], q[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(lo, hi, 0x88), _mm512_shuffle_f32x4(lo, hi, 0xdd));
}

struct Fast {
  template <int T, int R>
  static inline __attribute__((always_inline)) void shrink_tile(const bf16* a, int in, const bf16* x, int64_t stride,
                                                                const int32_t* tokens, bf16* t, int64_t t_stride) {
    __m512 sum[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_ps();
    const bf16* xs[T];
    for (int i = 0; i < T; i++) xs[i] = x + tokens[i] * stride;
    int k = 0;
    for (; k + 32 <= in; k += 32) {
      __m512i xv[T];
#pragma GCC unroll 4
      for (int i = 0; i < T; i++) xv[i] = _mm512_loadu_si512(xs[i] + k);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const __m512i av = _mm512_loadu_si512(a + size_t(r) * in + k);
#pragma GCC unroll 4
        for (int i = 0; i < T; i++) sum[i * R + r] = _mm512_dpbf16_ps(sum[i * R + r], bits(av), bits(xv[i]));
      }
    }
    if (k < in) {
      const __mmask32 mask = (__mmask32)((1u << (in - k)) - 1);
      for (int r = 0; r < R; r++) {
        const __m512i av = _mm512_maskz_loadu_epi16(mask, a + size_t(r) * in + k);
        for (int i = 0; i < T; i++)
          sum[i * R + r] = _mm512_dpbf16_ps(sum[i * R + r], bits(av), bits(_mm512_maskz_loadu_epi16(mask, xs[i] + k)));
      }
    }
    alignas(64) bf16 done[32];
    _mm256_store_si256((__m256i*)done, (__m256i)_mm512_cvtneps_pbh(sums(sum)));
    for (int i = 0; i < T; i++) std::memcpy(t + i * t_stride, done + i * R, R * sizeof(bf16));
  }

  template <int T>
  static void shrink_rows(const bf16* a, int in, const bf16* x, int64_t stride, const int32_t* tokens, int rows, bf16* t,
                          int64_t t_stride) {
    int r = 0;
    if constexpr (T == 1)
      for (; r + 16 <= rows; r += 16) shrink_tile<1, 16>(a + size_t(r) * in, in, x, stride, tokens, t + r, t_stride);
    if constexpr (T <= 2)
      for (; r + 8 <= rows; r += 8) shrink_tile<T, 8>(a + size_t(r) * in, in, x, stride, tokens, t + r, t_stride);
    for (; r + 4 <= rows; r += 4) shrink_tile<T, 4>(a + size_t(r) * in, in, x, stride, tokens, t + r, t_stride);
    for (; r < rows; r++) shrink_tile<T, 1>(a + size_t(r) * in, in, x, stride, tokens, t + r, t_stride);
  }

  static void shrink(const Weights& w, int in, const bf16* x, int64_t stride, const int32_t* tokens, int n, int row,
                     int rows, bf16* t, int64_t t_stride) {
    const bf16* a = static_cast<const bf16*>(w.a) + size_t(row) * in;
    int i = 0;
    for (; i + 4 <= n; i += 4) shrink_rows<4>(a, in, x, stride, tokens + i, rows, t + i * t_stride + row, t_stride);
    for (; i + 2 <= n; i += 2) shrink_rows<2>(a, in, x, stride, tokens + i, rows, t + i * t_stride + row, t_stride);
    for (; i < n; i++) shrink_rows<1>(a, in, x, stride, tokens + i, rows, t + i * t_stride + row, t_stride);
    if (row + rows == w.rank && w.rank % 2)  // B's last pair ends in a zero, and 0 * NaN is NaN
      for (i = 0; i < n; i++) t[i * t_stride + w.rank].bits = 0;
  }

  template <int T, int U>
  static inline __attribute__((always_inline)) void expand_tile(const bf16* const* ts, int pairs, const char* b, int out,
                                                                bf16* const* ys, __mmask16 mask) {
    __m512 sum[T * U];
#pragma GCC unroll 16
    for (int i = 0; i < T * U; i++) sum[i] = _mm512_setzero_ps();
    for (int k = 0; k < pairs; k++) {
      __m512i bv[U];
#pragma GCC unroll 4
      for (int u = 0; u < U; u++)
        bv[u] = U == 1 ? _mm512_maskz_loadu_epi32(mask, b + size_t(k) * out * 4)
                       : _mm512_loadu_si512(b + (size_t(k) * out + 16 * u) * 4);
#pragma GCC unroll 4
      for (int i = 0; i < T; i++) {
        int pair;
        std::memcpy(&pair, ts[i] + 2 * k, 4);
        const __m512i tv = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) sum[i * U + u] = _mm512_dpbf16_ps(sum[i * U + u], bits(bv[u]), bits(tv));
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < T; i++)
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) {
        bf16* y = ys[i] + 16 * u;
        const __m256i old = U == 1 ? _mm256_maskz_loadu_epi16(mask, y) : _mm256_loadu_si256((const __m256i*)y);
        const __m512 was = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(old), 16));
        const __m256i now = (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(was, sum[i * U + u]));
        if (U == 1)
          _mm256_mask_storeu_epi16(y, mask, now);
        else
          _mm256_storeu_si256((__m256i*)y, now);
      }
  }

  template <int T>
  static void expand_some(const char* b, int out, int pairs, const bf16* const* ts, bf16* const* ys, int count) {
    bf16* at[T];
    for (int i = 0; i < T; i++) at[i] = ys[i];
    int o = 0;
    for (; o + 64 <= count; o += 64) {
      expand_tile<T, 4>(ts, pairs, b + size_t(o) * 4, out, at, 0xffff);
      for (int i = 0; i < T; i++) at[i] += 64;
    }
    for (; o < count; o += 16) {
      const __mmask16 mask = count - o >= 16 ? 0xffff : (__mmask16)((1u << (count - o)) - 1);
      expand_tile<T, 1>(ts, pairs, b + size_t(o) * 4, out, at, mask);
      for (int i = 0; i < T; i++) at[i] += 16;
    }
  }

  static void expand(const Weights& w, int out, const bf16* t, int64_t t_stride, const int32_t* rows_of_t, bf16* y,
                     int64_t stride, const int32_t* tokens, int n, int first, int count) {
    const char* b = w.b.data() + size_t(first) * 4;
    const int pairs = depth(w.rank) / 2;
    const bf16* ts[CHUNK];
    bf16* ys[CHUNK];
    for (int i = 0; i < n; i++) {
      ts[i] = t + (rows_of_t ? rows_of_t[i] : i) * t_stride;
      ys[i] = y + tokens[i] * stride + first;
    }
    int i = 0;
    for (; i + 4 <= n; i += 4) expand_some<4>(b, out, pairs, ts + i, ys + i, count);
    for (; i + 2 <= n; i += 2) expand_some<2>(b, out, pairs, ts + i, ys + i, count);
    for (; i < n; i++) expand_some<1>(b, out, pairs, ts + i, ys + i, count);
  }
};
#endif

// ---- one layer of one step ---------------------------------------------------------------------------------------------

struct Work {
  int chunk, slice, first, count;
};

template <class T, class K>
void linear(Layer& layer, T* y, int64_t y_stride, const T* x, int64_t x_stride) {
  Plan& plan = *layer.plan;
  const int slices = int(layer.slices.size());
  const int width = (layer.max_rank + 1) / 2 * 2;
  static thread_local std::vector<Work> shrinks, expands;
  shrinks.clear();
  expands.clear();
  int64_t macs = 0;
  for (int c = 0; c < int(plan.chunks.size()); c++)
    for (int s = 0; s < slices; s++) {
      const Slice& slice = layer.slices[s];
      const int rank = slice.slots[plan.chunks[c].slot].rank;
      if (!rank) continue;
      for (int r = 0; r < rank; r += ROW_BLOCK) shrinks.push_back({c, s, r, std::min(ROW_BLOCK, rank - r)});
      for (int o = 0; o < slice.out; o += OUT_BLOCK) expands.push_back({c, s, o, std::min(OUT_BLOCK, slice.out - o)});
      macs += int64_t(plan.chunks[c].end - plan.chunks[c].begin) * rank * (slice.in + slice.out);
    }
  if (shrinks.empty() || plan.tokens.empty()) return;
  const size_t bytes = plan.tokens.size() * slices * width * sizeof(T);
  if (scratch.size() < bytes) scratch.resize(bytes);
  T* t = reinterpret_cast<T*>(scratch.data());
  const int64_t t_stride = int64_t(slices) * width;
  const Work* shrink = shrinks.data();
  const Work* expand = expands.data();
  const int shrink_count = int(shrinks.size()), expand_count = int(expands.size());

  auto shrink_one = [&](const Work& w) {
    const Chunk& c = plan.chunks[w.chunk];
    const Slice& slice = layer.slices[w.slice];
    K::shrink(slice.slots[c.slot], slice.in, x, x_stride, plan.tokens.data() + c.begin, c.end - c.begin, w.first, w.count,
              t + c.begin * t_stride + w.slice * width, t_stride);
  };
  auto expand_one = [&](const Work& w) {
    const Chunk& c = plan.chunks[w.chunk];
    const Slice& slice = layer.slices[w.slice];
    K::expand(slice.slots[c.slot], slice.out, t + c.begin * t_stride + w.slice * width, t_stride, nullptr,
              y + slice.offset, y_stride, plan.tokens.data() + c.begin, c.end - c.begin, w.first, w.count);
  };
  if (macs < SERIAL || omp_get_max_threads() == 1) {
    for (int i = 0; i < shrink_count; i++) shrink_one(shrink[i]);
    for (int i = 0; i < expand_count; i++) expand_one(expand[i]);
    return;
  }
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int i = 0; i < shrink_count; i++) shrink_one(shrink[i]);
#pragma omp for schedule(static)
    for (int i = 0; i < expand_count; i++) expand_one(expand[i]);
  }
}

// y[token] += t[token] B^T: an embedding, whose A vLLM has looked up already.
template <class T, class K>
void embedding(Layer& layer, T* y, int64_t y_stride, const T* t, int64_t t_stride) {
  Plan& plan = *layer.plan;
  Slice& slice = layer.slices[0];
  const int chunks = int(plan.chunks.size());
#pragma omp parallel for schedule(static) if (plan.tokens.size() > 64)
  for (int c = 0; c < chunks; c++) {
    const Chunk& chunk = plan.chunks[c];
    const Weights& w = slice.slots[chunk.slot];
    if (!w.rank) continue;
    const int32_t* tokens = plan.tokens.data() + chunk.begin;
    for (int o = 0; o < slice.out; o += OUT_BLOCK)
      K::expand(w, slice.out, t, t_stride, tokens, y + slice.offset, y_stride, tokens, chunk.end - chunk.begin, o,
                std::min(OUT_BLOCK, slice.out - o));
  }
}

struct Tensor {
  Handle handle;
  char* data;
  int64_t rows, columns, stride, step;  // elements from row to row, and from column to column

  explicit Tensor(uint64_t value) : handle(reinterpret_cast<Handle>(value)) {
    void* at;
    int64_t *sizes, *strides;
    aoti_torch_get_data_ptr(handle, &at);
    aoti_torch_get_sizes(handle, &sizes);
    aoti_torch_get_strides(handle, &strides);
    data = static_cast<char*>(at);
    rows = sizes[0], columns = sizes[1], stride = strides[0], step = strides[1];
  }
  ~Tensor() { aoti_torch_delete_tensor_object(handle); }
};

template <class T, class K>
void run(Layer& layer, Tensor& y, Tensor& x, bool looked_up) {
  T *to = reinterpret_cast<T*>(y.data), *from = reinterpret_cast<T*>(x.data);
  int64_t stride = x.stride;
  std::vector<T> straight;
  if (x.step != 1) {
    straight.resize(size_t(x.rows) * x.columns);
    for (int64_t i = 0; i < x.rows; i++)
      for (int64_t k = 0; k < x.columns; k++) straight[i * x.columns + k] = from[i * stride + k * x.step];
    from = straight.data(), stride = x.columns;
  }
  if (looked_up)
    embedding<T, K>(layer, to, y.stride, from, stride);
  else
    linear<T, K>(layer, to, y.stride, from, stride);
}

void apply(uint64_t* stack, bool looked_up) {
  Tensor y(stack[0]), x(stack[1]);
  Layer& layer = *layers[size_t(int64_t(stack[2]))];
  if (layer.plan->chunks.empty()) return;
  if (y.step != 1 || y.rows < layer.plan->rows || x.rows < layer.plan->rows)
    throw std::runtime_error("loradock: a layer's rows are not the step's " + std::to_string(layer.plan->rows) +
                             ": " + std::to_string(x.rows) + " in, " + std::to_string(y.rows) + " out");
  if (layer.dtype == 0)
    run<float, Plain<float>>(layer, y, x, looked_up);
  else if (layer.dtype == 1)
#ifdef FAST_BF16
    run<bf16, Fast>(layer, y, x, looked_up);
#else
    run<bf16, Plain<bf16>>(layer, y, x, looked_up);
#endif
#if defined(__FLT16_MANT_DIG__)
  else
    run<half, Plain<half>>(layer, y, x, looked_up);
#endif
}

void lora_linear(uint64_t* stack, uint64_t, uint64_t) { apply(stack, false); }
void lora_embedding(uint64_t* stack, uint64_t, uint64_t) { apply(stack, true); }

}  // namespace

extern "C" {

// The types that this build can compute with: one bit each.
int loradock_types() {
#if defined(__FLT16_MANT_DIG__)
  return 7;
#else
  return 3;
#endif
}

int loradock_register() {
  static Library library = nullptr;
  if (library) return 0;
  if (aoti_torch_library_init_impl("loradock", "CPU", __FILE__, __LINE__, &library)) return 1;
  return aoti_torch_library_impl(library, "lora_linear", lora_linear, 0) ||
         aoti_torch_library_impl(library, "lora_embedding", lora_embedding, 0);
}

int loradock_plan() {
  plans.emplace_back(new Plan);
  return int(plans.size()) - 1;
}

// The slot of each row of this step, -1 where there is none; `rows` of them.
void loradock_set_plan(int number, const int64_t* slots, int rows, int slot_count) {
  Plan& plan = *plans[number];
  plan.rows = rows;
  plan.tokens.clear();
  plan.chunks.clear();
  std::vector<std::vector<int32_t>> by_slot(slot_count);
  for (int i = 0; i < rows; i++)
    if (slots[i] >= 0 && slots[i] < slot_count) by_slot[slots[i]].push_back(i);
  for (int s = 0; s < slot_count; s++)
    for (size_t i = 0; i < by_slot[s].size(); i += CHUNK) {
      const int begin = int(plan.tokens.size());
      const size_t end = std::min(by_slot[s].size(), i + CHUNK);
      plan.tokens.insert(plan.tokens.end(), by_slot[s].begin() + i, by_slot[s].begin() + end);
      plan.chunks.push_back({s, begin, int(plan.tokens.size())});
    }
}

int loradock_layer(int plan, int dtype, int max_rank, int slots, int slices, const void* const* a, const void* const* b,
                   const int* in, const int* out, const int* offset, int a_by_row) {
  std::unique_ptr<Layer> layer(new Layer);
  layer->plan = plans[plan].get();
  layer->dtype = dtype;
  layer->max_rank = max_rank;
  layer->size = dtype == 0 ? 4 : 2;
  for (int s = 0; s < slices; s++) {
    Slice slice{in[s], out[s], offset[s], (const char*)a[s], (const char*)b[s], a_by_row != 0, {}};
    slice.slots.resize(slots);
    layer->slices.push_back(std::move(slice));
  }
  layers.push_back(std::move(layer));
  return int(layers.size()) - 1;
}

int loradock_rank(int number, int slot) {
  int rank = 0;
  for (const Slice& slice : layers[number]->slices) rank = std::max(rank, slice.slots[slot].rank);
  return rank;
}

// Take in what vLLM has just copied into a slot, in these layers.
void loradock_load(const int* numbers, int count, int slot) {
#pragma omp parallel for schedule(dynamic)
  for (int i = 0; i < count; i++) {
    Layer& layer = *layers[numbers[i]];
    for (Slice& slice : layer.slices) {
      if (layer.dtype == 0)
        pack<float>(layer, slice, slot);
      else
        pack<bf16>(layer, slice, slot);  // moved, not computed with: any 16 bits
    }
  }
}
}
