// A whole step of a dense decoder in one call: embedding, every layer with its adapters, attention over vLLM's paged cache.
//
// Weights are packed (`matrix.h`). One parallel region spans the step. Its phases are shared out piece by piece, and end
// with their last piece and not with their last thread: on a small machine something else may have a thread's core for a while.
// The residual stays in float32; what vLLM rounds to bfloat16 before a product or into the cache is rounded here too.

#include "products.h"

#ifdef STEP

#include <atomic>
#include <sched.h>

using namespace loradock;

namespace {

constexpr int ALONE = 2;      // up to so many tokens, each thread does small things for itself: cheaper than to meet

// One phase of a step: which of its pieces are taken, in each thread's own part of them, and how many are done.
struct Phase {
  struct alignas(64) Count {
    std::atomic<int> value{0};
  };
  Count done;
  Count next[1];  // as many as there are threads
};

class Phases {
 public:
  void begin(int count, int threads) {
    size_ = sizeof(Phase) + sizeof(Phase::Count) * (threads - 1);
    place_.need(size_ * count);
    std::memset(place_.data, 0, size_ * count);
  }
  Phase& operator[](int i) { return *reinterpret_cast<Phase*>(place_.data + size_ * i); }

 private:
  Buffer<char> place_;
  size_t size_ = 0;
};

struct Block {
  int qkv, o, gate_up, down;          // matrices
  int lora_qkv, lora_o, lora_gate_up, lora_down;  // layers of kernels.cpp, or -1
  const bf16 *norm_in, *norm_out, *norm_q, *norm_k;
  bf16* cache;
};

struct Decoder {
  int hidden, heads, kv_heads, head, inner, rotary, block_size, threads;
  float eps, scale;
  int64_t cache_block, cache_head;  // elements from one block, and one head of a block, to the next
  const bf16 *embedding, *cos_sin, *norm;
  std::vector<Block> layers;
  int top = -1;        // the output layer's matrix
  int vocabulary = 0;  // its first outputs; the rest is padding
  Phases phases;
  Buffer<float> residual;
  Buffer<bf16> x, qkv, y, act, t;
  Buffer<int8_t> q;
  Buffer<float> q_scale;
  Buffer<int32_t> q_sum, request;
};

std::vector<std::unique_ptr<Decoder>> decoders;

void normalize(const float* x, const bf16* weight, int n, float eps, bf16* out) {
  __m512 squares = _mm512_setzero_ps();
  for (int i = 0; i < n; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const __m512 by = _mm512_set1_ps(1.f / std::sqrt(_mm512_reduce_add_ps(squares) / n + eps));
  for (int i = 0; i < n; i += 16)
    store(out + i, _mm512_mul_ps(rounded(_mm512_mul_ps(_mm512_loadu_ps(x + i), by)), wide(weight + i)));
}

inline __m512 exponential(__m512 x) {
  // 2^n times a polynomial for the rest; relative error below 2e-7.
  x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.f)), _mm512_set1_ps(-87.f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 p = _mm512_set1_ps(1.9875691e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.f)));
  return _mm512_scalef_ps(p, n);
}

inline __m512 silu(__m512 v) {
  const __m512 one = _mm512_set1_ps(1.f);
  return _mm512_div_ps(v, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), v))));
}

// ---- adapters --------------------------------------------------------------------------------------------------------

// One module's adapters in this step: t = x A^T for the tokens that have one, and what to add to 16 outputs of a token.
struct Delta {
  const Layer* layer = nullptr;
  const Plan* plan = nullptr;
  bf16* t = nullptr;
  int64_t stride = 0, width = 0;

  Delta(int number, bf16* place) {
    if (number < 0) return;
    const Layer& it = *layers[number];
    if (it.plan->chunks.empty()) return;
    for (const Chunk& c : it.plan->chunks)
      for (const Slice& s : it.slices)
        if (s.slots[c.slot].rank) {
          layer = &it, plan = it.plan, t = place;
          width = (it.max_rank + 1) / 2 * 2, stride = width * int64_t(it.slices.size());
          return;
        }
  }

  explicit operator bool() const { return layer; }

  int pieces() const { return int(plan->chunks.size() * layer->slices.size()); }

