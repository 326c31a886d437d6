// The CPU multi-LoRA kernels: y[token] += (x[token] A^T) B^T with the A and B of each token's adapter slot.
//
// The op takes a layer's number and does nothing in a step, or for a slot, without an adapter. No torch headers: the few
// functions of its stable C ABI stand below.

#include <cmath>

#include "kernels.h"

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

namespace loradock {
std::vector<std::unique_ptr<Plan>> plans;
std::vector<std::unique_ptr<Layer>> layers;
}  // namespace loradock

using namespace loradock;

namespace {

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

#ifdef WIDE
// The largest size of each of `count` numbers so far, and a NaN in `wrong` once one is no number.
inline void note(const bf16* v, int count, Floats& most, Floats& wrong) {
  const Floats it = wide(v, count);
  most = max(most, abs(it)), wrong = wrong + (it - it);
}

// What numbers up to `most` are multiplied by to fit into 8 bits.
inline float to_eight(float most) { return most > 1e-30f ? 127 / most : 0; }

// A and B in 8 bits (`Weights`), each rank of either by a scale of its own; not done where a weight is no number: 8 bits
// have no NaN.
bool pack_eight(const Layer& layer, const Slice& slice, const bf16* a, const bf16* b, Weights& w) {
  const int64_t width = in8(slice.in), fours = w.fours();
  std::vector<float> of_a(w.rank), of_b(w.rank + 15);
  Floats wrong = spread(0.f);
  for (int k = 0; k < w.rank; k++) {
    Floats most = spread(0.f);
    for (int i = 0; i < slice.in; i += 16) note(a + size_t(k) * slice.in + i, slice.in - i, most, wrong);
    of_a[k] = largest_of(most);
  }
  for (int o = 0; o < slice.out; o++)
    for (int k = 0; k < w.rank; k += 16) {
      Floats most = load(of_b.data() + k);
      note(b + size_t(o) * layer.max_rank + k, w.rank - k, most, wrong);
      store(of_b.data() + k, most);
    }
  if (sum_of(wrong) != 0) return false;
  w.a8.assign(w.rank * width + 64, 0);
  w.b.assign(fours * ((slice.out + 15) / 16 * 64) + 64, 0);
  w.scale.resize(w.rank);
  auto* to_a = reinterpret_cast<int8_t*>(const_cast<char*>(w.aligned(w.a8)));
  char* to_b = const_cast<char*>(w.packed());
  for (int k = 0; k < w.rank; k++) {
    w.scale[k] = of_a[k] / 127 * (of_b[k] / 127);
    const Floats by = spread(to_eight(of_a[k]));
    for (int i = 0; i < slice.in; i += 16)
      store8(to_a + k * width + i, to_ints(wide(a + size_t(k) * slice.in + i, slice.in - i) * by));
    int8_t* row = to_a + k * width;
    for (int i = 0, in = slice.in; i < in; i++) row[i] = int8_t(row[i] + ZERO8);
  }
  for (float& most : of_b) most = to_eight(most);
  for (int o = 0; o < slice.out; o++)
    for (int k = 0; k < w.rank; k += 16) {
      alignas(16) int8_t q[16];
      store8(q, to_ints(wide(b + size_t(o) * layer.max_rank + k, w.rank - k) * load(of_b.data() + k)));
      for (int8_t& each : q) each = int8_t(each + ZERO8);
      for (int64_t f = k / 4; f < std::min<int64_t>(fours, k / 4 + 4); f++)
        std::memcpy(to_b + ((o / 16 * fours + f) * 16 + o % 16) * 4, q + 4 * f - k, 4);
    }
  return true;
}
#endif

// B as [rank, out]; for the bfloat16 dot products as [out / 16, rank / 2, 16, 2].
template <class T>
void pack(const Layer& layer, Slice& slice, int slot) {
  Weights& w = slice.slots[slot];
  w.rank = true_rank(layer, slice, slot);
  w.a = slice.a + size_t(slot) * layer.max_rank * slice.in * sizeof(T);
  w.a8 = {}, w.scale = {};
  if (w.rank == 0) {
    w.b = {};
    return;
  }
  const T* b = reinterpret_cast<const T*>(slice.b) + size_t(slot) * slice.out * layer.max_rank;
#ifdef WIDE
  if constexpr (std::is_same_v<T, bf16>)
    if (layer.eight && pack_eight(layer, slice, static_cast<const bf16*>(w.a), b, w)) return;
  if (layer.dtype == 1) {
    const int pairs = depth(w.rank) / 2;
    w.b.assign(size_t(pairs) * ((slice.out + 15) / 16) * 64 + 64, 0);
    T* to = reinterpret_cast<T*>(const_cast<char*>(w.packed()));
    for (int o = 0; o < slice.out; o++)
      for (int k = 0; k < w.rank; k++)
        to[((size_t(o / 16) * pairs + k / 2) * 16 + o % 16) * 2 + k % 2] = b[size_t(o) * layer.max_rank + k];
    return;
  }
#endif
  w.b.resize(size_t(w.rank) * slice.out * sizeof(T) + 64);
  T* to = reinterpret_cast<T*>(const_cast<char*>(w.packed()));
  for (int o = 0; o < slice.out; o++)
    for (int k = 0; k < w.rank; k++) to[size_t(k) * slice.out + o] = b[size_t(o) * layer.max_rank + k];
}

// ---- one layer of one step ---------------------------------------------------------------------------------------------

struct Work {
  int chunk, slice, first, count;
};

template <class T, class K>
void linear(Layer& layer, T* y, int64_t y_stride, const T* x, int64_t x_stride) {
  Plan& plan = *layer.plan;
  const int slices = int(layer.slices.size());
  static thread_local std::vector<Work> shrinks, expands;
  shrinks.clear();
  expands.clear();
  int64_t macs = 0;
  for (int c = 0; c < int(plan.chunks.size()); c++)
    for (int s = 0; s < slices; s++) {
      const Slice& slice = layer.slices[s];
      const int rank = slice.slots[plan.chunks[c].slot].rank;
      if (!rank) continue;
      const int block = slice.slots[plan.chunks[c].slot].eight() ? rank : ROW_BLOCK;
      for (int r = 0; r < rank; r += block) shrinks.push_back({c, s, r, std::min(block, rank - r)});
      for (int o = 0; o < slice.out; o += OUT_BLOCK) expands.push_back({c, s, o, std::min(OUT_BLOCK, slice.out - o)});
      macs += int64_t(plan.chunks[c].end - plan.chunks[c].begin) * rank * (slice.in + slice.out);
    }
  if (shrinks.empty() || plan.tokens.empty()) return;
  const int64_t t_row = layer.middle_row();
  const size_t bytes = plan.tokens.size() * t_row;
  if (scratch.size() < bytes) scratch.resize(bytes);
  char* t = scratch.data();
  const Work* shrink = shrinks.data();
  const Work* expand = expands.data();
  const int shrink_count = int(shrinks.size()), expand_count = int(expands.size());

  auto shrink_one = [&](const Work& w) {
    const Chunk& c = plan.chunks[w.chunk];
    const Slice& slice = layer.slices[w.slice];
    K::shrink(slice.slots[c.slot], slice.in, x, x_stride, plan.tokens.data() + c.begin, c.end - c.begin, w.first, w.count,
              t + c.begin * t_row + layer.middle_at(w.slice), t_row);
  };
  auto expand_one = [&](const Work& w) {
    const Chunk& c = plan.chunks[w.chunk];
    const Slice& slice = layer.slices[w.slice];
    K::expand(slice.slots[c.slot], slice.out, t + c.begin * t_row + layer.middle_at(w.slice), t_row, nullptr,
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
      K::expand(w, slice.out, reinterpret_cast<const char*>(t), t_stride * sizeof(T), tokens, y + slice.offset, y_stride,
                tokens, chunk.end - chunk.begin, o, std::min(OUT_BLOCK, slice.out - o));
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
  // B is multiplied in pairs of ranks: of an odd number of them the last needs a zero beside it.
  const int64_t width = x.columns + (looked_up ? x.columns % 2 : 0);
  std::vector<T> straight;
  if (x.step != 1 || width != x.columns) {
    straight.resize(size_t(x.rows) * width);
    for (int64_t i = 0; i < x.rows; i++)
      for (int64_t k = 0; k < x.columns; k++) straight[i * width + k] = from[i * stride + k * x.step];
    from = straight.data(), stride = width;
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
#ifdef WIDE
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
    for (size_t i = 0, chunk = rows > FEW_ROWS ? CHUNK : FEW_CHUNK; i < by_slot[s].size(); i += chunk) {
      const int begin = int(plan.tokens.size());
      const size_t end = std::min(by_slot[s].size(), i + chunk);
      plan.tokens.insert(plan.tokens.end(), by_slot[s].begin() + i, by_slot[s].begin() + end);
      plan.chunks.push_back({s, begin, int(plan.tokens.size())});
    }
  plan.slot.assign(rows, -1);
  plan.place.assign(rows, -1);
  for (const Chunk& c : plan.chunks)
    for (int i = c.begin; i < c.end; i++) plan.slot[plan.tokens[i]] = c.slot, plan.place[plan.tokens[i]] = i;
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

// What is loaded from now on is kept in 8 bits, as far as this build can.
void loradock_keep_eight_bits(int number) {
#ifdef WIDE
  layers[number]->eight = layers[number]->dtype == 1 && !layers[number]->slices[0].a_by_row;
#endif
}

// What the outputs of a slot's rows are multiplied with in a step, less their bias; null: with nothing.
void loradock_gains(int number, int slot, const float* gains, int count) {
  Layer& layer = *layers[number];
  if (layer.gains.size() <= size_t(slot)) layer.gains.resize(slot + 1);
  std::vector<Gains>& lines = layer.gains[slot];
  lines.assign((count + 15) / 32 + 1, Gains{});  // sixteen are read at a time
  for (int i = 0; i < count; i++) put(lines[i / 32].of[i % 32], gains[i] - 1);
  for (Slice& slice : layer.slices) slice.slots[slot].gains = count ? lines[0].of + slice.offset : nullptr;
}

int loradock_rank(int number, int slot) {
  int rank = 0;
  for (const Slice& slice : layers[number]->slices) rank = std::max(rank, slice.slots[slot].rank);
  return rank;
}

// Whether A of what the slot holds is read where vLLM has put it.
int loradock_reads_a(int number, int slot) {
  for (const Slice& slice : layers[number]->slices)
    if (slice.slots[slot].rank && !slice.slots[slot].eight()) return 1;
  return 0;
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
