// A whole step of a dense decoder in one call: embedding, every layer with its adapters, attention over vLLM's paged cache.
//
// Weights are packed (`matrix.h`). One parallel region spans the step. Its phases are shared out piece by piece, and end
// with their last piece and not with their last thread: on a small machine something else may have a thread's core for a while.
// The residual stays in float32; what vLLM rounds to bfloat16 before a product or into the cache is rounded here too.

#include "products.h"

#ifdef STEP

#include <atomic>
#include <optional>
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

// What becomes of a row before its weight; `weight` is null where there is no norm.
enum Normal { PLAIN = 0, ROUNDED = 1, CENTERED = 2 };  // nothing, rounded to bfloat16, its mean taken off (and not rounded)

struct Norm {
  const float* weight;
  float eps;
  int kind;
};

enum Activation { SILU = 0, GELU_TANH = 1 };

// The structures below are architecture.py's, field by field.

struct Block {
  int qkv, o, gate_up, down;          // matrices
  int lora_qkv, lora_o, lora_gate_up, lora_down;  // layers of kernels.cpp, or -1
  Norm before_attention, after_attention, before_mlp, after_mlp, q, k;
  int head_norms;       // elements from a head's weights in q and k to the next one's: 0 where all heads have the same
  int whole_norms;      // q and k are normalized over all heads together
  const bf16* cos_sin;  // [positions][rotary]: cosines, then sines
  int rotary;           // the first elements of a head that are turned; 0: none
  int interleaved;      // pairs are neighbours, not halves
  int window;           // a token sees so many, itself included; 0: all before it
  float scale, cap;     // of attention's scores; 0: no cap
};

struct Shape {
  int hidden, heads, kv_heads, head, inner;
  int activation;
  int parallel;                // attention and MLP get the same input
  float embedding_by, residual_by;  // what embeddings, and what is added to the residual, are multiplied by
  float logits_cap, logits_by;
  const bf16* embedding;  // null: it is packed
  Norm last;
};

// One of the layers' caches: their block tables and slots may differ, where some layers see a window alone.
struct Group {
  const int32_t* table;
  int64_t stride;
  const int64_t* slots;
};

// Tokens of one request that follow one another: some of its prompt, or one of its answer.
struct Tokens {
  int first, count;
  bool prompt;
};

struct Decoder : Shape {
  int block_size, threads;
  int64_t cache_block, cache_head;  // elements from one block, and one head of a block, to the next
  std::vector<Block> layers;
  std::vector<bf16*> cache;  // of each layer
  std::vector<int> group;    // of each layer
  std::vector<Tokens> runs;  // of a step
  std::vector<int> order, place;  // of `Step`
  bool after = false;        // what is added to the residual is normalized before
  int top = -1;        // the output layer's matrix
  int table = -1;      // the embedding's, where it is packed
  int vocabulary = 0;  // its first outputs; the rest is padding
  Phases phases;
  Buffer<float> residual, added, whole, t;
  Buffer<bf16> x, qkv, y, act;
  Buffer<uint8_t> panels;
  Buffer<int32_t> request;
};

std::vector<std::unique_ptr<Decoder>> decoders;

// put(i, v) for each 16 of the normalized row.
template <class Put>
inline void normalized(const float* x, const Norm& norm, int n, Put&& put) {
  if (!norm.weight) {
    for (int i = 0; i < n; i += 16) put(i, load(x + i));
    return;
  }
  Floats mean = spread(0.f), squares = mean;
  if (norm.kind == CENTERED) {
    for (int i = 0; i < n; i += 16) mean = mean + load(x + i);
    mean = spread(sum_of(mean) / n);
  }
  for (int i = 0; i < n; i += 16) {
    const Floats v = load(x + i) - mean;
    squares = fma(v, v, squares);
  }
  const Floats by = spread(1.f / std::sqrt(sum_of(squares) / n + norm.eps));
  for (int i = 0; i < n; i += 16) {
    Floats v = (load(x + i) - mean) * by;
    if (norm.kind == ROUNDED) v = rounded(v);
    put(i, v * load(norm.weight + i));
  }
}

void normalize(const float* x, const Norm& norm, int n, bf16* out) {
  normalized(x, norm, n, [&](int i, Floats v) { store(out + i, v); });
}

inline Floats exponential(Floats x) {
  // 2^n times a polynomial for the rest; relative error below 2e-7.
  x = max(min(x, spread(88.f)), spread(-87.f));
  const Floats n = nearest(x * spread(1.44269504f));
  Floats r = fnma(n, spread(0.693145752f), x);
  r = fnma(n, spread(1.42860677e-6f), r);
  Floats p = spread(1.9875691e-4f);
  p = fma(p, r, spread(1.3981999e-3f));
  p = fma(p, r, spread(8.3334519e-3f));
  p = fma(p, r, spread(4.1665795e-2f));
  p = fma(p, r, spread(1.6666665e-1f));
  p = fma(p, r, spread(0.5f));
  p = fma(p * r, r, r + spread(1.f));
  return times_power(p, n);
}

// For probabilities that are rounded to bfloat16: relative error below 5e-6. x is at most 0, and not infinite.
inline Floats probable(Floats x) {
  x = x * spread(1.44269504f);
  const Floats n = nearest(x), r = x - n;
  Floats p = spread(9.60048e-3f);
  p = fma(p, r, spread(5.591688e-2f));
  p = fma(p, r, spread(2.4023717e-1f));
  p = fma(p, r, spread(6.9312201e-1f));
  return times_power(fma(p, r, spread(1.f)), n);
}

// x / (1 + exp(-y))
inline Floats gated(Floats x, Floats y) { return x / (spread(1.f) + exponential(spread(0.f) - y)); }

inline Floats activated(Floats v, int activation) {
  if (activation == SILU) return gated(v, v);
  // x (1 + tanh(u)) / 2 = x / (1 + exp(-2u))
  const Floats cube = v * v * v;
  const Floats u = fma(spread(0.044715f), cube, v);
  return gated(v, spread(2 * 0.797884561f) * u);
}

// cap tanh(v / cap)
inline Floats capped(Floats v, float cap) {
  const Floats tanh = gated(spread(2.f), v * spread(2 / cap)) - spread(1.f);
  return tanh * spread(cap);
}

// ---- adapters --------------------------------------------------------------------------------------------------------

// The sums of 16 outputs of neighbouring rows with the same adapter, and what it adds to them: its pairs of ranks one by one,
// or its fours in 8 bits. What they are then is multiplied with its gains, but for the bias in it.
template <int M, bool EIGHT, bool SCALES>
void expand(const char* b_at, int parts, const char* t_at, int64_t t_row, float* sums, const bf16* gains, const float* bias) {
  const Floats by = SCALES ? wide(gains) : spread(0.f), apart = SCALES && bias ? load(bias) : spread(0.f);
  auto finish = [&](Floats v) { return SCALES ? fma(v - apart, by, v) : v; };
  if constexpr (EIGHT) return Fast::expand8<M, WIDTH>(b_at, parts, t_at, t_row, sums, finish);
  const bf16* b = reinterpret_cast<const bf16*>(b_at);
  const auto* t = reinterpret_cast<const bf16*>(t_at);
  const int64_t stride = t_row / int64_t(sizeof(*t));
  Floats v[M];
#pragma GCC unroll 12
  for (int i = 0; i < M; i++) v[i] = load(sums + i * WIDTH);
  for (int k = 0; k < parts; k++) {
    const Ints ranks = load64(b + size_t(k) * 32);
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) v[i] = dot2(v[i], ranks, pair_at(t + i * stride + 2 * k));
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; i++) store(sums + i * WIDTH, finish(v[i]));
}