  void shrink(int piece, const bf16* x, int64_t x_stride) const {
    const Chunk& c = plan->chunks[piece / layer->slices.size()];
    const size_t s = piece % layer->slices.size();
    const Weights& w = layer->slices[s].slots[c.slot];
    if (piece + 1 < pieces()) {  // the next one's A, likely this thread's too
      const int next = piece + 1;
      const Weights& n = layer->slices[next % layer->slices.size()].slots[plan->chunks[next / layer->slices.size()].slot];
      const size_t bytes = size_t(n.rank) * layer->slices[next % layer->slices.size()].in * sizeof(bf16);
      for (size_t i = 0; i < std::min(bytes, size_t(16384)); i += 64)
        _mm_prefetch(static_cast<const char*>(n.a) + i, _MM_HINT_T1);
    }
    for (int r = 0; r < w.rank; r += ROW_BLOCK)
      Fast::shrink(w, layer->slices[s].in, x, x_stride, plan->tokens.data() + c.begin, c.end - c.begin, r,
                   std::min(ROW_BLOCK, w.rank - r), t + c.begin * stride + int64_t(s) * width, stride);
  }

  // The delta of outputs [first, first + 16) of slice s, on top of v.
  inline __m512 add(__m512 v, int token, int s, int first) const {
    const int place = plan->place[token];
    if (place < 0) return v;
    const Weights& w = layer->slices[s].slots[plan->slot[token]];
    const int pairs = depth(w.rank) / 2;
    const char* b = w.packed() + size_t(first) * pairs * 4;
    const bf16* mine = t + place * stride + s * width;
    for (int k = 0; k < pairs; k++) {
      int pair;
      std::memcpy(&pair, mine + 2 * k, 4);
      v = _mm512_dpbf16_ps(v, bits(_mm512_load_si512(b + size_t(k) * 64)), bits(_mm512_set1_epi32(pair)));
    }
    return v;
  }

  // What `add` will read: many adapters' pieces are too short for the processor to see them coming.
  inline void fetch(int token, int s, int first) const {
    const int place = plan->place[token];
    if (place < 0) return;
    const Weights& w = layer->slices[s].slots[plan->slot[token]];
    const int pairs = depth(w.rank) / 2;
    const char* b = w.packed() + size_t(first) * pairs * 4;
    for (int k = 0; k < pairs; k++) _mm_prefetch(b + size_t(k) * 64, _MM_HINT_T0);
  }
};

// ---- attention -------------------------------------------------------------------------------------------------------

struct Step {
  const int32_t *ids, *table;
  const int64_t *positions, *slots;
  int64_t table_stride;
  int rows, requests;
  bool decode;    // one token for each request
  float* logits;  // [requests, vocabulary] of each one's only token, where the head is asked for as well
};

// Norm, where the model has one for q and k, and rotation of one head, in place.
void turn(const Decoder& d, bf16* v, const bf16* norm, int64_t position) {
  alignas(64) float f[512];
  if (norm) {
    for (int i = 0; i < d.head; i += 16) _mm512_store_ps(f + i, wide(v + i));
    normalize(f, norm, d.head, d.eps, v);
  }
  const int half = d.rotary / 2;
  const bf16 *cos = d.cos_sin + position * d.rotary, *sin = cos + half;
  for (int i = 0; i < half; i += 16) {
    const __m512 a = wide(v + i), b = wide(v + half + i), c = wide(cos + i), s = wide(sin + i);
    store(v + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
    store(v + half + i, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
  }
}

// The cache's block: K as [head, block_size], V as [block_size, head].
void remember(const Decoder& d, const Block& l, bf16* k, const bf16* v, int h, int64_t position, int64_t slot) {
  turn(d, k, l.norm_k, position);
  if (slot < 0) return;
  bf16* at = l.cache + slot / d.block_size * d.cache_block + h * d.cache_head;
  const int64_t in = slot % d.block_size;
  for (int i = 0; i < d.head; i++) at[int64_t(i) * d.block_size + in] = k[i];
  std::memcpy(at + int64_t(d.head) * d.block_size + in * d.head, v, d.head * sizeof(bf16));
}

// Of 32 bfloat16: those at even and those at odd places.
inline void split(const bf16* at, __m512& even, __m512& odd) {
  const __m512i v = _mm512_loadu_si512(at);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xffff0000)));
}

