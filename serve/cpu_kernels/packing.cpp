// Weights as they come, packed for `products.h`: once, when a layer is loaded.

#include "matrix.h"

#ifdef STEP

using namespace loradock;

namespace loradock {

std::vector<std::unique_ptr<Matrix>> matrices;

}

extern "C" {

// Rows of W [n, k], as bfloat16 (kind 0), as int8 with a scale for each row (1), or bfloat16 to be made int8 with a scale
// for each group of inputs (2). `paired`: the first half of the rows is the gate of the second half. -1: it can't be.
int loradock_matrix(const void* from, int n, int k, int kind, int group, const float* scale, const bf16* bias, int paired) {
  if (k % 16 || n % 16 || (kind == GROUP8 && (group % 16 || k % group)) || (paired && n % 32)) return -1;
  std::unique_ptr<Matrix> m(new Matrix{n, k, (n + WIDTH - 1) / WIDTH, kind, kind == GROUP8 ? group : k, {}, {}, {}});
  const int groups = k / m->group;
  m->data.need(m->block_bytes() * m->blocks + 4096);  // what is fetched ahead of the end
  if (kind != BF16) m->scale.need(size_t(m->blocks) * groups * WIDTH);
  if (bias) m->bias.need(size_t(m->blocks) * WIDTH);
#pragma omp parallel for schedule(static)
  for (int b = 0; b < m->blocks; b++) {
    uint8_t* to = m->data.data + b * m->block_bytes();
    for (int j = 0; j < WIDTH; j++) {
      const int o = paired ? (j < 16 ? b * 16 + j : n / 2 + b * 16 + j - 16) : b * WIDTH + j;
      const bool there = o < n;
      if (bias) m->bias.data[b * WIDTH + j] = there ? to_float(bias[o]) : 0;
      if (kind == BF16) {
        const bf16* row = static_cast<const bf16*>(from) + size_t(o) * k;
        bf16* at = reinterpret_cast<bf16*>(to);
        for (int i = 0; i < k; i++) at[(size_t(i / 2) * WIDTH + j) * 2 + i % 2] = there ? row[i] : bf16{0};
        continue;
      }
      auto put8 = [&](int i, int v) { to[(size_t(i / 4) * WIDTH + j) * 4 + i % 4] = uint8_t(v + 128); };
      if (kind == CHANNEL8) {
        const int8_t* row = static_cast<const int8_t*>(from) + size_t(o) * k;
        for (int i = 0; i < k; i++) put8(i, there ? row[i] : 0);
        m->scale.data[b * WIDTH + j] = there ? scale[o] : 0;
        continue;
      }
      const bf16* row = static_cast<const bf16*>(from) + size_t(o) * k;
      for (int g = 0; g < groups; g++) {
        float top = 0;
        for (int i = g * group; there && i < (g + 1) * group; i++) top = std::max(top, std::fabs(to_float(row[i])));
        const float by = top > 0 ? 127.f / top : 0.f;
        for (int i = g * group; i < (g + 1) * group; i++)
          put8(i, there ? int(std::nearbyint(to_float(row[i]) * by)) : 0);
        m->scale.data[(size_t(b) * groups + g) * WIDTH + j] = top / 127.f;
      }
    }
  }
  matrices.push_back(std::move(m));
  return int(matrices.size()) - 1;
}
}

#endif