typedef void (*Expand)(const char*, int, const char*, int64_t, float*, const bf16*, const float*);
// Of 1, 2, ... rows.
template <bool EIGHT, bool SCALES, int... I>
const Expand* expands(std::integer_sequence<int, I...>) {
  static const Expand all[sizeof...(I)] = {expand<I + 1, EIGHT, SCALES>...};
  return all;
}
template <bool EIGHT, bool SCALES>
const Expand* expands() { return expands<EIGHT, SCALES>(std::make_integer_sequence<int, TILE>()); }
const Expand* const EXPANDS[2][2] = {
    {expands<false, false>(), expands<false, true>()}, {expands<true, false>(), expands<true, true>()}};

// One module's adapters in this step: t = x A^T for the tokens that have one, and what to add to 16 outputs of a token.
struct Delta {
  const Layer* layer = nullptr;
  const Plan* plan = nullptr;
  char* t = nullptr;
  int64_t t_row = 0;

  Delta(int number, float* place) {
    if (number < 0) return;
    const Layer& it = *layers[number];
    if (it.plan->chunks.empty()) return;
    for (const Chunk& c : it.plan->chunks)
      for (const Slice& s : it.slices)
        if (s.slots[c.slot].rank) {
          layer = &it, plan = it.plan, t = reinterpret_cast<char*>(place), t_row = it.middle_row();
          return;
        }
  }

  explicit operator bool() const { return layer; }

  int pieces() const { return int(plan->chunks.size() * layer->slices.size()); }

  // The weights that a piece of the way in reads.
  const Weights& weights(int piece) const {
    const int slices = int(layer->slices.size());
    return layer->slices[piece % slices].slots[plan->chunks[piece / slices].slot];
  }
  size_t bytes(int piece) const {
    const Weights& w = weights(piece);
    const int in = layer->slices[piece % layer->slices.size()].in;
    return w.rank * (w.eight() ? size_t(in8(in)) : in * sizeof(bf16));
  }
  // Pairs of ranks, or fours in 8 bits: with 16 outputs 64 bytes each.
  static int parts(const Weights& w) { return w.eight() ? w.fours() : depth(w.rank) / 2; }

  // bytes_of_x: of the piece's tokens, and their `Bytes::owed`, where weights are in 8 bits.
  void shrink(int piece, const bf16* x, int64_t x_stride, const Bytes& bytes_of_x, const float* owed) const {
    const Chunk& c = plan->chunks[piece / layer->slices.size()];
    const size_t s = piece % layer->slices.size();
    const Weights& w = weights(piece);
    if (piece + 1 < pieces()) {  // the next one's A, likely this thread's too
      const char* next = weights(piece + 1).first();
      const size_t size = std::min(bytes(piece + 1), size_t(16384));
      for (size_t i = 0; i < size; i += 64) later(next + i);
    }
    const int32_t* tokens = plan->tokens.data() + c.begin;
    char* to = t + c.begin * t_row + layer->middle_at(s);
    if (w.eight()) return Fast::shrink8(w, layer->slices[s].in, bytes_of_x, c.end - c.begin, owed, to, t_row);
    for (int r = 0; r < w.rank; r += ROW_BLOCK)
      Fast::shrink(w, layer->slices[s].in, x, x_stride, tokens, c.end - c.begin, r, std::min(ROW_BLOCK, w.rank - r), to,
                   t_row);
  }

  // Sixteen outputs in a block: in which slice they are, and where there; -1 if they only fill the last block.
  struct Half {
    int slice, output;
  };
  inline Half half(const Matrix& m, int block, int first) const {
    int o = m.output(block, first), s = 0;
    if (o >= m.n) return {-1, 0};
    while (o >= layer->slices[s].offset + layer->slices[s].out) s++;
    return {s, o - layer->slices[s].offset};
  }

  // work(first row, last row, slot) for neighbouring rows with the same adapter, which are neighbours in t too.
  template <class F>
  inline void runs(const Input& in, int from, int to, F&& work) const {
    auto follows = [&](int i) { return plan->place[in.row(i)] == plan->place[in.row(i - 1)] + 1; };
    for (int row = from, end; row < to; row = end) {
      const int slot = plan->slot[in.row(row)];
      for (end = row + 1; end < to && plan->slot[in.row(end)] == slot && (slot < 0 || follows(end));) end++;
      if (slot >= 0) work(row, end, slot);
    }
  }

  // To the sums of rows [from, to) and a block's outputs.
  void add(const Matrix& m, const Input& in, int block, int from, int to, float* sums) const {
    if (!layer) return;
    const Half halves[2] = {half(m, block, 0), half(m, block, 16)};
    runs(in, from, to, [&](int row, int end, int slot) {
      const char* of_row = t + plan->place[in.row(row)] * t_row;
      float* to_row = sums + (row - from) * WIDTH;
      for (int side = 0; side < 2 && halves[side].slice >= 0; side++) {
        const int slice = halves[side].slice;
        const Weights& w = layer->slices[slice].slots[slot];
        const int parts = Delta::parts(w);
        if (!parts) continue;
        const int output = halves[side].output;
        const char *b = w.packed() + size_t(output / 16) * parts * 64, *from_t = of_row + layer->middle_at(slice);
        const float* bias = m.bias.data ? m.bias.data + block * WIDTH + 16 * side : nullptr;
        const bf16* gains = w.gains ? w.gains + output : nullptr;
        for (int first = row; first < end; first += TILE)
          EXPANDS[w.eight()][gains != nullptr][std::min(TILE, end - first) - 1](
              b, parts, from_t + (first - row) * t_row, t_row, to_row + (first - row) * WIDTH + 16 * side, gains, bias);
      }
    });
  }

  // What `add` will read: many adapters' pieces are too short for the processor to see them coming.
  void fetch(const Matrix& m, const Input& in, int block, int from, int to) const {
    if (!layer) return;
    for (int first = 0; first < WIDTH; first += 16) {
      const Half h = half(m, block, first);
      if (h.slice < 0) return;
      runs(in, from, to, [&](int, int, int slot) {
        const Weights& w = layer->slices[h.slice].slots[slot];
        const size_t bytes = size_t(parts(w)) * 64;
        for (size_t i = 0; i < bytes; i += 64) soon(w.packed() + h.output / 16 * bytes + i);
        if (w.gains) soon(w.gains + h.output);
      });
    }
  }
};

// ---- attention -------------------------------------------------------------------------------------------------------

struct Step {
  const int32_t* ids;
  const bf16* embedded;  // null, or their rows where an adapter changes some: [rows, hidden]
  const int64_t* positions;
  const Group* groups;
  int rows, requests;
  const Tokens* runs;  // up to QUERIES tokens each, in the step's order
  int pieces;          // how many of them there are
  bool decode;    // one token for each request, which reads no other one's
  float* logits;  // [requests, vocabulary] of each one's only token, where the head is asked for as well
  // With tiles, in a step that has both: the tokens of answers, then those of prompts; and where each token is among them.
  const int *order, *place;
  int answers;  // tokens of answers
};