// G query heads of one token over `length` keys of their one key head: softmax online, 32 keys at a time.
template <int G, int HEAD>
void attend(const Decoder& d, const Block& l, const int32_t* table, int length, int h, bf16* const* query, bf16* const* out) {
  alignas(64) float q[G][HEAD];
  const __m512 scale = _mm512_set1_ps(d.scale);
#pragma GCC unroll 4
  for (int g = 0; g < G; g++)
    for (int i = 0; i < HEAD; i += 16) _mm512_store_ps(q[g] + i, _mm512_mul_ps(wide(query[g] + i), scale));
  constexpr int V = HEAD / 16;
  __m512 sum[G][V];
  float most[G], total[G];
#pragma GCC unroll 4
  for (int g = 0; g < G; g++) {
    most[g] = -INFINITY, total[g] = 0;
    for (int i = 0; i < V; i++) sum[g][i] = _mm512_setzero_ps();
  }
  const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  for (int from = 0; from < length; from += 32) {
    const bf16* k = l.cache + int64_t(table[from / d.block_size]) * d.cache_block + h * d.cache_head;
    const bf16* v = k + int64_t(HEAD) * d.block_size + int64_t(from % d.block_size) * HEAD;
    k += from % d.block_size;
    // K lies by column: the processor does not see its next lines coming.
    const int soon = std::min(from + 32, length - 1);
    const bf16* next = l.cache + int64_t(table[soon / d.block_size]) * d.cache_block + h * d.cache_head;
    const bf16* next_v = next + int64_t(HEAD) * d.block_size + int64_t(soon / 32 * 32 % d.block_size) * HEAD;
    next += soon / 32 * 32 % d.block_size;
    __m512 even[G], odd[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) even[g] = odd[g] = _mm512_setzero_ps();
    for (int i = 0; i < HEAD; i++) {
      _mm_prefetch((const char*)(next + int64_t(i) * d.block_size), _MM_HINT_T0);
      _mm_prefetch((const char*)(next_v + i * 32), _MM_HINT_T0);
      __m512 ke, ko;
      split(k + int64_t(i) * d.block_size, ke, ko);
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        const __m512 qi = _mm512_set1_ps(q[g][i]);
        even[g] = _mm512_fmadd_ps(qi, ke, even[g]);
        odd[g] = _mm512_fmadd_ps(qi, ko, odd[g]);
      }
    }
    const int count = std::min(32, length - from);
    const __m512i place = _mm512_add_epi32(order, _mm512_setzero_si512());
    const __mmask16 in_even = _mm512_cmplt_epi32_mask(place, _mm512_set1_epi32(count));
    const __mmask16 in_odd = _mm512_cmplt_epi32_mask(_mm512_add_epi32(place, _mm512_set1_epi32(1)), _mm512_set1_epi32(count));
    alignas(64) float p[G][32];
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      float top = -INFINITY;
      top = std::max(_mm512_mask_reduce_max_ps(in_even, even[g]), in_odd ? _mm512_mask_reduce_max_ps(in_odd, odd[g]) : top);
      if (top > most[g]) {
        const float by = std::exp(most[g] - top);
        for (int i = 0; i < V; i++) sum[g][i] = _mm512_mul_ps(sum[g][i], _mm512_set1_ps(by));
        total[g] *= by;
        most[g] = top;
      }
      const __m512 m = _mm512_set1_ps(most[g]);
      const __m512 pe = _mm512_maskz_mov_ps(in_even, exponential(_mm512_sub_ps(even[g], m)));
      const __m512 po = _mm512_maskz_mov_ps(in_odd, exponential(_mm512_sub_ps(odd[g], m)));
      total[g] += _mm512_reduce_add_ps(_mm512_add_ps(pe, po));
      _mm512_store_ps(p[g], pe);
      _mm512_store_ps(p[g] + 16, po);
    }
    for (int j = 0; j < count; j++) {
      __m512 pj[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) pj[g] = _mm512_set1_ps(p[g][(j & 1) * 16 + j / 2]);
#pragma GCC unroll 8
      for (int i = 0; i < V; i += 2) {
        __m512 ve, vo;
        split(v + int64_t(j) * HEAD + i * 16, ve, vo);
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
          sum[g][i] = _mm512_fmadd_ps(pj[g], ve, sum[g][i]);
          sum[g][i + 1] = _mm512_fmadd_ps(pj[g], vo, sum[g][i + 1]);
        }
      }
    }
  }
  for (int g = 0; g < G; g++) {
    const __m512 by = _mm512_set1_ps(1.f / total[g]);
    for (int i = 0; i < V; i += 2) {  // even and odd places come together again
      const __m512i even = _mm512_cvtepu16_epi32(narrow(_mm512_mul_ps(sum[g][i], by)));
      const __m512i odd = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(_mm512_mul_ps(sum[g][i + 1], by))), 16);
      _mm512_storeu_si512(out[g] + i * 16, _mm512_or_si512(even, odd));
    }
  }
}