// The rows of a product: those of answers, those of prompts, or both.
struct Inputs {
  Input of[2];
  int count;

  const Input* begin() const { return of; }
  const Input* end() const { return of + count; }
};

// Of 32 bfloat16: those at even and those at odd places.
inline void split(const bf16* at, Floats& even, Floats& odd) {
  const Ints v = load64(at);
  even = firsts(v), odd = seconds(v);
}

// Those at even and those at odd places come together again.
inline void join(bf16* at, Floats even, Floats odd) { store64(at, zip(narrow(even), narrow(odd))); }

// Norm, where the model has one for each head of q and k, and rotation of one head, in place.
void turn(const Decoder& d, const Block& l, bf16* v, const Norm& norm, int h, int64_t position) {
  alignas(64) float f[512];
  if (norm.weight && !l.whole_norms) {
    for (int i = 0; i < d.head; i += 16) store(f + i, wide(v + i));
    normalize(f, {norm.weight + h * l.head_norms, norm.eps, norm.kind}, d.head, v);
  }
  const int half = l.rotary / 2;
  const bf16 *cos = l.cos_sin + position * l.rotary, *sin = cos + half;
  for (int i = 0; i < half; i += 16) {
    const Floats c = wide(cos + i), s = wide(sin + i);
    Floats a, b;
    if (l.interleaved)
      split(v + 2 * i, a, b);
    else
      a = wide(v + i), b = wide(v + half + i);
    const Floats turned_a = fms(a, c, b * s), turned_b = fma(b, c, a * s);
    if (l.interleaved)
      join(v + 2 * i, turned_a, turned_b);
    else
      store(v + i, turned_a), store(v + half + i, turned_b);
  }
}

// The cache's block: K as [head, block_size], V as [block_size, head].
void remember(const Decoder& d, const Block& l, bf16* cache, bf16* k, const bf16* v, int h, int64_t position, int64_t slot) {
  turn(d, l, k, l.k, h, position);
  if (slot < 0) return;
  bf16* at = cache + slot / d.block_size * d.cache_block + h * d.cache_head;
  const int64_t in = slot % d.block_size;
  for (int i = 0; i < d.head; i++) at[int64_t(i) * d.block_size + in] = k[i];
  std::memcpy(at + int64_t(d.head) * d.block_size + in * d.head, v, d.head * sizeof(bf16));
}

// What a token attends to: keys [first, length) of one head in its request's blocks.
struct Keys {
  const bf16* cache;
  const int32_t* table;
  int first, length, head;
};

// even[g], odd[g] = the products of query g with 16 pairs of keys, which lie by column. What is attended to next is fetched.
template <int G, int HEAD>
APART void scores(const bf16* k, int64_t stride, const bf16* next, const bf16* next_v, const float (*q)[HEAD], Floats (&even)[G],
                  Floats (&odd)[G]) {
  Floats e[G], o[G];
#pragma GCC unroll 4
  for (int g = 0; g < G; g++) e[g] = o[g] = spread(0.f);
  for (int i = 0; i < HEAD; i++) {
    soon(next + i * stride);
    soon(next_v + i * 32);
    Floats ke, ko;
    split(k + i * stride, ke, ko);
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      const Floats qi = spread(q[g][i]);
      e[g] = fma(qi, ke, e[g]);
      o[g] = fma(qi, ko, o[g]);
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; g++) even[g] = e[g], odd[g] = o[g];
}

// sum[g][at ...] += the values of keys [begin, end), each times its probability; those of even keys lie in p first.
template <int G, int V, int HELD>
APART void values(const bf16* v, int begin, int end, int at, const float (*p)[32], Floats (&sum)[G][V]) {
  Floats held[G][HELD];
#pragma GCC unroll 4
  for (int g = 0; g < G; g++)
#pragma GCC unroll 16
    for (int i = 0; i < HELD; i++) held[g][i] = sum[g][at + i];
  for (int j = begin; j < end; j++) {
    Floats pj[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) pj[g] = spread(p[g][(j & 1) * 16 + j / 2]);
#pragma GCC unroll 8
    for (int i = 0; i < HELD; i += 2) {
      Floats ve, vo;
      split(v + (int64_t(j) * V + at + i) * 16, ve, vo);
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        held[g][i] = fma(pj[g], ve, held[g][i]);
        held[g][i + 1] = fma(pj[g], vo, held[g][i + 1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; g++)
#pragma GCC unroll 16
    for (int i = 0; i < HELD; i++) sum[g][at + i] = held[g][i];
}

// G query heads of one token over the keys of their one key head: softmax online, 32 keys at a time.
template <int G, int HEAD>
void attend(const Decoder& d, const Block& l, const Keys& keys, bf16* const* query, bf16* const* out) {
  alignas(64) float q[G][HEAD];
  const int length = keys.length;
  const int32_t* table = keys.table;
  const bf16* cache = keys.cache + keys.head * d.cache_head;
  const Floats scale = spread(l.scale);
#pragma GCC unroll 4
  for (int g = 0; g < G; g++)
    for (int i = 0; i < HEAD; i += 16) store(q[g] + i, wide(query[g] + i) * scale);
  constexpr int V = HEAD / 16;
  constexpr int HELD = MANY ? V : V % 4 ? 2 : 4 / G;  // of a head's V sums, so many at a time
  Floats sum[G][V];
  float most[G], total[G];
#pragma GCC unroll 4
  for (int g = 0; g < G; g++) {
    most[g] = -INFINITY, total[g] = 0;
    for (int i = 0; i < V; i++) sum[g][i] = spread(0.f);
  }
  for (int from = keys.first / 32 * 32; from < length; from += 32) {
    const bf16* k = cache + int64_t(table[from / d.block_size]) * d.cache_block;
    const bf16* v = k + int64_t(HEAD) * d.block_size + int64_t(from % d.block_size) * HEAD;
    k += from % d.block_size;
    // K lies by column: the processor does not see its next lines coming.
    const int then = std::min(from + 32, length - 1);
    const bf16* next = cache + int64_t(table[then / d.block_size]) * d.cache_block;
    const bf16* next_v = next + int64_t(HEAD) * d.block_size + int64_t(then / 32 * 32 % d.block_size) * HEAD;
    next += then / 32 * 32 % d.block_size;
    Floats even[G], odd[G];
    scores<G, HEAD>(k, d.block_size, next, next_v, q, even, odd);
    // Which of these keys are seen: not those before the window, and not those behind the last.
    const int begin = std::max(0, keys.first - from), count = std::min(32, length - from);
    const unsigned evens = range((begin + 1) / 2, (count + 1) / 2), odds = range(begin / 2, count / 2);
    const Mask in_even = chosen(evens), in_odd = chosen(odds);
    const Floats none = spread(-INFINITY);
    alignas(64) float p[G][32];
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      if (l.cap) even[g] = capped(even[g], l.cap), odd[g] = capped(odd[g], l.cap);
      const float top = largest_of(max(choose(in_even, even[g], none), choose(in_odd, odd[g], none)));
      if (top > most[g]) {
        const float by = std::exp(most[g] - top);
        for (int i = 0; i < V; i++) sum[g][i] = sum[g][i] * spread(by);
        total[g] *= by;
        most[g] = top;
      }
      const Floats m = spread(most[g]);
      const Floats pe = only(in_even, exponential(even[g] - m)), po = only(in_odd, exponential(odd[g] - m));
      total[g] += sum_of(pe + po);
      store(p[g], pe);
      store(p[g] + 16, po);
    }
    for (int at = 0; at < V; at += HELD) values<G, V, HELD>(v, begin, count, at, p, sum);
  }
  for (int g = 0; g < G; g++) {
    const Floats by = spread(1.f / total[g]);
    for (int i = 0; i < V; i += 2) join(out[g] + i * 16, sum[g][i] * by, sum[g][i + 1] * by);
  }
}

template <int HEAD>
void attend_head(const Decoder& d, const Block& l, const Keys& keys, bf16* q, bf16* out) {
  const int each = d.heads / d.kv_heads;
  constexpr int MOST = !MANY ? 2 : HEAD <= 64 ? 4 : HEAD <= 128 ? 2 : 1;  // as many sums as there are registers for
  for (int g = 0; g < each;) {
    bf16 *qs[4], *outs[4];
    const int now = std::min(MOST, each - g);
    for (int i = 0; i < now; i++) qs[i] = q + (g + i) * HEAD, outs[i] = out + (g + i) * HEAD;
    if constexpr (MOST == 4) {
      if (now == 4)
        attend<4, HEAD>(d, l, keys, qs, outs);
      else if (now == 3)
        attend<3, HEAD>(d, l, keys, qs, outs);
    }
    if constexpr (MOST >= 2)
      if (now == 2) attend<2, HEAD>(d, l, keys, qs, outs);
    if (now == 1) attend<1, HEAD>(d, l, keys, qs, outs);
    g += now;
  }
}

// ---- attention of prompts ------------------------------------------------------------------------------------------------

constexpr int QUERIES = 16;  // neighbouring tokens of a prompt that go over the keys together
constexpr int HEADS = 4;     // and so many query heads of each at most
constexpr int KEYS = 64;     // keys that they take at a time
constexpr int STRIP = 6;     // queries that are multiplied with them together,
constexpr int COLUMNS = MANY ? 4 : 1;  // and so many sixteens of them: as many sums as there are registers for
constexpr int TALL_STRIP = 16;         // queries that the processor's tiles multiply

// Some keys and values of one head, as dot products want them: pairs of a key's elements, and pairs of neighbouring values.
template <int HEAD>
struct Packed {
  alignas(64) uint32_t k[HEAD / 2][KEYS];
  alignas(64) uint32_t v[KEYS / 2][HEAD];

  // Those from `from` on, of which [first, last) may be looked at: what lies elsewhere may be anything.
  void take(const Decoder& d, const Keys& keys, int from) {
    for (int at = 0; at < KEYS; at += 32) {
      const int begin = std::max(0, keys.first - from - at), end = std::min(32, keys.length - from - at);
      for (int j = 0; j < 32 && begin >= end; j += 2) std::memset(v[(at + j) / 2], 0, sizeof(v[0]));
      if (begin >= end) continue;
      const bf16* block = keys.cache + int64_t(keys.table[(from + at) / d.block_size]) * d.cache_block + keys.head * d.cache_head;
      const int in = (from + at) % d.block_size;
      for (int i = 0; i < HEAD; i += 2)
        interleave(block + int64_t(i) * d.block_size + in, block + int64_t(i + 1) * d.block_size + in, true, true, k[i / 2] + at);
      block += int64_t(HEAD) * d.block_size + int64_t(in) * HEAD;
      for (int j = 0; j < 32; j += 2)
        for (int i = 0; i < HEAD; i += 32)
          interleave(block + j * HEAD + i, block + (j + 1) * HEAD + i, j >= begin && j < end, j + 1 >= begin && j + 1 < end,
                     v[(at + j) / 2] + i);
    }
  }

 private:
  // 32 pairs of an element of `a` and one of `b`; zeros where one is not there.
  static void interleave(const bf16* a, const bf16* b, bool has_a, bool has_b, uint32_t* out) {
    const Shorts none{};
    for (int i = 0; i < 32; i += 16) store64(out + i, zip(has_a ? load32(a + i) : none, has_b ? load32(b + i) : none));
  }
};

// Queries [of `count` tokens, `heads` of each] over all of their keys, softmax online. Probabilities are rounded to bfloat16
// before they meet the values, and so is what they add up to.
template <int HEAD>
struct Queries {
  int rows = 0, strips = 0;
  alignas(64) Element q[QUERIES * HEADS + STRIP][HEAD];
  alignas(64) bf16 tall_q[QUERIES * HEADS][HEAD];  // instead, for the processor's tiles
  alignas(64) float sum[QUERIES * HEADS + STRIP][HEAD];
  alignas(64) float total[QUERIES * HEADS + STRIP][16];
  float most[QUERIES * HEADS + STRIP];
  int first[QUERIES * HEADS + STRIP], length[QUERIES * HEADS + STRIP];
  bf16* out[QUERIES * HEADS + STRIP];

  void add(const bf16* query, bf16* to, int from, int until) {
    if (TILES)
      std::memcpy(tall_q[rows], query, sizeof(tall_q[rows]));
    else
      for (int i = 0; i < HEAD; i += 16) store(q[rows] + i, wide(query + i));
    out[rows] = to, first[rows] = from, length[rows] = until;
    rows++;
  }

  // Keys [from, first of all rows) are not there, nor are those from the longest row's length on.
  void attend(const Decoder& d, const Block& l, Keys keys) {
    const int strip_rows = TILES ? TALL_STRIP : STRIP;
    strips = (rows + strip_rows - 1) / strip_rows;
    keys.first = first[0], keys.length = length[0];
    for (int i = 0; i < rows; i++) {
      keys.first = std::min(keys.first, first[i]), keys.length = std::max(keys.length, length[i]);
      most[i] = -INFINITY;
    }
    for (int i = rows; i < strips * strip_rows; i++) {  // no query: it sees nothing
      if (TILES)
        std::memset(tall_q[i], 0, sizeof(tall_q[i]));
      else
        std::memset(q[i], 0, sizeof(q[i]));
      first[i] = length[i] = 0;
    }
    std::memset(sum, 0, sizeof(sum[0]) * strips * strip_rows);
    std::memset(total, 0, sizeof(total[0]) * strips * strip_rows);
    Packed<HEAD> packed;
    std::optional<Tiles> tiles;
    if (TILES) tiles.emplace(TALL_STRIP);
    // Always the same keys together: no answer depends on how its prompt was cut.
    for (int from = keys.first / KEYS * KEYS; from < keys.length; from += KEYS) {
      packed.take(d, keys, from);
      for (int strip = 0; strip < strips; strip++)
        if (tiles)
          meet_tall(*tiles, l, packed, from, strip * TALL_STRIP);
        else
          meet(l, packed, from, strip * STRIP);
    }
    for (int i = 0; i < rows; i++) {
      const Floats by = spread(1.f / sum_of(load(total[i])));
      for (int k = 0; k < HEAD; k += 16) store(out[i] + k, load(sum[i] + k) * by);
    }
  }

 private:
  // Which of some keys each of N queries sees, and which any of them does.
  template <int N>
  struct Seen {
    int begin[N], end[N], least = KEYS, last = 0;
    Seen(const Queries& all, int from, int row) {
      for (int i = 0; i < N; i++) {
        begin[i] = std::max(0, all.first[row + i] - from), end[i] = std::min(KEYS, all.length[row + i] - from);
        if (begin[i] < end[i]) least = std::min(least, begin[i]), last = std::max(last, end[i]);
      }
    }
  };

  void meet_tall(Tiles& tiles, const Block& l, const Packed<HEAD>& packed, int from, int row) {
    const Seen<TALL_STRIP> seen(*this, from, row);
    if (seen.least >= seen.last) return;
    alignas(64) float scores[TALL_STRIP][KEYS];
    alignas(64) bf16 p[TALL_STRIP][KEYS];
    tiles.multiply(scores[0], sizeof(scores[0]), true, tall_q[row], sizeof(tall_q[0]), packed.k, sizeof(packed.k[0]), HEAD / DEEP, KEYS);
    for (int i = 0; i < TALL_STRIP; i++) {
      const float by = soften(l, row + i, seen.begin[i], seen.end[i], scores[i], p[i]);
      for (int k = 0; k < HEAD && by != 1; k += 16) store(sum[row + i] + k, load(sum[row + i] + k) * spread(by));
    }
    tiles.multiply(sum[row], sizeof(sum[0]), false, p[0], sizeof(p[0]), packed.v, sizeof(packed.v[0]), KEYS / DEEP, HEAD);
  }

  void meet(const Block& l, const Packed<HEAD>& packed, int from, int row) {
    alignas(64) float scores[STRIP][KEYS];
    alignas(64) Element p[STRIP][KEYS];
    float by[STRIP];
    const Seen<STRIP> seen(*this, from, row);
    const int least = seen.least, last = seen.last;
    if (least >= last) return;
    score(packed, row, scores);
    for (int i = 0; i < STRIP; i++) by[i] = soften(l, row + i, seen.begin[i], seen.end[i], scores[i], p[i]);
    constexpr int REST = HEAD / 16 % COLUMNS, WHOLE = HEAD - 16 * REST;
    for (int at = 0; at < WHOLE; at += 16 * COLUMNS) gather<COLUMNS>(packed, row, at, least / 2, (last + 1) / 2, p, by);
    if constexpr (REST) gather<REST>(packed, row, WHOLE, least / 2, (last + 1) / 2, p, by);
  }

  void score(const Packed<HEAD>& packed, int row, float (*scores)[KEYS]) const {
    for (int column = 0; column < KEYS / 16; column += COLUMNS) {
      Floats s[STRIP][COLUMNS];
      fill(s, spread(0.f));
      for (int at = 0; at < HEAD; at += 2) {
        Ints k[COLUMNS];
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; j++) k[j] = load64(packed.k[at / 2] + 16 * (column + j));
        dot2(s, k, q[row] + at, HEAD);
      }
#pragma GCC unroll 6
      for (int i = 0; i < STRIP; i++)
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; j++) store(scores[i] + 16 * (column + j), s[i][j]);
    }
  }

  // The probabilities of a query's scores; what its sum so far is to be multiplied by comes back.
  template <class P>
  float soften(const Block& l, int row, int begin, int end, const float* scores, P* p) {
    if (begin >= end) {
      std::memset(p, 0, sizeof(P) * KEYS);
      return 1;
    }
    const uint64_t seen = ~uint64_t(0) << begin & ~uint64_t(0) >> (KEYS - end);
    const Floats scale = spread(l.scale), none = spread(-INFINITY);
    Floats s[4], highest = none;
    for (int j = 0; j < 4; j++) {
      s[j] = load(scores + 16 * j) * scale;
      if (l.cap) s[j] = capped(s[j], l.cap);
      s[j] = choose(chosen(uint16_t(seen >> 16 * j)), s[j], none);
      highest = max(highest, s[j]);
    }
    const float top = largest_of(highest);
    float by = 1;
    if (top > most[row]) by = std::exp(most[row] - top), most[row] = top;
    const Floats m = spread(most[row]);
    Floats all = load(total[row]) * spread(by);
    for (int j = 0; j < 4; j++) s[j] = only(chosen(uint16_t(seen >> 16 * j)), probable(s[j] - m));
    for (int j = 0; j < 4; j += 2) all = keep(s[j], s[j + 1], all, p + 16 * j);
    store(total[row], all);
    return by;
  }

  // 32 probabilities, rounded; added to a sum of them.
  static Floats keep(Floats a, Floats b, Floats all, bf16* p) {
    const Ints two = both(narrow(a), narrow(b));
    store64(p, two);
    return dot2(all, two, spread(0x3f803f80));
  }
  static Floats keep(Floats a, Floats b, Floats all, float* p) {
    a = rounded(a), b = rounded(b);
    store(p, a), store(p + 16, b);
    return all + (a + b);
  }

  // What the values of these keys add to 16 N elements of the sums.
  template <int N>
  void gather(const Packed<HEAD>& packed, int row, int at, int begin, int end, const Element (*p)[KEYS], const float* by) {
    Floats s[STRIP][N];
#pragma GCC unroll 6
    for (int i = 0; i < STRIP; i++)
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) s[i][j] = load(sum[row + i] + at + 16 * j) * spread(by[i]);
    for (int two = begin; two < end; two++) {
      Ints v[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) v[j] = load64(packed.v[two] + at + 16 * j);
      dot2(s, v, p[0] + 2 * two, KEYS);
    }
#pragma GCC unroll 6
    for (int i = 0; i < STRIP; i++)
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) store(sum[row + i] + at + 16 * j, s[i][j]);
  }
};