template <int HEAD>
void attend_head(const Decoder& d, const Block& l, const int32_t* table, int length, int h, bf16* q, bf16* out) {
  const int each = d.heads / d.kv_heads;
  constexpr int MOST = HEAD <= 64 ? 4 : 2;  // as many sums as there are registers for
  for (int g = 0; g < each;) {
    bf16 *qs[4], *outs[4];
    const int now = std::min(MOST, each - g);
    for (int i = 0; i < now; i++) qs[i] = q + (g + i) * HEAD, outs[i] = out + (g + i) * HEAD;
    if (now == 4)
      attend<4, HEAD>(d, l, table, length, h, qs, outs);
    else if (now == 3)
      attend<3, HEAD>(d, l, table, length, h, qs, outs);
    else if (now == 2)
      attend<2, HEAD>(d, l, table, length, h, qs, outs);
    else
      attend<1, HEAD>(d, l, table, length, h, qs, outs);
    g += now;
  }
}

void attend_token(const Decoder& d, const Block& l, const Step& s, int token, int h, bf16* qkv, bf16* out) {
  const int each = d.heads / d.kv_heads;
  bf16* q = qkv + h * each * d.head;
  for (int g = 0; g < each; g++) turn(d, q + g * d.head, l.norm_q, s.positions[token]);
  const int32_t* table = s.table + d.request.data[token] * s.table_stride;
  const int length = int(s.positions[token]) + 1;
  out += h * each * d.head;
  if (d.head == 64)
    attend_head<64>(d, l, table, length, h, q, out);
  else if (d.head == 128)
    attend_head<128>(d, l, table, length, h, q, out);
  else if (d.head == 96)
    attend_head<96>(d, l, table, length, h, q, out);
  else
    attend_head<32>(d, l, table, length, h, q, out);
}

// The first keys and values of what is attended next.
void fetch(const Decoder& d, const Block& l, const Step& s, int token, int h) {
  const int32_t* table = s.table + d.request.data[token] * s.table_stride;
  const bf16* k = l.cache + int64_t(table[0]) * d.cache_block + h * d.cache_head;
  const bf16* v = k + int64_t(d.head) * d.block_size;
  for (int i = 0; i < d.head; i++) {
    _mm_prefetch((const char*)(k + int64_t(i) * d.block_size), _MM_HINT_T0);
    _mm_prefetch((const char*)(v + i * 32), _MM_HINT_T0);
  }
}

// ---- the step ----------------------------------------------------------------------------------------------------------

struct Sharing {
  Phases& phases;
  int thread, threads;
  int phase = 0;

  // work(first, last) for all of [0, n), in pieces of up to `grain`: a thread's own part first, then what others have left.
  // Returns when everything is done.
  template <class F>
  void share(int n, int grain, F&& work) {
    if (threads == 1) return work(0, n);
    Phase& p = phases[phase++];
    int did = 0;
    for (int turn = 0; turn < threads; turn++) {
      const int whose = (thread + turn) % threads;
      const int begin = int(int64_t(n) * whose / threads), end = int(int64_t(n) * (whose + 1) / threads);
      std::atomic<int>& next = p.next[whose].value;
      while (next.load(std::memory_order_relaxed) < end - begin) {
        const int first = begin + next.fetch_add(grain, std::memory_order_relaxed);
        if (first >= end) break;
        const int last = std::min(first + grain, end);
        work(first, last);
        did += last - first;
      }
    }
    if (did) p.done.value.fetch_add(did, std::memory_order_acq_rel);
    for (int spins = 0; p.done.value.load(std::memory_order_acquire) < n; spins++) {
      if (spins < 4000)
        _mm_pause();
      else
        sched_yield();
    }
  }
};