// Where a token's keys of head h are.
inline Keys keys_of(const Decoder& d, int layer, const Step& s, int token, int h) {
  const Group& group = s.groups[d.group[layer]];
  const int length = int(s.positions[token]) + 1, window = d.layers[layer].window;
  return {d.cache[layer], group.table + d.request.data[token] * group.stride, window ? std::max(0, length - window) : 0,
          length, h};
}

template <int HEAD>
void attend_token(const Decoder& d, int layer, const Step& s, int token, int h, bf16* qkv, bf16* out) {
  const Block& l = d.layers[layer];
  const int each = d.heads / d.kv_heads;
  bf16* q = qkv + h * each * HEAD;
  for (int g = 0; g < each; g++) turn(d, l, q + g * HEAD, l.q, h * each + g, s.positions[token]);
  attend_head<HEAD>(d, l, keys_of(d, layer, s, token, h), q, out + h * each * HEAD);
}

// Neighbouring tokens of one request; `qkv` and `out` are the first one's.
template <int HEAD>
void attend_tokens(const Decoder& d, int layer, const Step& s, Tokens tokens, int h, bf16* qkv, bf16* out) {
  const int width = (d.heads + 2 * d.kv_heads) * HEAD, all = d.heads * HEAD;
  // Which of both it is never follows from what is beside a token: they round differently.
  if (!tokens.prompt) return attend_token<HEAD>(d, layer, s, tokens.first, h, qkv, out);
  const Block& l = d.layers[layer];
  const int each = d.heads / d.kv_heads;
  for (int begin = 0; begin < each; begin += HEADS) {
    Queries<HEAD> queries;
    for (int i = 0; i < tokens.count; i++) {
      const Keys keys = keys_of(d, layer, s, tokens.first + i, h);
      for (int g = h * each + begin; g < h * each + std::min(each, begin + HEADS); g++) {
        bf16* q = qkv + int64_t(i) * width + g * HEAD;
        turn(d, l, q, l.q, g, s.positions[tokens.first + i]);
        queries.add(q, out + int64_t(i) * all + g * HEAD, keys.first, keys.length);
      }
    }
    queries.attend(d, l, keys_of(d, layer, s, tokens.first, h));
  }
}