// Blocks in one piece: with many rows several, so that the rows pass the cache less often.
inline int grain(int rows) { return rows > ROWS ? 6 : rows > 4 ? 1 : 2; }

// Logits in float32, as vLLM's sampler wants them. vLLM's own are rounded to bfloat16 before: the two likeliest tokens are
// then often equal, and which one greedy decoding takes is a matter of their numbers.
// vLLM pads the vocabulary to a multiple of 64: only the first `columns` outputs are stored, there is no room for more.
void head(Sharing& all, const Matrix& m, const Input& in, int rows, float* out, int64_t stride, int columns) {
  all.share((columns + WIDTH - 1) / WIDTH, rows > ROWS ? 6 : 8, [&](int first, int last) {
    multiply(m, in, rows, first, last, [&](int row, int block, const float* sums) {
      float* to = out + row * stride + block * WIDTH;
      for (int i = 0, left = columns - block * WIDTH; i < WIDTH && left > 0; i += 16, left -= 16)
        _mm512_mask_storeu_ps(to + i, lanes(left), _mm512_load_ps(sums + i));
    }, [](int, int) {});
  });
}

struct Team : Sharing {
  Decoder& d;
  const Step& s;

  Team(Decoder& d, const Step& s, int thread, int threads) : Sharing{d.phases, thread, threads}, d(d), s(s) {}

  bool alone() const { return s.rows <= ALONE; }

  // Each thread's own copy where it works alone, and everybody's otherwise.
  template <class T>
  T* mine(Buffer<T>& buffer) const {
    return buffer.data + (alone() ? buffer.size / threads * thread : 0);
  }

  // work(first, last) for the rows: each thread all of them, or all threads together.
  template <class F>
  void rows(F&& work) {
    if (alone())
      work(0, s.rows);
    else
      share(s.rows, std::max(1, s.rows / (8 * threads)), work);
  }

  void normalized(const bf16* weight) {
    bf16* x = mine(d.x);
    rows([&](int first, int last) {
      for (int i = first; i < last; i++)
        normalize(d.residual.data + int64_t(i) * d.hidden, weight, d.hidden, d.eps, x + int64_t(i) * d.hidden);
    });
  }

  // The adapters' part of the way in, and int8 if the matrix wants them.
  Input prepare(const Matrix& m, const Delta& delta, const bf16* x, int64_t stride) {
    Input in{x, stride, mine(d.q), mine(d.q_scale), mine(d.q_sum)};
    const int shrinks = delta ? delta.pieces() : 0;
    const int quantizes = m.kind != BF16 ? s.rows : 0, groups = m.groups();
    auto work = [&](int first, int last) {
      for (int i = first; i < last; i++)
        if (i < shrinks)
          delta.shrink(i, x, stride);
        else
          quantize(m, x + (i - shrinks) * stride, const_cast<int8_t*>(in.q) + int64_t(i - shrinks) * m.k,
                   const_cast<float*>(in.scale) + int64_t(i - shrinks) * groups,
                   const_cast<int32_t*>(in.sum) + int64_t(i - shrinks) * groups);
    };
    const int all = shrinks + quantizes;
    if (all && alone())
      work(0, all);
    else if (all)
      share(all, std::max(1, all / (8 * threads)), work);
    return in;
  }

  template <class Out, class Fetch>
  void product(const Matrix& m, const Input& in, Out&& out, Fetch&& fetch) {
    share(m.blocks, grain(s.rows), [&](int first, int last) { multiply(m, in, s.rows, first, last, out, fetch); });
  }

  void add_to_residual(int number, int lora, const bf16* x, int64_t stride) {
    const Matrix& m = *matrices[number];
    const Delta delta(lora, mine(d.t));
    const Input in = prepare(m, delta, x, stride);
    product(m, in, [&](int row, int block, const float* sums) {
      float* to = d.residual.data + int64_t(row) * d.hidden + block * WIDTH;
      for (int i = 0; i < WIDTH && block * WIDTH + i < m.n; i += 16) {
        __m512 v = _mm512_load_ps(sums + i);
        if (delta) v = delta.add(v, row, 0, block * WIDTH + i);
        _mm512_storeu_ps(to + i, _mm512_add_ps(_mm512_loadu_ps(to + i), rounded(v)));
      }
    }, [&](int row, int block) {
      for (int i = 0; delta && i < WIDTH && block * WIDTH + i < m.n; i += 16) delta.fetch(row, 0, block * WIDTH + i);
    });
  }

  void attention(const Block& l) {
    const int width = (d.heads + 2 * d.kv_heads) * d.head;
    const int64_t out = int64_t(d.heads) * d.head;
    {
      const Matrix& m = *matrices[l.qkv];
      const Delta delta(l.lora_qkv, mine(d.t));
      const Input in = prepare(m, delta, mine(d.x), d.hidden);
      const int ends[2] = {d.heads * d.head, (d.heads + d.kv_heads) * d.head};
      product(m, in, [&](int row, int block, const float* sums) {
        for (int i = 0; i < WIDTH && block * WIDTH + i < m.n; i += 16) {
          const int o = block * WIDTH + i, slice = (o >= ends[0]) + (o >= ends[1]);
          __m512 v = _mm512_load_ps(sums + i);
          if (delta) v = delta.add(v, row, slice, o - (slice ? ends[slice - 1] : 0));
          store(d.qkv.data + int64_t(row) * width + o, v);
        }
      }, [&](int row, int block) {
        for (int i = 0; delta && i < WIDTH && block * WIDTH + i < m.n; i += 16) {
          const int o = block * WIDTH + i, slice = (o >= ends[0]) + (o >= ends[1]);
          delta.fetch(row, slice, o - (slice ? ends[slice - 1] : 0));
        }
      });
    }
    const int items = s.rows * d.kv_heads;
    auto keep = [&](int item) {
      const int token = item / d.kv_heads, h = item % d.kv_heads;
      bf16* row = d.qkv.data + int64_t(token) * width;
      bf16* k = row + (d.heads + h) * d.head;
      remember(d, l, k, k + d.kv_heads * d.head, h, s.positions[token], s.slots[token]);
    };
    if (!s.decode)
      share(items, std::max(1, items / (8 * threads)), [&](int first, int last) {
        for (int i = first; i < last; i++) keep(i);
      });
    share(items, std::max(1, items / (32 * threads)), [&](int first, int last) {
      for (int i = first; i < last; i++) {
        if (s.decode) keep(i);
        if (s.decode && i + 1 < items) fetch(d, l, s, (i + 1) / d.kv_heads, (i + 1) % d.kv_heads);
        const int token = i / d.kv_heads;
        attend_token(d, l, s, token, i % d.kv_heads, d.qkv.data + int64_t(token) * width, d.y.data + token * out);
      }
    });
    add_to_residual(l.o, l.lora_o, d.y.data, out);
  }

  void feed_forward(const Block& l) {
    {
      const Matrix& m = *matrices[l.gate_up];  // a block: 16 of the gate, and the same 16 of the other
      const Delta delta(l.lora_gate_up, mine(d.t));
      const Input in = prepare(m, delta, mine(d.x), d.hidden);
      product(m, in, [&](int row, int block, const float* sums) {
        __m512 gate = _mm512_load_ps(sums), up = _mm512_load_ps(sums + 16);
        if (delta) gate = delta.add(gate, row, 0, block * 16), up = delta.add(up, row, 1, block * 16);
        store(d.act.data + int64_t(row) * d.inner + block * 16,
              _mm512_mul_ps(rounded(silu(rounded(gate))), rounded(up)));
      }, [&](int row, int block) {
        if (delta) delta.fetch(row, 0, block * 16), delta.fetch(row, 1, block * 16);
      });
    }
    add_to_residual(l.down, l.lora_down, d.act.data, d.inner);
  }