void attend_tokens(const Decoder& d, int layer, const Step& s, Tokens tokens, int h, bf16* qkv, bf16* out) {
  if (d.head == 64)
    attend_tokens<64>(d, layer, s, tokens, h, qkv, out);
  else if (d.head == 128)
    attend_tokens<128>(d, layer, s, tokens, h, qkv, out);
  else if (d.head == 96)
    attend_tokens<96>(d, layer, s, tokens, h, qkv, out);
  else if (d.head == 256)
    attend_tokens<256>(d, layer, s, tokens, h, qkv, out);
  else
    attend_tokens<32>(d, layer, s, tokens, h, qkv, out);
}

// The first keys and values of what is attended next.
void fetch(const Decoder& d, int layer, const Step& s, int token, int h) {
  const Keys keys = keys_of(d, layer, s, token, h);
  const int from = keys.first / 32 * 32;
  const bf16* k = keys.cache + int64_t(keys.table[from / d.block_size]) * d.cache_block + h * d.cache_head;
  const bf16* v = k + int64_t(d.head) * d.block_size + int64_t(from % d.block_size) * d.head;
  k += from % d.block_size;
  for (int i = 0; i < d.head; i++) {
    soon(k + int64_t(i) * d.block_size);
    soon(v + i * 32);
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
        relax();
      else
        sched_yield();
    }
  }
};

// Blocks in one piece: with many rows several, so that the rows pass the cache less often.
inline int grain(int rows, bool tall) { return tall ? TALL_BLOCKS : rows > ROWS ? 6 : rows > 4 ? 1 : 2; }

// Logits in float32, as vLLM's sampler wants them. vLLM's own are rounded to bfloat16 before: the two likeliest tokens are
// then often equal, and which one greedy decoding takes is a matter of their numbers.
// vLLM pads the vocabulary to a multiple of 64: only the first `columns` outputs are stored, there is no room for more.
void head(Sharing& all, const Matrix& m, const Input& in, float* out, int64_t stride, int columns, float cap, float by) {
  auto scaled = [&](Floats v) {
    if (cap) v = capped(v, cap);
    return by == 1 ? v : v * spread(by);
  };
  all.share((columns + WIDTH - 1) / WIDTH, in.rows > ROWS ? 6 : 8, [&](int first, int last) {
    multiply(m, in, first, last, [&](int row, int block, const float* sums) {
      float* to = out + row * stride + block * WIDTH;
      for (int i = 0, left = columns - block * WIDTH; i < WIDTH && left > 0; i += 16, left -= 16)
        store(to + i, scaled(load(sums + i)), left);
    });
  });
}

struct Team : Sharing {
  Decoder& d;
  const Step& s;

  Team(Decoder& d, const Step& s, int thread, int threads) : Sharing{d.phases, thread, threads}, d(d), s(s) {}

  // Not where attention and MLP get the same input: a thread that comes late would read it from a residual that others
  // have added to meanwhile. Elsewhere what it reads then is for a product that is done.
  bool alone() const { return s.rows <= ALONE && !d.parallel; }

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

  // To the residual of row i: what the last product left, normalized.
  void settle(int i, const Norm& norm) {
    float* to = d.residual.data + int64_t(i) * d.hidden;
    const Floats by = spread(d.residual_by);
    ::normalized(d.added.data + int64_t(i) * d.hidden, norm, d.hidden, [&](int k, Floats v) {
      v = rounded(v);
      if (d.residual_by != 1) v = rounded(v * by);
      store(to + k, load(to + k) + v);
    });
  }

  // The next product's input: the residual, normalized, once what was left of the last product is in it.
  void normalized(const Norm& left, const Norm& norm) {
    bf16* x = mine(d.x);
    const bool before = left.weight && alone();  // the residual is everybody's
    if (before) settled(left);
    rows([&](int first, int last) {
      for (int i = first; i < last; i++) {
        if (left.weight && !before) settle(i, left);
        normalize(d.residual.data + int64_t(i) * d.hidden, norm, d.hidden, x + int64_t(i) * d.hidden);
      }
    });
  }

  void settled(const Norm& left) {
    share(s.rows, std::max(1, s.rows / (8 * threads)), [&](int first, int last) {
      for (int i = first; i < last; i++) settle(i, left);
    });
  }

  // The adapters' part of the way in, and int8 if the matrix wants them. Adapters in 8 bits take these: a chunk's rows are
  // converted before it is multiplied.
  Inputs prepare(const Matrix& m, const Delta& delta, const bf16* x, int64_t stride) {
    Inputs all_rows{{{x, stride, mine(d.panels), s.rows, nullptr, s.answers == 0}, {}}, 1};
    if (s.order) {
      uint8_t* panels = all_rows.of[0].panels;
      all_rows.of[0] = {x, stride, panels, s.answers, s.order, false};
      all_rows.of[1] = {x, stride, panels + s.answers * Input::row_bytes(m), s.rows - s.answers, s.order + s.answers, true};
      all_rows.count = 2;
    }
    return prepare(m, delta, all_rows);
  }

  Inputs prepare(const Matrix& m, const Delta& delta, const Inputs& inputs) {
    const bf16* x = inputs.of[0].x;
    const int64_t stride = inputs.of[0].stride;
    // work(its rows, its number in them) for a token.
    auto of_token = [&](int token, auto&& work) {
      const int at = s.order ? s.place[token] : token;
      const bool second = inputs.count == 2 && at >= s.answers;
      work(inputs.of[second], at - second * s.answers);
    };
    const bool eight = delta && delta.layer->eight;
    const int slices = delta ? int(delta.layer->slices.size()) : 0;
    const int shrinks = delta ? delta.pieces() / (eight ? slices : 1) : 0;
    const bool any = std::any_of(inputs.begin(), inputs.end(), [&](const Input& in) { return in.converts(m); });
    const int converts = any ? s.rows : 0;
    auto work = [&](int first, int last) {
      for (int i = first; i < last; i++)
        if (i >= shrinks) {
          if (!eight || delta.plan->slot[i - shrinks] < 0)
            of_token(i - shrinks, [&](const Input& in, int row) {
              if (in.converts(m)) convert(m, in, row);
            });
        } else if (eight) {
          static thread_local Rows8 rows;
          const Chunk& c = delta.plan->chunks[i];
          const Bytes bytes = rows.room(c.end - c.begin, m.k, m.group, m.zero());
          float owed[CHUNK];
          for (int at = 0; at < c.end - c.begin; at++) {
            of_token(delta.plan->tokens[c.begin + at], [&](const Input& in, int row) { convert(m, in, row, rows, at); });
            owed[at] = bytes.owed(at);
          }
          for (int p = i * slices; p < (i + 1) * slices; p++) delta.shrink(p, x, stride, bytes, owed);
        } else {
          delta.shrink(i, x, stride, {}, nullptr);
        }
    };
    const int all = shrinks + converts;
    if (all && alone())
      work(0, all);
    else if (all)
      share(all, std::max(1, all / (8 * threads)), work);
    return inputs;
  }

  // x times a matrix and its adapters.
  template <class Out>
  void product(int number, int lora, const bf16* x, int64_t stride, Out&& out) {
    const Matrix& m = *matrices[number];
    const Delta delta(lora, mine(d.t));
    const Inputs inputs = prepare(m, delta, x, stride);
    const bool tall = std::any_of(inputs.begin(), inputs.end(), [&](const Input& in) { return in.tall(m); });
    share(m.blocks, grain(s.rows, tall), [&](int first, int last) {
      for (const Input& in : inputs) multiply(m, in, first, last, out, delta);
    });
  }

  // A product onto the residual; where it is normalized before, `settle` brings it there.
  void add_to_residual(int number, int lora, const bf16* x, int64_t stride) {
    const Matrix& m = *matrices[number];
    const Floats by = spread(d.residual_by);
    product(number, lora, x, stride, [&](int row, int block, const float* sums) {
      float* to = (d.after ? d.added : d.residual).data + int64_t(row) * d.hidden + block * WIDTH;
      for (int i = 0; i < WIDTH && block * WIDTH + i < m.n; i += 16) {
        Floats v = rounded(load(sums + i));
        if (!d.after) {
          if (d.residual_by != 1) v = rounded(v * by);
          v = load(to + i) + v;
        }
        store(to + i, v);
      }
    });
  }

  // Queries and keys of a row, each over all of its heads.
  void normalize_whole(const Block& l, bf16* row) {
    const int ends[3] = {0, d.heads * d.head, (d.heads + d.kv_heads) * d.head};
    for (int part = 0; part < 2; part++) {
      bf16* v = row + ends[part];
      const int n = ends[part + 1] - ends[part];
      float* f = d.whole.data + (int64_t(thread) * d.heads) * d.head;
      for (int i = 0; i < n; i += 16) store(f + i, wide(v + i));
      normalize(f, part ? l.k : l.q, n, v);
    }
  }

  void attention(int layer) {
    const Block& l = d.layers[layer];
    const int width = (d.heads + 2 * d.kv_heads) * d.head;
    const int64_t out = int64_t(d.heads) * d.head;
    product(l.qkv, l.lora_qkv, mine(d.x), d.hidden, [&](int row, int block, const float* sums) {
      for (int i = 0; i < WIDTH && block * WIDTH + i < width; i += 16)
        store(d.qkv.data + int64_t(row) * width + block * WIDTH + i, load(sums + i));
    });
    if (l.whole_norms)
      share(s.rows, std::max(1, s.rows / (8 * threads)), [&](int first, int last) {
        for (int i = first; i < last; i++) normalize_whole(l, d.qkv.data + int64_t(i) * width);
      });
    const int64_t* slots = s.groups[d.group[layer]].slots;
    const int items = s.rows * d.kv_heads;
    auto keep = [&](int item) {
      const int token = item / d.kv_heads, h = item % d.kv_heads;
      bf16* row = d.qkv.data + int64_t(token) * width;
      bf16* k = row + (d.heads + h) * d.head;
      remember(d, l, d.cache[layer], k, k + d.kv_heads * d.head, h, s.positions[token], slots[token]);
    };
    if (!s.decode)
      share(items, std::max(1, items / (8 * threads)), [&](int first, int last) {
        for (int i = first; i < last; i++) keep(i);
      });
    const int attends = s.pieces * d.kv_heads;
    share(attends, std::max(1, attends / (32 * threads)), [&](int first, int last) {
      for (int i = first; i < last; i++) {
        if (s.decode) keep(i);
        if (s.decode && i + 1 < attends) fetch(d, layer, s, (i + 1) / d.kv_heads, (i + 1) % d.kv_heads);
        const Tokens tokens = s.runs[i / d.kv_heads];
        attend_tokens(d, layer, s, tokens, i % d.kv_heads, d.qkv.data + int64_t(tokens.first) * width,
                      d.y.data + tokens.first * out);
      }
    });
    add_to_residual(l.o, l.lora_o, d.y.data, out);
  }

  void feed_forward(const Block& l) {
    // A block: 16 of the gate, and the same 16 of the other.
    product(l.gate_up, l.lora_gate_up, mine(d.x), d.hidden, [&](int row, int block, const float* sums) {
      const Floats gate = load(sums), up = load(sums + 16);
      store(d.act.data + int64_t(row) * d.inner + block * 16, rounded(activated(rounded(gate), d.activation)) * rounded(up));
    });
    add_to_residual(l.down, l.lora_down, d.act.data, d.inner);
  }

  void embed(int i) {
    const bf16* row = s.embedded ? s.embedded + int64_t(i) * d.hidden : d.embedding + int64_t(s.ids[i]) * d.hidden;
    if (!s.embedded && !d.embedding) {
      bf16* unpacked = d.x.data + int64_t(i) * d.hidden;
      unpack(*matrices[d.table], s.ids[i], [&](int k, uint32_t two) { std::memcpy(unpacked + k, &two, 4); });
      row = unpacked;
    }
    float* to = d.residual.data + int64_t(i) * d.hidden;
    const Floats by = spread(d.embedding_by);
    for (int k = 0; k < d.hidden; k += 16)
      store(to + k, d.embedding_by == 1 ? wide(row + k) : rounded(wide(row + k) * by));
  }