  void run(bf16* out) {
    share(s.rows, std::max(1, s.rows / (2 * threads)), [&](int first, int last) {
      for (int i = first; i < last; i++) {
        const bf16* row = d.embedding + int64_t(s.ids[i]) * d.hidden;
        float* to = d.residual.data + int64_t(i) * d.hidden;
        for (int k = 0; k < d.hidden; k += 16) _mm512_storeu_ps(to + k, wide(row + k));
      }
    });
    for (const Block& l : d.layers) {
      normalized(l.norm_in);
      attention(l);
      normalized(l.norm_out);
      feed_forward(l);
    }
    share(s.rows, std::max(1, s.rows / (2 * threads)), [&](int first, int last) {
      for (int i = first; i < last; i++)
        normalize(d.residual.data + int64_t(i) * d.hidden, d.norm, d.hidden, d.eps, out + int64_t(i) * d.hidden);
    });
    if (!s.logits) return;
    const Matrix& m = *matrices[d.top];
    head(*this, m, prepare(m, Delta(-1, nullptr), out, d.hidden), s.rows, s.logits, d.vocabulary, d.vocabulary);
  }
};

constexpr int PHASES = 16;  // of a layer, at most

template <class F>
void together(int threads, F&& work) {
  if (threads == 1) return work(0, 1);
#pragma omp parallel num_threads(threads)
  work(omp_get_thread_num(), omp_get_num_threads());
}

// work(all, in) in all threads, for a product that is no part of a step.
template <class F>
void alone(const Matrix& m, const bf16* x, int64_t stride, int rows, F&& work) {
  static Buffer<int8_t> q;
  static Buffer<float> scale;
  static Buffer<int32_t> sum;
  static Phases phases;
  const int groups = m.groups(), most = omp_get_max_threads();
  if (m.kind != BF16) {
    q.need(size_t(rows) * m.k), scale.need(size_t(rows) * groups), sum.need(size_t(rows) * groups);
    for (int i = 0; i < rows; i++)
      quantize(m, x + i * stride, q.data + size_t(i) * m.k, scale.data + size_t(i) * groups,
               sum.data + size_t(i) * groups);
  }
  const Input in{x, stride, q.data, scale.data, sum.data};
  phases.begin(1, most);
  together(most, [&](int thread, int threads) {
    Sharing all{phases, thread, threads};
    work(all, in);
  });
}

}  // namespace