  void run(bf16* out) {
    share(s.rows, std::max(1, s.rows / (2 * threads)), [&](int first, int last) {
      for (int i = first; i < last; i++) embed(i);
    });
    Norm left{};  // of what the last product has added
    for (int layer = 0; layer < int(d.layers.size()); layer++) {
      const Block& l = d.layers[layer];
      normalized(left, l.before_attention);
      attention(layer);
      if (!d.parallel) normalized(l.after_attention, l.before_mlp);
      feed_forward(l);
      left = l.after_mlp;
    }
    if (left.weight) settled(left);
    share(s.rows, std::max(1, s.rows / (2 * threads)), [&](int first, int last) {
      for (int i = first; i < last; i++)
        normalize(d.residual.data + int64_t(i) * d.hidden, d.last, d.hidden, out + int64_t(i) * d.hidden);
    });
    if (!s.logits) return;
    const Matrix& m = *matrices[d.top];
    const Inputs plain{{{out, d.hidden, mine(d.panels), s.rows}, {}}, 1};  // whatever a token was, what comes next is an answer
    head(*this, m, prepare(m, Delta(-1, nullptr), plain).of[0], s.logits, d.vocabulary, d.vocabulary, d.logits_cap,
         d.logits_by);
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
void alone(const Matrix& m, const bf16* x, int64_t stride, int rows, bool prompts, F&& work) {
  static Buffer<uint8_t> panels;
  static Phases phases;
  const int most = omp_get_max_threads();
  Input in{x, stride, nullptr, rows, nullptr, prompts};
  if (in.converts(m)) panels.need(rows * Input::row_bytes(m)), in.panels = panels.data;
  phases.begin(2, most);
  together(most, [&](int thread, int threads) {
    Sharing all{phases, thread, threads};
    if (in.converts(m))
      all.share(rows, std::max(1, rows / (8 * threads)), [&](int first, int last) {
        for (int i = first; i < last; i++) convert(m, in, i);
      });
    work(all, in);
  });
}

}  // namespace

extern "C" {

// What this build computes a step with; nothing where it computes none.
const char* loradock_instructions() {
  static const std::string all = std::string(INSTRUCTIONS) + (TILES ? " AMX" : "");
  return all.c_str();
}

// table: the embedding's matrix, where it is packed.
void loradock_decoder_head(int number, int matrix, int vocabulary, int table) {
  Decoder& d = *decoders[number];
  d.top = matrix, d.vocabulary = vocabulary, d.table = table;
}

int loradock_decoder(const Shape* shape) {
  const Shape& it = *shape;
  if (it.hidden % 16 || it.inner % 16 || it.heads % it.kv_heads) return -1;
  if (it.head != 32 && it.head != 64 && it.head != 96 && it.head != 128 && it.head != 256) return -1;
  std::unique_ptr<Decoder> d(new Decoder{});
  static_cast<Shape&>(*d) = it;
  d->threads = omp_get_max_threads();
  decoders.push_back(std::move(d));
  return int(decoders.size()) - 1;
}

// -1: its rotation is of a size that is not known.
int loradock_decoder_layer(int number, const Block* layer) {
  Decoder& d = *decoders[number];
  if (layer->rotary % 32 || layer->rotary > d.head) return -1;
  d.layers.push_back(*layer);
  d.after = layer->after_mlp.weight;
  return 0;
}

// Of each layer: where its cache is, and which of a step's groups it belongs to.
void loradock_decoder_cache(int number, bf16* const* caches, const int* groups, int block_size, int64_t block, int64_t head) {
  Decoder& d = *decoders[number];
  d.cache.assign(caches, caches + d.layers.size());
  d.group.assign(groups, groups + d.layers.size());
  d.block_size = block_size, d.cache_block = block, d.cache_head = head;
}

// One step: ids and positions of `rows` tokens, of which request r has those from starts[r] to starts[r + 1]. Its prompt ends
// at position prompts[r]; what comes then are its answer and drafts of it. embedded: null, or the rows of `ids`.
// out: [rows, hidden], normalized. logits: null, or [rows, vocabulary]. Not 0: the adapters' plan is not this step's.
int loradock_step(int number, const int32_t* ids, const bf16* embedded, const int64_t* positions, const Group* groups, int rows,
                  const int32_t* starts, const int32_t* prompts, int requests, bf16* out, float* logits) {
  Decoder& d = *decoders[number];
  bool decode = rows == requests;
  // vLLM shares a block from the step on that fills it: who has the same prompt may read it in this very step.
  for (int i = 0; rows > 1 && decode && i < rows; i++) decode = (positions[i] + 1) % d.block_size;
  std::vector<Tokens>& runs = d.runs;
  runs.clear();
  for (int r = 0; r < requests; r++) {
    const int first = starts[r], end = starts[r + 1];
    const int answer = int(std::clamp<int64_t>(first + prompts[r] - positions[first], first, end));
    for (int i = first; i < answer; i += QUERIES) runs.push_back({i, std::min(QUERIES, answer - i), true});
    for (int i = answer; i < end; i++) runs.push_back({i, 1, false});
  }
  int answers = 0;
  for (const Tokens& of : runs) answers += of.prompt ? 0 : of.count;
  const bool both = TILES && answers && answers < rows;
  if (both) {
    d.order.resize(rows), d.place.resize(rows);
    int next[2] = {0, answers};  // of answers, and of prompts
    for (const Tokens& of : runs)
      for (int i = of.first; i < of.first + of.count; i++) d.order[d.place[i] = next[of.prompt]++] = i;
  }
  const Step s{ids,    embedded, positions, groups, rows, requests, runs.data(), int(runs.size()), decode, logits,
               both ? d.order.data() : nullptr, d.place.data(), answers};
  const size_t n = rows;
  auto panel_of = [](int m) { return Input::may_convert(*matrices[m]) ? Input::row_bytes(*matrices[m]) : 0; };
  size_t ranks = 0, panel = d.top < 0 ? 0 : panel_of(d.top);
  bool whole = false;
  for (const Block& l : d.layers) {
    whole |= bool(l.whole_norms);
    for (int m : {l.qkv, l.o, l.gate_up, l.down}) panel = std::max(panel, panel_of(m));
    for (int a : {l.lora_qkv, l.lora_o, l.lora_gate_up, l.lora_down}) {
      if (a < 0) continue;
      if (!layers[a]->plan->chunks.empty() && layers[a]->plan->rows != rows) return 1;
      ranks = std::max(ranks, layers[a]->slices.size() * ((layers[a]->max_rank + 3) / 4 * 4 + 2));
    }
  }
  // Rows of what each thread has for itself where it works alone (`mine`), and everybody shares otherwise.
  const size_t each = (std::max(n, size_t(ALONE) * d.threads) + d.threads - 1) / d.threads * d.threads;
  d.residual.need(n * d.hidden);
  if (d.after) d.added.need(n * d.hidden);
  if (whole) d.whole.need(size_t(d.threads) * d.heads * d.head);
  d.x.need(each * d.hidden);
  d.qkv.need(n * (d.heads + 2 * d.kv_heads) * d.head);
  d.y.need(n * d.heads * d.head);
  d.act.need(n * d.inner);
  d.t.need(each * (ranks + 1));
  d.panels.need(each * panel);
  d.request.need(n);
  for (int r = 0; r < requests; r++)
    for (int i = starts[r]; i < starts[r + 1]; i++) d.request.data[i] = r;
  d.phases.begin(PHASES * int(d.layers.size() + 1), d.threads);
  together(d.threads, [&](int thread, int threads) { Team(d, s, thread, threads).run(out); });
  return 0;
}

// out[rows, columns] = x W^T, in float32, of W's first rows, capped (unless `cap` is 0) and multiplied.
void loradock_logits(int number, const bf16* x, int64_t stride, int rows, float* out, int64_t out_stride, int columns,
                     float cap, float by) {
  const Matrix& m = *matrices[number];
  alone(m, x, stride, rows, false, [&](Sharing& all, const Input& in) { head(all, m, in, out, out_stride, columns, cap, by); });
}

// out[rows, n] = x W^T, in bfloat16: for one layer by itself. `prompts`: as of tokens of prompts.
void loradock_product(int number, const bf16* x, int64_t stride, int rows, int prompts, bf16* out) {
  const Matrix& m = *matrices[number];
  alone(m, x, stride, rows, prompts, [&](Sharing& all, const Input& in) {
    all.share(m.blocks, grain(rows, in.tall(m)), [&](int first, int last) {
      multiply(m, in, first, last, [&](int row, int block, const float* sums) {
        bf16* to = out + int64_t(row) * m.n;
        const int next = m.output(block, 16);
        store(to + m.output(block, 0), load(sums));
        if (next < m.n) store(to + next, load(sums + 16));
      });
    });
  });
}

void loradock_linear(int number, const bf16* x, int64_t stride, int rows, bf16* out) {
  loradock_product(number, x, stride, rows, false, out);
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
  Floats most = spread(-INFINITY);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) most = max(most, load(row + i));
  float top = largest_of(most);
  for (; i < n; i++) top = std::max(top, row[i]);
  for (i = 0; i + 16 <= n; i += 16)
    if (const Mask at = same(load(row + i), spread(top)); any(at)) return i + first_of(at);
  for (; i < n; i++)
    if (row[i] == top) return i;
  return 0;
}
}

#else

extern "C" const char* loradock_instructions() { return ""; }

#endif