extern "C" {

int loradock_step_available() { return 1; }

void loradock_decoder_head(int number, int matrix, int vocabulary) {
  decoders[number]->top = matrix, decoders[number]->vocabulary = vocabulary;
}

int loradock_decoder(int hidden, int heads, int kv_heads, int head, int inner, int rotary, float eps, float scale,
                     const bf16* embedding, const bf16* cos_sin, const bf16* norm) {
  if (hidden % 16 || inner % 16 || rotary % 32 || rotary > head || heads % kv_heads) return -1;
  if (head != 32 && head != 64 && head != 96 && head != 128) return -1;
  std::unique_ptr<Decoder> d(new Decoder{});
  d->hidden = hidden, d->heads = heads, d->kv_heads = kv_heads, d->head = head, d->inner = inner, d->rotary = rotary;
  d->eps = eps, d->scale = scale, d->embedding = embedding, d->cos_sin = cos_sin, d->norm = norm;
  d->threads = omp_get_max_threads();
  decoders.push_back(std::move(d));
  return int(decoders.size()) - 1;
}

void loradock_decoder_layer(int number, const int* matrix, const int* lora, const bf16* norm_in, const bf16* norm_out,
                            const bf16* norm_q, const bf16* norm_k) {
  decoders[number]->layers.push_back({matrix[0], matrix[1], matrix[2], matrix[3], lora[0], lora[1], lora[2], lora[3],
                                      norm_in, norm_out, norm_q, norm_k, nullptr});
}

void loradock_decoder_cache(int number, bf16* const* caches, int block_size, int64_t block, int64_t head) {
  Decoder& d = *decoders[number];
  for (size_t i = 0; i < d.layers.size(); i++) d.layers[i].cache = caches[i];
  d.block_size = block_size, d.cache_block = block, d.cache_head = head;
}

// One step: ids, positions and cache slots of `rows` tokens, of which request r has those from starts[r] to starts[r + 1].
// out: [rows, hidden], normalized. logits: null, or [rows, vocabulary]. Not 0: the adapters' plan is not this step's.
int loradock_step(int number, const int32_t* ids, const int64_t* positions, const int64_t* slots, int rows,
                  const int32_t* starts, const int32_t* table, int64_t table_stride, int requests, bf16* out,
                  float* logits) {
  Decoder& d = *decoders[number];
  const Step s{ids, table, positions, slots, table_stride, rows, requests, rows == requests, logits};
  const size_t n = rows;
  size_t wide = std::max({d.hidden, d.inner, d.heads * d.head}), ranks = 0;
  size_t groups = d.top < 0 ? 1 : matrices[d.top]->groups();
  for (const Block& l : d.layers) {
    for (int m : {l.qkv, l.o, l.gate_up, l.down})
      groups = std::max(groups, size_t(matrices[m]->groups()));
    for (int a : {l.lora_qkv, l.lora_o, l.lora_gate_up, l.lora_down}) {
      if (a < 0) continue;
      if (!layers[a]->plan->chunks.empty() && layers[a]->plan->rows != rows) return 1;
      ranks = std::max(ranks, layers[a]->slices.size() * ((layers[a]->max_rank + 1) / 2 * 2));
    }
  }
  d.residual.need(n * d.hidden);
  d.x.need(std::max(n, size_t(ALONE)) * d.threads * d.hidden);
  d.qkv.need(n * (d.heads + 2 * d.kv_heads) * d.head);
  d.y.need(n * d.heads * d.head);
  d.act.need(n * d.inner);
  d.t.need(std::max(n, size_t(ALONE)) * d.threads * (ranks + 1));
  d.q.need(std::max(n, size_t(ALONE)) * d.threads * wide);
  d.q_scale.need(std::max(n, size_t(ALONE)) * d.threads * groups);
  d.q_sum.need(std::max(n, size_t(ALONE)) * d.threads * groups);
  d.request.need(n);
  for (int r = 0; r < requests; r++)
    for (int i = starts[r]; i < starts[r + 1]; i++) d.request.data[i] = r;
  d.phases.begin(PHASES * int(d.layers.size() + 1), d.threads);
  together(d.threads, [&](int thread, int threads) { Team(d, s, thread, threads).run(out); });
  return 0;
}

// out[rows, columns] = x W^T, in float32, of W's first rows.
void loradock_logits(int number, const bf16* x, int64_t stride, int rows, float* out, int64_t out_stride, int columns) {
  const Matrix& m = *matrices[number];
  alone(m, x, stride, rows, [&](Sharing& all, const Input& in) { head(all, m, in, rows, out, out_stride, columns); });
}

// out[rows, n] = x W^T, in bfloat16: for one layer by itself.
void loradock_linear(int number, const bf16* x, int64_t stride, int rows, bf16* out) {
  const Matrix& m = *matrices[number];
  alone(m, x, stride, rows, [&](Sharing& all, const Input& in) {
    all.share(m.blocks, grain(rows), [&](int first, int last) {
      multiply(m, in, rows, first, last, [&](int row, int block, const float* sums) {
        for (int i = 0; i < WIDTH && m.output(block, i) < m.n; i += 16)
          store(out + int64_t(row) * m.n + m.output(block, i), _mm512_load_ps(sums + i));
      }, [](int, int) {});
    });
  });
}

// What vLLM does in parallel regions of their own, which cost more than a few tokens' work: where each token's K and V go,
void loradock_slots(const int32_t* starts, const int64_t* positions, const int32_t* table, int64_t stride, int64_t block,
                    int64_t* slots, int requests) {
  for (int r = 0; r < requests; r++)
    for (int i = starts[r]; i < starts[r + 1]; i++)
      slots[i] = table[r * stride + positions[i] / block] * block + positions[i] % block;
}

// and the first of a row's largest.
int64_t loradock_argmax(const float* row, int64_t n) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(row + i));
  float top = _mm512_reduce_max_ps(most);
  for (; i < n; i++) top = std::max(top, row[i]);
  const __m512 tops = _mm512_set1_ps(top);
  for (i = 0; i + 16 <= n; i += 16)
    if (const __mmask16 at = _mm512_cmp_ps_mask(_mm512_loadu_ps(row + i), tops, _CMP_EQ_OQ)) return i + __builtin_ctz(at);
  for (; i < n; i++)
    if (row[i] == top) return i;
  return 0;
}
}

#else

extern "C" int loradock_step_available() { return 0; }

#endif
